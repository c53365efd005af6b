"""Clients take turns over HTTP, also behind proxies; one client alone is told 429."""

from __future__ import annotations

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import openai
import pytest
import requests
from requests.adapters import HTTPAdapter

from shared.http.proxies import Proxies
from shared.launch.errors import UsageError
from tests.httphost import FakeHost, asyncdiff, config_of, wait_for

PROXY = "127.0.0.1/32"


class From(HTTPAdapter):
    """Connections from one of this machine's loopback addresses."""

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, source_address=(self.address, 0), **options)


def ask(host: FakeHost, address: str, id: str, positive: str = "hold", **headers: str) -> requests.Response:
    """POST /generate from this address."""
    with requests.Session() as session:
        session.mount("http://", From(address))
        return session.post(
            f"{host.url}/generate",
            json={"positive": positive, "negative": id, "steps": 1},
            headers={"X-Request-Id": id, **headers},
            timeout=20,
        )


def test_a_client_that_floods_the_host_lets_another_through() -> None:
    with FakeHost() as host, ThreadPoolExecutor(12) as pool:
        flood: list[Future[requests.Response]] = []
        for number in range(8):
            flood.append(pool.submit(ask, host, "127.0.0.1", f"flood-{number}-"))
            wait_for(lambda: len(host.queue) + (host.queue.running is not None) == len(flood))
        other = [pool.submit(ask, host, "127.0.0.2", "other-one")]
        wait_for(lambda: len(host.queue) == 8)
        jobs = {job["id"]: job for job in host.get("/jobs").json()["jobs"]}
        assert jobs["flood-1-"]["place"] == 1, "the first in the queue was there before"
        assert jobs["other-one"]["place"] == 2 and jobs["flood-7-"]["place"] == 8
        assert [job.id for job in host.queue.waiting()][:3] == ["flood-1-", "other-one", "flood-2-"]
        host.go_on.set()
        assert {future.result().status_code for future in flood + other} == {200}
        assert [request.negative for request in host.seen][:4] == [
            "flood-0-",
            "flood-1-",
            "other-one",
            "flood-2-",
        ]


def test_a_client_has_its_own_share_of_the_queue() -> None:
    with (
        FakeHost(config_of(max_queue_per_client=2, allow_lora_paths=True)) as host,
        ThreadPoolExecutor(4) as pool,
    ):
        held = []
        for number in range(3):
            held.append(pool.submit(ask, host, "127.0.0.1", f"request-{number}"))
            wait_for(lambda: len(host.queue) + (host.queue.running is not None) == len(held))
        refused = ask(host, "127.0.0.1", "request-3")
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        assert refused.json()["message"] == (
            "2 of your requests are waiting; at most 2 of one client may wait (--max_queue_per_client)"
        )
        sdk = openai.OpenAI(base_url=f"{host.url}/v1", api_key="none", max_retries=0, timeout=20)
        with pytest.raises(openai.RateLimitError, match="at most 2 of one client"):
            sdk.images.generate(prompt="hold")
        assert host.post("/lora", json={"path": "a", "scale": 1.0}).status_code == 429
        assert host.get("/jobs/request-3").status_code == 404, "what was refused is no job"
        held.append(pool.submit(ask, host, "127.0.0.3", "request-4"))
        wait_for(lambda: len(host.queue) == 3)
        again = pool.submit(ask, host, "127.0.0.1", "request-1")  # an accepted one, asked for once more
        host.go_on.set()
        assert [future.result().status_code for future in [*held, again]] == [200] * 5
        text = host.get("/metrics").text
        assert 'diffusion_requests_total{outcome="too_many"} 2.0' in text


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ((), "192.0.2.1", "", "192.0.2.1"),
        ((), "127.0.0.1", "203.0.113.9", "127.0.0.1"),  # nobody is believed unless a flag says so
        ((PROXY,), "127.0.0.1", "", "127.0.0.1"),
        ((PROXY,), "127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ((PROXY,), "192.0.2.1", "203.0.113.9", "192.0.2.1"),  # no proxy: its header is its own invention
        ((PROXY,), "127.0.0.1", "10.9.9.9, 203.0.113.9", "203.0.113.9"),  # the client forged the first
        ((PROXY, "10.0.0.0/8"), "127.0.0.1", "6.6.6.6, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        ((PROXY, "10.0.0.0/8"), "127.0.0.1", "10.1.2.3", "10.1.2.3"),  # a client in the proxies' network
        ((PROXY,), "127.0.0.1", "203.0.113.9:51000", "203.0.113.9"),
        ((PROXY,), "127.0.0.1", "[2001:4860::8:9]:51000", "2001:4860::/64"),
        ((PROXY,), "127.0.0.1", "6.6.6.6, unknown", "127.0.0.1"),
        ((PROXY,), "127.0.0.1", "6.6.6.6,", "127.0.0.1"),
        ((PROXY,), "::ffff:127.0.0.1", "::ffff:203.0.113.9", "203.0.113.9"),
        (("::1/128",), "::1", "2001:4860:1:2:3::", "2001:4860:1:2::/64"),
        ((), "fe80::1%eth0", "", "fe80::1%eth0"),
        ((), "", "203.0.113.9", ""),
    ],
)
def test_which_address_counts(trusted: tuple[str, ...], peer: str, forwarded: str, client: str) -> None:
    assert Proxies(trusted).client(peer, forwarded) == client


@pytest.mark.parametrize(
    ("trusted", "clients"), [((PROXY,), ["203.0.113.1", "203.0.113.2"]), ((), 2 * ["127.0.0.1"])]
)
def test_clients_behind_a_trusted_proxy_take_turns(trusted: tuple[str, ...], clients: list[str]) -> None:
    with FakeHost(config_of(trusted_proxies=trusted)) as host, ThreadPoolExecutor(3) as pool:
        held = [pool.submit(ask, host, "127.0.0.1", "the-running")]
        wait_for(lambda: host.queue.running)
        for number in (1, 2):
            forged = {"X-Forwarded-For": f"6.6.6.6, 203.0.113.{number}"}
            held.append(pool.submit(ask, host, "127.0.0.1", f"request-{number}", **forged))
            wait_for(lambda: len(host.queue) == len(held) - 1)
        assert [job.client for job in host.queue.waiting()] == clients
        host.go_on.set()
        assert {future.result().status_code for future in held} == {200}


def test_two_headers_of_two_proxies_are_one_list() -> None:
    with FakeHost(config_of(trusted_proxies=(PROXY, "10.0.0.1/32"))) as host:
        body = b'{"positive": "x"}'
        head = b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nX-Request-Id: two-headers\r\n"
        head += b"X-Forwarded-For: 6.6.6.6, 203.0.113.7\r\nX-Forwarded-For: 10.0.0.1\r\n"
        with socket.create_connection(("127.0.0.1", host.server.port), timeout=5) as connection:
            connection.sendall(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        assert host.queue.last is not None and host.queue.last.client == "203.0.113.7"


def test_networks_of_the_flag_are_checked(tmp_path: Any) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    launch = ["--type=sd1", f"--checkpoint={tmp_path}"]
    assert asyncdiff([*launch, "--trusted_proxies=::1"]).trusted_proxies == ("::1/128",)
    for wrong in ("proxy.example", "10.0.0.1/8", "10.0.0.0/33", "*", "127.0.0.1,,::1", ""):
        with pytest.raises(UsageError, match="--trusted_proxies: must be addresses or networks such as"):
            asyncdiff([*launch, f"--trusted_proxies={wrong}"])
