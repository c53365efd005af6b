"""The clients' link to a host while it is started again in the middle of a request. Imports no torch."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.httphost import FakeHost, config_of, wait_for

pytestmark = pytest.mark.alone

LINK = Path(__file__).resolve().parents[2] / "clients" / "comfyui" / "host.py"
HOLD = {"positive": "hold", "steps": 3}


@pytest.fixture
def link() -> Any:
    spec = importlib.util.spec_from_file_location("link_to_a_host", LINK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.RETRY_SECONDS, module.WAIT_SECONDS = 0.1, 5.0  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("end", [FakeHost.close, FakeHost.die])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_restart_in_the_middle_is_waited_out(
    link: Any, tmp_path: Path, end: Callable[[FakeHost], None], keeps: bool
) -> None:
    config = config_of(state_dir=str(tmp_path / "state")) if keeps else config_of()
    told: list[str] = []
    host = FakeHost(config)
    with ThreadPoolExecutor(1) as pool:
        client = link.Host(host.url)
        answer = pool.submit(client.generate, HOLD, id="mine-0001", on_away=told.append)
        wait_for(lambda: host.seen)
        end(host)
        wait_for(lambda: told)  # one that is back before it is asked again is not missed
        with FakeHost(replace(host.config, port=host.server.port)) as again:
            wait_for(lambda: again.seen, 20)
            again.go_on.set()
            made = answer.result(20)
            [job] = again.get("/jobs").json()["jobs"]
            assert (job["id"], job["state"]) == ("mine-0001", "done")
        assert made["seed"] == again.seen[0].seed and len(again.seen) == 1
        assert not keeps or made["seed"] == host.seen[0].seed, "another picture than the one that was begun"
        assert len(told) == 1 and told[0].endswith("; it is waited for")


def test_a_host_that_loads_again_is_waited_for(link: Any) -> None:
    with FakeHost(state="loading") as host, ThreadPoolExecutor(1) as pool:
        told: list[str] = []
        answer = pool.submit(link.Host(host.url).generate, {"positive": "x"}, on_away=told.append)
        wait_for(lambda: told)
        host.status.ready()
        assert answer.result(10)["format"] == "png" and told == ["the host is loading; it is waited for"]


def test_a_host_that_does_not_come_back_is_told(link: Any) -> None:
    link.SILENT_SECONDS = 0.5
    host = FakeHost()
    client = link.Host(host.url)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.generate, HOLD)
        wait_for(lambda: host.seen)
        host.close()
        with pytest.raises(
            link.HostError, match=r"^no answer from the host at .*; it was waited for 0\.5 s$"
        ):
            answer.result(20)
    link.SILENT_SECONDS = 60
    client.end_reason = lambda: "error: --type: unknown"  # a host of this side that ended is not waited for
    began = time.monotonic()
    with pytest.raises(link.HostError, match="error: --type: unknown"):
        client.generate(HOLD)
    assert time.monotonic() - began < 5


def test_a_request_that_ends_its_hosts_is_not_posted_for_ever(link: Any) -> None:
    host = FakeHost()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(link.Host(host.url).generate, HOLD)
        for _ in range(2):
            wait_for(lambda: host.seen, 20)  # noqa: B023
            host.die()
            host = FakeHost(replace(host.config, port=host.server.port))
        with pytest.raises(link.HostError, match="the host ended 2 times while it had this request"):
            answer.result(20)
        assert not host.seen
        host.close()


def test_cancel_is_at_once_also_while_the_host_is_away(link: Any, tmp_path: Path) -> None:
    host = FakeHost(config_of(state_dir=str(tmp_path / "state")))
    away = threading.Event()
    ended: list[float] = []

    def check() -> None:
        if away.is_set():
            ended.append(time.monotonic())
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(link.Host(host.url).generate, HOLD, check=check, interval=0.05)
        wait_for(lambda: host.seen)
        host.die()
        away.set()
        with pytest.raises(KeyboardInterrupt):
            answer.result(20)
        assert time.monotonic() - ended[0] < 4
        with FakeHost(replace(host.config, port=host.server.port)) as again:
            wait_for(lambda: [job["state"] for job in again.get("/jobs").json()["jobs"]] == ["cancelled"], 20)


def test_errors_are_the_hosts_with_their_status(link: Any) -> None:
    with FakeHost() as host:
        client = link.Host(host.url)
        for body, status, told in (
            ({"steps": 0}, 400, "steps: must be at least 1, got 0"),
            ({"positive": "user"}, 422, "the model refuses this"),
            ({"positive": "fail", "steps": 3}, 500, "rank 1: out of memory"),
        ):
            with pytest.raises(link.HostError, match=told) as caught:
                client.generate(body)
            assert caught.value.status == status


def test_a_host_without_jobs_is_told(link: Any) -> None:
    class Old(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"message": "OK"}')

    server = HTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(link.HostError, match="is older than this client: it has no /jobs"):
        link.Host(f"http://127.0.0.1:{server.server_port}").generate({})
    server.shutdown()
