"""A host without ranks: the real HTTP server, queue and checks, and a loop thread that plays rank 0."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
import safetensors.numpy
from PIL import Image

from shared.api.jobs import GenerationJob, JobError, OperationJob
from shared.api.operations import AddLora, Operation, RemoveLora
from shared.api.queue import JobQueue
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.status import HostStatus
from shared.api.store import open_store
from shared.backends import BACKENDS
from shared.http.server import Server, body_bound, create_app
from shared.launch.flags import HostConfig
from shared.launch.parser import parse_config


def picture(format: str = "PNG", size: tuple[int, int] = (8, 8), frames: int = 1) -> bytes:
    """A small picture, or an animation where `frames` is above 1."""
    out = io.BytesIO()
    images = [Image.new("RGB", size, (40 * i, 0, 0)) for i in range(frames)]
    extra: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(out, format=format, **extra)
    return out.getvalue()


def config_of(type: str = "sd1", **changes: Any) -> HostConfig:
    return HostConfig(
        **{"backend": "asyncdiff", "type": type, "checkpoint": "/models/x", "port": 0, **changes}
    )


def asyncdiff(argv: Sequence[str]) -> HostConfig:
    """The launch of asyncdiff_host.py with these arguments."""
    return parse_config(BACKENDS["asyncdiff"], BACKENDS, argv)


class FakeHost:
    """Serves on a free port. The prompt says what the loop does with a request:

    "slow": `step_seconds` a step; "fail": 500 at the second step; "user": 422 by the model; "hold": waits at
    its first step until `go_on` is set; "warn…" is a warning. Anything else takes no time.
    Who watches sees a red preview, 4x2.
    """

    step_seconds = 0.05
    latent = np.zeros((1, 4, 1, 1), np.float32)  # of every picture whose request asks for it

    def __init__(self, config: HostConfig | None = None, state: Any = "ready") -> None:
        self.config = config or config_of()
        self.status = HostStatus(self.config.backend, self.config.type, 2, state=state)
        self.queue = JobQueue(self.config.max_queue, self.config.max_queue_per_client)
        self.store = open_store(self.config)
        self.app = create_app(self.config, self.status, self.queue, self.store)
        self.server = Server(
            self.app,
            self.config.host,
            self.config.port,
            self.config.max_queue,
            body_bound(self.app, self.config),
        )
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.seen: list[GenerateRequest] = []
        self.steps_run = 0
        self.go_on = threading.Event()
        self.calls: list[Operation] = []
        self.loras = dict(self.config.lora or {})
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._end.set()
        self.queue.close(JobError(503, "the host is stopping"))
        self.store.settle(5)
        self.go_on.set()
        self.server.close()
        self._thread.join(5)
        if self.store.folder is not None:
            self.store.folder.close()

    def die(self) -> None:
        """End as on SIGKILL: nothing more is written."""
        if self.store.folder is not None:
            self.store.folder.close()
        self.close()

    def _loop(self) -> None:
        while not self._end.is_set():
            loading = self.status.state == "loading"
            job = None if loading else self.queue.take(0.05)
            if job is None:
                time.sleep(0.01 if loading else 0)
                continue
            self.status.state = "busy"
            try:
                match job:
                    case OperationJob():
                        job.succeed(self._operate(job.operation))
                    case GenerationJob():
                        while not job.done:
                            request, _ = job.draw(1)
                            job.add([self._make(job, request)])
            except JobError as error:
                job.finish(error)
            self.queue.release()
            if self.status.state == "busy":
                self.status.state = "ready"

    def _make(self, job: GenerationJob, request: GenerateRequest) -> Reply:
        self.seen.append(request)
        prompt = request.positive or ""
        for step in range(request.steps or 1):
            if prompt == "slow":
                time.sleep(self.step_seconds)
            if prompt == "hold":
                while not (self.go_on.wait(0.01) or job.cancelled):
                    pass
            if prompt == "fail" and step == 1:
                raise JobError(500, "rank 1: out of memory\nTraceback: frame #0")
            if prompt == "user":
                raise JobError(422, "the model refuses this")
            if job.cancelled:
                raise JobError(499, "cancelled")
            if job.seconds_running() > self.config.request_timeout:
                raise JobError(504, f"timed out after {self.config.request_timeout:g} s")
            self.steps_run += 1
            job.at_step(step + 1, request.steps or 1)
            if self.queue.wants_preview():
                self.queue.show_preview(step + 1, 4, 2, b"\xff\0\0" * 8)
        reply = self._reply(request)
        reply.warnings = [prompt] if prompt.startswith("warn") else []
        return reply

    def _operate(self, operation: Operation) -> list[object]:
        """Plays the engine's LoRA methods; the path "fused" is refused, "broken" fails."""
        self.calls.append(operation)
        path = operation.path
        if path == "fused" or (isinstance(operation, RemoveLora) and path not in self.loras):
            raise JobError(409, f"lora: {path} cannot be changed")
        if path == "broken":
            raise JobError(500, "rank 0: broken file")
        if isinstance(operation, AddLora):
            self.loras[path] = operation.scale
        else:
            del self.loras[path]
        return [{"path": p, "scale": s, "layers": 4, "layers_left_out": 0} for p, s in self.loras.items()]

    def _reply(self, request: GenerateRequest) -> Reply:
        format = request.output_format or "png"
        count = (request.frames or 1) if self.config.spec.output == "video" else 1
        if format == "latent":
            files = [b"latent"]
        elif format == "mp4":
            files = [b"\0\0\0\x18ftypmp42"]
        elif format == "gif":
            files = [picture("GIF", frames=2)]
        elif format == "webp" and count > 1:
            files = [picture("WEBP", frames=2)]
        else:
            files = [picture(format.upper())] * count
        return Reply(
            files,
            format,
            request.seed or 0,
            request.width or 0,
            request.height or 0,
            request.steps or 0,
            {"total": 0.2, "denoise": 0.1, "decode": 0.1},
            safetensors.numpy.save({"latent": self.latent}) if request.return_latent else None,
        )

    def generate(self, body: Any = None, **options: Any) -> requests.Response:
        """POST /generate; a dict goes as JSON, bytes as they are."""
        options.setdefault("timeout", 20)
        if isinstance(body, bytes):
            headers = {"Content-Type": "application/json"} | options.pop("headers", {})
            return requests.post(f"{self.url}/generate", data=body, headers=headers, **options)
        return requests.post(f"{self.url}/generate", json={} if body is None else body, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=20, **options)

    def raw(self, data: bytes, timeout: float = 5.0) -> bytes:
        """What the server answers to these bytes, until it closes the connection or falls silent."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=timeout) as connection:
            connection.sendall(data)
            answer = b""
            try:
                while chunk := connection.recv(65536):
                    answer += chunk
            except TimeoutError:
                pass
            return answer


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    """Poll until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)
