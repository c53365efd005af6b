"""Who and what comes in from outside: bounded faults and bodies, browsers, slow clients, a full folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.httphost import FakeHost

MANY = b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}"
LONG = "A" * (4 << 20)


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost() as host:
        yield host


# What is wrong is told in few words, whatever its size.


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_ninety_thousand_faults_are_twenty_and_a_number(host: FakeHost, path: str) -> None:
    began = time.monotonic()
    answer = host.post(path, data=MANY, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and len(answer.content) < 50_000
    assert len(answer.json()["errors"]) == 20
    assert "and 89980 more faults" in answer.text
    assert time.monotonic() - began < 5


def test_more_values_than_a_request_can_need(host: FakeHost) -> None:
    for body in (b'{"positive":[' + b"{}," * 300_000 + b"{}]}", b"[" + b"[]," * 200_000 + b"[]]"):
        answer = host.generate(body)
        assert answer.status_code == 400 and "more than 200000 values" in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {LONG: 1}),
        ("/generate", {"scheduler": LONG}),
        ("/generate", {"scheduler": {"scheduler": "ddim", LONG: LONG}, "steps": LONG}),
        ("/generate", {"steps": [[LONG] * 3] * 3, "lora_scales": {LONG: LONG}}),
        ("/generate", {"output_format": LONG, "cfg": 10**4000}),
        ("/v1/images/generations", {"n": LONG, "size": LONG, "background": LONG, LONG: LONG}),
        ("/v1/images/generations", {"n": [LONG], "stream": {LONG: LONG}}),
        ("/sdapi/v1/txt2img", {"sampler_name": LONG}),
        ("/sdapi/v1/txt2img", {"scheduler": LONG, "n_iter": LONG, "batch_size": [LONG]}),
        ("/sdapi/v1/txt2img", {"override_settings": {"sd_model_checkpoint": LONG}}),
        ("/sdapi/v1/img2img", {"init_images": [LONG, LONG]}),
    ],
)
def test_long_values_are_shortened(
    host: FakeHost, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    logging.getLogger("host").propagate = True
    answer = host.post(path, json=body)
    assert answer.status_code in (400, 422), answer.status_code
    assert len(answer.content) < 20_000
    assert sum(len(record.getMessage()) for record in caplog.records) < 5_000


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/" + "a" * 50_000, {}),
        ("GET", "/v1/models/" + "a" * 50_000, {}),
        ("POST", "/health/" + "%0a" * 15_000, {}),
        ("POST", "/cancel?id=" + "a" * 50_000, {}),
        ("POST", "/generate", {"Content-Type": "a/" + "b" * 50_000}),
        ("POST", "/generate", {"Content-Type": "application/json", "Content-Encoding": "c" * 50_000}),
        ("POST", "/generate", {"Content-Type": "application/json", "Accept": "d/" + "e" * 50_000}),
        ("POST", "/v1/images/edits", {"Content-Type": "a/" + "b" * 50_000}),
    ],
)
def test_long_headers_and_paths_are_shortened(
    host: FakeHost, caplog: pytest.LogCaptureFixture, method: str, path: str, headers: dict[str, str]
) -> None:
    logging.getLogger("host").propagate = True
    caplog.set_level(logging.DEBUG, "host")
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    body = "{}" if method == "POST" else ""
    text = f"{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{head}\r\n{body}"
    answer = host.raw(text.encode())
    assert answer.startswith(b"HTTP/1.1 ") and len(answer) < 3_000
    assert sum(len(record.getMessage()) for record in caplog.records) < 3_000


def test_numbers_of_any_size_are_no_failure(host: FakeHost) -> None:
    for digits in (309, 400, 4299, 4301, 9000):
        for key in ("width", "height", "seed", "steps", "cfg_scale", "n_iter", "batch_size", "clip_skip"):
            for number in ("9" * digits, "-" + "9" * digits, "9" * digits + ".5", f"1e{digits}"):
                body = f'{{"prompt": "x", "steps": 1, "{key}": {number}}}'.encode()
                answer = host.post(
                    "/sdapi/v1/txt2img", data=body, headers={"Content-Type": "application/json"}
                )
                assert answer.status_code in (200, 400, 422), (key, number[:30], answer.text)
    for path in ("/generate", "/v1/images/generations"):
        for key in ("width", "steps", "cfg", "seed", "n", "frames", "fps", "controlnet_scale"):
            for number in ("9" * 400, "1e400", "-1e400", "NaN", "Infinity", "-0.0", "-0"):
                body = f'{{"{key}": {number}}}'.encode()
                answer = host.post(path, data=body, headers={"Content-Type": "application/json"})
                assert answer.status_code in (200, 400, 422), (path, key, number[:30], answer.text)
                json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))
