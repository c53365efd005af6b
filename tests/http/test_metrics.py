"""GET /metrics against Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.httphost import FakeHost, config_of


def scrape(host: FakeHost) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = host.get("/metrics")
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_counts_and_histograms() -> None:
    with FakeHost() as host:
        host.status.ranks = [{"rank": 1, "device": "cuda:1", "memory_used_mib": 3, "memory_total_mib": 10}]
        before = scrape(host)
        assert before[("diffusion_requests_total", (("outcome", "ok"),))] == 0
        host.generate({"steps": 2})
        host.post("/v1/images/generations", json={"prompt": "x", "n": 2, "steps": 1})
        host.generate({"steps": 0})
        host.generate({"frames": 1})
        host.generate({"positive": "fail"})
        host.get("/health")
        host.get("/generate")
        now = scrape(host)
        for outcome, count in {
            "ok": 2,
            "bad_request": 1,
            "not_served": 1,
            "failed": 1,
            "cancelled": 0,
        }.items():
            assert now[("diffusion_requests_total", (("outcome", outcome),))] == count, outcome
        assert now[("diffusion_request_seconds_count", ())] == 3
        assert now[("diffusion_step_seconds_count", ())] == 3
        assert now[("diffusion_step_seconds_sum", ())] == 0.1 / 2 + 2 * 0.1
        assert now[("diffusion_queue_length", ())] == 0
        assert now[("diffusion_state", (("diffusion_state", "ready"),))] == 1
        labels = (("device", "cuda:1"), ("kind", "used"), ("rank", "1"))
        assert now[("diffusion_rank_memory_bytes", labels)] == 3 * 2**20


def test_two_hosts_share_no_counts_and_the_key_is_asked() -> None:
    with FakeHost() as one, FakeHost(config_of(api_key="k")) as other:
        one.generate({})
        assert other.get("/metrics").status_code == 401
        text = other.get("/metrics", headers={"Authorization": "Bearer k"}).text
        assert 'diffusion_requests_total{outcome="ok"} 0.0' in text
