"""Parsing and checking of requests: examples, and properties over any JSON and any damaged bytes."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from shared.api.codecs import picture_size
from shared.api.faults import RequestError
from shared.api.media import decode_image, encode_image
from shared.api.parsing import STRENGTH, check_request, parse_request
from shared.api.replies import Reply
from shared.api.requests import COMMON_FIELDS, GenerateRequest
from shared.api.warned import collecting_warnings
from shared.backends import BACKENDS
from shared.launch.flags import HostConfig
from shared.models import MODELS
from tests.httphost import config_of, picture

CONFIG = config_of(max_pixel_steps=10**15)
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
settings.register_profile("requests", deadline=None)
settings.load_profile("requests")
FIELDS = sorted(GenerateRequest.model_fields)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def tensor(**tensors: Any) -> str:
    import numpy as np

    return b64(safetensors.numpy.save({k: np.asarray(v, dtype="float32") for k, v in tensors.items()}))


def parse(data: dict[str, Any], config: HostConfig = CONFIG) -> GenerateRequest:
    return parse_request(json.dumps(data).encode(), config)


def refused(data: dict[str, Any], config: HostConfig = CONFIG) -> tuple[int, dict[str, str]]:
    with pytest.raises(RequestError) as caught:
        parse(data, config)
    return caught.value.status, {p.field: p.problem for p in caught.value.problems}


# Properties.


@given(ANY_JSON)
def test_any_json_value_is_parsed_or_refused(value: Any) -> None:
    try:
        assert isinstance(parse_request(json.dumps(value).encode(), CONFIG), GenerateRequest)
    except RequestError as error:
        assert error.status in (400, 422) and error.problems and str(error)


def test_a_whole_number_may_be_written_as_any_number_of_json() -> None:
    given = b'{"steps": 4.0, "seed": 1e3, "width": 128.0, "cfg": 3.0, "scheduler": {"scheduler": "dpmpp_2m", '
    read = parse_request(given + b'"solver_order": 2.0}}', CONFIG)
    assert (read.steps, read.seed, read.width, read.cfg) == (4, 1000, 128, 3.0)
    assert read.scheduler == {"scheduler": "dpmpp_2m", "solver_order": 2}
    assert all(type(value) is int for value in (read.steps, read.seed, read.scheduler["solver_order"]))
    for wrong in (4.5, True, "4", 1e300, [4]):
        status, problems = refused({"steps": wrong})
        assert status == 400 and list(problems) == ["steps"] and str(wrong) in problems["steps"]


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    try:
        parse_request(body, CONFIG)
    except RequestError as error:
        assert error.status in (400, 422)


COMPANIONS = {"image", "image_scale", "ip_image_scale", "control_image_scale", "denoising_end"} | set(
    STRENGTH
)


def root(field: str, data: dict[str, Any]) -> str:
    """The request's field that a problem is about: "lora_scales" of "lora_scales.path"."""
    return field if field in data else field.split(".")[0]


@given(
    st.dictionaries(
        st.sampled_from(FIELDS) | st.text(min_size=1, max_size=10), ANY_JSON, min_size=1, max_size=8
    ),
    st.sampled_from(sorted(MODELS)),
)
@example({"add_noise": True, "strength": []}, "ad")
def test_every_fault_is_named(data: dict[str, Any], type: str) -> None:
    """What is refused alone is refused, by the same name, among others."""
    backend = "asyncdiff" if type in BACKENDS["asyncdiff"].types else "xdit"
    config = config_of(type, backend=backend, max_pixel_steps=10**15)
    try:
        parse(data, config)
        named: set[str] = set()
    except RequestError as error:
        named = {root(p.field, data) for p in error.problems}
        assert named <= set(data) | {"image", *STRENGTH, "denoising_start", "denoising_end"}
    for name, value in data.items():
        try:
            parse({name: value}, config)
        except RequestError as error:
            alone = {root(p.field, data) for p in error.problems}
            # What a missing or too late companion causes is gone, or told of the companion, when it is given.
            assert alone - COMPANIONS <= named


VALID: dict[str, st.SearchStrategy[Any]] = {
    "positive": st.text(min_size=1, max_size=50),
    "negative": st.text(min_size=1, max_size=50),
    "steps": st.integers(1, 1000),
    "cfg": st.floats(0, 100),
    "seed": st.integers(0, 2**64 - 1),
    "clip_skip": st.integers(0, 12),
    "width": st.integers(2, 1024).map(lambda n: 8 * n),
    "height": st.integers(2, 1024).map(lambda n: 8 * n),
    "denoising_start": st.floats(0.01, 0.5),
    "denoising_end": st.floats(0.6, 1),
    "scheduler": st.sampled_from(["euler", "k_euler", "DDIMScheduler", {"scheduler": "ddim", "eta": 1}]),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "latent"]),
    "latent": st.just(tensor(latent=[[1.0]])),
}


@given(st.fixed_dictionaries({}, optional=VALID))
def test_valid_requests_round_trip(data: dict[str, Any]) -> None:
    request = parse(data)
    for name, value in data.items():
        got = getattr(request, name)
        assert (b64(got) if isinstance(got, bytes) else got) == value
    assert None not in (request.steps, request.cfg, request.seed, request.width, request.height)
    again = request.model_dump(exclude_none=True, exclude={"frames", "fps"})
    assert check_request(again, CONFIG) == request.model_copy(update={"frames": None, "fps": request.fps})


@settings(max_examples=60)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
def test_damaged_pictures_are_read_or_refused(format: str, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(picture(format, (20, 10)))
    for position, value in flips:
        data[position % len(data)] = value
    damaged = bytes(data[: len(data) - cut % len(data)])
    config = config_of(ip_adapter={"x": 1.0})
    try:
        request = parse({"ip_image": b64(damaged)}, config)
        assert request.ip_image == damaged
    except RequestError as error:
        assert [p.field for p in error.problems] == ["ip_image"]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_tensors_are_read_or_refused(flips: list[tuple[int, int]]) -> None:
    data = bytearray(base64.b64decode(tensor(latent=[[1.0, 2.0]])))
    for position, value in flips:
        data[position % len(data)] = value
    try:
        parse({"latent": b64(bytes(data))})
    except RequestError as error:
        assert [p.field for p in error.problems] == ["latent"]


# Examples.


def test_null_and_the_empty_prompt_are_absent() -> None:
    request = parse({"positive": "", "steps": None, "image": None, "scheduler": ""})
    assert request.positive is None and request.image is None and request.scheduler is None
    assert request.steps == 30


def test_a_scheduler_may_come_as_json_text() -> None:
    assert parse({"scheduler": '{"scheduler": "ddim", "eta": 0}'}).scheduler == {
        "scheduler": "ddim",
        "eta": 0,
    }
    assert "not valid JSON" in refused({"scheduler": "{ddim"})[1]["scheduler"]


def test_a_drawn_seed_is_told_and_changes() -> None:
    seeds = {parse({"seed": -5}).seed for _ in range(5)} | {parse({}).seed for _ in range(5)}
    assert len(seeds) == 10 and all(0 <= s < 2**32 for s in seeds if s is not None)


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        ({"steps": 1001}, "steps", "at most 1000, got 1001"),
        ({"steps": 1.5}, "steps", "integer"),
        ({"positive": 5}, "positive", "string, got 5"),
        ({"positive": "x" * 20_001}, "positive", "20000"),
        ({"seed": 2**64}, "seed", "below 18446744073709551616"),
        ({"width": 100}, "width", "multiple of 8"),
        ({"denoise": 0.5, "strength": 0.4}, "denoise", "differ: 0.4 and 0.5"),
        ({"strength": 0.5, "denoising_start": 0.4}, "strength", "not both"),
        (
            {"strength": 0.5},
            "strength",
            "below 1 needs an image or a latent to start from; got 0.5 and neither",
        ),
        ({"strength": 0, "latent": tensor(latent=[1])}, "strength", "above 0"),
        ({"strength": 1.1}, "strength", "at most 1, got 1.1"),
        ({"add_noise": True, "latent": tensor(latent=[1])}, "add_noise", "needs latent and strength"),
        ({"pictures": 0}, "pictures", "at least 1, got 0"),
        ({"pictures": 17}, "pictures", "at most 16, got 17"),
        ({"denoising_start": 0.5, "denoising_end": 0.5}, "denoising_end", "above denoising_start 0.5"),
        ({"denoising_end": 0}, "denoising_end", "above denoising_start 0, got 0"),
        ({"denoising_start": 1.0}, "denoising_start", "below 1"),
        ({"sigmas": tensor(sigmas=[1]), "timesteps": tensor(timesteps=[1])}, "timesteps", "not both"),
        ({"positive": "a", "positive_embeds": tensor(embeds=[1])}, "positive_embeds", "not both"),
        ({"scheduler": {"name": "ddim"}}, "scheduler", 'under "scheduler"'),
        ({"scheduler": 3}, "scheduler", "a name"),
        ({"lora_scales": {"a": "b"}}, "lora_scales.a", "number"),
        ({"output_format": "bmp"}, "output_format", "'png', 'jpeg'"),
        ({"latent": tensor(other=[1])}, "latent", "'latent'; got 'other'"),
        ({"latent": b64(b"x" * 30)}, "latent", "safetensors"),
        ({"latent": tensor(latent=[])}, "latent", "empty"),
        ({"positive_embeds": tensor(embeds=[1], pooled=[1], more=[1])}, "positive_embeds", "'more'"),
        ({"image": "data:image/png," + b64(picture())}, "image", ";base64"),
        ({"image": ""}, "image", "empty"),
        ({"image": b64(picture("GIF"))}, "image", "allowed: PNG, JPEG, WebP, BMP"),
        ({"image": b64(picture("JPEG", (64, 64))[:-100])}, "image", "broken picture"),
    ],
)
def test_400(data: dict[str, Any], field: str, words: str) -> None:
    status, problems = refused(data)
    assert status == 400 and words in problems[field], problems


def test_what_is_allowed_is_what_this_launch_takes() -> None:
    status, problems = refused({"negativ": "blur", "width": 63}, config_of("wan", backend="xdit"))
    assert status == 400 and problems["width"] == "must be a multiple of 16 for wan, got 63"
    hint, allowed = problems["negativ"].split(" allowed: ")
    assert hint == "unknown field; did you mean negative?"
    assert "frames" in allowed.split(", ") and not {"clip_skip", "ip_image"} & set(allowed.split(", "))


def test_a_picture_with_too_many_pixels() -> None:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("1", (9000, 8000)).save(out, "PNG")
    status, problems = refused({"control_image": b64(out.getvalue())})
    assert (status, problems["control_image"]) == (400, "has 9000x8000 pixels, more than 8192x8192")


@pytest.mark.parametrize("name", ["image", "mask", "control_image", "ip_image"])
def test_a_picture_with_too_unlike_sides(name: str) -> None:
    """512 pixels wide, a picture of 1 x 67,000,000 would take 137 GB in Pillow's first pass."""
    for height, allowed in ((64 * 64, True), (64 * 64 + 1, False)):
        status, problems = refused({name: b64(picture(size=(64, height))), "cfg": -1})
        text = f"has 64x{height} pixels; one side may be at most 64 times the other"
        assert status == 400 and (problems.get(name) == text) is not allowed, problems


def test_a_list_of_pictures_has_a_bound_in_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.api.codecs.MAX_VIDEO_PIXELS", 24 * 16 * 3)
    one = b64(picture(size=(24, 16)))
    assert len(check_request({"image": [one] * 3}, config_of("ad")).images) == 3
    for name, type in (("image", "ad"), ("control_image", "sd1"), ("ip_image", "sd1")):
        status, problems = refused({name: [one] * 5}, config_of(type))
        text = "has 1536 pixels in its first 4 pictures; at most 1152 in all"
        assert (status, problems[name]) == (400, text)


def test_the_frames_of_a_list_count_as_work() -> None:
    config, frame = config_of("ad", max_pixel_steps=64 * 64 * 20 * 4), b64(picture(size=(64, 64)))
    assert len(check_request({"image": [frame] * 20, "steps": 4}, config).images) == 20
    status, problems = refused({"image": [frame] * 21, "steps": 4}, config)
    assert status == 422 and "64 x 64 pixels x 21 frames x 4 steps" in problems["steps"]


def test_of_an_animation_the_first_picture_counts_and_that_is_said() -> None:
    moving, still = b64(picture("WEBP", (64, 64), frames=3)), b64(picture("WEBP", (64, 64)))
    body = {"image": moving, "mask": moving, "control_image": [still, moving]}
    with collecting_warnings() as warnings:
        check_request(body, config_of("sd1", control_net={"/a": 1.0, "/b": 1.0}))
    text = "is an animation of 3 frames, of which only the first is used"
    assert warnings[:3] == [f"{name}: {text}" for name in ("image", "mask", "control_image")]
    assert len(warnings) == 3
    with collecting_warnings() as warnings:
        check_request({"image": moving}, config_of("ad"))
    assert warnings == []


def test_a_picture_may_not_be_scaled_beyond_the_largest_side() -> None:
    data = {"image": b64(picture(size=(4000, 100))), "image_scale": 800}
    status, problems = refused(data, config_of("sdup"))
    assert status == 400 and "larger than 8192 a side; got 800 percent" in problems["image_scale"]
    assert parse({**data, "image_scale": 200}, config_of("sdup")).image_scale == 200


def test_a_scale_needs_its_picture() -> None:
    status, problems = refused({"image_scale": 50}, config_of("svd"))
    assert (status, problems["image_scale"]) == (400, "there is no image to scale")
    status, problems = refused({"image_scale": 50}, config_of("hy"))
    assert status == 422 and "does not support image_scale" in problems["image_scale"]


def test_faults_of_form_and_of_the_launch_come_together() -> None:
    status, problems = refused({"steps": 0, "width": 1000, "frames": 3, "x": 1}, config_of("sd3"))
    assert status == 400 and set(problems) == {"steps", "width", "frames", "x"}


def test_a_faulty_field_causes_no_second_fault() -> None:
    status, problems = refused({"image": "?", "image_scale": 50}, config_of("svd"))
    assert status == 400 and set(problems) == {"image"}
    status, problems = refused({"denoising_start": "x", "denoising_end": 0.0})
    assert set(problems) == {"denoising_start"}


@pytest.mark.parametrize(
    ("config", "data", "field", "words"),
    [
        (config_of("svd"), {}, "image", "needs an input image"),
        (
            config_of("svd"),
            {"image": b64(picture()), "positive": "a"},
            "positive",
            "does not support positive",
        ),
        (CONFIG, {"ip_image": b64(picture())}, "ip_image", "without --ip_adapter"),
        (CONFIG, {"control_image": b64(picture())}, "control_image", "without --control_net"),
        (config_of(control_net={"x": 1.0}), {}, "control_image", "started with --control_net"),
        (
            config_of("svd"),
            {"image": b64(picture()), "clip_skip": 1},
            "clip_skip",
            "does not support clip_skip",
        ),
        (CONFIG, {"scheduler": "flow_euler"}, "scheduler", "type sd1 supports"),
        (CONFIG, {"output_format": "gif"}, "output_format", "png, jpeg, webp, latent; got 'gif'"),
        (config_of("ad"), {"output_format": "jpeg"}, "output_format", "mp4"),
    ],
)
def test_422(config: HostConfig, data: dict[str, Any], field: str, words: str) -> None:
    status, problems = refused(data, config)
    assert status == 422 and words in problems[field], problems


def test_base64_may_be_a_data_uri_and_wrapped() -> None:
    config = config_of(ip_adapter={"x": 1.0})
    data = picture("JPEG", (30, 20))
    text = "data:image/jpeg;base64," + base64.encodebytes(data).decode()
    request = parse({"ip_image": text}, config)
    assert request.ip_image == data and picture_size(data) == (30, 20)


def test_accept_gives_the_format_where_the_body_does_not() -> None:
    assert parse_request(b"{}", CONFIG).output_format == "png"
    assert parse_request(b"{}", CONFIG, "jpeg").output_format == "jpeg"
    assert parse_request(b'{"output_format": "webp"}', CONFIG, None).output_format == "webp"


@pytest.mark.parametrize("type", sorted(MODELS))
def test_every_type_knows_its_fields(type: str) -> None:
    assert MODELS[type].fields | COMMON_FIELDS <= set(FIELDS)


def test_reply_as_json() -> None:
    one = Reply([b"a"], "png", 1, 8, 8, 2, {"total": 1, "denoise": 1, "decode": 0}, latent=b"l")
    answer = one.answer()
    assert (answer["output"].data, answer["latent"].data, answer["is_image"]) == (b"a", b"l", True)
    two = Reply([b"a", b"b"], "png", 1, 8, 8, 2, {"total": 1, "denoise": 1, "decode": 0})
    assert [file.data for file in two.answer()["output"]] == [b"a", b"b"] and two.answer()["latent"] is None


def test_encoding_counts_as_decoding() -> None:
    from PIL import Image

    seconds = {"total": 3.0, "denoise": 2.0, "decode": 1.0}
    reply = Reply([], "png", 1, 512, 512, 2, seconds, pictures=[Image.effect_noise((512, 512), 50)])
    reply.encode()
    assert reply.output[0].startswith(b"\x89PNG") and not reply.pictures
    took = reply.seconds["decode"] - 1.0
    assert took > 0 and reply.seconds == {"total": round(3.0 + took, 4), "denoise": 2.0, "decode": 1.0 + took}
    made = list(reply.output)
    reply.encode()
    assert reply.output == made


@pytest.mark.parametrize("name", ["sigmas", "timesteps"])
def test_a_schedule_is_bounded_as_steps_are(name: str) -> None:
    import base64

    import numpy as np
    import safetensors.numpy

    def body(count: int) -> bytes:
        data = safetensors.numpy.save({name: np.linspace(900, 1, count, dtype=np.float32)})
        return json.dumps({name: base64.b64encode(data).decode()}).encode()

    parse_request(body(1000), CONFIG)
    with pytest.raises(RequestError, match="at most 1000 numbers, one per step; got 1001"):
        parse_request(body(1001), CONFIG)


# Pictures to start from.


def drawn(width: int, height: int) -> str:
    return b64(picture(size=(width, height)))


def white(width: int, height: int) -> str:
    return b64(encode_image(Image.new("L", (width, height), 255), "png"))


@pytest.mark.parametrize(
    ("type", "fields", "size", "warned"),
    [
        ("sd1", {"image": drawn(70, 41)}, (64, 40), "70x41 pixels are made 64x40"),
        ("flux", {"image": drawn(72, 104)}, (64, 96), "multiples of 16"),
        ("sd1", {"image": drawn(128, 80), "image_scale": 50}, (64, 40), None),
        ("sd1", {"image": drawn(72, 40), "mask": white(36, 20)}, (72, 40), None),
        (
            "sd1",
            {"image": drawn(72, 40), "mask": white(36, 22)},
            (72, 40),
            "mask: 36x22 pixels are stretched to the shape of image, 72x40",
        ),
        ("sd1", {"image": drawn(70, 41), "width": 128, "height": 72}, (128, 72), None),
        ("sd1", {"image": drawn(70, 41), "width": 128, "height": 96}, (128, 96), "stretched to the shape"),
        ("sd1", {"image": drawn(70, 48), "width": 128}, (128, 48), "70x48 pixels are stretched"),
        (
            "ad",
            {"image": [drawn(64, 64), drawn(64, 48)]},
            (64, 64),
            "64x48 pixels are stretched to the shape",
        ),
        # An edit is no larger than its model makes pictures, as diffusers' Flux2KleinPipeline has it.
        ("kontext", {"image": drawn(400, 300)}, (400, 288), "are made 400x288"),
        ("kontext", {"image": drawn(4032, 3024)}, (1168, 880), "at most 1024 x 1024 pixels where no size"),
        ("flux2", {"image": drawn(4032, 3024)}, (1168, 880), "4032x3024 pixels are made 1168x880"),
        ("flux2", {"image": [drawn(640, 480), drawn(90, 400)]}, (640, 480), None),
        ("kontext", {"image": drawn(4032, 3024), "width": 1536, "height": 512}, (1536, 512), None),
        ("kontext", {"image": drawn(1024, 256)}, (1024, 256), "1024x256 pixels are stretched: type kontext"),
        ("sd1", {"image": drawn(5, 300)}, (16, 296), "5x300 pixels are made 16x296"),
        ("svd", {"image": drawn(70, 41)}, (1024, 576), None),
        ("svd", {"image": drawn(41, 70)}, (1024, 576), "41x70 pixels are stretched to the shape of 1024x576"),
        # Videos have as many pixels as the launch's size, in the shape of the picture that they begin with.
        ("wani2v", {"image": drawn(41, 70)}, (480, 832), None),
        ("wani2v", {"image": drawn(90, 90)}, (624, 624), None),
        ("wani2v", {"image": drawn(90, 90), "width": 96, "height": 48}, (96, 48), "stretched to the shape"),
        ("wani2v", {"image": drawn(90, 44), "width": 96, "height": 48}, (96, 48), None),
        ("ltx2", {"image": drawn(41, 70)}, (480, 832), None),
        ("ltx2", {}, (768, 512), None),
    ],
)
def test_the_size_is_the_picture_s_own(
    type: str, fields: dict[str, Any], size: tuple[int, int], warned: str | None
) -> None:
    with collecting_warnings() as told:
        request = parse(fields, config_of(type))
    assert (request.width, request.height) == size
    assert (warned in told[0] and len(told) == 1) if warned else not told


@pytest.mark.parametrize(
    ("type", "launch", "fields", "size", "warned"),
    [
        # The launch's area in the shape of the control picture, unless a size is asked for.
        ("sd1", (512, 512), {"control_image": drawn(300, 600)}, (360, 728), None),
        ("sd1", (512, 512), {"control_image": drawn(515, 500)}, (512, 512), None),
        ("sdxl", (1024, 512), {"control_image": [drawn(90, 90), drawn(90, 45)]}, (728, 728), "90x45 pixels"),
        ("flux", (1024, 1024), {"control_image": drawn(2000, 1000)}, (1456, 720), None),
        (
            "sd1",
            (512, 512),
            {"control_image": drawn(300, 600), "width": 512, "height": 512},
            (512, 512),
            "control_image: 300x600 pixels are stretched to the shape of 512x512; give width and height of",
        ),
        (
            "sd1",
            (512, 512),
            {"control_image": drawn(64, 32), "image": drawn(64, 64)},
            (64, 64),
            "control_image: 64x32 pixels are stretched to the shape of 64x64",
        ),
    ],
)
def test_a_control_picture_gives_its_shape(
    type: str, launch: tuple[int, int], fields: dict[str, Any], size: tuple[int, int], warned: str | None
) -> None:
    config = config_of(type, width=launch[0], height=launch[1], control_net={"/a": 1.0, "/b": 1.0})
    with collecting_warnings() as told:
        request = parse(fields, config)
    assert (request.width, request.height) == size
    assert (warned in told[0] and len(told) == 1) if warned else not told


def test_a_latent_s_size_is_the_launch_s_whatever_the_control_picture_s_shape() -> None:
    config = config_of(control_net={"/a": 1.0})
    request = parse({"control_image": drawn(300, 600), "latent": tensor(latent=[[1.0]])}, config)
    assert (request.width, request.height) == (512, 512)


def test_kontext_s_aspects_are_those_of_its_authors_sizes() -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    aspects = MODELS["kontext"].starts[0].aspects
    assert aspects is not None
    found = [width / height for width, height in PREFERRED_KONTEXT_RESOLUTIONS]
    assert (min(found), max(found)) == pytest.approx(aspects, rel=0.03)  # tests/tiny.py makes them small


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (8, 8), (1, 2, 3, 100)), {}),
        (Image.new("LA", (8, 8), (1, 100)), {}),
        (Image.new("RGB", (8, 8), "red").quantize(4), {"transparency": 0}),
    ],
)
def test_transparency_is_left_out_and_that_is_said(image: Image.Image, options: dict[str, Any]) -> None:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    body = {name: b64(out.getvalue()) for name in ("image", "ip_image", "control_image")}
    with collecting_warnings() as told:
        check_request(
            body | {"mask": white(8, 8)}, config_of(control_net={"/a": 1.0}, ip_adapter={"/b": 1.0})
        )
    text = "is transparent in part, which is left out: the colours beneath it are seen"
    assert [line for line in told if "transparent" in line] == [f"{name}: {text}" for name in body]


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"ip_adapter_scale": 0.5}, "ip_adapter_scale: has no effect without ip_image"),
        ({"ip_adapter_scale": 0.5, "ip_image": drawn(8, 8)}, None),
        ({"sigmas": tensor(sigmas=[9, 4, 1]), "steps": 30}, "steps: has no effect, as sigmas has 3 numbers"),
        ({"sigmas": tensor(sigmas=[9, 4, 1]), "steps": 3}, None),
        ({"timesteps": tensor(timesteps=[9, 4])}, None),
        ({"latent": tensor(latent=[1]), "pictures": 2}, "pictures: all begin with the same latent"),
        ({"latent": tensor(latent=[1]), "pictures": 2, "add_noise": True, "strength": 0.5}, None),
    ],
)
def test_a_field_that_another_makes_idle_is_told(fields: dict[str, Any], warned: str | None) -> None:
    with collecting_warnings() as told:
        parse(fields, config_of("sd1", ip_adapter={"/a": 1.0}))
    assert (told[0].startswith(warned) and len(told) == 1) if warned else not told


@pytest.mark.parametrize(
    ("type", "fields", "warned"),
    [
        ("zimage", {"negative": "b"}, ["negative"]),  # its default is 1
        ("zimage", {"negative": "b", "cfg": 4.0}, []),
        ("zimage", {"negative": ""}, []),
        ("qwen", {"negative": "b"}, []),
        ("qwen", {"negative": "b", "cfg": 1.0}, ["negative"]),
        ("sd1", {"negative": "b", "cfg": 0.5, "guidance_rescale": 0.7}, ["negative", "guidance_rescale"]),
        ("hv15", {"negative": "b", "cfg": 0.5}, []),  # its guider goes away from the prompt there
        ("hv15", {"negative": "b", "cfg": 1.0}, ["negative"]),
        ("flux", {"negative": "b", "true_cfg_scale": 2.0, "cfg": 1.0}, []),
        ("flux", {"true_cfg_scale": 0.5}, ["true_cfg_scale"]),
        ("flux", {"true_cfg_scale": 1.0}, []),
    ],
)
def test_what_needs_guidance_is_told_where_there_is_none(
    type: str, fields: dict[str, Any], warned: list[str]
) -> None:
    with collecting_warnings() as told:
        parse({"positive": "a"} | fields, config_of(type))
    assert [line.partition(":")[0] for line in told] == warned


def test_a_picture_that_lies_on_its_side_is_turned() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    out = io.BytesIO()
    Image.new("RGB", (96, 40)).save(out, "JPEG", exif=exif)
    assert picture_size(out.getvalue()) == (40, 96)
    request = parse({"image": b64(out.getvalue())})
    assert (request.width, request.height) == (40, 96) == decode_image(out.getvalue()).size


def test_frames_are_as_many_as_pictures() -> None:
    two = {"image": [drawn(64, 64), drawn(64, 64)]}
    assert parse(two, config_of("ad")).frames == 2
    assert parse({"image": drawn(64, 64)}, config_of("ad")).frames == 16
    assert refused(two | {"frames": 3}, config_of("ad")) == (
        400,
        {"frames": "must be 2, the pictures of image; got 3"},
    )
    status, problems = refused(two)
    assert status == 400 and problems["image"] == "must be one picture for type sd1, got a list of 2"
    assert refused({"image": []}, config_of("ad"))[1]["image"].startswith("must hold 1 to 1024 pictures")


@pytest.mark.parametrize(
    ("type", "flags", "fields", "status", "field", "words"),
    [
        ("sd1", {}, {"mask": drawn(8, 8)}, 400, "mask", "needs the image that it is a mask of"),
        ("sd1", {}, {"latent": tensor(latent=[1])}, 400, "latent", "give image or latent, not both"),
        ("sd1", {}, {"denoising_end": 0.5}, 400, "denoising_end", "give image or denoising_end, not both"),
        ("sd1", {"max_pixel_steps": 1000}, {"steps": 1}, 422, "steps", "64 x 64 pixels x 1 frames x 1 steps"),
        ("sd3", {"control_net": {"/c": 1.0}}, {}, 422, "image", "this host has no pipeline that starts from"),
        ("sd3", {"control_net": {"/c": 1.0}}, {"mask": drawn(8, 8)}, 422, "mask", "that takes a mask"),
        (
            "zimage",
            {"control_net": {"/c": 1.0}},
            {},
            422,
            "image",
            "this host has no pipeline that starts from",
        ),
        (
            *("flux", {"control_net": {"/c": 1.0}, "ip_adapter": {"/i": 1.0}}, {}, 422),
            *("image", "is not supported with --ip_adapter: FluxControlNetImg2ImgPipeline takes none"),
        ),
        ("flux", {"pipefusion_parallel_degree": 2}, {}, 422, "image", "is not supported with PipeFusion"),
        (
            *("flux2", {"pipefusion_parallel_degree": 2}, {"mask": drawn(8, 8)}, 422),
            *("mask", "is not supported with PipeFusion"),
        ),
        ("ad", {}, {"mask": drawn(8, 8)}, 422, "mask", "does not support mask"),
        ("chroma", {}, {"mask": drawn(8, 8)}, 422, "mask", "does not support mask"),
        *((name, {}, {}, 422, "image", "does not support image") for name in ("hy", "pixa", "pixs")),
    ],
)
def test_pictures_that_are_refused(
    type: str, flags: dict[str, Any], fields: dict[str, Any], status: int, field: str, words: str
) -> None:
    given = fields if set(fields) == {"mask"} and status == 400 else {"image": drawn(64, 64)} | fields
    got, problems = refused(given, config_of(type, **flags))
    assert got == status and words in problems[field], problems


def test_stages_look_at_pictures() -> None:
    request = check_request(
        {"seed": 1, "image": [drawn(64, 64)] * 2}, config_of("flux2", pipefusion_parallel_degree=2)
    )
    assert len(request.image or ()) == 2


NETS = {"/models/canny": 1.0, "/models/depth": 0.5}
IMAGE, ADAPTER = b64(picture()), "/models/ip-adapter.safetensors"


@pytest.mark.parametrize(
    ("type", "launch", "data", "says"),
    [
        ("sd1", {"control_net": NETS}, {"control_image": [IMAGE] * 2, "controlnet_scale": [1, 0.3]}, None),
        ("sd1", {"control_net": NETS}, {"control_image": IMAGE, "controlnet_scale": 0.3}, None),
        (
            "sd1",
            {"control_net": NETS},
            {"control_image": [IMAGE] * 3},
            "must be a picture for each of the 2 ControlNets, or one for all; got 3",
        ),
        (
            "sd1",
            {"control_net": NETS},
            {"control_image": IMAGE, "controlnet_scale": [0.1] * 3},
            "must be a scale for each of the 2 ControlNets, or one for all; got 3",
        ),
        (
            "sd1",
            {"control_net": {"/models/canny": 1.0}},
            {"control_image": [IMAGE] * 2},
            "must be one for the ControlNet; got 2",
        ),
        ("sd1", {"ip_adapter": {ADAPTER: 1.0}}, {"ip_image": [IMAGE] * 3, "ip_adapter_scale": 0.5}, None),
        ("sd1", {"ip_adapter": {ADAPTER: 1.0, "/b": 1.0}}, {"ip_image": [IMAGE] * 2}, None),
        (
            "sd1",
            {"ip_adapter": {ADAPTER: 1.0, "/b": 1.0}},
            {"ip_image": [IMAGE] * 3},
            "must be a picture for each of the 2 IP-Adapters, or one for all; got 3",
        ),
        (
            "sd1",
            {"ip_adapter": {ADAPTER: 1.0}},
            {"ip_image": IMAGE, "ip_adapter_scale": [0.5, 0.6]},
            "must be one for the IP-Adapter; got 2",
        ),
        (
            "sd3",
            {"ip_adapter": {ADAPTER: 1.0}},
            {"ip_image": [IMAGE] * 2},
            "must be one for the IP-Adapter; got 2",
        ),
        (
            "sd1",
            {"control_net": NETS},
            {"control_image": []},
            "must be one picture or a list of 1 to 16, got 0",
        ),
        ("sd1", {"control_net": NETS}, {"control_image": [IMAGE, 7]}, "must be base64 text, got int"),
        (
            "sd1",
            {"control_net": NETS},
            {"control_image": IMAGE, "controlnet_scale": [1, 101]},
            "must be at most 100, got 101",
        ),
    ],
)
def test_one_for_each_of_several(
    type: str, launch: dict[str, Any], data: dict[str, Any], says: str | None
) -> None:
    config = config_of(type, **launch)
    if says is None:
        request = parse(data, config)
        given = data.get("control_image") or data["ip_image"]
        held = request.control_image or request.ip_image
        assert held == ([picture()] * len(given) if isinstance(given, list) else picture())
        assert request.controlnet_scale == data.get("controlnet_scale")
    else:
        status, faults = refused(data, config)
        field = next(name for name in data if name in faults)
        assert (status, faults[field]) == (400, says)


def test_a_list_of_one_is_the_one() -> None:
    config = config_of(control_net={"/models/canny": 1.0})
    assert parse({"control_image": [IMAGE]}, config).control_image == picture()


def test_an_animation_is_a_list_of_frames_where_a_video_starts_from_one() -> None:
    for format in ("GIF", "WEBP", "PNG"):
        clip = picture(format, (24, 16), frames=3)
        for value in (base64.b64encode(clip).decode(), clip):
            request = check_request({"image": value}, config_of("ad"))
            assert request.frames == 3 and (request.width, request.height) == (24, 16)
            reds = [Image.open(io.BytesIO(frame)).convert("RGB").getpixel((5, 5)) for frame in request.images]
            assert [abs(red[0] - 40 * i) < 12 for i, red in enumerate(reds)] == [True] * 3  # type: ignore[index]
    for format in ("GIF", "PNG"):
        request = check_request({"image": base64.b64encode(picture(format)).decode()}, config_of("ad"))
        assert isinstance(request.image, bytes) and request.frames == 16
    # A picture type has no frames: a GIF is no picture there, and of an animation the first one counts.
    with pytest.raises(RequestError, match="image: is not a picture; allowed: PNG, JPEG, WebP, BMP"):
        check_request({"image": base64.b64encode(picture("GIF", frames=2)).decode()}, config_of("sd1"))
    moving = check_request({"image": base64.b64encode(picture("WEBP", frames=2)).decode()}, config_of("sd1"))
    assert isinstance(moving.image, bytes)
    for wrong in ("R0lGODlh", "####", base64.b64encode(picture("GIF", frames=2)[:10]).decode()):
        with pytest.raises(RequestError, match="image: is"):
            check_request({"image": wrong}, config_of("ad"))


def test_an_animation_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.api.codecs.MAX_VIDEO_PIXELS", 24 * 16 * 3)
    for frames, allowed in ((3, True), (4, False)):
        body = {"image": base64.b64encode(picture("GIF", (24, 16), frames)).decode()}
        if allowed:
            assert len(check_request(body, config_of("ad")).images) == 3
            continue
        with pytest.raises(RequestError, match="image: has 4 frames of 24x16; at most 1024, of 1152 pixels"):
            check_request(body, config_of("ad"))


def test_what_other_clients_would_read_in_a_prompt_is_told() -> None:
    prompts = {"positive": "a cat <lora:fur:0.7> AND a dog <lora:fur:0.7>", "negative": "<lyco:x:1>"}
    with collecting_warnings() as told:
        check_request(prompts | {"prompt_syntax": "a1111"}, config_of("sd1"))
    assert told == [
        "positive: <lora:fur:0.7> is read as words; lora_scales names LoRAs",
        "negative: <lyco:x:1> is read as words; lora_scales names LoRAs",
        "positive: AND is read as a word; the prompts at its two sides are not joined as by A1111",
    ]
    with collecting_warnings() as told:
        check_request({"positive": "a cat AND a dog <3"}, config_of("sd1"))
    assert told == []
