"""The web page: what it is made from, the stream of events, and the page itself in headless Chromium."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any

import pytest
import requests
from PIL import Image
from playwright.sync_api import expect
from pydantic import Field

from shared.api.codecs import MAX_FRAMES
from shared.api.requests import FIELD_NOTES, GenerateRequest, Notes, field_notes
from shared.http import pages
from shared.http.pages import FILES, FOLDER, MAX_UNSENT, LaunchField, Watchers, offer
from shared.http.wsgi import MAX_WATCHERS
from shared.models import MODELS
from tests.chromium import fill, luminance, needs_chromium, no_sideways_scroll
from tests.httphost import FakeHost, config_of, picture, wait_for
from tests.test_host import Launch


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost() as host:
        yield host


class Stream:
    """An open GET /events; its events are collected by a thread."""

    def __init__(self, host: FakeHost, **options: Any) -> None:
        self.answer = requests.get(f"{host.url}/events", stream=True, timeout=20, **options)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ended = threading.Event()
        if self.answer.ok:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        name = ""
        try:
            for line in self.answer.iter_lines():
                kind, _, text = line.decode().partition(": ")
                if kind == "event":
                    name = text
                elif kind == "data":
                    self.events.append((name, json.loads(text)))
        except (requests.RequestException, AttributeError):
            pass  # closed by the test
        self.ended.set()

    def named(self, name: str) -> list[dict[str, Any]]:
        return [data for event, data in list(self.events) if event == name]

    def close(self) -> None:
        response: Any = self.answer.raw
        response._fp.fp.raw._sock.shutdown(socket.SHUT_RDWR)  # `close` alone waits for the reader
        self.answer.close()


# The files.


def test_the_page_holds_nothing_from_elsewhere_and_asks_for_no_token() -> None:
    with FakeHost(config_of(api_key="secret")) as host:
        page = host.get("/")
        assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        for name in FILES:
            answer = host.get(f"/web/{name}")
            assert answer.content == (FOLDER / name).read_bytes()
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            text = answer.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
            assert not re.search(r"https?://|@import|\beval\b|innerHTML|\bstyle=", text), name
        assert host.get("/web/nothing").status_code == 404
        for outside in (b"/web/../server.py", b"/web/%2e%2e/server.py", b"/web//etc/passwd"):
            told = host.raw(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % outside)
            assert re.match(rb"HTTP/1.1 40[14] ", told)
        for path in ("/launch", "/events"):
            assert host.get(path).status_code == 401
        assert host.get("/launch", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("type", MODELS)
def test_the_launch_tells_what_it_serves(type: str) -> None:
    told = offer(config_of(type))
    assert set(told["fields"]) <= set(GenerateRequest.model_fields)
    assert set(told["defaults"]) <= set(told["fields"])
    assert ("image" in told["needs"]) == (MODELS[type].image == "needed")
    assert not {"control_image", "ip_image", "controlnet_scale"} & set(told["fields"])
    if "control_image" in MODELS[type].fields:
        told = offer(config_of(type, control_net={"/c": 0.7}))
        assert "control_image" in told["needs"] and told["defaults"]["controlnet_scale"] == 0.7
        assert "ip_image" not in told["fields"]


def test_the_launch_tells_each_fields_label_kind_and_bounds() -> None:
    told = offer(config_of("sd1", control_net={"/c": 1.0}))["fields"]
    assert told["steps"] == {"label": "Steps", "kind": "number", "minimum": 1, "maximum": 1000, "step": 1}
    width = {"label": "Width", "kind": "number", "minimum": 16, "maximum": 8192, "step": 8, "unit": "pixels"}
    assert told["width"] == width
    assert told["control_image"] == {"label": "ControlNet image", "kind": "image"}
    assert told["control_image_scale"]["exclusiveMinimum"] == 0 and told["control_image_scale"]["unit"] == "%"
    assert told["cfg"] == {"label": "Guidance", "kind": "number", "minimum": 0, "maximum": 100}
    assert told["prompt_syntax"] == {"label": "", "kind": "choice", "choices": ["a1111"]}
    assert told["latent"]["kind"] == "tensor" and told["lora_scales"]["kind"] == "object"
    assert told["output_format"]["choices"] == ["png", "jpeg", "webp"]
    assert "k_euler" in told["scheduler"]["choices"]
    assert "control_image_scale" not in offer(config_of("sd1"))["fields"]
    for type in MODELS:
        for name, field in offer(config_of(type))["fields"].items():
            LaunchField.model_validate(field)
            assert (field["kind"] == "choice") == ("choices" in field), name


def test_how_many_pictures_a_launch_takes() -> None:
    nets, adapters = {"/c": 1.0, "/d": 1.0}, {"/i": 1.0, "/j": 1.0, "/k": 1.0}
    for type, launch, most in (
        ("sd1", {"control_net": nets, "ip_adapter": adapters}, {"control_image": 2, "ip_image": 3}),
        ("sd1", {"control_net": {"/c": 1.0}, "ip_adapter": {"/i": 1.0}}, {"ip_image": 16}),
        ("sd3", {"ip_adapter": {"/i": 1.0}}, {}),
    ):
        fields = offer(config_of(type, **launch))["fields"]
        assert {name: field["most"] for name, field in fields.items() if "most" in field} == most


def test_the_launch_tells_from_what_it_can_start_and_how_far() -> None:
    sd1, sdxl = offer(config_of("sd1")), offer(config_of("sdxl", control_net={"/c": 1.0}))
    assert sd1["strengths"] == {"image": 0.8, "mask": 1.0} and {"image", "mask", "strength"} <= set(
        sd1["fields"]
    )
    assert sdxl["strengths"] == {"image": 0.8, "mask": 0.9999}
    assert offer(config_of("svd"))["strengths"] == {} and "image" in offer(config_of("svd"))["fields"]


def test_the_launch_tells_how_many_pictures_a_field_takes_and_a_scale_that_is_of_all() -> None:
    assert offer(config_of("ad"))["fields"]["image"]["most"] == MAX_FRAMES
    assert "most" not in offer(config_of("sd1"))["fields"]["image"]
    for scales, told in (((0.5, 0.5), 0.5), ((0.5, 1.0), None)):
        nets = dict(zip(("/a", "/b"), scales, strict=True))
        assert offer(config_of("sd1", control_net=nets))["defaults"].get("controlnet_scale") == told
        assert offer(config_of("sd1", ip_adapter=nets))["defaults"].get("ip_adapter_scale") == told


def test_the_launch_tells_of_no_start_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    sd1 = MODELS["sd1"]
    for starts, taken in (((), set()), (tuple(s for s in sd1.starts if s.kind == "image"), {"image"})):
        monkeypatch.setitem(MODELS, "sd1", replace(sd1, starts=starts))
        assert {"image", "mask"} & set(offer(config_of("sd1"))["fields"]) == taken
    monkeypatch.setitem(MODELS, "sd1", sd1)
    alone = tuple(replace(start, ip_adapter=False) for start in sd1.starts)
    monkeypatch.setitem(MODELS, "sd1", replace(sd1, starts=alone))
    assert "image" not in offer(config_of("sd1", ip_adapter={"/i": 1.0}))["fields"]
    assert "image" in offer(config_of("sd1"))["fields"]


def test_a_new_field_is_told_as_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(GenerateRequest):
        sharpness: Annotated[Annotated[float, Field(ge=0, lt=2)] | None, Notes("Sharpness", unit="x")] = None

    assert field_notes(More)["sharpness"] == Notes("Sharpness", unit="x")
    monkeypatch.setitem(FIELD_NOTES, "sharpness", field_notes(More)["sharpness"])
    monkeypatch.setitem(pages._PROPERTIES, "sharpness", More.model_json_schema()["properties"]["sharpness"])
    sd1 = MODELS["sd1"]
    monkeypatch.setitem(MODELS, "sd1", replace(sd1, fields=sd1.fields | {"sharpness"}))
    expected = {"label": "Sharpness", "kind": "number", "minimum": 0, "exclusiveMaximum": 2, "unit": "x"}
    assert offer(config_of("sd1"))["fields"]["sharpness"] == expected


def test_the_page_names_no_field_that_there_is_not() -> None:
    script = (FOLDER / "form.js").read_text()
    named = re.findall(r'"(\w+)"', script[script.index("const FIRST") : script.index("const EMPTY")])
    assert len(named) > 15 and set(named) <= set(GenerateRequest.model_fields)


# The events.


def test_events_tell_progress_previews_and_the_end(host: FakeHost) -> None:
    stream = Stream(host)
    assert stream.answer.headers["Content-Type"].startswith("text/event-stream")
    wait_for(lambda: stream.named("jobs"))
    assert stream.named("host")[0]["state"] == "ready"
    assert stream.named("jobs") == [{"running": None, "waiting": []}]
    named = {"X-Request-Id": "my-request"}
    answer = host.generate({"positive": "slow", "steps": 12}, headers=named)
    assert answer.headers["X-Request-Id"] == "my-request"
    other = {"X-Request-Id": "my-second"}
    assert host.generate({"positive": "fail", "steps": 3}, headers=other).status_code == 500
    wait_for(lambda: len(stream.named("end")) == 2)
    running = [e["running"] for e in stream.named("jobs") if e["running"]]
    steps = [one["step"] for one in running if one["id"] == "my-request"]
    assert len(steps) > 2 and steps == sorted(steps) and steps[-1] <= 12
    assert {one["id"] for one in running} <= {"my-request", "my-second"}
    previews = stream.named("preview")
    assert previews and previews[0]["id"] == "my-request"
    shown = Image.open(io.BytesIO(base64.b64decode(previews[0]["jpeg"])))
    assert shown.format == "JPEG" and shown.size == (4, 2)
    red, green, _ = shown.convert("RGB").getpixel((1, 1))  # type: ignore[misc]
    assert red > 200 > 60 > green
    done, failed = stream.named("end")
    assert done == {"id": "my-request", "outcome": "done", "message": "OK"}
    assert (failed["outcome"], failed["message"]) == ("failed", "rank 1: out of memory")
    stream.close()


def test_one_request_is_cancelled_by_its_id_and_no_other(host: FakeHost) -> None:
    stream = Stream(host)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(host.generate, {"positive": "hold"}, headers={"X-Request-Id": "first-one"})
        wait_for(lambda: host.queue.running)
        second = pool.submit(host.generate, {"positive": "x"}, headers={"X-Request-Id": "second-one"})
        wait_for(lambda: any(e["waiting"] == ["second-one"] for e in stream.named("jobs")))
        assert host.post("/cancel?id=unknown").json()["cancelled"] is False
        assert host.post("/cancel?id=second-one").json()["cancelled"] is True
        assert second.result(5).status_code == 499
        assert not first.done()
        assert host.post("/cancel?id=first-one").json()["cancelled"] is True
        assert first.result(5).status_code == 499
    wait_for(lambda: stream.named("end"))
    assert stream.named("end")[0]["outcome"] == "cancelled"
    stream.close()


def test_a_strange_request_id_is_replaced(host: FakeHost) -> None:
    for strange in ("short", "a b c d e f g h", "x" * 65, "line\\nbreak%0a"):
        answer = host.get("/health", headers={"X-Request-Id": strange})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-Id"])


@pytest.mark.alone
def test_watchers_are_bounded_and_leave_their_seats() -> None:
    with FakeHost(config_of(max_queue=0)) as host:
        streams = [Stream(host) for _ in range(MAX_WATCHERS)]
        wait_for(lambda: all(s.named("host") for s in streams))
        refused = host.get("/events")
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert host.get("/health").status_code == 200
        assert host.generate({"positive": "x"}).status_code == 200
        assert requests.head(f"{host.url}/events", timeout=5).status_code == 503
        for stream in streams[1:]:
            stream.close()
        wait_for(lambda: host.queue.watchers == 1)
        assert requests.head(f"{host.url}/events", timeout=5).status_code == 200
        wait_for(lambda: host.queue.watchers == 1)
        began = time.monotonic()
        host.status.state = "stopping"
        host.close()
        assert time.monotonic() - began < 1.5, "an open stream holds the server up"
        assert streams[0].ended.wait(2)
        assert streams[0].named("host")[-1]["state"] == "stopping"
        assert host.queue.watchers == 0


def test_who_does_not_read_gets_no_previews_and_is_let_go(host: FakeHost) -> None:
    job_held = ThreadPoolExecutor(1).submit(host.generate, {"positive": "hold"})
    wait_for(lambda: host.queue.running)
    host.queue.show_preview(1, 1, 1, b"123")
    watchers = Watchers(host.status, host.queue)
    assert not list(watchers._events(lambda: False, lambda: MAX_UNSENT + 1))
    assert b"event: preview" not in next(watchers._events(lambda: False, lambda: 1))
    assert b"event: preview" in next(watchers._events(lambda: False, lambda: 0))
    host.go_on.set()
    assert job_held.result(5).status_code == 200


# The page in a browser.


@needs_chromium
def test_a_picture_forms_in_two_tabs_and_the_history_keeps_it(demo_host: Launch, tabs: Any) -> None:
    page, second = tabs(demo_host.url), tabs(demo_host.url, color_scheme="dark")
    for tab in (page, second):
        expect(tab.locator("#state")).to_have_text("ready")
        expect(tab.locator("#title")).to_have_text("Stable Diffusion 1.x on asyncdiff")
        expect(tab.locator("#stages li")).to_have_count(2)
        expect(tab.locator("#ranks tbody tr")).to_have_count(2)
    expect(page.locator("#ranks")).to_be_hidden()
    page.locator("#host summary").click()
    expect(page.locator("#ranks")).to_be_visible()
    expect(page.locator("#width")).to_have_value("128")
    fill(page, positive="a red circle on a blue background", steps=20, cfg=4, seed=7)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#doing")).to_have_text(re.compile(r"Step \d+ of 20"))
    expect(page.locator("#shown img.preview")).to_be_visible()
    expect(second.locator("#doing")).to_have_text(re.compile(r"Another request: step \d+ of 20"))
    expect(second.locator("#shown img.preview")).to_be_visible()
    expect(second.locator("#state")).to_have_text("busy")
    expect(page.locator("#facts")).to_contain_text("Seed 7 · 128 × 128 · 20 steps")
    expect(page.locator("#status")).to_have_text("Done.")
    expect(second.locator("#status")).to_have_text("Another request is done.")
    expect(second.locator("#empty")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "sd1-7.png"
    with Image.open(download.value.path()) as made:
        assert made.size == (128, 128)
        assert made.getpixel((64, 64))[0] > 150 > made.getpixel((4, 4))[0]  # type: ignore[index]

    fill(page, positive="a blue circle on a red background", seed=20, pictures=2, steps=2)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#history li")).to_have_count(3)
    assert page.locator("#history button").all_inner_texts() == ["Seed 20", "Seed 21", "Seed 7"]
    page.locator("#history button").last.click()
    expect(page.locator("#facts")).to_contain_text("Seed 7 ")
    page.get_by_role("button", name="Use these settings").click()
    expect(page.locator("#positive")).to_have_value("a red circle on a blue background")
    assert [page.locator(f"#{n}").input_value() for n in ("seed", "steps", "cfg")] == ["7", "20", "4"]
    assert luminance(page, "backgroundColor") > 0.8 > 0.4 > luminance(page, "color")
    assert luminance(second, "backgroundColor") < 0.2 < 0.7 < luminance(second, "color")


@needs_chromium
def test_cancel_by_button_and_by_key_and_from_another_tab(demo_host: Launch, tabs: Any) -> None:
    page, second = tabs(demo_host.url), tabs(demo_host.url)
    fill(page, positive="a circle", steps=900)

    def begin() -> None:
        page.locator("#positive").press("Control+Enter")
        expect(page.locator("#doing")).to_have_text(re.compile(r"Step [1-9]\d* of 900"))

    begin()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#running")).to_be_hidden()
    expect(page.locator("#empty")).to_be_visible()
    begin()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    begin()
    for id in ("cancel-other", "confirm"):
        expect(page.locator(f"#{id}")).to_be_hidden()
    expect(second.locator("#cancel")).to_be_disabled()
    second.keyboard.press("Escape")
    second.get_by_role("button", name="Cancel another's request…").click()
    second.get_by_role("button", name="Let it go on").click()
    expect(page.locator("#doing")).to_have_text(re.compile(r"Step [1-9]\d* of 900"))
    second.locator("#cancel-other").click()
    second.get_by_role("button", name="Cancel it").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(second.locator("#status")).to_have_text("Another request was cancelled.")
    expect(page.locator("#error")).to_be_empty()
    expect(page.locator("#state")).to_have_text("ready")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_progress_and_cancel_are_in_sight(host: FakeHost, tabs: Any, scheme: str) -> None:
    phone = {"width": 390, "height": 844}
    page = tabs(host.url, viewport=phone, has_touch=True, is_mobile=True, color_scheme=scheme)
    fill(page, positive="hold", steps=3)
    page.locator("#generate").tap()
    expect(page.locator("#doing")).to_have_text(re.compile("Sent|Step"))
    for place in ("0", "document.body.scrollHeight"):
        page.evaluate(f"() => scrollTo(0, {place})")
        for name in ("progress", "percent", "cancel-here"):
            expect(page.locator(f"#{name}")).to_be_in_viewport(ratio=1)
    assert no_sideways_scroll(page)
    with page.expect_response("**/cancel?id=*"):
        page.locator("#cancel-here").tap()
    host.go_on.set()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#running")).to_be_hidden()


@needs_chromium
def test_escape_in_the_question_leaves_ones_own_request(host: FakeHost, tabs: Any) -> None:
    other, page = tabs(host.url), tabs(host.url)
    fill(other, positive="hold", steps=3)
    other.locator("#generate").click()
    expect(other.locator("#doing")).to_have_text(re.compile("Step"))
    fill(page, positive="mine", steps=3)
    page.locator("#generate").click()
    expect(page.locator("#doing")).to_have_text(re.compile("Queued"))
    page.locator("#cancel-other").click()
    page.keyboard.press("Escape")
    expect(page.locator("#confirm")).to_be_hidden()
    expect(page.locator("#cancel")).to_be_enabled()
    host.go_on.set()
    expect(page.locator("#status")).to_have_text("Done.")


@needs_chromium
def test_warnings_of_an_answer_are_shown_as_text(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url)
    fill(page, positive="warn <b>bold</b>", steps=1)
    page.locator("#generate").press("Enter")
    expect(page.locator("#status")).to_have_text("Done.")
    expect(page.locator("#warnings li")).to_have_count(1)
    expect(page.locator("#warnings b")).to_have_count(0)
    fill(page, positive="a circle")
    page.locator("#generate").press("Enter")
    expect(page.locator("#warnings")).to_be_hidden()


@needs_chromium
def test_errors_in_words_beside_their_fields_on_a_phone_by_keyboard(host: FakeHost, tabs: Any) -> None:
    page = tabs(host.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    expect(page.locator("#positive")).to_be_visible()
    page.locator("#positive").focus()
    visited = []
    for _ in range(12):
        visited.append(page.evaluate("() => document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    main = [
        "positive",
        "negative",
        "image",
        "size",
        "width",
        "height",
        "steps",
        "cfg",
        "seed",
        "pictures",
        "SUMMARY",
        "generate",
    ]
    assert visited[: len(main)] == main
    assert page.evaluate(
        "() => [...document.querySelectorAll('input, select, textarea')]"
        ".every((control) => control.labels.length || control.ariaLabel)"
    )
    fill(page, width=100, steps=0, positive="fail")
    page.locator("#generate").press("Enter")
    expect(page.locator("#width-problem")).to_have_text("must be a multiple of 8 for sd1, got 100")
    expect(page.locator("#steps-problem")).to_have_text("must be at least 1, got 0")
    expect(page.locator("#steps")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#error")).to_contain_text("marked fields")
    assert no_sideways_scroll(page)
    fill(page, width=64, steps=3)
    page.locator("#generate").press("Enter")
    expect(page.locator("#error")).to_have_text("rank 1: out of memory")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    fill(page, positive="hold")
    page.locator("#generate").press("Enter")
    wait_for(lambda: host.queue.running)
    other = tabs(host.url)
    fill(other, positive="fine")
    other.locator("#generate").press("Enter")
    expect(other.locator("#doing")).to_have_text("Queued, 1 ahead")
    other.keyboard.press("Escape")
    expect(other.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))
    host.go_on.set()
    expect(page.locator("#status")).to_have_text("Done.")
    assert no_sideways_scroll(page)
    host.status.state, host.status.message = "broken", "rank 1 died"
    host.close()
    expect(page.locator("#state")).to_have_text("unreachable")
    expect(page.locator("#host-message")).to_contain_text("It said: rank 1 died.")
    page.locator("#generate").press("Enter")
    expect(page.locator("#error")).to_contain_text("cannot be reached")
    again = config_of("sd1", port=host.server.port, width=256, height=256)
    with FakeHost(again):
        expect(page.locator("#error")).to_contain_text("reload this page")
        expect(page.locator("#state")).to_have_text("ready")


@needs_chromium
def test_the_token_and_a_type_that_takes_an_image(tabs: Any, tmp_path: Any) -> None:
    with FakeHost(config_of("svd", api_key="gehéim")) as host:
        page = tabs(host.url, viewport={"width": 360, "height": 740})
        expect(page.locator("#main")).to_be_hidden()
        fill(page, token="wrong")
        page.get_by_role("button", name="Enter").click()
        expect(page.locator("#token-problem")).to_have_text("The host refuses this token.")
        fill(page, token="gehéim")
        page.locator("#token").press("Enter")
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#positive")).to_have_count(0)
        expect(page.locator("#frames")).to_have_value("14")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#image-problem")).to_contain_text("needs an input image")
        path = tmp_path / "start.png"
        path.write_bytes(picture())
        page.locator("#image").set_input_files(path)
        expect(page.locator("#image-chosen")).to_contain_text("start.png")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#shown video")).to_have_attribute("src", re.compile("^blob:"))
        assert host.seen[0].image == picture() and host.seen[0].output_format == "mp4"
        page.get_by_role("button", name="Remove").click()
        expect(page.locator("#image-chosen")).to_be_hidden()
        page.get_by_role("button", name="Use these settings").click()
        expect(page.locator("#image-chosen")).to_contain_text("start.png")
        assert no_sideways_scroll(page)
        page.reload()  # the token is kept
        expect(page.locator("#state")).to_have_text("ready")
