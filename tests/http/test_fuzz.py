"""Odd requests to every route: each is answered in the route's form, in few words, and the host goes on.

FUZZ_REQUESTS sets how many (400 in a short run); FUZZ_SEED draws other ones than the short run's.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Answers, fuzz
from tests.httphost import FakeHost, config_of
from tests.odd import BODIES, FORMS, KEYS, LITERALS, PICKLES, PICTURES, TENSORS

COUNT = int(os.environ.get("FUZZ_REQUESTS", "400"))
MOST = 8 << 10  # bytes of the answer to a faulty request, characters of a log line
GOOD = {"positive": "a red circle", "seed": 7, "steps": 2}
PARTS = [
    "%00",
    "..%2f..%2fserver.py",
    "%ff%fe",
    "%0d%0aX: 1",
    "a" * 3000,
    "%c3%a9",
    "script.js",
    "x",
    "a/b",
    "%",
]
CONFIGS = [
    config_of(legacy_pickle=True),
    config_of(control_net={"/c": 1.0}, ip_adapter={"/i": 1.0}, lora={"/models/a.safetensors": 1.0}),
    config_of("svd"),
    config_of("flux", backend="xdit"),
]

odd_text = st.sampled_from(LITERALS) | st.text(max_size=40).map(json.dumps) | st.floats().map(json.dumps)
plain = st.one_of(
    odd_text, st.integers().map(str), st.sampled_from(PICTURES + TENSORS + PICKLES).map(json.dumps)
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(st.sampled_from([*KEYS, "a"]), inner), max_size=4).map(lambda p: objects(p)),
    ),
    max_leaves=5,
)


def objects(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"


pairs = st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=5), values), max_size=4)
bodies = st.one_of(
    pairs.map(lambda p: objects([("steps", "2"), *p]).encode("utf-8", "surrogatepass")),
    pairs.map(lambda p: objects(p).encode("utf-8", "surrogatepass")),
    values.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(FORMS + BODIES),
    st.binary(max_size=60),
)
TYPES = ["application/json"] * 6 + [
    *("multipart/form-data; boundary=b", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 300),
    *(
        "application/json; charset=utf-16",
        "application/json; charset=\x80",
        "text/plain",
        "",
        ";;=",
        "a/b\x85c",
    ),
    "application/x-www-form-urlencoded",
]
NAMES = [
    *("Accept", "Prefer", "X-Request-Id", "Content-Encoding", "Range", "If-None-Match", "Cookie", "Host"),
    *("Authorization", "Origin", "Expect", "Transfer-Encoding", "Sec-Fetch-Site", "X-Forwarded-For"),
]
SAID = [
    *("image/png", "image/webp;q=1e400, */*;q=nan", "video/mp4", "," * 900, "respond-async", "gzip", "\xff"),
    *("bytes=0-1,5-", "*", "Basic !!!", "Bearer", "null", "100-continue", "abcdefgh", "chunked", "[::1"),
]
METHODS = ["POST"] * 6 + ["GET", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "post"]
headers = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(SAID)), max_size=2)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[FakeHost]]:
    made = [FakeHost(config) for config in CONFIGS]
    yield made
    for host in made:
        host.close()


def ask(host: FakeHost, request: bytes, method: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body; of a stream without end the body is left."""
    with socket.create_connection(("127.0.0.1", host.server.port), timeout=15) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection, method=method)
        answer.begin()
        while answer.status == 100:
            answer = http.client.HTTPResponse(connection, method=method)
            answer.begin()
        stream = answer.headers.get_content_type() == "text/event-stream"
        return answer.status, answer.headers, b"" if stream else answer.read()


def check(path: str, method: str, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
    assert b"Traceback" not in body and b'File "' not in body
    if status < 400:
        return
    assert status < 500 or (status == 503 and headers["Retry-After"]) or status == 507, (status, body[:500])
    assert len(body) <= MOST, (len(body), body[:500])
    assert headers.get_content_type() == "application/json"
    if method == "HEAD":
        return
    told = json.loads(body)
    if "error" not in told:
        assert set(told) == {"message", "output", "is_image", "errors"} and told["message"]
        assert all(fault["problem"] for fault in told["errors"])
    elif path.startswith("/v1/"):
        assert told["error"]["message"] and told["error"]["type"] and isinstance(told["errors"], list)
    else:
        assert path.startswith("/sdapi/") and told["detail"], told


@st.composite
def requests_(draw: st.DrawFn) -> tuple[int, str, str, bytes]:
    """Which host, method, path, and the bytes to send."""
    which = draw(st.integers(0, len(CONFIGS) - 1))
    weighted = 3 * ["/generate", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/images/generations"]
    path = draw(st.sampled_from([*weighted, *ROUTES]))
    path = path.replace("<path:name>", draw(st.sampled_from(PARTS))) if "<path:" in path else path
    path = path.replace("<name>", draw(st.sampled_from(PARTS))) if "<name>" in path else path
    query = draw(st.sampled_from(["", "", "", "?id=x", "?id=%00&id=%ff", "?" + "&" * 500]))
    method = draw(st.sampled_from(METHODS))
    body = draw(bodies)
    kind = draw(st.sampled_from(["multipart/form-data; boundary=b"] if body in FORMS else TYPES))
    path = "/v1/images/edits" if body in FORMS and draw(st.booleans()) else path
    lines = [("Connection", "close"), ("Content-Length", str(len(body))), ("Content-Type", kind)]
    if draw(st.integers(0, 9)) == 0:  # cut into chunks
        lines[1] = ("Transfer-Encoding", "chunked")
        body = b"".join(
            b"%x\r\n%s\r\n" % (len(body[i : i + 50]), body[i : i + 50]) for i in range(0, len(body), 50)
        )
        body += b"0\r\n\r\n"
    lines += [line for line in draw(headers) if line != ("Transfer-Encoding", "chunked")]  # it would wait
    head = f"{method} {path}{query} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines)
    return which, method, path, head.encode("latin-1") + b"\r\n" + body


def routes() -> list[str]:
    paths: set[str] = set()
    for config in CONFIGS:
        with FakeHost(config) as host:
            paths |= {str(rule) for rule in host.app.url_map.iter_rules()}
    return [*sorted(paths), "/nowhere", "//generate", "/generate/", "/%67enerate", "*"]


ROUTES = routes()


class Lines(logging.Handler):
    """The longest line of the log, and failures that nobody foresaw."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.failed = "", ""

    def emit(self, record: logging.LogRecord) -> None:
        self.longest = max(self.longest, record.getMessage(), key=len)
        if record.exc_info:
            self.failed = (
                self.formatter.format(record) if self.formatter else logging.Formatter().format(record)
            )


def test_odd_requests(hosts: list[FakeHost], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.http.legacy._end_launch", lambda: None)
    lines = Lines()
    asked = 0

    @settings(
        max_examples=COUNT,
        deadline=None,
        derandomize="FUZZ_SEED" not in os.environ,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @seed(int(os.environ.get("FUZZ_SEED", "0"))) if "FUZZ_SEED" in os.environ else lambda f: f
    @given(requests_())
    def odd(request: tuple[int, str, str, bytes]) -> None:
        nonlocal asked
        which, method, path, data = request
        lines.longest = lines.failed = ""
        began = time.monotonic()
        check(path, method, *ask(hosts[which], data, method.upper()))
        assert time.monotonic() - began < 5
        assert not lines.failed, lines.failed
        assert len(lines.longest) <= MOST, lines.longest[:500]
        asked += 1
        if asked % 100 == 0:
            right(hosts[0])

    log = [logging.getLogger(name) for name in ("host", "waitress")]
    for logger in log:
        logger.addHandler(lines)
        logger.setLevel("INFO")
    try:
        odd()
    finally:
        for logger in log:
            logger.removeHandler(lines)
    for host in hosts:
        assert host.get("/health").json()["state"] == "ready"
    right(hosts[0])


def test_requests_drawn_from_the_document_are_answered_as_it_says(hosts: list[FakeHost]) -> None:
    answers = Answers()
    with FakeHost(config_of(allow_lora_paths=True)) as host:
        fuzz(host.url, COUNT // 2, 0, answers)
    fuzz(hosts[2].url, COUNT // 4, 1, answers)  # of a video
    assert not answers.faults
    with FakeHost() as host:
        paths = host.get("/openapi.json").json()["paths"]
    assert set(answers.by_route) == {
        f"{method.upper()} {path}" for path, of in paths.items() for method in of
    }
    assert answers.by_route["POST /generate"][200]


def right(host: FakeHost) -> None:
    answer = host.generate(GOOD | {"output_format": "png"})
    assert answer.status_code == 200 and answer.json()["seed"] == 7 and answer.json()["steps"] == 2
    assert base64.b64decode(answer.json()["output"]).startswith(b"\x89PNG")
