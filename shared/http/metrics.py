"""What the host did and how fast, as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric, StateSetMetricFamily

from shared.api.queue import JobQueue
from shared.api.replies import Reply
from shared.api.status import HostStatus

OUTCOMES = {
    200: "ok",
    400: "bad_request",
    401: "unauthorized",
    413: "too_large",
    415: "not_json",
    422: "not_served",
    429: "too_many",
    499: "cancelled",
    503: "unavailable",
    504: "timed_out",
    507: "no_room",
}
STATES = ("loading", "ready", "busy", "broken", "stopping")
_REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1800)
MEDIA_TYPE = CONTENT_TYPE_LATEST
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.6, 1, 2, 5, 15)


class Metrics:
    """Counts of one host, in a registry of its own."""

    def __init__(self, status: HostStatus, queue: JobQueue) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "diffusion_requests", "Requests for a picture, by outcome", ["outcome"], registry=self.registry
        )
        for outcome in (*OUTCOMES.values(), "failed"):
            self.requests.labels(outcome)
        self.latency = Histogram(
            "diffusion_request_seconds",
            "From the request's arrival to its picture, with the wait in the queue",
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.step = Histogram(
            "diffusion_step_seconds",
            "Denoising time of a picture, divided by its steps",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_HostCollector(status, queue))

    def answered(self, status: int) -> None:
        """A request for a picture was answered with this HTTP status."""
        self.requests.labels(OUTCOMES.get(status, "failed" if status >= 500 else "bad_request")).inc()

    def made(self, reply: Reply, seconds: float) -> None:
        """A picture was made, `seconds` after its request came."""
        self.latency.observe(seconds)
        if reply.steps and "denoise" in reply.seconds:
            self.step.observe(reply.seconds["denoise"] / reply.steps)

    def text(self) -> bytes:
        """All of it now, of `MEDIA_TYPE`."""
        return generate_latest(self.registry)


class _HostCollector:
    """What is read at the time of the scrape: state, queue, memory of the ranks."""

    def __init__(self, status: HostStatus, queue: JobQueue) -> None:
        self.status = status
        self.queue = queue

    def collect(self) -> Iterable[Metric]:
        status = self.status
        yield StateSetMetricFamily(
            "diffusion_state", "State of the host", {s: s == status.state for s in STATES}
        )
        host = {"backend": status.backend, "type": status.type, "world_size": str(status.world_size)}
        yield InfoMetricFamily("diffusion_host", "What the host serves", host)
        yield GaugeMetricFamily("diffusion_queue_length", "Requests that wait", len(self.queue))
        memory = GaugeMetricFamily(
            "diffusion_rank_memory_bytes", "Memory of a rank's device", labels=["rank", "device", "kind"]
        )
        for rank in status.ranks:
            for kind in ("used", "total", "peak", "request_peak"):
                if (mib := rank.get(f"memory_{kind}_mib")) is not None:
                    labels = [str(rank.get("rank", "")), str(rank.get("device", "")), kind]
                    memory.add_metric(labels, mib * (1 << 20))
        yield memory
