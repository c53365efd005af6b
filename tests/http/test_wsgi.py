"""Clients that are slow, idle, many or not admitted: the host goes on for the others."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator

import pytest
import requests

from shared.http import connections, wsgi
from shared.http.connections import NO_ROOM
from tests.httphost import FakeHost, config_of, wait_for

pytestmark = pytest.mark.alone


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost() as host:
        yield host


def connect(host: FakeHost, text: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", host.server.port), timeout=5)
    connection.sendall(text)
    return connection


def answer(connection: socket.socket) -> bytes:
    """All that the host says until it closes."""
    got = b""
    while piece := connection.recv(65536):
        got += piece
    return got


def healthy(host: FakeHost) -> bool:
    return requests.get(f"{host.url}/health", timeout=5).status_code == 200


def post(length: int, path: str = "/generate", headers: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"{headers}Content-Length: {length}\r\n\r\n"
    ).encode()


def temporary_files() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and "(deleted)" in os.readlink(link) for link in links)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/generate", b"bearer token"),
        ("/v1/images/generations", b"invalid_api_key"),
        ("/sdapi/v1/options", b"detail"),
    ],
)
def test_without_the_token_a_body_is_not_awaited(path: str, said: bytes) -> None:
    with FakeHost(config_of(api_key="secret")) as host:
        before = temporary_files()
        connections = [connect(host, post(60 << 20, path) + b"A" * (2 << 20)) for _ in range(4)]
        for connection in connections:
            got = answer(connection)
            assert got.startswith(b"HTTP/1.1 401 ") and said in got
        assert temporary_files() == before
        assert healthy(host)
        wrong = connect(host, post(10, path, "Authorization: Bearer secre\r\n"))
        assert answer(wrong).startswith(b"HTTP/1.1 401 ")


def test_a_refused_client_that_goes_on_sending_reads_its_answer() -> None:
    with FakeHost(config_of(api_key="secret")) as host:
        with connect(host, post(32 << 20)) as connection:
            for _ in range(32):
                connection.sendall(b"A" * (1 << 20))
            assert answer(connection).startswith(b"HTTP/1.1 401 ")
        with connect(host, b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n") as connection:
            assert answer(connection).startswith(b"HTTP/1.1 401 ")


def test_a_refused_client_may_send_longer_than_the_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.3)
    with FakeHost() as host, connect(host, post(200 << 20)) as connection:
        for _ in range(10):
            connection.sendall(b"A" * (1 << 20))
            time.sleep(0.1)
        connection.shutdown(socket.SHUT_WR)
        assert answer(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("path", "said"), [("/v1/images/edits", b'"error":{'), ("/sdapi/v1/txt2img", b"detail")]
)
def test_a_broken_body_is_answered_in_its_routes_form(host: FakeHost, path: str, said: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    got = answer(connect(host, head.encode() + b"zz\r\n"))
    assert got.startswith(b"HTTP/1.1 400 ") and said in got


def test_with_the_token_all_is_read() -> None:
    with FakeHost(config_of(api_key="secret")) as host:
        body = {"positive": "A" * (1 << 10), "steps": 1}
        made = requests.post(
            f"{host.url}/generate", json=body, headers={"Authorization": "Bearer secret"}, timeout=10
        )
        assert made.status_code == 200
        read = requests.post(f"{host.url}/sdapi/v1/options", json={}, auth=("any", "secret"), timeout=10)
        assert read.status_code == 200


def test_many_half_requests_shut_nobody_out(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PER_ADDRESS", 40)
    busy = connect(host, post(33) + b'{"positive": "hold", "steps": 2}\n')
    half = [connect(host, b"GET /health HTTP/1.1\r\nHo") for _ in range(120)]
    assert healthy(host)
    deadline = time.monotonic() + 5
    while len(host.server._listeners[0].active_channels) > 45 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(host.server._listeners[0].active_channels) <= 45
    host.go_on.set()
    assert busy.recv(100).startswith(b"HTTP/1.1 200 "), "a request that runs was closed as idle"
    for connection in half:
        connection.close()


def test_few_open_files_shut_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (wsgi.OTHER_FILES + 20, 1024))
    with FakeHost() as host:
        half = [connect(host, b"GET /health HTTP/1.1\r\nHo") for _ in range(60)]
        assert healthy(host)
        wait_for(lambda: len(host.server._listeners[0].active_channels) <= 25)
        for connection in half:
            connection.close()


def test_slow_headers_and_bodies_end(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.5)
    headers = connect(host, b"GET /health HTTP/1.1\r\n")
    body = connect(host, post(1000) + b"{")
    assert b" 408 " in answer(headers).split(b"\r\n")[0]
    got = answer(body)
    assert got.startswith(b"HTTP/1.1 408 ") and b"slower than" in got
    assert healthy(host)


def test_an_answer_that_nobody_takes_is_dropped(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(connections, "SLOWEST", 1 << 30)
    host.app.add_url_rule("/large", "large", lambda: b"A" * (32 << 20))
    before = temporary_files()
    connection = connect(host)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(0.3)
    assert temporary_files() == before
    deadline = time.monotonic() + 10
    while host.server._listeners[0].active_channels and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not host.server._listeners[0].active_channels
    assert healthy(host)


def test_a_full_temporary_folder_is_507(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("waitress.buffers.TempfileBasedBuffer.__init__", full)
    large = requests.post(f"{host.url}/generate", json={"positive": "A" * (5 << 20)}, timeout=10)
    assert large.status_code == 507 and large.json()["message"] == NO_ROOM
    chunks = requests.post(f"{host.url}/generate", data=iter([b"A" * (1 << 20)] * 5), timeout=10)
    assert chunks.status_code == 507
    assert requests.post(f"{host.url}/generate", json={"positive": "x"}, timeout=10).status_code == 200
    monkeypatch.setattr("werkzeug.formparser.SpooledTemporaryFile", full)
    form = requests.post(
        f"{host.url}/v1/images/edits",
        data={"prompt": "x"},
        files={"image": ("a.png", b"A" * 100)},
        timeout=10,
    )
    assert form.status_code == 507
