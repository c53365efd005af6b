"""shared.api.metadata: a picture's file says what made it, so that the same bytes can be had again."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import safetensors.numpy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared.api import media
from shared.api.codecs import LEFT_OUT
from shared.api.embedded import KEY, Metadata
from shared.api.hashes import FileHashes
from shared.api.jobs import Order
from shared.api.media import encode_image, encode_video
from shared.api.metadata import body_of, infotext, parse_infotext
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.models import MODELS
from tests.httphost import FakeHost, config_of, picture

UNICODE, EXIF, USER_COMMENT, DESCRIPTION = b"UNICODE\0", 0x8769, 0x9286, 0x010E
BODY = {"positive": "a red circle, 8k", "negative": "blurry", "steps": 2, "cfg": 7.5, "seed": 3}
BODY |= {"width": 24, "height": 16}
TEXT = (
    "a red circle, 8k\nNegative prompt: blurry\n"
    "Steps: 2, Sampler: Automatic, CFG scale: 7.5, Seed: 3, Size: 24x16, Model: demo"
)
LONG = 20_000  # characters, the most that a prompt may have


class DrawingHost(FakeHost):
    """Its pixels follow from all that changes a picture: a body that lacks some of it gives others."""

    def _reply(self, request: GenerateRequest) -> Reply:
        changing = request.model_dump(exclude={"pictures", "metadata", "return_latent", "output_format"})
        seed = int.from_bytes(hashlib.sha256(repr(changing).encode()).digest()[:8])
        size = (request.height or 64, request.width or 64, 3)
        rng = np.random.default_rng(seed)
        video = self.config.spec.output == "video"
        frames = (request.frames or 1) if video else 1
        made = super()._reply(request)
        made.width, made.height = size[1], size[0]
        if made.format == "latent":
            return made
        made.output = []
        made.pictures = [Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for _ in range(frames)]
        made.fps = request.fps if video else None
        return made


@pytest.fixture
def host() -> Any:
    with DrawingHost(config_of(checkpoint="/models/demo")) as host:
        yield host


def files(answer: requests.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    output = answer.json()["output"]
    return [base64.b64decode(file) for file in (output if isinstance(output, list) else [output])]


def texts(file: bytes) -> tuple[str | None, str | None]:
    """A1111's text and the body of a file, read as the formats' standards have them."""
    image = Image.open(io.BytesIO(file))
    if image.format == "PNG":
        assert isinstance(image.info.get(KEY, ""), str)
        return image.info.get("parameters"), image.info.get(KEY)
    exif = image.getexif()
    comment = exif.get_ifd(EXIF).get(USER_COMMENT)
    if comment is not None:
        assert comment.startswith(UNICODE)
        comment = comment[8:].decode("utf-16-be")
    return comment, exif.get(DESCRIPTION)


def body_in(file: bytes) -> dict[str, Any]:
    body = texts(file)[1]
    assert body is not None and body.isascii()
    return json.loads(body)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_says_what_made_it_and_gives_the_same_bytes_again(host: DrawingHost, format: str) -> None:
    [file] = files(host.generate(BODY | {"output_format": format}))
    assert texts(file)[0] == TEXT
    assert body_in(file) == BODY | {"pictures": 1, "output_format": format}
    assert files(host.generate(body_in(file))) == [file]


def test_what_was_drawn_or_came_from_the_launch_is_filled_in() -> None:
    with DrawingHost(config_of(checkpoint="/models/demo.safetensors", width=40, height=48)) as host:
        answer = host.generate({"positive": "x"})
        [file] = files(answer)
        body = body_in(file)
        assert (body["seed"], body["width"], body["height"]) == (answer.json()["seed"], 40, 48)
        assert body["steps"] == host.config.spec.steps
        assert files(host.generate(body)) == [file]
        assert "Size: 40x48, Model: demo" in (texts(file)[0] or "")


def test_several_pictures_have_each_their_own_seed(host: DrawingHost) -> None:
    made = files(host.generate(BODY | {"seed": 2**64 - 1, "pictures": 3}))
    seeds = [2**64 - 1, 0, 1]
    assert [body_in(file)["seed"] for file in made] == seeds
    for file, seed in zip(made, seeds, strict=True):
        assert f"Seed: {seed}, " in (texts(file)[0] or "") and body_in(file)["pictures"] == 1
        assert files(host.generate(body_in(file))) == [file]


def test_raw_bytes_carry_it_too(host: DrawingHost) -> None:
    for format in ("png", "jpeg", "webp"):
        raw = host.generate(BODY, headers={"Accept": f"image/{format}"}).content
        assert files(host.generate(body_in(raw))) == [raw] and texts(raw)[0] == TEXT


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_metadata_false_leaves_it_out(host: DrawingHost, format: str) -> None:
    [file] = files(host.generate(BODY | {"output_format": format, "metadata": False}))
    assert texts(file) == (None, None) and b"red circle" not in file
    with_it = files(host.generate(BODY | {"output_format": format, "metadata": True}))[0]
    assert Image.open(io.BytesIO(file)).tobytes() == Image.open(io.BytesIO(with_it)).tobytes()
    refused = host.generate(BODY | {"metadata": "no"})
    assert refused.status_code == 400 and refused.json()["errors"][0]["field"] == "metadata"


PROMPTS = ["a\nb, c: d", "кот 猫 \N{CAT FACE}", 'é "quoted" \\ <b>', "a\0b", "Negative prompt", " spaces "]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_any_words(host: DrawingHost, prompt: str, format: str) -> None:
    [file] = files(host.generate(BODY | {"positive": prompt, "output_format": format}))
    text, body = texts(file)[0] or "", body_in(file)
    assert text == TEXT.replace("a red circle, 8k", prompt.replace("\0", "")).strip()
    assert body["positive"] == prompt and files(host.generate(body)) == [file]


@pytest.mark.parametrize("letter", ["a", "é", "猫", "\N{CAT FACE}"])
@pytest.mark.parametrize("format", ["png", "webp"])
def test_the_longest_prompts(host: DrawingHost, letter: str, format: str) -> None:
    asked = BODY | {"positive": letter * LONG, "negative": letter * LONG, "output_format": format}
    answer = host.generate(asked)
    [file] = files(answer)
    assert (texts(file)[0] or "").startswith(f"{letter * LONG}\nNegative prompt: {letter * LONG}\nSteps: 2")
    assert files(host.generate(body_in(file))) == [file] and "warnings" not in answer.json()


@pytest.mark.parametrize(
    ("positive", "negative", "left_out"),
    [
        ("a" * 20_000, "", None),
        ("a" * 20_000, "b" * 10_000, KEY),
        ("a" * LONG, "b" * LONG, f"{KEY} and parameters"),
        ("猫" * 20_000, "", KEY),
    ],
)
def test_what_a_jpeg_cannot_hold_is_told(
    host: DrawingHost, positive: str, negative: str, left_out: str | None
) -> None:
    asked = BODY | {"positive": positive, "negative": negative, "output_format": "jpeg", "pictures": 2}
    answer = host.generate(asked)
    for file in files(answer):
        text, body = texts(file)
        assert (body is None) == (left_out is not None)
        assert (text is None) == (left_out is not None and left_out.endswith("parameters"))
    told = f"the prompts are too long for a JPEG's metadata; left out: {left_out}"
    assert answer.json().get("warnings") == (None if left_out is None else [told])


def tensor(name: str) -> str:
    return base64.b64encode(safetensors.numpy.save({name: np.ones((1, 4, 8, 8), np.float32)})).decode()


def test_pictures_and_tensors_are_left_out_and_refused_by_name_until_given(host: DrawingHost) -> None:
    inputs = {"latent": tensor("latent"), "positive_embeds": tensor("embeds")}
    asked = {k: v for k, v in BODY.items() if k != "positive"} | {"strength": 0.5} | inputs
    [file] = files(host.generate(asked))
    body = body_in(file)
    assert {name for name, value in body.items() if value == LEFT_OUT} == set(inputs)
    assert len(file) < 5000 and "Denoising strength: 0.5" in (texts(file)[0] or "")
    refused = host.generate(body)
    assert refused.status_code == 400
    problem = "was left out of the picture's metadata: give it again"
    assert {e["field"]: e["problem"] for e in refused.json()["errors"]} == dict.fromkeys(inputs, problem)
    assert files(host.generate(body | inputs)) == [file]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_from_a_picture_and_back(host: DrawingHost, format: str) -> None:
    """With the picture and the mask given again the same bytes, whether or not the strength was named."""
    given = {"image": base64.b64encode(picture(size=(24, 16))).decode()}
    masked = given | {"mask": base64.b64encode(picture("BMP", (24, 16))).decode()}
    for pictures, own, told in (
        (given, {}, "0.8"),
        (given, {"strength": 0.4}, "0.4"),
        (masked, {}, "1"),
        (masked, {"strength": 0.75}, "0.75"),
    ):
        [file] = files(host.generate(BODY | {"output_format": format} | pictures | own))
        body = body_in(file)
        assert {name for name, value in body.items() if value == LEFT_OUT} == set(pictures)
        assert parse_infotext(texts(file)[0] or "")["Denoising strength"] == told
        assert files(host.generate(body | pictures)) == [file]
        assert host.generate(body).status_code == 400


def test_nothing_of_the_server_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "secret-folder"
    for name in ("style", "a/same", "b/same"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, path)
    lora, vae = f"{folder}/launch.safetensors", "/secret-vae/v"
    config = config_of(
        checkpoint="/secret-models/demo", lora_dir=[str(folder)], api_key="k3y", lora={lora: 1.0}, vae=vae
    )
    scales = {"style": 0.5, lora: 0.8, f"{folder}/a/same.safetensors": 1.0}
    with DrawingHost(config) as host:
        key = {"Authorization": "Bearer k3y"}
        for format in ("png", "jpeg", "webp"):
            asked = BODY | {"lora_scales": scales, "output_format": format}
            [file] = files(host.generate(asked, headers=key))
            assert b"secret" not in file and b"k3y" not in file and str(tmp_path).encode() not in file
            text, body = texts(file)
            assert text is not None and body is not None
            assert not any(word in text + body for word in ("secret", "k3y", str(tmp_path)))
            names = {"style": 0.5, "launch": 0.8, "a/same": 1.0}
            assert json.loads(body)["lora_scales"] == names
            assert text.startswith("a red circle, 8k <lora:style:0.5> <lora:launch:0.8> <lora:a/same:1>\n")


@pytest.mark.parametrize("type", sorted(MODELS))
def test_a_body_of_every_type_is_the_same_request(type: str) -> None:
    config = config_of(type)
    asked: dict[str, Any] = {"cfg": 3}
    if config.spec.image == "needed":
        asked["image"] = base64.b64encode(picture(size=(64, 64))).decode()
    request = check_request(asked, config)
    body = json.loads(json.dumps(body_of(request, request.seed or 0, config)))
    again = check_request(body | {k: v for k, v in asked.items() if k == "image"}, config)
    assert again == request


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("k_dpmpp_2m", "Sampler: DPM++ 2M, Schedule type: Karras, "),
        ("euler_a", "Sampler: Euler a, CFG"),
        ("ddim_trailing", "Sampler: DDIM, Schedule type: SGM Uniform, "),
        ({"scheduler": "tcd", "eta": 0.3}, "Sampler: TCD, CFG"),
        ("DDIMScheduler", "Sampler: DDIMScheduler, CFG"),
    ],
)
def test_schedulers_by_a1111s_names(host: DrawingHost, scheduler: Any, words: str) -> None:
    [file] = files(host.generate(BODY | {"scheduler": scheduler}))
    assert words in (texts(file)[0] or "") and body_in(file)["scheduler"] == scheduler
    with DrawingHost(config_of(scheduler=scheduler)) as other:
        assert words in (texts(files(other.generate(BODY))[0])[0] or "")


def test_a_name_with_commas_is_quoted_as_a1111_does(tmp_path: Path) -> None:
    config = config_of(checkpoint="/models/a, b: c")
    request = check_request(BODY | {"clip_skip": 1}, config)
    hashes = FileHashes(tmp_path)
    text = infotext(Order(request), Reply([], "png", 3, 24, 16, 2), config, hashes)
    assert text.endswith('Size: 24x16, Model: "a, b: c", Clip skip: 2')
    assert parse_infotext(text)["Model"] == "a, b: c"


def test_the_other_apis_carry_it_too(host: DrawingHost) -> None:
    key = "multigpu_diffusion"
    openai = host.post("/v1/images/generations", json={"prompt": "x", "n": 2, "size": "32x32"}).json()
    for made in openai["data"]:
        file = base64.b64decode(made["b64_json"])
        assert body_in(file)["seed"] == made["seed"] and files(host.generate(body_in(file))) == [file]
    asked = {"prompt": "(a:1.2) <lora:s:0.5>", "sampler_name": "DPM++ 2M", "scheduler": "Karras", "n_iter": 2}
    answer = host.post("/sdapi/v1/txt2img", json=asked).json()
    made = [base64.b64decode(image) for image in answer["images"]]
    assert json.loads(answer["info"])["infotexts"] == [texts(file)[0] for file in made]
    for file in made:
        assert files(host.generate(body_in(file))) == [file]
        assert (texts(file)[0] or "").startswith("(a:1.2)  <lora:s:0.5>\nSteps: ")
        assert body_in(file)["prompt_syntax"] == "a1111"
    off = {"prompt": "x", "override_settings": {"enable_pnginfo": False}}
    [image] = host.post("/sdapi/v1/txt2img", json=off).json()["images"]
    assert key.encode() not in base64.b64decode(image)


def test_frames_and_moving_webp_carry_it_and_other_videos_do_not() -> None:
    with DrawingHost(config_of("ad", motion_adapter="/m")) as host:
        asked = BODY | {"frames": 3}
        for format, count in (("png", 3), ("webp", 1)):
            made = files(host.generate(asked | {"output_format": format}))
            assert len(made) == count
            for file in made:
                assert body_in(file)["frames"] == 3 and (texts(file)[0] or "").startswith("a red circle")
                assert files(host.generate(body_in(file))) == made
        for format in ("gif", "mp4"):
            [file] = files(host.generate(asked | {"output_format": format}))
            assert b"red circle" not in file


@pytest.mark.parametrize("encoder", ["imagecodecs", "pillow"])
def test_png_texts_stand_before_the_pixels_and_the_rest_is_as_it_was(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if encoder == "pillow":
        monkeypatch.setattr(media, "imagecodecs", None)
    image = Image.effect_noise((40, 24), 50).convert("RGB")
    bare, made = encode_image(image, "png"), encode_image(image, "png", Metadata("猫\nSteps: 1", "{}"))
    kinds, at = [], 8
    while at < len(made):
        length, kind = struct.unpack(">I4s", made[at : at + 8])
        kinds.append(kind.decode())
        at += length + 12
    assert kinds[:3] == ["IHDR", "iTXt", "tEXt"] and kinds[-1] == "IEND"
    assert len(made) > len(bare) and made.endswith(bare[33:]) and made.startswith(bare[:33])
    Image.open(io.BytesIO(made)).verify()  # the checksums


def test_a_picture_with_it_is_still_a_picture_to_send(host: DrawingHost) -> None:
    made = [encode_image(Image.new("RGB", (16, 24), "red"), f, Metadata("x", "{}")) for f in ("png", "jpeg")]
    made += [encode_video([Image.new("RGB", (16, 24), c) for c in ("red", "blue")], "webp", 8, None)]
    for file in made:
        assert media.decode_image(file).size == (16, 24)


# POST /sdapi/v1/png-info


def info_of(host: FakeHost, image: Any) -> requests.Response:
    data = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    return host.post("/sdapi/v1/png-info", json={"image": data, "unknown": 1})


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_png_info_reads_what_was_written(host: DrawingHost, format: str) -> None:
    [file] = files(host.generate(BODY | {"output_format": format, "positive": "a\nкот, c"}))
    uri = f"data:image/{format};base64,{base64.b64encode(file).decode()}"
    for image in (file, uri):
        answer = info_of(host, image)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert set(told) == {"info", "items", "parameters"}
        assert told["info"] == texts(file)[0]
        assert files(host.generate(json.loads(told["items"][KEY]))) == [file]
        assert told["parameters"] == {
            "Prompt": "a\nкот, c",
            "Negative prompt": "blurry",
            "Steps": "2",
            "Sampler": "Automatic",
            "CFG scale": "7.5",
            "Seed": "3",
            "Size-1": "24",
            "Size-2": "16",
            "Model": "demo",
            "Clip skip": "1",
        }


def test_png_info_needs_no_model_and_tells_nothing_where_there_is_nothing() -> None:
    with FakeHost(state="loading") as host:
        for format in ("PNG", "JPEG", "WEBP", "BMP"):
            assert info_of(host, picture(format)).json() == {"info": "", "items": {}, "parameters": {}}


def test_png_info_of_files_by_others(host: DrawingHost) -> None:
    info, out = PngInfo(), io.BytesIO()
    info.add_text("parameters", 'x\nSteps: 1, Seed: 2, Size: 8x9, Lora hashes: "a: 1, b: 2", Clip skip: 2')
    info.add_itxt("Comment", "кот")
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info, dpi=(72, 72))
    told = info_of(host, out.getvalue()).json()
    assert told["items"] == {"Comment": "кот"}
    values = {"Steps": "1", "Seed": "2", "Size-1": "8", "Size-2": "9", "Lora hashes": "a: 1, b: 2"}
    assert told["parameters"] == values | {"Prompt": "x", "Negative prompt": "", "Clip skip": "2"}
    for comment, text in ((b"ASCII\0\0\0hello", "hello"), (bytes(8) + b"hi", "hi"), (b"bare", "bare")):
        exif, out = Image.Exif(), io.BytesIO()
        exif.get_ifd(EXIF)[USER_COMMENT] = comment
        exif[DESCRIPTION] = "a holiday"
        Image.new("RGB", (8, 8)).save(out, "JPEG", exif=exif)
        assert info_of(host, out.getvalue()).json() == {
            "info": text,
            "items": {},
            "parameters": {"Prompt": text, "Negative prompt": "", "Clip skip": "1"},
        }
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff")
    assert info_of(host, out.getvalue()).json()["info"] == ""


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"image": "eHl6"}, 400, "image: is not a picture; allowed: PNG, JPEG, WebP, BMP"),
        ({"image": "###"}, 400, "image: is not valid base64"),
        ({"image": 7}, 400, "image: must be base64 text, got int"),
        ({}, 400, "image: must be base64 text, got NoneType"),
        ([], 400, "the body must be a JSON object, got list"),
    ],
)
def test_png_infos_faults_in_a1111s_form(host: DrawingHost, body: Any, status: int, words: str) -> None:
    answer = host.post("/sdapi/v1/png-info", json=body)
    assert answer.status_code == status and words in answer.json()["detail"]
    assert set(answer.json()) == {"error", "detail", "body", "errors"}


def test_png_info_takes_bodies_as_large_as_the_other_picture_routes(host: DrawingHost) -> None:
    noise = encode_image(Image.effect_noise((512, 512), 90).convert("RGB"), "png", Metadata("x", "{}"))
    assert len(noise) > 1 << 17 and info_of(host, noise).json()["info"] == "x"
    with FakeHost(config_of(api_key="k")) as closed:
        assert info_of(closed, noise).status_code == 401
    assert host.post("/sdapi/v1/png-info", data=b"x").status_code == 415


@pytest.mark.parametrize("part", ["a", " ", ",", "ab:", 'ab: "', ',ab:"\\\\', ",ab:1", "\\"])
def test_a_long_line_is_taken_apart_in_a_moment(part: str) -> None:
    began = time.process_time()
    parse_infotext("x\n" + part * (1_000_000 // len(part)))
    assert time.process_time() - began < 5
