"""Who and what comes in from outside: bounded faults and bodies, browsers, slow clients, a full folder."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Error as PlaywrightError

from shared.http.access import exposure_warnings
from shared.launch.errors import UsageError
from shared.launch.parser import API_KEY_VARIABLE
from tests.chromium import needs_chromium
from tests.httphost import FakeHost, asyncdiff, config_of

MANY = b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}"
LONG = "A" * (4 << 20)


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost() as host:
        yield host


# What is wrong is told in few words, whatever its size.


@pytest.mark.alone
@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations"])
def test_ninety_thousand_faults_are_twenty_and_a_number(host: FakeHost, path: str) -> None:
    began = time.monotonic()
    answer = host.post(path, data=MANY, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and len(answer.content) < 8_000
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
    answer = host.post(path, json=body)
    assert answer.status_code in (400, 422), answer.status_code
    assert len(answer.content) < 8_000
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


# Browsers: under which name the host was found, and whose page asks.


@pytest.mark.parametrize(
    "host_name", ["localhost", "LOCALHOST:7", "127.0.0.1", "10.1.2.3:6000", "[::1]:6000"]
)
def test_known_hosts(host: FakeHost, host_name: str) -> None:
    assert host.get("/health", headers={"Host": host_name}).status_code == 200


def test_this_machines_own_names_and_no_host(host: FakeHost) -> None:
    for name in {socket.gethostname(), socket.gethostname().upper() + ":6000"}:
        assert host.get("/health", headers={"Host": name}).status_code == 200
    assert b" 200 " in host.raw(b"GET /health HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize(
    "host_name",
    [
        *("evil.example", "evil.example:6000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("a@localhost", "localhost, evil.example", "localhost:port", "[::1", "127.1", "localhost/x"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/sdapi/v1/options", "/nothing"])
def test_foreign_hosts_are_refused(host: FakeHost, host_name: str, path: str) -> None:
    answer = host.get(path, headers={"Host": host_name})
    assert answer.status_code == 403 and "--trusted_hosts" in answer.text


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "http://203.0.113.5", "file://", ""]
)
def test_foreign_pages_are_refused(host: FakeHost, origin: str) -> None:
    for path in ("/generate", "/cancel", "/lora", "/v1/images/edits", "/sdapi/v1/interrupt"):
        answer = host.post(path, data="x", headers={"Origin": origin, "Content-Type": "text/plain"})
        assert answer.status_code == 403 and "--allow_origin" in answer.text
        assert "Access-Control-Allow-Origin" not in answer.headers
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert requests.options(f"{host.url}/generate", headers=ask, timeout=5).status_code == 403
    assert not host.seen


def test_the_hosts_own_page_may_call(host: FakeHost) -> None:
    assert host.generate({}, headers={"Origin": host.url}).status_code == 200
    headers = {"Host": "localhost", "Origin": "https://localhost"}  # behind a proxy that speaks TLS
    assert host.generate({}, headers=headers).status_code == 200


def test_trusted_hosts_and_allowed_origins() -> None:
    page = "https://app.example"
    config = config_of(trusted_hosts=("gpu.example",), allow_origin=(page,), api_key="secret")
    with FakeHost(config) as host:
        assert host.get("/health", headers={"Host": "gpu.example:6000"}).status_code == 200
        assert host.get("/health", headers={"Host": "a.gpu.example"}).status_code == 403
        ask = {"Origin": page, "Access-Control-Request-Method": "POST"}
        leave = requests.options(f"{host.url}/generate", headers=ask, timeout=5)
        assert leave.status_code == 204 and leave.headers["Access-Control-Allow-Origin"] == page
        assert "POST" in leave.headers["Access-Control-Allow-Methods"]
        assert "Authorization" in leave.headers["Access-Control-Allow-Headers"]
        assert host.generate({}, headers={"Origin": page}).status_code == 401
        made = host.generate({}, headers={"Origin": page, "Authorization": "Bearer secret"})
        assert made.status_code == 200 and made.headers["Access-Control-Allow-Origin"] == page
        assert "X-Seed" in made.headers["Access-Control-Expose-Headers"] and made.headers["Vary"] == "Origin"
        assert host.get("/health", headers={"Origin": "https://b.example"}).status_code == 403


SMALL_ROUTES = {
    "/lora": b'"errors":[]',
    "/cancel": b'"errors":[]',
    "/nowhere": b'"errors":[]',
    "/sdapi/v1/options": b'"detail":',
    "/sdapi/v1/interrupt": b'"detail":',
    "/v1/models": b'"invalid_request_error"',
    "/apply": b'"errors":[]',
}


@pytest.mark.parametrize("path", SMALL_ROUTES)
@pytest.mark.parametrize("length", ["Content-Length: 70000", "Transfer-Encoding: chunked"])
def test_routes_that_need_little_take_little(path: str, length: str) -> None:
    body = b"" if "70000" in length else b"%x\r\n" % 70_000 + b"{" * 70_000 + b"\r\n"
    with FakeHost(config_of(legacy_pickle=True)) as host:
        head = f"POST {path} HTTP/1.1\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", host.server.port), timeout=5) as connection:
            connection.sendall(head.encode() + body)  # and no byte more: the answer does not wait for it
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 413 "), answer
        assert b"may have at most 65536 bytes" in answer and SMALL_ROUTES[path] in answer
        exact = json.dumps({"path": "A"}).ljust(65536)
        headers = {"Content-Type": "application/json"}
        assert host.post(path, data=exact, headers=headers).status_code != 413


def test_a_form_of_too_many_parts(host: FakeHost) -> None:
    files = [(f"a{i}", (None, "x")) for i in range(2000)]
    answer = host.post("/v1/images/edits", files=files)
    assert answer.status_code == 413 and "too many parts" in answer.text


# The key, and a launch that anyone can reach.


def test_the_key_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "key").write_text(" of-the-file\n")
    (tmp_path / "empty").write_text("\n")
    launch = ["--type=sd1", f"--checkpoint={tmp_path}"]
    assert asyncdiff(launch).api_key is None
    assert asyncdiff([*launch, f"--api_key_file={tmp_path}/key"]).api_key == "of-the-file"
    with pytest.raises(UsageError, match="is empty"):
        asyncdiff([*launch, f"--api_key_file={tmp_path}/empty"])
    with pytest.raises(UsageError, match="only one of them"):
        asyncdiff([*launch, f"--api_key_file={tmp_path}/key", "--api_key=a"])
    monkeypatch.setenv(API_KEY_VARIABLE, "of-the-variable")
    assert asyncdiff(launch).api_key == "of-the-variable"
    assert asyncdiff([*launch, "--api_key=a"]).api_key == "a"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(UsageError, match=API_KEY_VARIABLE):
        asyncdiff(launch)


def test_a_launch_that_anyone_can_reach_is_warned_of() -> None:
    for address in ("0.0.0.0", "::", "192.0.2.1"):
        [line] = exposure_warnings(config_of(host=address))
        assert address in line and "--api_key" in line
        assert not exposure_warnings(config_of(host=address, api_key="secret"))
    for address in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert not exposure_warnings(config_of(host=address))


def test_names_and_pages_of_the_flags_are_checked(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    launch = ["--type=sd1", f"--checkpoint={tmp_path}"]
    config = asyncdiff(
        [*launch, "--trusted_hosts=a.b, c", "--allow_origin=https://a.b,null"],
    )
    assert (config.trusted_hosts, config.allow_origin) == (("a.b", "c"), ("https://a.b", "null"))
    for flag in (
        "--trusted_hosts=http://a.b",
        "--trusted_hosts=a,,b",
        "--allow_origin=a.b",
        "--allow_origin=",
    ):
        with pytest.raises(UsageError, match=flag.split("=")[0]):
            asyncdiff([*launch, flag])


# What a picture may cost.


@pytest.mark.parametrize(
    ("type", "body", "status"),
    [
        ("sd1", {"width": 8192, "height": 8192, "steps": 1000}, 422),
        ("sd1", {"width": 4096, "height": 4096, "steps": 100}, 200),
        ("sd1", {"steps": 1000}, 200),
        ("ad", {"width": 4096, "height": 4096, "frames": 1000}, 422),
        ("ad", {"frames": 64, "width": 1024, "height": 1024, "steps": 50}, 200),
    ],
)
def test_pixels_times_steps_are_bounded(type: str, body: dict[str, int], status: int) -> None:
    with FakeHost(config_of(type)) as host:
        answer = host.generate({**body, "output_format": "latent"})
        assert answer.status_code == status, answer.text
        assert (status == 200) == ("--max_pixel_steps" not in answer.text)
    with FakeHost(config_of(type, max_pixel_steps=1000)) as host:
        assert host.generate({"steps": 1000}).status_code == 422


# Pages of elsewhere that --allow_origin lets in, in a browser.

CALLS = """async ({ url, key }) => {
  const headers = { Authorization: `Bearer ${key}`, "X-Stainless-Lang": "js" };
  const json = { ...headers, "Content-Type": "application/json", Accept: "application/json" };
  const named = { ...json, Prefer: "respond-async", "X-Request-Id": "from-a-page" };
  const asked = { method: "POST", headers: named, body: '{"positive": "x"}' };
  const accepted = await fetch(`${url}/generate`, asked);
  const place = accepted.headers.get("Location");
  const done = await (await fetch(`${url}${place}?wait=5`, { headers })).json();
  const output = await fetch(`${url}${place}/output`, { headers });
  const seed = output.headers.get("X-Seed");
  const forgotten = await fetch(url + place, { method: "DELETE", headers });
  const gone = await fetch(url + place, { headers });
  const refused = await fetch(`${url}/generate`, { method: "POST", headers: json, body: "[" });
  const events = (await fetch(`${url}/events`, { headers })).body.getReader();
  const first = new TextDecoder().decode((await events.read()).value);
  await events.cancel();
  const statuses = [accepted, output, forgotten, gone, refused].map((answer) => answer.status);
  const applied = accepted.headers.get("Preference-Applied");
  return { place, applied, state: done.state, seed, statuses, first };
}"""


@needs_chromium
def test_a_page_of_elsewhere_uses_jobs_in_a_browser(tabs: Any, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>elsewhere</title>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{elsewhere.server_port}"
        with FakeHost(config_of(allow_origin=(page,), api_key="secret")) as host:
            told = tabs(page).evaluate(CALLS, {"url": host.url, "key": "secret"})
        with FakeHost(config_of(api_key="secret")) as closed:
            with pytest.raises(PlaywrightError, match="Failed to fetch"):
                tabs(page).evaluate(CALLS, {"url": closed.url, "key": "secret"})
            assert not closed.seen
        elsewhere.shutdown()
    assert told["place"] == "/jobs/from-a-page" and told["applied"] == "respond-async"
    assert told["state"] == "done" and int(told["seed"]) >= 0
    assert told["statuses"] == [202, 200, 200, 404, 400]
    assert told["first"].startswith("event: host")


def test_every_method_of_every_route_is_told_to_pages() -> None:
    page = "https://app.example"
    with FakeHost(config_of(allow_origin=(page,), legacy_pickle=True)) as host:
        ask = {"Origin": page, "Access-Control-Request-Method": "DELETE"}
        leave = requests.options(f"{host.url}/jobs/x", headers=ask, timeout=5).headers
        known = {method for rule in host.app.url_map.iter_rules() for method in rule.methods or ()}
        known -= {"HEAD", "OPTIONS"}
        assert known == set(leave["Access-Control-Allow-Methods"].split(", "))
