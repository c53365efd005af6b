"""The HTTP side against a loop thread without torch: every row of PROTOCOL's section 2."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from PIL import Image

from shared.api.jobs import JobError
from shared.api.replies import File
from shared.api.warned import HEADER_LENGTH
from shared.http.answers import PIECE, Json
from shared.http.connections import MAX_BODY
from shared.http.openapi import openapi
from shared.http.wsgi import Server
from shared.launch.logs import JsonFormatter
from tests.httphost import FakeHost, config_of, picture, wait_for

ROOT = Path(__file__).parents[2]
PNG = base64.b64encode(picture()).decode()
HEX_ID = re.compile(r"[0-9a-f]{16}")


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost() as host:
        yield host


def check_error(answer: requests.Response, status: int, *words: str) -> dict[str, Any]:
    """The answer is PROTOCOL's error with this status, and its text has the words."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert HEX_ID.fullmatch(answer.headers["X-Request-Id"])
    body = answer.json()
    assert set(body) == {"message", "output", "is_image", "errors"}
    assert body["output"] is None and body["is_image"] is False
    assert "Traceback" not in answer.text and "<html" not in answer.text.lower()
    for word in words:
        assert word in answer.text
    return body


def fields_of(answer: requests.Response) -> set[str]:
    return {e["field"] for e in answer.json()["errors"]}


# The successful answers.


def test_generate_answers_what_was_asked(host: FakeHost) -> None:
    answer = host.generate({"positive": "a", "seed": 7, "steps": 3, "width": 64, "height": 32})
    assert answer.status_code == 200
    body = answer.json()
    assert base64.b64decode(body.pop("output")) == picture()
    assert body == {
        "message": "OK",
        "format": "png",
        "is_image": True,
        "seed": 7,
        "width": 64,
        "height": 32,
        "steps": 3,
        "seconds": {"total": 0.2, "denoise": 0.1, "decode": 0.1},
        "latent": None,
    }
    assert HEX_ID.fullmatch(answer.headers["X-Request-Id"])
    assert "Server" not in answer.headers


def test_warnings_in_the_answer_the_header_and_the_log(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "host")
    text = "warn: left out\r\nX-Evil: 1 caf\xe9 \u4e16 " + "x" * 3000
    answer = host.generate({"positive": text})
    assert answer.json()["warnings"] == [text] and "X-Evil" not in answer.headers
    header = answer.headers["X-Warnings"]
    assert header.startswith("warn: left out X-Evil: 1 caf\xe9 \\u4e16 xxx") and len(header) == HEADER_LENGTH
    raw = host.generate({"positive": "warn"}, headers={"Accept": "image/png"})
    assert raw.headers["X-Warnings"] == "warn" and raw.content.startswith(b"\x89PNG")
    lines = [r.message for r in caplog.records if r.message.startswith("id=")]
    assert [line.count("warnings='warn'") for line in lines] == [0, 1]
    plain = host.generate({"positive": "fine"})
    assert "warnings" not in plain.json() and "X-Warnings" not in plain.headers
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        guest = host.post(path, json={"prompt": "warn"})
        assert guest.json()["warnings"] == ["warn"] and guest.headers["X-Warnings"] == "warn"


def test_defaults_come_from_the_launch(host: FakeHost) -> None:
    body = host.generate({"positive": "", "negative": None, "seed": -1}).json()
    assert (body["width"], body["height"], body["steps"]) == (512, 512, 30)
    assert 0 <= body["seed"] < 2**32
    assert host.seen[-1].positive is None and host.seen[-1].seed == body["seed"]
    assert host.generate({}).json()["seed"] != body["seed"]


def test_frames_as_png_are_a_list() -> None:
    with FakeHost(config_of("ad")) as host:
        body = host.generate({"positive": "a", "frames": 3}).json()
        assert [base64.b64decode(f) for f in body["output"]] == [picture()] * 3
        assert host.generate({"output_format": "mp4"}).json()["is_image"] is False


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("image/png", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/jpg", "image/jpeg"),
        ("image/webp", "image/webp"),
        ("image/*", "image/png"),
        ("*/*", "application/json"),
        ("", "application/json"),
        ("application/json", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("image/webp;q=0.4, image/jpeg;q=0.8", "image/jpeg"),
        ("image/png, application/json", "image/png"),
        ("application/json, image/png", "application/json"),
        ("image/png;q=0.1, */*", "application/json"),
        ("video/mp4, image/jpeg", "image/jpeg"),
        ("*/*, application/json;q=0", "image/png"),
        ("image/png;q=0, image/*", "image/jpeg"),
        ("text/html,application/xhtml+xml,image/avif,image/webp,*/*;q=0.8", "image/webp"),
    ],
)
def test_accept_chooses_the_form(host: FakeHost, accept: str, expected: str) -> None:
    answer = host.generate({"seed": 5}, headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == expected
    if expected != "application/json":
        assert answer.headers["X-Seed"] == "5"
        with Image.open(io.BytesIO(answer.content)) as image:
            assert Image.MIME[image.format or ""] == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("video/mp4", "video/mp4"),
        ("image/gif", "image/gif"),
        ("image/webp", "image/webp"),
        ("image/*", "image/webp"),
    ],
)
def test_accept_of_a_video(accept: str, expected: str) -> None:
    with FakeHost(config_of("ad")) as host:
        answer = host.generate({"frames": 2}, headers={"Accept": accept})
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, expected)


def test_output_format_with_a_wildcard_or_its_own_type(host: FakeHost) -> None:
    jpeg = host.generate({"output_format": "jpeg"}, headers={"Accept": "image/*"})
    assert jpeg.headers["Content-Type"] == "image/jpeg"
    assert host.generate({"output_format": "jpeg"}, headers={"Accept": "*/*"}).json()["format"] == "jpeg"
    assert host.generate({"output_format": "latent"}).json()["format"] == "latent"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_as_the_protocol_shows_it(host: FakeHost, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    command = ["curl", "-sS", "-H", "Accept: image/png", "-o", str(out), "-d", '{"positive": "a red circle"}']
    command += ["-H", "Content-Type: application/json", f"{host.url}/generate"]
    subprocess.run(command, check=True, timeout=20)
    assert out.read_bytes() == picture()


# The error table.


@pytest.mark.parametrize(
    ("body", "fields", "words"),
    [
        (b"", {""}, "not valid JSON"),
        (b"not json", {""}, "not valid JSON"),
        (b"\xff\xfe", {""}, "not valid JSON"),
        (b"[" * 100_000, {""}, "recursion"),
        (b"[]", {""}, "JSON object"),
        (b'{"seed": NaN}', {""}, "not valid JSON"),
        ({"steps": "many"}, {"steps"}, "got 'many'"),
        ({"steps": -1}, {"steps"}, "must be at least 1, got -1"),
        ({"steps": True}, {"steps"}, "got True"),
        ({"width": 10**9}, {"width"}, "at most 8192"),
        ({"width": 70, "height": 1}, {"width", "height"}, "multiple of 8"),
        ({"unknown": 1, "str": 2}, {"unknown", "str"}, "unknown field"),
        ({"ip_image": "%%%"}, {"ip_image"}, "not valid base64"),
        (
            {"control_image": base64.b64encode(b"just text").decode()},
            {"control_image"},
            "PNG, JPEG, WebP, BMP",
        ),
        ({"latent": PNG}, {"latent"}, "safetensors"),
        ({"cfg": 1e6, "clip_skip": 1.5, "x": 0}, {"cfg", "clip_skip", "x"}, "at most 100"),
        ({"steps": 0, "frames": 3}, {"steps", "frames"}, "does not support frames"),
    ],
)
def test_400_names_all_faults(host: FakeHost, body: Any, fields: set[str], words: str) -> None:
    answer = host.generate(body)
    check_error(answer, 400, words)
    assert fields_of(answer) == fields


@pytest.mark.parametrize(
    ("config", "body", "accept", "fields", "words"),
    [
        ({"type": "svd"}, {}, None, {"image"}, "needs an input image"),
        ({}, {"ip_image": PNG}, None, {"ip_image"}, "without --ip_adapter"),
        ({}, {"frames": 3, "fps": 8}, None, {"frames", "fps"}, "does not support frames"),
        ({"backend": "xdit", "type": "hy"}, {"image": PNG}, None, {"image"}, "does not support image"),
        ({}, {"scheduler": "nonsense"}, None, {"scheduler"}, "euler_a"),
        ({}, {"output_format": "mp4"}, None, {"output_format"}, "makes png, jpeg, webp"),
        ({}, {}, "video/mp4", {"Accept"}, "image/png"),
        ({}, {"frames": 3}, "text/html", {"Accept", "frames"}, "got text/html"),
        ({}, {"output_format": "jpeg"}, "image/png", {"output_format"}, "Accept allows only image/png"),
        ({}, {"output_format": "latent"}, "image/png", {"output_format"}, "'latent'"),
        ({"type": "ad"}, {}, "image/png", {"Accept"}, "frames as png come as a list"),
        ({"type": "ad"}, {}, "image/jpeg", {"Accept"}, "video/mp4"),
        ({}, {}, "*/*;q=0", {"Accept"}, "got nothing"),
    ],
)
def test_422_says_why(config: Any, body: Any, accept: str | None, fields: set[str], words: str) -> None:
    with FakeHost(config_of(**config)) as host:
        answer = host.generate(body, headers={"Accept": accept} if accept else None)
        check_error(answer, 422, words)
        assert fields_of(answer) == fields
        assert not host.seen


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Encoding": "gzip"},
    ],
)
def test_415(host: FakeHost, headers: dict[str, str]) -> None:
    check_error(host.generate(b"{}", headers=headers), 415, "must be")


def test_json_with_a_charset_is_json(host: FakeHost) -> None:
    answer = host.generate(b"{}", headers={"Content-Type": "Application/JSON; charset=UTF-8"})
    assert answer.status_code == 200


def test_404_and_405(host: FakeHost) -> None:
    for path in ("/nothing", "/generate/", "//generate//x", "/%3Cscript%3E"):
        check_error(host.get(path), 404)
    answer = host.get("/generate")
    check_error(answer, 405, "POST")
    assert "POST" in answer.headers["Allow"]
    check_error(host.post("/health"), 405, "GET")


def test_500_by_the_model_and_by_the_server(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = check_error(host.generate({"positive": "fail"}), 500)
    assert body["message"] == "rank 1: out of memory"
    check_error(host.generate({"positive": "user"}), 422, "refuses this")
    monkeypatch.setattr(type(host.queue), "cancel_running", lambda _: 1 / 0)
    answer = host.post("/cancel")
    check_error(answer, 500, "X-Request-Id")
    assert "ZeroDivisionError" not in answer.text
    [record] = [r for r in caplog.records if r.exc_info]
    assert answer.headers["X-Request-Id"] in record.getMessage()
    assert host.generate({}).status_code == 200


def test_503_while_loading_and_when_broken() -> None:
    with FakeHost(state="loading") as host:
        assert (host.get("/initialize").status_code, host.get("/initialize").text) == (202, "WAIT")
        answer = host.generate({"positive": "a"})
        check_error(answer, 503, "loading")
        assert int(answer.headers["Retry-After"]) > 0
        assert host.get("/health").json()["state"] == "loading"
        assert host.get("/progress").text == "0"
        host.status.state = "ready"
        assert (host.get("/initialize").status_code, host.get("/initialize").text) == (200, "OK")
        assert host.generate({}).status_code == 200
        host.status.state, host.status.message = "broken", "rank 1 died"
        check_error(host.get("/initialize"), 503, "rank 1 died")
        answer = host.generate({})
        check_error(answer, 503, "broken: rank 1 died")
        assert "Retry-After" in answer.headers
        health = host.get("/health")
        assert (health.status_code, health.json()["state"]) == (503, "broken")


def test_probes_of_a_host_that_loads_leave_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "host")
    with FakeHost(state="loading") as host:
        assert host.get("/ready").status_code == 503
        assert host.generate({}).status_code == 503
        wait_for(lambda: bool(caplog.records))
    lines = [r.message for r in caplog.records if r.message.startswith("id=")]
    assert len(lines) == 1 and "POST /generate" in lines[0], lines


def test_every_get_but_the_models_own_is_answered_while_loading() -> None:
    with FakeHost(state="loading") as host:
        gets = [rule.rule for rule in host.app.url_map.iter_rules() if "GET" in (rule.methods or ())]
        for path in set(gets) - {
            "/lora",
            "/v1/videos",
            "/embeddings",
            "/sdapi/v1/embeddings",
            "/ready",
            "/events",
        }:
            if "<" not in path:
                assert host.get(path).status_code // 100 == 2, path
        answer = host.get("/ready")
        check_error(answer, 503, "loading")
        assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("state, status", [("ready", 200), ("busy", 200), ("stopping", 503), ("broken", 503)])
def test_ready_is_for_probes(host: FakeHost, state: Any, status: int) -> None:
    host.status.state = state
    assert host.get("/ready").status_code == status
    assert ("Retry-After" in host.get("/ready").headers) == (status == 503)


def test_health_tells_the_age_of_the_running_step() -> None:
    limits: dict[str, Any] = {"request_timeout": 0.4, "collective_timeout": 0.4}
    with FakeHost(config_of(**limits)) as host, ThreadPoolExecutor(1) as pool:
        assert host.get("/health").json()["step_age_seconds"] is None
        held = pool.submit(host.generate, {"positive": "hold", "steps": 1})
        wait_for(lambda: host.queue.running is not None)
        assert host.get("/health").status_code == 200
        time.sleep(0.6)
        health = host.get("/health")
        assert health.status_code == 503 and health.json()["step_age_seconds"] >= 0.5
        host.go_on.set()
        held.result()


@pytest.mark.alone
def test_503_when_the_queue_is_full() -> None:
    with FakeHost(config_of(max_queue=2)) as host, ThreadPoolExecutor(3) as pool:
        held = [pool.submit(host.generate, {"positive": "hold", "steps": 1}) for _ in range(3)]
        wait_for(lambda: len(host.queue) == 2 and host.queue.running)
        answer = host.generate({})
        check_error(answer, 503, "at most 2")
        assert int(answer.headers["Retry-After"]) > 0
        for path in ("/health", "/progress", "/initialize"):
            began = time.monotonic()
            assert host.get(path).status_code == 200
            assert time.monotonic() - began < 1
        assert host.get("/health").json()["queue_length"] == 2
        host.go_on.set()
        assert [f.result().status_code for f in held] == [200] * 3
        assert host.generate({}).status_code == 200


def test_504() -> None:
    with FakeHost(config_of(request_timeout=0.1)) as host:
        check_error(host.generate({"positive": "slow", "steps": 50}), 504, "timed out after 0.1 s")
        assert host.generate({}).status_code == 200


def test_waiting_requests_are_answered_when_the_host_ends(host: FakeHost) -> None:
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(host.generate, {"positive": "hold"}) for _ in range(2)]
        wait_for(lambda: len(host.queue) == 1 and host.queue.running)
        host.queue.close(JobError(500, "the host is ending: rank 1 died"))
        answers = sorted((future.result() for future in held), key=lambda answer: answer.status_code)
    for answer, status in zip(answers, (500, 503), strict=True):  # what has not begun has not failed
        check_error(answer, status, "rank 1 died")
    check_error(host.generate({}), 503, "rank 1 died")


# Bodies that are too large, and bytes that are no HTTP.


class Zeros:
    """A body of `size` bytes that is made while it is sent; `len` makes requests send its length."""

    def __init__(self, size: int) -> None:
        self.left = self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, count: int = 1 << 16) -> bytes:
        count = min(count if count > 0 else self.left, self.left)
        self.left -= count
        return bytes(count)


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


@pytest.mark.parametrize("chunked", [False, True])
def test_413_for_100_mb(host: FakeHost, chunked: bool) -> None:
    zeros = Zeros(100_000_000)
    before = resident_mib()
    headers = {"Content-Type": "application/json"}
    data: Any = iter(lambda: zeros.read(), b"") if chunked else zeros
    answer = requests.post(f"{host.url}/generate", data=data, headers=headers, timeout=30)
    check_error(answer, 413, f"{MAX_BODY} bytes")
    assert zeros.left == 0
    assert resident_mib() - before < 40
    assert host.generate({}).status_code == 200


def test_413_at_the_limit(host: FakeHost) -> None:
    check_error(host.generate(b" " * (MAX_BODY + 1)), 413)
    check_error(host.generate(b" " * MAX_BODY), 400, "not valid JSON")


def test_413_at_once_for_a_client_that_asks_first(host: FakeHost) -> None:
    head = b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    answer = host.raw(head + b"Content-Length: 100000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b"application/json" in answer
    assert host.raw(head + b"Content-Length: 10000000000000\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    small = host.raw(head + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
    assert small.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
    assert b" 405 " in host.raw(
        b"GET /generate HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbroken header\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /generate HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (
            b"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 7\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            400,
        ),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"get /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET /%ff%0a HTTP/1.1\r\nConnection: close\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_malformed_http_is_answered_in_json(host: FakeHost, data: bytes, status: int) -> None:
    head, _, body = host.raw(data).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status, head
    assert b"Content-Type: application/json" in head and b"X-Request-Id: " in head
    assert json.loads(body)["output"] is None
    assert host.get("/health").status_code == 200


def test_a_connection_that_says_nothing_disturbs_nobody(host: FakeHost) -> None:
    silent = [socket.create_connection(("127.0.0.1", host.server.port)) for _ in range(60)]
    for connection in silent:
        connection.sendall(b"POST /generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    assert host.generate({}).status_code == 200
    for connection in silent:
        connection.close()


# Eight clients at once, half of them wrong.

FAULTS: list[tuple[Any, int]] = [
    ({"steps": "ten"}, 400),
    ({"unknown_field": 1}, 400),
    ({"steps": -5}, 400),
    ({"width": 1_000_000, "height": 1_000_000}, 400),
    ({"control_image": "!!not base64!!"}, 400),
    ({"control_image": base64.b64encode(b"a text file\n" * 50).decode()}, 400),
    (Zeros, 413),
    (b"this is not JSON", 400),
    ({"frames": 3}, 422),
    ({"positive": "fail", "steps": 3}, 500),
]


def test_eight_clients_forty_requests_half_with_faults(host: FakeHost) -> None:
    def one(index: int) -> None:
        if index % 2 == 0:
            seed = 1000 + index
            body = host.generate({"positive": "slow", "steps": 1 + index % 3, "seed": seed}).json()
            assert (body["message"], body["seed"], body["steps"]) == ("OK", seed, 1 + index % 3)
            return
        fault, status = FAULTS[index // 2 % len(FAULTS)]
        data = fault(100_000_000) if fault is Zeros else fault
        if fault is Zeros:
            headers = {"Content-Type": "application/json"}
            answer = requests.post(f"{host.url}/generate", data=data, headers=headers, timeout=60)
        else:
            answer = host.generate(data)
        check_error(answer, status)

    host.step_seconds = 0.01
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(one, index) for index in range(40)]:
            future.result()
    assert host.generate({}).status_code == 200
    assert host.get("/health").json()["state"] == "ready"


# LoRAs on a running host.


def test_lora_list_add_remove() -> None:
    with FakeHost(config_of(lora={"/a.safetensors": 0.5}, allow_lora_paths=True)) as host:
        assert host.get("/lora").json() == {
            "message": "OK",
            "loras": [{"path": "/a.safetensors", "scale": 0.5}],
        }
        added = host.post("/lora", json={"path": "/b.safetensors"}).json()
        assert [(e["path"], e["scale"], e["layers"]) for e in added["loras"]] == [
            ("/a.safetensors", 0.5, 4),
            ("/b.safetensors", 1.0, 4),
        ]
        assert host.get("/lora").json() == added
        removed = requests.delete(f"{host.url}/lora", json={"path": "/a.safetensors"}, timeout=5).json()
        assert [e["path"] for e in removed["loras"]] == ["/b.safetensors"]
        assert host.get("/lora").json() == removed
        assert host.get("/progress").text == "0"


def test_lora_faults() -> None:
    with FakeHost(config_of(allow_lora_paths=True)) as host:
        lora_faults(host)


def lora_faults(host: FakeHost) -> None:
    answer = host.post("/lora", json={"scale": "x", "weight": 1})
    check_error(answer, 400, "allowed: path, scale")
    assert fields_of(answer) == {"path", "scale", "weight"}
    check_error(host.post("/lora", json={"path": "fused"}), 409, "cannot be changed")
    check_error(requests.delete(f"{host.url}/lora", json={"path": "none"}, timeout=5), 409)
    check_error(host.post("/lora", json={"path": "broken"}), 500, "broken file")
    check_error(host.post("/lora", data="path=x"), 415)
    assert host.get("/lora").json()["loras"] == []
    host.status.state = "loading"
    check_error(host.get("/lora"), 503)
    check_error(host.post("/lora", json={"path": "a"}), 503)


def test_loras_by_name(tmp_path: Path) -> None:
    folder, secret = tmp_path / "loras", tmp_path / "secret.safetensors"
    (folder / "sub").mkdir(parents=True)
    header = json.dumps(
        {
            "__metadata__": {
                "modelspec.title": "Ink",
                "ss_tag_frequency": json.dumps({"1_a": {"ink": 9, "cat": 1}, "2_b": {"ink": 1, "dog": 4}}),
            }
        }
    ).encode()
    (folder / "ink.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for place in (folder / "sub" / "wash.safetensors", folder / "wash.safetensors", secret):
        place.write_bytes(b"none")
    (folder / "out.safetensors").symlink_to(secret)
    (folder / "in.safetensors").symlink_to(folder / "ink.safetensors")
    with FakeHost(config_of(lora_dir=(str(folder),))) as host:
        listed = {lora.pop("name"): lora for lora in host.get("/loras").json()["loras"]}
        assert set(listed) == {"ink", "in", "sub/wash", "wash"}
        told = {"size": 8 + len(header), "title": "Ink", "trigger_words": ["ink", "dog", "cat"]}
        assert listed["ink"] == told and listed["wash"] == {"size": 4}
        for name, path in (
            ("ink", "ink"), ("sub/wash.safetensors", "sub/wash"), ("wash", "wash"),
            (str(folder / "in.safetensors"), "in"),
        ):  # fmt: skip
            assert host.post("/lora", json={"path": name}).status_code == 200
            assert host.calls[-1].path == f"{folder}/{path}.safetensors"
        made = len(host.calls)
        for given in ("out", str(secret), "../secret", f"{folder}/../secret.safetensors", "sub/../ink", "/"):
            check_error(host.post("/lora", json={"path": given}), 422, "--lora_dir", "--allow_lora_paths")
        (folder / "other").mkdir()
        (folder / "other" / "dry.safetensors").write_bytes(b"")
        (folder / "sub" / "dry.safetensors").write_bytes(b"")
        check_error(host.post("/lora", json={"path": "dry"}), 422, "is ambiguous: other/dry, sub/dry")
        assert len(host.calls) == made


def test_loras_as_a1111_lists_them(tmp_path: Path) -> None:
    tags = {"1_a": {"ink": 9}}
    metadata = {"ss_output_name": "Ink v2", "ss_tag_frequency": json.dumps(tags), "ss_network_args": "{bad"}
    header = json.dumps({"__metadata__": metadata | {"ss_epoch": 3}}).encode()
    for folder in ("a/loras", "b/loras"):
        (tmp_path / folder / "my styles").mkdir(parents=True)
    (tmp_path / "a/loras/my styles/ink wash.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header
    )
    for folder in ("a/loras", "b/loras"):
        (tmp_path / folder / "same.safetensors").write_bytes(b"none")
    folders = (str(tmp_path / "a/loras"), str(tmp_path / "b/loras"))
    with FakeHost(config_of(lora_dir=folders)) as host:
        host.status.state = "loading"
        listed = host.get("/sdapi/v1/loras").json()
        assert listed[2] == {
            "name": "my styles/ink wash",
            "alias": "Ink v2",
            "path": "my styles/ink wash.safetensors",
            "metadata": metadata | {"ss_tag_frequency": tags},
        }
        assert [entry["name"] for entry in listed] == ["a/loras/same", "b/loras/same", "my styles/ink wash"]
        assert host.post("/sdapi/v1/refresh-loras").json() is None
        host.status.state = "ready"
        for name, path in (
            ("Ink v2", "a/loras/my styles/ink wash"), ("ink wash", "a/loras/my styles/ink wash"),
            ("a/loras/same", "a/loras/same"), ("b/loras/same", "b/loras/same"),
        ):  # fmt: skip
            assert host.post("/lora", json={"path": name}).status_code == 200
            assert host.calls[-1].path == f"{tmp_path}/{path}.safetensors"
        check_error(
            host.post("/lora", json={"path": "same"}), 422, "is ambiguous: a/loras/same, b/loras/same"
        )
        prompt = {"prompt": "a cat <lora:ink wash:0.8>", "steps": 1}
        assert host.post("/sdapi/v1/txt2img", json=prompt).status_code == 200
        assert host.seen[-1].lora_scales == {"ink wash": 0.8} and host.seen[-1].positive == "a cat "


EMBEDDINGS: list[dict[str, Any]] = [
    {"name": "bad-hands-5", "vectors": 2, "shape": 768, "step": 700},
    {"name": "wide", "vectors": 1, "shape": 1024, "left_out": "it is 1024 wide, ..."},
    {"name": "broken", "left_out": "cannot be read"},
]


def test_embeddings_are_listed_once_they_are_loaded(host: FakeHost) -> None:
    assert host.get("/embeddings").json() == {"message": "OK", "embeddings": []}
    host.status.embeddings = EMBEDDINGS
    assert host.get("/embeddings").json()["embeddings"] == EMBEDDINGS
    unknown = {"sd_checkpoint": None, "sd_checkpoint_name": None}
    assert host.get("/sdapi/v1/embeddings").json() == {
        "loaded": {"bad-hands-5": {"vectors": 2, "shape": 768, "step": 700, **unknown}},
        "skipped": {"wide": {"vectors": 1, "shape": 1024, "step": None, **unknown}},
    }
    host.status.state = "loading"
    for path in ("/embeddings", "/sdapi/v1/embeddings"):
        assert host.get(path).status_code == 503


def test_a_lora_path_needs_its_switch(host: FakeHost) -> None:
    check_error(host.post("/lora", json={"path": "/etc/x.safetensors"}), 422, "--allow_lora_paths")
    assert not host.calls and host.get("/loras").json()["loras"] == []


def test_a_lora_waits_its_turn_and_the_list_does_not() -> None:
    with FakeHost(config_of(allow_lora_paths=True)) as host:
        a_lora_waits(host)


def a_lora_waits(host: FakeHost) -> None:
    with ThreadPoolExecutor(2) as pool:
        picture = pool.submit(host.generate, {"positive": "hold", "steps": 1})
        wait_for(lambda: host.queue.running)
        change = pool.submit(host.post, "/lora", json={"path": "a"})
        wait_for(lambda: len(host.queue) == 1)
        assert host.get("/lora").json()["loras"] == [] and not host.calls
        check_error(host.post("/lora", json={"path": "b"}), 503, "another LoRA")
        host.go_on.set()
        assert picture.result().status_code == 200
        assert change.result().json()["loras"][0]["path"] == "a"


# Progress, cancel, disconnect.


def test_progress_never_falls_and_ends_at_100(host: FakeHost) -> None:
    assert host.get("/progress").text == "0"
    with ThreadPoolExecutor(1) as pool:
        host.step_seconds = 0.02
        answer = pool.submit(host.generate, {"positive": "slow", "steps": 30})
        wait_for(lambda: host.queue.running)
        seen = []
        while not answer.done():
            seen.append(int(host.get("/progress").text))
    assert answer.result().status_code == 200
    assert seen == sorted(seen) and len(set(seen)) > 5 and min(seen) < 50
    assert host.get("/progress").text == "100"


def test_cancel_ends_the_running_request_within_a_step(host: FakeHost) -> None:
    assert host.post("/cancel").json() == {"message": "no request is running", "cancelled": False}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(host.generate, {"positive": "slow", "steps": 200})
        wait_for(lambda: host.steps_run >= 2)
        second = pool.submit(host.generate, {"positive": "next", "steps": 1})
        wait_for(lambda: len(host.queue) == 1)
        steps = host.steps_run
        assert host.post("/cancel").json() == {"message": "OK", "cancelled": True}
        body = check_error(first.result(), 499)
        assert body["message"] == "cancelled"
        assert host.steps_run - steps <= 2
        assert second.result().status_code == 200
    assert host.post("/cancel").json()["cancelled"] is False


def leave_after_sending(host: FakeHost, body: bytes, reset: bool = False) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", host.server.port))
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    head = f"POST /generate HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.alone
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_cancels_its_request(host: FakeHost, reset: bool) -> None:
    connection = leave_after_sending(host, b'{"positive": "slow", "steps": 500}', reset)
    wait_for(lambda: host.steps_run >= 2)
    job = host.queue.running
    connection.close()
    began = time.monotonic()
    wait_for(lambda: host.queue.running is None)
    assert time.monotonic() - began < 2  # not after 500 steps
    assert job is not None and job.error is not None and job.error.status == 499


def test_a_waiting_client_that_leaves_never_runs(host: FakeHost) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(host.generate, {"positive": "hold", "steps": 1})
        wait_for(lambda: host.queue.running)
        connection = leave_after_sending(host, b'{"positive": "never"}')
        wait_for(lambda: len(host.queue) == 1)
        connection.close()
        wait_for(lambda: len(host.queue) == 0)
        host.go_on.set()
        assert first.result().status_code == 200
    assert [r.positive for r in host.seen] == ["hold"]


# Token, log, the document.


def test_api_key_is_asked_of_every_route_but_health() -> None:
    with FakeHost(config_of(api_key="s3cret-ü")) as host:
        assert host.get("/health").status_code == 200
        for path in ("/initialize", "/progress", "/openapi.json", "/nothing"):
            answer = host.get(path)
            check_error(answer, 401)
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        wrong = [
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Bearer"},
        ]
        for headers in wrong:
            check_error(host.generate({}, headers=headers), 401)
        check_error(host.post("/cancel"), 401)
        right = {"Authorization": "bearer s3cret-ü".encode()}
        assert host.generate({}, headers=right).status_code == 200
        assert host.get("/openapi.json", headers=right).json()["security"] == [{"api_key": []}]


def test_one_log_line_a_request(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="host"):
        good = host.generate({"seed": 3, "steps": 4, "width": 64, "height": 64})
        bad = host.generate({"steps": 0})
        host.get("/health")
        wait_for(lambda: len(caplog.records) >= 2)
    [first, second] = [r for r in caplog.records if r.name == "host"]
    fields = vars(first)["fields"]
    assert fields.pop("seconds") < 5
    assert fields == {
        "id": good.headers["X-Request-Id"],
        "status": 200,
        "route": "POST /generate",
        "size": "64x64",
        "steps": 4,
        "seed": 3,
    }
    entry = json.loads(JsonFormatter().format(first))
    assert entry["id"] == good.headers["X-Request-Id"] and entry["level"] == "info" and entry["seed"] == 3
    assert bad.headers["X-Request-Id"] in second.getMessage() and "status=400" in second.getMessage()


def test_health_tells_the_host(host: FakeHost) -> None:
    body = host.get("/health").json()
    assert (body["state"], body["backend"], body["type"], body["world_size"]) == (
        "ready",
        "asyncdiff",
        "sd1",
        2,
    )
    assert {"plan", "queue_length", "ranks", "versions", "uptime_seconds"} <= set(body)


@pytest.mark.parametrize("type", ["sd1", "svd", "ad", "sdup", "sd3"])
def test_openapi_is_valid_and_true(type: str) -> None:
    import jsonschema
    from openapi_spec_validator import validate

    with FakeHost(config_of(type, api_key="k", allow_lora_paths=True)) as host:
        key = {"Authorization": "Bearer k"}
        document = host.get("/openapi.json", headers=key).json()
        validate(document)
        assert document["openapi"].startswith("3.1")

        def check(value: Any, name: str) -> None:
            schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
            jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)

        [example] = document["components"]["schemas"]["GenerateRequest"]["examples"]
        check(example, "GenerateRequest")
        answer = host.generate(example, headers=key)
        assert answer.status_code == 200, answer.text
        check(answer.json(), "GenerateAnswer")
        check(host.generate({"steps": 0, "x": 1}, headers=key).json(), "ErrorAnswer")
        check(host.get("/health").json(), "Health")
        check({"path": "a", "scale": 1}, "LoraChange")
        check(host.post("/lora", json={"path": "a"}, headers=key).json(), "LoraAnswer")
        check(host.get("/loras", headers=key).json(), "LoraNames")
        host.status.embeddings = EMBEDDINGS
        check(host.get("/embeddings", headers=key).json(), "EmbeddingNames")
        check(host.post("/cancel", headers=key).json(), "Cancelled")
        with pytest.raises(jsonschema.ValidationError):
            check({"steps": 0}, "GenerateRequest")
        with pytest.raises(jsonschema.ValidationError):
            check({"nonsense": 1}, "GenerateRequest")


@pytest.mark.parametrize("legacy", [False, True])
def test_openapi_has_every_route_and_no_other(legacy: bool) -> None:
    with FakeHost(config_of(legacy_pickle=legacy)) as host:
        told = {(path, method.upper()) for path, of in told_paths(host).items() for method in of}
        served = {
            (rule.rule.replace("<path:", "<").replace("<", "{").replace(">", "}"), method)
            for rule in host.app.url_map.iter_rules()
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        }
        assert told == served and ("/lora", "DELETE") in told and (("/close", "GET") in told) == legacy


def told_paths(host: FakeHost) -> dict[str, Any]:
    return dict(host.get("/openapi.json").json()["paths"])


def test_a_route_that_declares_nothing_is_noticed(host: FakeHost) -> None:
    assert openapi(host.app, host.config)["paths"] == told_paths(host)
    host.app._got_first_request = False
    host.app.add_url_rule("/undeclared", "undeclared", lambda: "")
    with pytest.raises(KeyError, match="undeclared"):
        openapi(host.app, host.config)


# The server itself.


def test_a_port_in_use_or_a_foreign_address_is_an_oserror(host: FakeHost) -> None:
    with pytest.raises(OSError, match="in use"):
        Server(host.app, "127.0.0.1", host.server.port, 1)
    with pytest.raises(OSError):
        Server(host.app, "192.0.2.1", 0, 1)
    with pytest.raises(OSError):
        Server(host.app, "no.such.host.invalid", 0, 1)


def test_localhost_and_close(host: FakeHost) -> None:
    before = threading.active_count()
    server = Server(host.app, "localhost", 0, 1)
    url = f"http://localhost:{server.port}/health"
    assert requests.get(url, timeout=5).status_code == 200
    server.close()
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)
    assert threading.active_count() <= before


def test_any_text_becomes_json() -> None:
    encoder = Json(Flask(__name__))
    for value in ({"a": "é", "b": [1, None, True]}, "a path that is not UTF-8: \udcff"):
        assert json.loads(encoder.dumps(value)) == value
        assert json.loads(encoder.response(value).data) == value


@pytest.mark.parametrize("text", ["é", "a path that is not UTF-8: \udcff"])
def test_files_in_json_become_base64(text: str) -> None:
    encoder = Json(Flask(__name__))
    files = [b"", b"a", os.urandom(PIECE), os.urandom(2 * PIECE + 1)]
    response = encoder.response({"files": [File(data) for data in files], "text": text, "number": 1})
    assert response.is_streamed and response.content_length == len(response.data)
    made = json.loads(response.data)
    assert [base64.b64decode(file, validate=True) for file in made.pop("files")] == files
    assert made == {"text": text, "number": 1}
    assert encoder.loads(encoder.dumps(File(b"one"))) == base64.b64encode(b"one").decode()
    with pytest.raises(TypeError):
        encoder.response({"file": object()})


def test_keep_alive_serves_many_requests_on_one_connection(host: FakeHost) -> None:
    with requests.Session() as session:
        for seed in range(5):
            answer = session.post(f"{host.url}/generate", json={"seed": seed}, timeout=5)
            assert answer.json()["seed"] == seed
            assert "close" not in answer.headers.get("Connection", "")


def test_no_torch_is_imported() -> None:
    code = "import sys, shared.http.server; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_several_pictures_come_in_one_answer() -> None:
    with FakeHost(config_of(max_queue=0)) as host:
        body = {"positive": "a", "seed": 7, "pictures": 3, "return_latent": True}
        answer = host.generate(body).json()
        assert [r.seed for r in host.seen] == answer["seeds"] == [7, 8, 9]
        assert answer["seed"] == 7 and len(answer["output"]) == len(answer["latent"]) == 3
        assert [base64.b64decode(file) for file in answer["output"]] == [picture()] * 3
        assert answer["seconds"]["total"] == pytest.approx(0.6)
        alone = host.generate({"positive": "a", "pictures": 1}).json()
        assert isinstance(alone["output"], str) and "seeds" not in alone
        refused = host.generate({"positive": "a", "pictures": 2}, headers={"Accept": "image/png"})
        assert refused.status_code == 422
        assert refused.json()["errors"] == [
            {"field": "pictures", "problem": "must be 1 because Accept allows only image/png; got 2"}
        ]


def test_no_picture_of_a_request_loses_its_place_to_another_request() -> None:
    with FakeHost(config_of(max_queue=0)) as host:
        host.step_seconds = 0.05
        answers: list[Any] = []
        body = {"prompt": "slow", "n": 5, "steps": 2}
        url = "/v1/images/generations"
        several = threading.Thread(target=lambda: answers.append(host.post(url, json=body)))
        several.start()
        wait_for(lambda: host.queue.running is not None)
        others = set()
        while several.is_alive():
            others.add(host.generate({"positive": "a", "steps": 1}).status_code)
        assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 5
        assert 503 in others
