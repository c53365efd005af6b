"""The page's tools in headless Chromium: pictures, masks, LoRAs, queue, history, settings of pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from safetensors.numpy import save_file

from shared.api.embedded import KEY, Metadata
from shared.http.pages import sizes
from tests.api.test_metadata import DrawingHost
from tests.chromium import fill, needs_chromium, no_sideways_scroll
from tests.httphost import FakeHost, config_of, wait_for

pytestmark = needs_chromium
DESK = {"color_scheme": "light"}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "color_scheme": "dark",
}
both = pytest.mark.parametrize(
    "screen",
    [
        pytest.param(DESK, id="desk-light", marks=pytest.mark.slow),
        pytest.param(PHONE, id="phone-dark"),
    ],
)


@pytest.fixture
def host() -> Iterator[DrawingHost]:
    with DrawingHost(config_of(width=64, height=64)) as host:
        assert isinstance(host, DrawingHost)
        yield host


def png(size: tuple[int, int] = (96, 64), colour: str = "red", texts: Metadata | None = None) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return texts.in_png(out.getvalue()) if texts else out.getvalue()


def file(name: str, data: bytes) -> Any:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def bring(page: Page, event: str, to: str, name: str, data: bytes) -> None:
    """Drop or paste a file on an element, once the page has made it."""
    page.locator(to).evaluate(
        """(element, [event, name, base64]) => {
            const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], name, { type: "image/png" }));
            const options = { bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files };
            const kind = event === "paste" ? ClipboardEvent : DragEvent;
            element.dispatchEvent(new kind(event, options));
        }""",
        [event, name, base64.b64encode(data).decode()],
    )


def make(page: Page, **values: Any) -> None:
    fill(page, **values)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_have_text(re.compile("(Done|are done)"))


def grey(data: bytes | None) -> Any:
    assert data
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        rgb = np.asarray(image.convert("RGB"))
        assert image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    assert (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()
    return rgb[..., 0]


class Painter:
    """The open painter over a picture of this size."""

    def __init__(self, page: Page, size: tuple[int, int]) -> None:
        self.page, self.size = page, size
        page.locator("#paint:visible, #paint-on:visible").click()
        expect(page.locator("#painter")).to_be_visible()

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the picture is on the screen."""
        box = self.page.locator("#mask-canvas").bounding_box()
        assert box
        return box["x"] + x * box["width"] / self.size[0], box["y"] + y * box["height"] / self.size[1]

    def size_of_brush(self, pixels: int) -> None:
        self.page.locator("#mask-size").fill(str(pixels))

    def by_mouse(self, *points: tuple[float, float]) -> None:
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=4)
        self.page.mouse.up()

    def by_finger(self, *points: tuple[float, float]) -> None:
        touch = self.page.context.new_cdp_session(self.page)
        for number, point in enumerate(points):
            x, y = self.at(*point)
            kind = "touchMove" if number else "touchStart"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def use(self) -> None:
        self.page.get_by_role("button", name="Use this mask").click()
        expect(self.page.locator("#painter")).to_be_hidden()


@both
def test_a_painted_mask_reaches_the_host_as_its_pixels(host: DrawingHost, tabs: Any, screen: Any) -> None:
    page = tabs(host.url, **screen)
    expect(page.locator("#mask")).to_be_hidden()
    expect(page.locator("#strength")).to_be_hidden()
    page.locator("#image").set_input_files([file("start.png", png((96, 64)))])
    expect(page.locator("#image-chosen")).to_contain_text("96 × 64")
    assert no_sideways_scroll(page)
    expect(page.locator("#strength")).to_have_attribute("placeholder", "0.8")
    painter = Painter(page, (96, 64))
    stroke = painter.by_finger if screen is PHONE else painter.by_mouse
    painter.size_of_brush(16)
    stroke((20, 32), (76, 32))
    page.get_by_text("Eraser").click()
    painter.size_of_brush(8)
    stroke((48, 10), (48, 54))
    page.get_by_text("Brush", exact=True).click()
    stroke((4, 4), (90, 4))
    page.get_by_role("button", name="Undo").click()
    painter.use()
    expect(page.locator("#strength")).to_have_attribute("placeholder", "1")
    make(page, positive="a", strength=0.4, steps=2)
    assert host.seen[0].strength == 0.4
    assert host.seen[0].image == png((96, 64))
    mask = grey(host.seen[0].mask)
    assert mask.shape == (64, 96)
    wanted = np.zeros((64, 96), np.uint8)
    wanted[24:40, 20:76] = 255
    wanted[24:40, 44:52] = 0
    inner = np.ones((64, 96), bool)
    for side in (24, 40):
        inner[side - 2 : side + 2] = False
    for side in (44, 52):
        inner[:, side - 2 : side + 2] = False
    inner[:, 10:22] = inner[:, 74:86] = False  # the round ends
    assert (mask[inner] == wanted[inner]).all()
    assert mask[32, 14] == 255 and mask[32, 82] == 255 and mask[32, 9] == mask[32, 87] == 0

    painter = Painter(page, (96, 64))
    page.get_by_role("button", name="Invert").click()
    painter.use()
    make(page, seed=1)
    assert np.abs(grey(host.seen[1].mask).astype(int) + mask - 255).max() <= 2
    painter = Painter(page, (96, 64))
    page.locator("#mask-clear").click()
    painter.use()
    expect(page.locator("#mask-chosen")).to_be_hidden()
    make(page, seed=2)
    assert host.seen[2].mask is None and host.seen[2].image


def test_a_mask_is_painted_by_keyboard_and_leaves_with_its_picture(host: DrawingHost, tabs: Any) -> None:
    page = tabs(host.url)
    page.locator("#image").set_input_files([file("start.png", png((64, 64)))])
    page.locator("#paint").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#mask-canvas")).to_be_focused()
    fill(page, **{"mask-size": 16})
    page.locator("#mask-canvas").focus()
    for key in ("Space", "ArrowRight", "ArrowRight", "Space", "ArrowDown", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Use this mask").press("Enter")
    make(page, positive="a", steps=1)
    mask = grey(host.seen[0].mask)
    assert mask[32, 26:54].min() == 255  # from the middle, 8 pixels a key
    assert not mask[45:].any() and not mask[:, 58:].any()
    page.locator("#paint-on").click()
    page.keyboard.press("Escape")
    expect(page.locator("#mask-chosen")).to_be_visible()
    bring(page, "drop", "[data-drop=image]", "same.png", png((64, 64), "blue"))
    expect(page.locator("#image-chosen")).to_contain_text("same.png")
    expect(page.locator("#mask-chosen")).to_be_visible()
    bring(page, "drop", "[data-drop=image]", "other.png", png((64, 32)))
    expect(page.locator("#mask-chosen")).to_be_hidden()
    expect(page.locator("#mask-problem")).to_contain_text("another size")
    assert (page.locator("#width").input_value(), page.locator("#height").input_value()) == ("64", "32")
    page.locator("#size").select_option("64 64")
    bring(page, "drop", "[data-drop=image]", "large.png", png((256, 256)))
    expect(page.locator("#image-chosen")).to_contain_text("large.png")
    expect(page.locator("#width")).to_have_value("64")  # of its shape already
    bring(page, "drop", "[data-drop=image]", "wide.png", png((256, 64)))
    expect(page.locator("#width")).to_have_value("128")  # as many pixels as the launch's size
    expect(page.locator("#height")).to_have_value("32")
    page.locator("#size").select_option("256 64")
    page.get_by_role("button", name="Remove wide.png").click()
    expect(page.locator("#width")).to_have_value("64")
    expect(page.locator("#height")).to_have_value("64")


def test_pictures_come_by_drop_and_paste_to_their_fields(tabs: Any) -> None:
    config = config_of(control_net={"/c": 1.0}, ip_adapter={"/i": 1.0}, width=64, height=64)
    with FakeHost(config) as host:
        page = tabs(host.url)
        expect(page.locator("#control_image")).to_be_attached()
        bring(page, "drop", "[data-drop=control_image] .drop", "edges.png", png(colour="white"))
        expect(page.locator("#control_image-chosen")).to_contain_text("edges.png")
        page.locator("#ip_image").focus()
        bring(page, "paste", "#ip_image", "style.png", png(colour="green"))
        expect(page.locator("#ip_image-chosen")).to_contain_text("style.png")
        bring(page, "drop", "[data-drop=control_image]", "notes.txt", b"no picture")
        expect(page.locator("#control_image-problem")).to_contain_text("is not a picture")
        make(page, positive="a", steps=1)
        assert host.seen[0].control_image == png(colour="white")
        assert host.seen[0].ip_image == png(colour="green")


def test_the_frames_of_a_video_are_several_pictures_in_the_order_of_their_names(tabs: Any) -> None:
    with FakeHost(config_of("ad", width=64, height=64)) as host:
        page = tabs(host.url)
        colours = ("red", "green", "blue", "white")
        given = [file(f"frame{number}.png", png((64, 64), colours[number - 8])) for number in (9, 10, 8)]
        page.locator("#image").set_input_files(given)
        expect(page.locator("#image-chosen span")).to_have_text(
            [re.compile(f"frame{n}.png") for n in (8, 9, 10)]
        )
        expect(page.locator("#frames")).to_have_value("3")
        bring(page, "drop", "[data-drop=image]", "frame11.png", png((64, 64), "white"))
        expect(page.locator("#frames")).to_have_value("4")
        make(page, positive="a", steps=1)
        assert host.seen[0].image == [png((64, 64), colour) for colour in colours]
        assert host.seen[0].frames == 4
        page.get_by_role("button", name="Use these settings").click()
        expect(page.locator("#image-chosen span")).to_have_count(4)


@both
def test_prompts_are_queued_while_one_draws(host: DrawingHost, tabs: Any, screen: Any) -> None:
    page = tabs(host.url, **screen)
    fill(page, positive="hold", steps=2)
    page.locator("#generate").click()
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))
    for prompt in ("second", "<b>third</b>", "fourth"):
        fill(page, positive=prompt)
        page.locator("#generate").click()
    expect(page.locator("#mine .title")).to_have_text(["hold", "second", "<b>third</b>", "fourth"])
    page.get_by_role("button", name="Cancel: second").click()
    expect(page.locator("#status")).to_have_text("Cancelled.")
    page.get_by_role("button", name="Remove: fourth").click()
    expect(page.locator("#mine .title")).to_have_text(["hold", "<b>third</b>", "second"])
    assert no_sideways_scroll(page)
    host.go_on.set()
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#running")).to_be_hidden()
    assert [request.positive for request in host.seen] == ["hold", "<b>third</b>"]
    expect(page.locator("#shown img")).to_have_attribute("alt", "<b>third</b>")


def test_a_restart_of_the_host_is_waited_out(tabs: Any, tmp_path: Any) -> None:
    host = FakeHost(config_of(state_dir=str(tmp_path / "state")))
    page = tabs(host.url)
    fill(page, positive="hold", steps=2)
    page.locator("#generate").click()
    wait_for(lambda: host.seen)
    host.die()
    expect(page.locator("#status")).to_have_text("The host is away; this request waits for it.")
    with FakeHost(replace(host.config, port=host.server.port)) as again:
        again.go_on.set()
        expect(page.locator("#status")).to_have_text("Done.")
        expect(page.locator("#facts")).to_contain_text(f"Seed {host.seen[0].seed} ")


def test_several_pictures_are_one_request(host: DrawingHost, tabs: Any) -> None:
    page = tabs(host.url)
    posted = []
    page.on("request", lambda asked: posted.append(asked.url) if asked.method == "POST" else None)
    host.step_seconds = 0.2
    fill(page, positive="slow", steps=3, seed=40, pictures=3)
    page.locator("#generate").click()
    expect(page.locator("#doing")).to_have_text(re.compile(r"Picture 2 of 3, step \d of 3"))
    expect(page.locator("#status")).to_have_text("3 pictures are done.")
    assert page.locator("#history button").all_inner_texts() == ["Seed 40", "Seed 41", "Seed 42"]
    assert posted == [f"{host.url}/generate"]


def test_the_history_and_its_settings_outlive_a_reload(host: DrawingHost, tabs: Any) -> None:
    page = tabs(host.url, **PHONE)
    page.locator("#image").set_input_files([file("start.png", png((64, 64)))])
    painter = Painter(page, (64, 64))
    painter.by_mouse((10, 10), (50, 50))
    painter.use()
    make(page, positive="<i>first</i>", negative="blur", steps=3, cfg=4, seed=11, pictures=2, strength=0.5)
    page.get_by_role("button", name="Remove start.png").click()
    make(page, positive="second", steps=2, seed=5, pictures=1)
    page.reload()
    expect(page.locator("#history li")).to_have_count(3)
    expect(page.locator("#positive")).to_have_value("")
    page.locator("#history button").nth(2).click()
    expect(page.locator("#facts")).to_contain_text("Seed 12 · 64 × 64 · 3 steps")
    page.get_by_role("button", name="Use these settings").click()
    expect(page.locator("#positive")).to_have_value("<i>first</i>")
    expect(page.locator("#mask-chosen")).to_contain_text("painted mask")
    page.locator("#generate").click()
    wait_for(lambda: len(host.seen) == 4)
    assert host.seen[3].model_dump() == host.seen[0].model_dump() | {"seed": 12, "pictures": 1}
    expect(page.locator("#history li")).to_have_count(4)
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#history li")).to_have_count(3)
    other = page.context.new_page()
    other.goto(host.url)
    other.locator("#history button").nth(2).click()
    expect(other.locator("#facts")).to_contain_text("Seed 12 ")
    page.bring_to_front()
    page.locator("#history button").nth(1).click()
    expect(page.locator("#facts")).to_contain_text("Seed 11 ")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(other.locator("#history li")).to_have_count(2)
    other.bring_to_front()
    other.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#history li")).to_have_count(1)
    page.reload()
    expect(page.locator("#history button")).to_have_text(["Seed 5"])
    page.get_by_role("button", name="Clear…").click()
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#history-card")).to_be_hidden()
    page.reload()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#history-card")).to_be_hidden()


def test_a_browser_that_keeps_nothing_says_so(host: DrawingHost, tabs: Any) -> None:
    page = tabs(host.url)
    page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    page.reload()
    make(page, positive="a", steps=1)
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator("#history-note")).to_contain_text("until this page is closed")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#history-card")).to_be_hidden()


def test_a_file_of_the_page_gives_its_settings_and_the_same_pixels(host: DrawingHost, tabs: Any) -> None:
    page = tabs(host.url)
    make(page, positive="a red circle", negative="blur", steps=7, cfg=3.5, seed=99, width=128)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    made = download.value.path().read_bytes()
    page.reload()
    expect(page.locator("#history li")).to_have_count(1)
    bring(page, "drop", "#stage", "made.png", made)
    expect(page.locator("#status")).to_have_text("The form has the settings of made.png.")
    expect(page.locator("#positive")).to_have_value("a red circle")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_have_text("Done.")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == made


def test_settings_of_files_from_elsewhere(host: DrawingHost, tabs: Any) -> None:
    body = {"positive": "<b>bold</b>", "seed": 3, "prompt_syntax": "a1111", "image": "(left out)", "odd": 1}
    page = tabs(host.url)
    page.locator("#settings-file").set_input_files(
        [file("ours.png", png(texts=Metadata("", json.dumps(body))))]
    )
    expect(page.locator("#status")).to_contain_text("the Input image is not in the file")
    expect(page.locator("#status")).to_contain_text("odd is not taken by this host")
    expect(page.locator("#positive")).to_have_value("<b>bold</b>")
    expect(page.locator("#extras li span")).to_have_text(["prompt_syntax a1111"])
    make(page, steps=1)
    assert host.seen[0].prompt_syntax == "a1111" and host.seen[0].image is None
    page.get_by_role("button", name="Remove prompt_syntax").click()
    make(page)
    assert host.seen[1].prompt_syntax is None
    theirs = (
        "a (cat:1.2) <lora:ink:0.7>\nNegative prompt: dog\nSteps: 9, Sampler: Euler, CFG scale: 5.5, "
        "Seed: 17, Size: 96x64, Clip skip: 2"
    )
    bring(page, "drop", "#stage", "theirs.png", png(texts=Metadata(theirs, "")))
    expect(page.locator("#status")).to_have_text("The form has the settings of theirs.png.")
    make(page)
    seen = host.seen[2]
    assert (seen.positive, seen.negative, seen.steps, seen.cfg) == ("a (cat:1.2)", "dog", 9, 5.5)
    assert (seen.seed, seen.width, seen.height, seen.clip_skip) == (17, 96, 64, 1)
    assert (seen.prompt_syntax, seen.lora_scales) == ("a1111", {"ink": 0.7})
    huge = json.dumps({"seed": 2**60 + 1})
    for name, data, told in (
        ("bare.png", png(), "bare.png does not tell how it was made."),
        ("huge.png", png(texts=Metadata("", huge)), "The seed of huge.png is too large for this page."),
        ("notes.png", b"no picture", re.compile("^notes.png cannot be read: .*is not a picture")),
    ):
        bring(page, "drop", "body", name, data)
        expect(page.locator("#status")).to_have_text(told)
    assert Image.open(io.BytesIO(png(texts=Metadata("", huge)))).info[KEY] == huge


@both
def test_loras_by_name_with_scales(tabs: Any, tmp_path: Any, screen: Any) -> None:
    for name, word in (("ink", "in ink"), ("style/old film", "")):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"a": np.zeros(1, np.float32)}, path, {"modelspec.trigger_phrase": word} if word else {})
    config = config_of(lora_dir=(str(tmp_path),), lora={"/models/gloss.safetensors": 0.6})
    with FakeHost(config) as host:
        page = tabs(host.url, **screen)
        page.locator("#loras summary").click()
        options = page.locator("#lora-names option")
        expect(options).to_have_count(3)
        assert {one.get_attribute("value") for one in options.all()} == {"gloss", "ink", "style/old film"}
        fill(page, lora_scales="nothing")
        page.locator("#lora-add").click()
        expect(page.locator("#lora_scales-problem")).to_have_text("this host has no LoRA nothing")
        for name in ("ink", "gloss", "style/old film"):
            fill(page, lora_scales=name)
            page.locator("#lora_scales").press("Enter")
        assert not host.seen, "Enter in the list of LoRAs has sent the form"
        expect(page.get_by_label("Scale of gloss")).to_have_value("0.6")
        page.get_by_label("Scale of ink").fill("0.45")
        page.get_by_role("button", name="Remove style/old film").click()
        fill(page, positive="a cat")
        page.get_by_role("button", name="in ink", exact=True).click()
        assert no_sideways_scroll(page)
        page.locator("#generate").click()
        wait_for(lambda: host.seen)
        assert host.seen[0].positive == "a cat, in ink"
        loras = {
            name.split("/")[-1].removesuffix(".safetensors"): s
            for name, s in (host.seen[0].lora_scales or {}).items()
        }
        assert loras == {"ink": 0.45, "gloss": 0.6}
        page.get_by_label("Scale of ink").fill("")
        page.locator("#generate").click()
        expect(page.locator("#lora_scales-problem")).to_have_text("the scale of ink must be a number")


@both
def test_full_size_before_and_after_and_the_seed(host: DrawingHost, tabs: Any, screen: Any) -> None:
    page = tabs(host.url, permissions=["clipboard-read", "clipboard-write"], **screen)
    make(page, positive="first", steps=1, seed=21)
    expect(page.locator("#compare-row")).to_be_hidden()
    page.get_by_role("button", name="Start from this picture").click()
    expect(page.locator("#image-chosen")).to_contain_text("seed 21")
    make(page, positive="second", seed=22)
    before = page.locator("#shown .before")
    expect(before).to_have_css("clip-path", "inset(0px 100% 0px 0px)")
    fill(page, compare=40)
    expect(before).to_have_css("clip-path", "inset(0px 60% 0px 0px)")
    with Image.open(io.BytesIO(host.seen[1].images[0])) as start:
        assert start.size == (64, 64)
    page.get_by_role("button", name="Copy seed").click()
    expect(page.locator("#status")).to_have_text("Seed 22 is copied.")
    assert page.evaluate("() => navigator.clipboard.readText()") == "22"
    page.evaluate("() => navigator.clipboard.writeText('')")
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { configurable: true })")
    page.get_by_role("button", name="Copy seed").click()  # as on a page of http
    page.evaluate("() => delete navigator.clipboard")
    assert page.evaluate("() => navigator.clipboard.readText()") == "22"
    page.get_by_role("button", name="Full size").click()
    expect(page.locator("#full-facts")).to_contain_text("Seed 22")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#full-facts")).to_contain_text("Seed 21")
    expect(page.locator("#full-older")).to_be_disabled()
    page.get_by_role("button", name="Every pixel").click()
    assert page.locator("#full-picture img").evaluate("(image) => image.width") == 64
    page.keyboard.press("Escape")
    expect(page.locator("#full")).to_be_hidden()
    expect(page.locator("#facts")).to_contain_text("Seed 21")


def test_the_stage_stays_on_a_picture_of_the_history_until_asked_to_watch(
    host: DrawingHost, tabs: Any
) -> None:
    page = tabs(host.url)
    make(page, positive="first", steps=1, seed=1)
    fill(page, positive="hold", steps=2, seed=2)
    page.locator("#generate").click()
    expect(page.locator("#doing")).to_have_text(re.compile("Step"))
    page.locator("#history button").click()
    expect(page.locator("#facts")).to_contain_text("Seed 1 ")
    host.queue.show_preview(1, 4, 2, b"\xff\0\0" * 8)
    expect(page.locator("#peek")).to_be_visible()
    expect(page.locator("#shown img.preview")).to_have_count(0)
    page.get_by_role("button", name="Watch").click()
    host.queue.show_preview(2, 4, 2, b"\0\xff\0" * 8)
    expect(page.locator("#shown img.preview")).to_be_visible()
    page.locator("#history button").click()
    host.go_on.set()
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#facts")).to_contain_text("Seed 1 ")


def test_sizes_of_the_type(tabs: Any) -> None:
    with FakeHost(config_of("sdxl")) as host:
        page = tabs(host.url)
        page.locator("#size").select_option("wide, 1344 × 768")
        assert (page.locator("#width").input_value(), page.locator("#height").input_value()) == (
            "1344",
            "768",
        )
        fill(page, height=800)
        expect(page.locator("#size")).to_have_value("")
        fill(page, height=1344, width=768)
        expect(page.locator("#size")).to_have_value("768 1344")


def test_a_video_has_the_shape_of_the_picture_that_it_begins_with(tabs: Any) -> None:
    with FakeHost(config_of("wani2v", backend="xdit", width=64, height=64)) as host:
        page = tabs(host.url)
        bring(page, "drop", "[data-drop=image]", "wide.png", png((256, 64)))
        expect(page.locator("#width")).to_have_value("128")
        expect(page.locator("#height")).to_have_value("32")


def test_sizes_are_the_ones_that_sdxl_was_trained_with_and_never_more_pixels() -> None:
    wide = [(1152, 896), (1216, 832), (1344, 768)]
    assert set(sizes(1024, 1024, 8)) == {(1024, 1024), *wide, *((h, w) for w, h in wide)}
    for own, multiple in (
        ((1024, 576), 8),
        ((128, 128), 8),
        ((720, 480), 32),
        ((16, 16), 16),
        ((512, 512), 16),
    ):
        found = sizes(*own, multiple)
        assert found[0] == own and len(set(found)) == len(found)
        for width, height in found[1:]:
            assert width * height <= own[0] * own[1] and not width % multiple and not height % multiple
