"""A1111's img2img: what is sent to the ranks, and what comes back, by webuiapi where that can say it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageFilter

from shared.api.metadata import parse_infotext
from shared.api.retouch import filled
from tests.api.test_metadata import DrawingHost
from tests.httphost import FakeHost, config_of, picture
from tests.test_host import Launch

Json = dict[str, Any]
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with DrawingHost(config_of(checkpoint="/models/demo")) as host:
        yield host


def client(host: FakeHost) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(port=host.server.port, sampler="Euler a", steps=2)


def halves(size: tuple[int, int] = (128, 64)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def spot(box: tuple[int, int, int, int], size: tuple[int, int] = (128, 64)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def base64_of(image: Image.Image, format: str = "PNG", **more: Any) -> str:
    out = io.BytesIO()
    image.save(out, format, **more)
    return base64.b64encode(out.getvalue()).decode()


def opened(data: bytes | list[bytes] | None) -> Image.Image:
    assert isinstance(data, bytes)
    return Image.open(io.BytesIO(data))


def post(host: FakeHost, status: int = 200, **body: Any) -> Json:
    answer = host.post("/sdapi/v1/img2img", json={"init_images": [base64_of(halves())], "steps": 2, **body})
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_picture_goes_as_it_came_with_the_size_that_was_asked_for(host: FakeHost) -> None:
    answer = client(host).img2img([halves()], prompt="x", width=64, height=96, seed=7, batch_size=2)
    for seed, (seen, made) in enumerate(zip(host.seen, answer.images, strict=True), 7):
        assert (seen.width, seen.height, seen.strength, seen.mask, seen.seed) == (64, 96, 0.75, None, seed)
        assert values(opened(seen.image)).tolist() == values(halves()).tolist() and made.size == (64, 96)
    assert (answer.info["width"], answer.info["height"], answer.info["all_seeds"]) == (64, 96, [7, 8])
    assert "init_images" not in answer.parameters
    told = parse_infotext(answer.info["infotexts"][0])
    assert told["Denoising strength"] == "0.75" and "Mask blur" not in told
    # Without a size it is the picture's own.
    post(host, denoising_strength=0.3)
    assert (host.seen[-1].width, host.seen[-1].height, host.seen[-1].strength) == (128, 64, 0.3)


def test_a_type_that_only_looks_at_the_picture_ignores_the_strength_without_a_mask() -> None:
    with FakeHost(config_of("kontext", backend="xdit")) as host:
        told = post(host, denoising_strength=0.3)
        post(host)
        post(host, denoising_strength=0.3, mask=base64_of(spot((40, 20, 60, 40))), inpaint_full_res=False)
    assert "denoising_strength: type kontext (FLUX.1 Kontext) ignores it" in json.dumps(told)
    assert [(seen.strength, seen.mask is None) for seen in host.seen] == [
        (None, True),
        (None, True),
        (0.3, False),
    ]


def test_a_control_net_that_paints_from_noise_ignores_the_strength() -> None:
    with FakeHost(config_of("zimage", backend="xdit", control_net={"/x": 1.0})) as host:
        unit = {"controlnet": {"args": [{"image": base64_of(halves())}]}}
        mask = base64_of(spot((40, 20, 60, 40)))
        told = post(host, denoising_strength=0.3, mask=mask, inpaint_full_res=False, alwayson_scripts=unit)
    assert "denoising_strength: type zimage (Z-Image) ignores it" in json.dumps(told)
    assert host.seen[0].strength is None and host.seen[0].mask is not None


def test_only_the_masked_part_is_painted_and_pasted_back(host: FakeHost) -> None:
    mask = spot((40, 20, 60, 40))
    answer = client(host).img2img(
        *([halves()],), mask_image=mask, mask_blur=0, inpaint_full_res_padding=8, width=64, height=64, seed=3
    )
    [seen] = host.seen
    assert (seen.width, seen.height, seen.strength) == (64, 64, 0.75)
    image, white = opened(seen.image), opened(seen.mask)
    assert image.size == white.size == (64, 64) and white.mode == "L"
    # The part is (32, 12, 68, 48): red to 64, then blue; the mask begins 8 / 36 from its edge.
    assert values(white)[32, 32] == 255 and values(white)[32, 8] == 0 and values(white)[8, 32] == 0
    [made] = answer.images
    assert made.size == (128, 64)
    keep = values(mask) == 0
    assert (values(made)[keep] == values(halves())[keep]).all(), "what is not masked keeps its pixels"
    assert (values(made)[~keep] != values(halves())[~keep]).any(axis=1).mean() > 0.9
    info = answer.info
    assert (info["width"], info["height"]) == (64, 64) and "mask" not in answer.parameters
    told = parse_infotext(info["infotexts"][0])
    assert (told["Inpaint area"], told["Masked area padding"]) == ("Only masked", "8")
    assert told["Masked content"] == "fill" and "Mask blur" not in told


def test_a_mask_of_another_shape_is_told(host: FakeHost) -> None:
    asked: Json = {"init_images": [base64_of(halves((64, 64)))], "inpaint_full_res": False}
    told = "mask: 64x32 pixels are stretched to the shape of image, 64x64; give a mask of the picture's size"
    assert post(host, mask=base64_of(spot((0, 0, 9, 9), (64, 32))), **asked)["warnings"] == [told]
    assert "warnings" not in post(host, mask=base64_of(spot((0, 0, 9, 9), (128, 128))), **asked)


def test_the_whole_picture_is_painted_around_the_mask(host: FakeHost) -> None:
    mask = spot((40, 20, 60, 40))
    more = {"inpaint_full_res": False, "inpainting_fill": 1, "mask_blur": 3, "inpainting_mask_invert": 1}
    answer = post(host, mask=base64_of(mask), **more)
    [seen] = host.seen
    assert (seen.width, seen.height) == (128, 64)
    soft = values(Image.eval(mask, lambda value: 255 - value).filter(ImageFilter.GaussianBlur(3)))
    assert values(opened(seen.image)).tolist() == values(halves()).tolist()
    assert values(opened(seen.mask)).tolist() == soft.tolist()
    made = values(opened(base64.b64decode(answer["images"][0])))
    assert (made[30, 50] == RED).all(), "the middle of the spot stays"
    assert (made[soft == 0] == values(halves())[soft == 0]).all()
    told = parse_infotext(json.loads(answer["info"])["infotexts"][0])
    assert (told["Mask blur"], told["Mask mode"]) == ("3", "Inpaint not masked")
    assert "Masked content" not in told and "Inpaint area" not in told


def test_masked_content_is_filled_where_that_is_asked_for(host: FakeHost) -> None:
    mask = spot((40, 20, 60, 40))
    post(host, mask=base64_of(mask), inpaint_full_res=False, mask_blur=0)
    assert values(opened(host.seen[0].image)).tolist() == values(filled(halves(), mask)).tolist()
    for fill in (2, 3):
        answer = post(host, 422, mask=base64_of(mask), inpainting_fill=fill)
        assert "inpainting_fill: must be 0 (fill) or 1 (original); 2 and 3 change latents" in answer["detail"]


def test_a_mask_is_its_alpha_where_that_is_not_opaque(host: FakeHost) -> None:
    alpha = halves().convert("RGBA")
    alpha.putalpha(spot((40, 20, 60, 40)))
    post(host, mask=base64_of(alpha), mask_blur_x=0, mask_blur_y=0, inpaint_full_res=False)
    assert values(opened(host.seen[0].mask)).tolist() == values(spot((40, 20, 60, 40))).tolist()


def test_a_blank_mask_is_image_to_image_and_said(host: FakeHost) -> None:
    answer = post(host, mask=base64_of(spot((0, 0, 0, 0))))
    [seen] = host.seen
    assert seen.mask is None and seen.image is not None and seen.strength == 0.75
    assert answer["warnings"] == ["mask: is blank, so the whole picture is painted, as image to image"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (1, [[RED] * 32 + [BLUE] * 32] * 64),
        (2, [[RED] * 32 + [BLUE] * 32] * 64),
    ],
)
def test_resize_modes(host: FakeHost, mode: int, expected: Any) -> None:
    answer = post(host, resize_mode=mode, width=64, height=64)
    [seen] = host.seen
    image = opened(seen.image)
    assert image.size == (64, 64) and (seen.width, seen.height) == (64, 64)
    # Away from the seam, where Lanczos rings; mode 1 keeps the scale, mode 2 halves it.
    columns = [*range(24), *range(40, 64)]
    assert (values(image)[:, columns] == np.array(expected)[:, columns]).all()
    seam = (values(image)[32, :, 0] > 127).sum()
    assert seam == 32
    told = parse_infotext(json.loads(answer["info"])["infotexts"][0])
    assert told["Resize mode"] == {1: "Crop and resize", 2: "Resize and fill"}[mode]
    assert b"multigpu_diffusion" not in base64.b64decode(answer["images"][0]), "no body gives it again"


@pytest.mark.parametrize("more", [{}, {"resize_mode": 1}, {"mask": (0, 0, 9, 9), "inpaint_full_res": False}])
def test_a_size_that_is_rounded_is_said(host: FakeHost, more: Json) -> None:
    more = more | ({"mask": base64_of(spot(more["mask"], (67, 66)))} if "mask" in more else {})
    answer = post(host, init_images=[base64_of(halves((67, 66)))], **more)
    text = "image: 67x66 pixels are made 64x64, as the sides of a picture of type sd1 are multiples of 8"
    assert answer["warnings"] == [text]
    assert "warnings" not in post(
        host, init_images=[base64_of(halves((67, 66)))], width=64, height=64, **more
    )
    assert [(seen.width, seen.height) for seen in host.seen] == [(64, 64)] * 2


def test_the_guidance_that_counted_is_told(host: FakeHost) -> None:
    for given, counted in ((0, 0), (3.5, 3.5), (None, 7.5)):
        assert json.loads(post(host, cfg_scale=given)["info"])["cfg_scale"] == counted


def test_pictures_are_upright_and_on_white(host: FakeHost) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter turn to the right
    turned = base64_of(halves(), "JPEG", exif=exif.tobytes(), quality=100)
    post(host, init_images=[turned], resize_mode=1, width=64, height=64)
    image = values(opened(host.seen[0].image))
    assert abs(image[4, 32] - RED).max() < 8 and abs(image[60, 32] - BLUE).max() < 8, "red is above now"
    post(host, init_images=[turned])
    assert (host.seen[1].width, host.seen[1].height) == (64, 128)
    clear = halves().convert("RGBA")
    clear.putalpha(spot((0, 0, 64, 64)))
    post(host, init_images=[base64_of(clear)])
    image = values(opened(host.seen[2].image))
    assert (image[:, :64] == RED).all() and (image[:, 64:] == 255).all()


def test_a_control_net_without_a_picture_of_its_own_takes_the_painted_part() -> None:
    scripts = {"controlnet": {"args": [{"weight": 0.5}]}}
    with DrawingHost(config_of(control_net={"/models/canny": 1.0})) as host:
        post(host, alwayson_scripts=scripts)
        assert host.seen[0].control_image == host.seen[0].image and host.seen[0].controlnet_scale == 0.5
        post(
            host,
            alwayson_scripts=scripts,
            mask=base64_of(spot((40, 20, 60, 40))),
            mask_blur=0,
            width=64,
            height=64,
        )
        control, sent = opened(host.seen[1].control_image), opened(host.seen[1].image)
        assert control.size == sent.size == (64, 64)
        part = halves().crop((40, 20, 60, 40)).resize((64, 64), Image.Resampling.LANCZOS)
        assert values(control).tolist() == values(part).tolist(), "not filled"


@pytest.mark.parametrize(("mode", "left"), [("Crop and Resize", RED), ("Resize and Fill", RED), (0, None)])
def test_a_control_image_is_resized_as_its_unit_says(mode: Any, left: Any) -> None:
    """Of 128x64 to 64x64; stretched it goes as it came, as pipelines stretch."""
    unit = {"image": base64_of(halves()), "resize_mode": mode}
    with FakeHost(config_of(control_net={"/models/canny": 1.0})) as host:
        body = {"alwayson_scripts": {"ControlNet": {"args": [unit]}}, "width": 64, "height": 64}
        assert host.post("/sdapi/v1/txt2img", json=body).status_code == 200
        image = opened(host.seen[0].control_image)
        assert image.size == ((128, 64) if left is None else (64, 64))
        again = webuiapi.WebUIApi(port=host.server.port, steps=2)
        unit_there = webuiapi.ControlNetUnit(image=halves(), model="canny")  # "Resize and Fill"
        again.txt2img(controlnet_units=[unit_there], width=64, height=64, alwayson_scripts={})
        assert opened(host.seen[1].control_image).size == (64, 64)


def test_a_control_image_gets_the_aspect_of_the_picture_that_sets_the_size() -> None:
    unit = {"image": base64_of(halves((64, 64))), "resize_mode": "Crop and Resize"}
    with FakeHost(config_of(control_net={"/models/canny": 1.0})) as host:
        post(host, alwayson_scripts={"ControlNet": {"args": [unit]}})
        assert (host.seen[0].width, host.seen[0].height) == (128, 64)
        assert opened(host.seen[0].control_image).size == (128, 64)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"resize_mode": 3}, 422, "resize_mode: must be 0, 1 or 2; 3 resizes latents, not pixels; got 3"),
        ({"resize_mode": "1"}, 422, "resize_mode: must be a whole number from 0 to 3, got '1'"),
        ({"mask_blur": -1}, 422, "mask_blur: must be a whole number from 0 to 256, got -1"),
        ({"mask_blur_x": 1.5}, 422, "mask_blur_x: must be a whole number"),
        ({"inpaint_full_res": "yes"}, 422, "inpaint_full_res: must be true or false, got 'yes'"),
        ({"inpaint_full_res_padding": 10**9}, 422, "inpaint_full_res_padding: must be a whole number from 0"),
        ({"mask_round": False}, 422, "mask_round: must be true"),
        ({"latent_mask": "eHl6"}, 422, "latent_mask: is not supported"),
        ({"mask": "eHl6"}, 400, "mask: is not a picture"),
        ({"init_images": ["eHl6"], "resize_mode": 1}, 400, "init_images: is not a picture"),
        ({"init_images": None}, 422, "init_images: must hold one picture, got none"),
        ({"init_images": ["a", "b"]}, 422, "init_images: must hold one picture, got 2"),
        ({"denoising_strength": 0}, 400, "denoising_strength: must be above 0"),
        ({"resize_mode": 1, "width": 10**9}, 400, "width: must be at most 8192"),
        ({"width": 0}, 400, "width: must be at least 16, got 0"),
        ({"height": True}, 400, "height: must be a valid integer, got True"),
        ({"init_images": [None]}, 422, "init_images: must hold one picture, got none"),
        ({"mask": [base64_of(spot((0, 0, 9, 9)))]}, 400, "mask: must be one picture, got a list of 1"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(host: FakeHost, body: Json, status: int, words: str) -> None:
    assert words in post(host, status, **body)["detail"] and not host.seen


def test_frames_of_a_video_are_what_it_starts_from() -> None:
    gif = base64.b64encode(picture("GIF", (16, 16), frames=3)).decode()
    with FakeHost(config_of("ad")) as host:
        post(host, init_images=[base64_of(halves())] * 2)
        post(host, init_images=[gif], denoising_strength=0.4)
        assert [(len(seen.images), seen.frames, seen.strength) for seen in host.seen] == [
            *((2, 2, 0.75), (3, 3, 0.4))
        ]
        answer = post(host, 422, init_images=[gif], resize_mode=1)
        assert "resize_mode: must be 0 for the frames of a video; got 1" in answer["detail"]


def test_types_without_masks_say_so() -> None:
    with FakeHost(config_of("sdup")) as host:
        answer = post(host, 422, mask=base64_of(spot((0, 0, 9, 9))), resize_mode=1)
        assert "mask: type sdup (" in answer["detail"] and "does not support mask" in answer["detail"]
        assert "resize_mode: must be 0: the picture of type sdup sets the size" in answer["detail"]
        post(host)
        assert host.seen[0].image is not None


def test_the_same_request_again_gives_the_same_pixels(host: FakeHost) -> None:
    """From the text of the picture, with the picture and the mask given again."""
    mask = spot((40, 20, 60, 40))
    sdk = client(host)
    asked: Json = {"mask_blur": 6, "inpaint_full_res_padding": 12, "width": 64, "height": 64}
    first = sdk.img2img([halves()], prompt="a cat", mask_image=mask, denoising_strength=0.6, **asked)
    info = host.post(
        "/sdapi/v1/png-info", json={"image": base64_of(first.image, pnginfo=text_of(first.image))}
    )
    told = info.json()["parameters"]
    again = sdk.img2img(
        [halves()],
        prompt=told["Prompt"],
        mask_image=mask,
        seed=int(told["Seed"]),
        steps=int(told["Steps"]),
        cfg_scale=float(told["CFG scale"]),
        sampler_name=told["Sampler"],
        denoising_strength=float(told["Denoising strength"]),
        width=int(told["Size-1"]),
        height=int(told["Size-2"]),
        mask_blur=int(told["Mask blur"]),
        inpaint_full_res=told["Inpaint area"] == "Only masked",
        inpaint_full_res_padding=int(told["Masked area padding"]),
        inpainting_fill=0 if told["Masked content"] == "fill" else 1,
    )
    assert again.image.tobytes() == first.image.tobytes()


def text_of(image: Image.Image) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", image.info["parameters"])
    return info


def test_on_a_real_model_only_what_is_masked_changes_and_to_what_is_asked(demo_host: Launch) -> None:
    sdk = webuiapi.WebUIApi(port=int(demo_host.url.rpartition(":")[2]), sampler="Euler", steps=12)
    red = sdk.txt2img(prompt="a red circle on a blue background", seed=7, width=128, height=128, cfg_scale=4)
    start = red.image.convert("RGB")
    mask = spot((0, 0, 128, 64), (128, 128))
    for padding, size in ((0, (128, 64)), (16, (128, 96))):
        made = sdk.img2img(
            *([start],),
            mask_image=mask,
            prompt="a green circle on a yellow background",
            seed=9,
            cfg_scale=4,
            denoising_strength=1.0,
            mask_blur=0,
            inpainting_fill=1,
            inpaint_full_res_padding=padding,
            width=size[0],
            height=size[1],
        )
        found, before = values(made.image), values(start)
        assert made.image.size == (128, 128) and (found[64:] == before[64:]).all()
        assert np.abs(found[:64] - before[:64]).mean() > 30
    asked: Json = {"prompt": "a green circle", "seed": 9, "cfg_scale": 4, "width": 128, "height": 128}
    apart = []
    for strength in (0.25, 1.0):
        whole = sdk.img2img([start], denoising_strength=strength, **asked)
        apart.append(np.abs(values(whole.image) - values(start)).mean())
    assert apart[0] < apart[1] / 2, "little of the schedule, little of a change"
