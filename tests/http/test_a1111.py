"""A1111's API: what SillyTavern and Open WebUI send and read."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import requests
from PIL import Image

from shared.api.a1111_samplers import SAMPLERS, SCHEDULES, samplers_for
from shared.http.a1111_request import translate
from shared.models import MODELS, schedulers_for
from shared.models.spec import IMAGE
from tests.httphost import FakeHost, config_of, picture, wait_for

# The body that SillyTavern sends, its own settings among the keys.
SILLY_TAVERN: dict[str, Any] = {
    "url": "http://localhost:7860",
    "auth": "",
    "prompt": "a red circle",
    "negative_prompt": "blurry",
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "steps": 20.0,
    "cfg_scale": 7,
    "width": 516,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": 3,
    "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
    "clip_skip": 2,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost(config_of(checkpoint="/models/demo")) as host:
        yield host


def get(host: FakeHost, name: str) -> Any:
    answer = host.get(f"/sdapi/v1/{name}")
    assert answer.status_code == 200
    return answer.json()


def post(host: FakeHost, name: str, body: Any, **options: Any) -> requests.Response:
    return host.post(f"/sdapi/v1/{name}", json=body, **options)


def test_what_nothing_reads_is_told(host: FakeHost) -> None:
    given = {
        "prompt": "x",
        "cfg": 3,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "jpeg_quality": 50},
    }
    told = "options that nothing here reads were left out: 'cfg', override_settings.jpeg_quality"
    assert post(host, "txt2img", given).json()["warnings"] == [told]
    many = {f"k{n}": n for n in range(200)}
    [told] = post(host, "txt2img", {"prompt": "x"} | many).json()["warnings"]
    assert told.endswith("'k9' and 190 more")


@pytest.mark.parametrize(
    ("type", "given", "words"),
    [
        ("sd1", {"clip_skip": "two"}, "clip_skip: must be a whole number from 1 to 13, got 'two'"),
        ("sd1", {"subseed": "abc"}, "subseed: must be a valid integer, got 'abc'"),
        ("sd1", {"refiner_switch_at": 7}, "refiner_switch_at: must be at most 1, got 7"),
        (
            "sdxl",
            {"refiner_switch_at": "x", "refiner_checkpoint": "None"},
            "refiner_switch_at: must be a valid",
        ),
        ("sd1", {"clip_skip": 14}, "clip_skip: must be a whole number from 1 to 13, got 14"),
        ("sd1", {"override_settings": {"samples_format": "avif"}}, "samples_format: must be one of png, jpg"),
        ("ad", {"override_settings": {"samples_format": "jpg"}}, "samples_format: must be one of gif, webp"),
    ],
)
def test_options_of_a_wrong_value_are_refused(type: str, given: dict[str, Any], words: str) -> None:
    with FakeHost(config_of(type)) as host:
        answer = post(host, "txt2img", {"prompt": "x"} | given)
        assert answer.status_code == 422 and words in answer.json()["detail"]


def test_a_clip_skip_without_clip_is_told() -> None:
    with FakeHost(config_of("flux", backend="xdit")) as host:
        answer = post(host, "txt2img", {"prompt": "x", "clip_skip": 2}).json()
        assert answer["warnings"] == ["clip_skip: has no effect on type flux (FLUX.1)"]
        assert "warnings" not in post(host, "txt2img", {"prompt": "x", "clip_skip": 1}).json()


@pytest.mark.parametrize(
    ("wanted", "made"), [("jpg", "jpeg"), ("webp", "webp"), ("png", "png"), (None, "png")]
)
def test_the_format_of_the_samples(host: FakeHost, wanted: str | None, made: str) -> None:
    asked = {"prompt": "x", "override_settings": {"samples_format": wanted}}
    [image] = post(host, "txt2img", asked).json()["images"]
    assert Image.open(io.BytesIO(base64.b64decode(image))).format == made.upper()
    assert post(host, "options", {"samples_format": "jpg"}).status_code == 422


def test_txt2img_as_sillytavern_sends_it(host: FakeHost) -> None:
    answer = post(host, "txt2img", SILLY_TAVERN).json()
    assert set(answer) == {"images", "parameters", "info", "warnings"}
    assert answer["warnings"] == [
        "width: 516 is made 512, a multiple of 8",
        "save_images: has no effect; pictures come in the answer, and nowhere else",
        "options that nothing here reads were left out: 'url', 'auth'",
    ]
    assert [base64.b64decode(image) for image in answer["images"]] == [picture()]
    assert answer["parameters"] == SILLY_TAVERN
    info = json.loads(answer["info"])
    assert (info["seed"], info["all_seeds"], info["width"], info["sd_model_name"]) == (3, [3], 512, "demo")
    assert "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 512x512" in info["infotexts"][0]
    [seen] = host.seen
    assert (seen.positive, seen.negative, seen.scheduler) == ("a red circle", "blurry", "euler_a")
    assert (seen.steps, seen.cfg, seen.clip_skip, seen.seed) == (20, 7, 1, 3)


def test_txt2img_as_open_webui_sends_it(host: FakeHost) -> None:
    body = {"prompt": "x", "batch_size": 2, "width": 64, "height": 64, "steps": 5, "negative_prompt": ""}
    answer = post(host, "txt2img", body).json()
    assert len(answer["images"]) == 2
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [host.seen[0].seed, (host.seen[0].seed or 0) + 1]
    assert host.seen[0].scheduler is None and host.seen[0].negative is None


def test_batches_multiply_and_have_a_limit(host: FakeHost) -> None:
    assert len(post(host, "txt2img", {"batch_size": 2, "n_iter": 3, "steps": 1}).json()["images"]) == 6
    answer = post(host, "txt2img", {"batch_size": 8, "n_iter": 8})
    assert answer.status_code == 422 and "at most 16, got 64" in answer.json()["detail"]


def test_img2img_where_the_type_takes_an_image(host: FakeHost) -> None:
    image = base64.b64encode(picture(size=(16, 16))).decode()
    with FakeHost(config_of("sdup")) as upscaler:
        body = {
            "init_images": [image],
            "prompt": "sharp",
            "width": 512,
            "height": 512,
            "denoising_strength": 0.3,
        }
        answer = post(upscaler, "img2img", body).json()
        assert len(answer["images"]) == 1 and "init_images" not in answer["parameters"]
        assert upscaler.seen[0].image == picture(size=(16, 16))
        refused = post(upscaler, "img2img", {"init_images": [], "mask": "x"})
        assert refused.status_code == 422 and "init_images" in refused.text and "mask" in refused.text
        assert (
            "init_images: is not a picture"
            in post(upscaler, "img2img", {"init_images": ["eHl6"]}).json()["detail"]
        )
    with FakeHost(config_of("svd")) as video:
        assert (
            base64.b64decode(post(video, "img2img", {"init_images": [image]}).json()["images"][0])[:3]
            == b"GIF"
        )
    with FakeHost(config_of("hy")) as none:
        answer = post(none, "img2img", {"init_images": [image], "prompt": "x"})
    assert answer.status_code == 422 and "does not support image" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"sampler_name": "Nonsense"}, 422, "sampler_name: must be one of DPM++ 2M"),
        (
            {"sampler_name": "DDIM", "scheduler": "Karras"},
            422,
            "DDIM does not support Karras; samplers that do: DPM++",
        ),
        ({"scheduler": "Karras"}, 422, "needs a sampler_name"),
        ({"sampler_name": "Euler", "scheduler": "Turbo"}, 422, "one of Automatic, Karras, Exponential, SGM"),
        (
            {"override_settings": {"sd_model_checkpoint": "other"}},
            422,
            "only the checkpoint 'demo'; got 'other'",
        ),
        ({"steps": -1, "cfg_scale": "x"}, 400, "cfg_scale: must be a valid number"),
        ({"width": 10**9}, 400, "at most 8192"),
        ({"batch_size": "two"}, 422, "batch_size: must be 1 to 16, got 'two'"),
        ([], 400, "JSON object"),
    ],
)
def test_faults_in_a1111s_form(host: FakeHost, body: Any, status: int, words: str) -> None:
    answer = post(host, "txt2img", body)
    assert answer.status_code == status and words in answer.json()["detail"], answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"} and not host.seen


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"sampler_name": "DPM++ 2M", "scheduler": "karras"}, "k_dpmpp_2m"),
        ({"sampler_name": "DPM++ 2M Karras"}, "k_dpmpp_2m"),
        ({"sampler_index": "Euler"}, "euler"),
        ({"sampler_name": "unipc", "scheduler": "normal"}, "unipc"),
        ({"sampler_name": "Automatic", "scheduler": "Automatic"}, None),
        ({"sampler_name": "DPM++ 2M SDE Karras"}, "k_dpmpp_2m_sde"),
        ({"sampler_name": "DPM++ 2M Exponential"}, "exponential_dpmpp_2m"),
        ({"sampler_name": "Euler", "scheduler": "beta"}, "beta_euler"),
        ({"sampler_name": "Euler a", "scheduler": "SGM Uniform"}, "euler_a_trailing"),
        ({"sampler_name": "DDIM", "scheduler": "sgm_uniform"}, "ddim_trailing"),
        ({"sampler_name": "Euler", "scheduler": "simple"}, "euler_trailing"),
        ({"sampler_name": "LCM"}, "lcm"),
        ({"sampler_name": "TCD"}, "tcd"),
    ],
)
def test_sampler_names(host: FakeHost, body: dict[str, Any], expected: str | None) -> None:
    assert post(host, "txt2img", body).status_code == 200
    assert host.seen[0].scheduler == expected


@pytest.mark.parametrize("type", sorted(MODELS))
def test_every_sampler_is_one_of_the_type(type: str) -> None:
    samplers = samplers_for(config_of(type))
    assert samplers and set(samplers) <= set(SAMPLERS)
    assert set(samplers.values()) <= set(schedulers_for(MODELS[type]))


def test_lists(host: FakeHost) -> None:
    [model] = get(host, "sd-models")
    assert (model["title"], model["model_name"]) == ("demo", "demo")
    assert "Euler a" in [s["name"] for s in get(host, "samplers")]
    assert [s["label"] for s in get(host, "schedulers")] == ["Automatic", *SCHEDULES]
    assert get(host, "sd-vae") == []
    assert get(host, "options")["sd_model_checkpoint"] == "demo"
    unchanged = {"sd_model_checkpoint": "demo", "other": 1, "CLIP_stop_at_last_layers": 1, "sd_vae": "None"}
    assert post(host, "options", unchanged).json() is None
    for title in ("demo.safetensors", "demo [1f3a]", "demo.safetensors [1f3a]"):
        assert post(host, "options", {"sd_model_checkpoint": title}).status_code == 200
        made = post(host, "txt2img", {"override_settings": {"sd_model_checkpoint": title}})
        assert made.status_code == 200
    for other in ("other", "demo2.safetensors", "demo [no hash]", ["demo"], {"demo": 1}):
        assert post(host, "options", {"sd_model_checkpoint": other}).status_code == 422


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"script_name": "x/y/z plot"}, "script_name: is not supported: leave it out; got 'x/y/z plot'"),
        ({"styles": ["anime"]}, "styles: "),
        ({"tiling": True}, "tiling: "),
        ({"restore_faces": True}, "restore_faces: "),
        ({"refiner_checkpoint": "r", "refiner_switch_at": 0.8}, "without --refiner"),
        (
            {"subseed": 3, "subseed_strength": 0.5},
            "subseed_strength: is not supported: leave it out; got 0.5",
        ),
        ({"sampler_name": "DDIM", "eta": 1.0}, "eta: "),
        ({"s_churn": 5}, "s_churn: "),
        ({"s_tmin": 0.5}, "s_tmin: is not supported: leave it out; got 0.5"),
        ({"s_tmax": 5.5}, "s_tmax: is not supported"),
        ({"firstpass_image": "xyz"}, "firstpass_image: "),
        ({"infotext": "a cat\nSteps: 3"}, "infotext: "),
        ({"mask": "xyz"}, "mask: "),
        ({"latent_mask": "xyz"}, "latent_mask: "),
        ({"firstphase_width": 64}, "firstphase_width: "),
        ({"override_settings": {"sd_vae": "a.safetensors"}}, "override_settings.sd_vae: is not supported"),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, "override_settings.eta_noise_seed_delta: "),
        ({"override_settings": {"s_tmin": 1}}, "override_settings.s_tmin: "),
        ({"override_settings": {"emphasis": "No norm"}}, "override_settings.emphasis: "),
        ({"override_settings": {"sd_noise_schedule": "Zero Terminal SNR"}}, "sd_noise_schedule: "),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, False, {"ad_model": "f.pt"}]}}}, "'ADetailer': "),
        ({"alwayson_scripts": {"controlnet": {"args": [{"image": "x", "module": "canny"}]}}}, "module: is"),
        (
            {"alwayson_scripts": {"controlnet": {"args": [{"image": "x", "guidance_end": 0.5}]}}},
            "guidance_end",
        ),
        (
            {"alwayson_scripts": {"controlnet": {"args": [{"image": "x"}] * 2}}},
            "one enabled unit, as launched",
        ),
        ({"alwayson_scripts": {"controlnet": {"args": [7]}}}, "must hold objects, got 7"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"weight": 1}]}}}, "ControlNet.image: is needed"),
        (
            {"alwayson_scripts": {"controlnet": {"args": [{"image": "x", "hr_option": "Low res only"}]}}},
            "hr_option: is not supported",
        ),
    ],
)
def test_options_that_are_not_served_are_refused_by_name(host: FakeHost, body: Any, words: str) -> None:
    answer = post(host, "txt2img", body)
    assert answer.status_code == 422 and words in answer.json()["detail"], answer.text
    assert not host.seen


def test_the_refiner_of_the_launch() -> None:
    with FakeHost(config_of("sdxl", refiner="/models/sdxl-refiner.safetensors")) as host:
        for body, start in (
            ({}, 0.8),
            ({"refiner_checkpoint": "", "refiner_switch_at": 0.5}, 0.8),
            ({"refiner_checkpoint": "None"}, 1.0),
            ({"refiner_checkpoint": "sdxl-refiner"}, 0.8),
            ({"refiner_checkpoint": "sdxl-refiner.safetensors [1f3a]", "refiner_switch_at": 0.5}, 0.5),
            ({"refiner_checkpoint": "sdxl-refiner", "refiner_switch_at": 0}, 1.0),
        ):
            answer = post(host, "txt2img", {"prompt": "a cat", **body})
            assert answer.status_code == 200 and host.seen[-1].refiner_start == start, body
            text = json.loads(answer.json()["info"])["infotexts"][0]
            told = f"Refiner: sdxl-refiner, Refiner switch at: {start}"
            assert (told in text) == (start < 1)
        other = post(host, "txt2img", {"refiner_checkpoint": "other"})
        assert other.status_code == 422 and "has only the checkpoint 'sdxl-refiner'" in other.text
        more = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.7, "width": 64, "height": 64}
        assert post(host, "txt2img", {"prompt": "a cat", **more}).status_code == 200
        assert [request.refiner_start for request in host.seen[-2:]] == [1.0, 0.8]


def test_settings_for_all_requests_that_would_change_pictures_are_refused(host: FakeHost) -> None:
    settings = {"CLIP_stop_at_last_layers": 2, "sd_vae": "other.pt", "eta_noise_seed_delta": 31337}
    answer = post(host, "options", settings)
    assert answer.status_code == 422
    for name, value in settings.items():
        assert f"{name}: " in answer.json()["detail"] and str(value) in answer.json()["detail"]
    for alone in settings:
        assert post(host, "options", {alone: settings[alone]}).status_code == 422


def test_settings_for_all_requests_that_nothing_reads_are_told(host: FakeHost) -> None:
    own = get(host, "options")
    answer = post(host, "options", own | {"enable_pnginfo": True, "eta_noise_seed_delta": 0})
    assert answer.json() is None and "X-Warnings" not in answer.headers
    answer = post(host, "options", own | {"jpeg_quality": 50, "live_previews_enable": False})
    told = "settings that nothing here reads were left out: 'jpeg_quality', 'live_previews_enable'"
    assert answer.json() is None and answer.headers["X-Warnings"] == told
    answer = post(host, "options", {"enable_pnginfo": False})
    assert answer.status_code == 422 and "enable_pnginfo: must be true for all requests" in answer.text


def test_options_that_mean_nothing_pass(host: FakeHost) -> None:
    scripts = {
        "ADetailer": {"args": [False, {"ad_model": "f.pt"}]},
        "ControlNet": {"args": [{"enabled": False, "image": "x"}, {}]},
        "Refiner": {"args": [False, "", 0.8]},
        "Comments": {"args": []},
    }
    for sampler in ("Euler", "DPM++ 2M Karras", "UniPC"):  # webuiapi always sends an eta of 1
        assert post(host, "txt2img", {"sampler_name": sampler, "eta": 1.0}).status_code == 200
    host.seen.clear()
    body: dict[str, Any] = {
        "tiling": None,
        "styles": [],
        "eta": 1,
        "sampler_name": "Euler a",
        "s_noise": 1.0,
        "s_tmin": 0,
        "s_tmax": None,
        "mask": None,
        "mask_blur": 4,
        "inpainting_fill": 0,
        "inpaint_full_res": True,
        "inpaint_full_res_padding": 32,
        "inpainting_mask_invert": 1,
        "script_name": "None",
        "seed_resize_from_w": -1,
        "subseed": -1,
        "resize_mode": 1,
        "override_settings": {"sd_vae": "Automatic", "samples_format": "png", "emphasis": "Original"},
        "alwayson_scripts": scripts,
    }
    assert post(host, "txt2img", body).status_code == 200
    assert host.seen[0].control_image is None


@pytest.mark.parametrize("key", ["image", "input_image"])
def test_control_net_of_the_launch(key: str) -> None:
    unit = {key: base64.b64encode(picture()).decode(), "module": "none", "weight": 0.5}
    unit |= {"guidance_start": 0, "guidance_end": 1.0, "control_mode": 0, "resize_mode": "Crop and Resize"}
    with FakeHost(config_of(control_net={"/models/canny": 1.0})) as host:
        answer = post(host, "txt2img", {"alwayson_scripts": {"ControlNet": {"args": [unit]}}})
        assert answer.status_code == 200, answer.text
        assert (host.seen[0].control_image, host.seen[0].controlnet_scale) == (picture(), 0.5)
        assert "needed" in post(host, "txt2img", {"prompt": "x"}).json()["detail"]


@pytest.mark.parametrize(
    ("model", "is_launched"),
    [
        *((name, True) for name in (None, "", "canny", "Canny [d14c016b]", "sub/depth-v1.1.safetensors")),
        ("depth-v1.1 [00000000]", True),
        *((name, False) for name in ("None", "openpose", "depth-v1", "depth-v1.2", 3, ["canny"])),
    ],
)
def test_a_unit_names_a_control_net_of_the_launch(model: Any, is_launched: bool) -> None:
    unit = {"image": base64.b64encode(picture()).decode(), "model": model}
    nets = {"/models/canny": 1.0, "/models/depth-v1.1/": 0.5}
    with FakeHost(config_of(control_net=nets)) as host:
        answer = post(host, "txt2img", {"alwayson_scripts": {"ControlNet": {"args": [unit]}}})
        assert answer.status_code == (200 if is_launched else 422), answer.text
        if is_launched and model:  # the other one does not act
            scales = [1.0, 0.0] if "anny" in model else [0.0, 0.5]
            assert (host.seen[0].control_image, host.seen[0].controlnet_scale) == (picture(), scales)
        if not is_launched:
            told = f"ControlNet.model: must be canny, depth-v1.1, as launched; got {model!r}"
            assert told in answer.json()["detail"] and not host.seen


def test_several_units_of_control_net() -> None:
    one, two = picture(), picture(size=(16, 24))
    units: list[dict[str, Any]] = [
        {"image": base64.b64encode(image).decode(), "resize_mode": 0} for image in (one, two)
    ]
    units[0] |= {"model": "depth-v1.1", "weight": 0.3}
    nets = {"/models/canny": 1.0, "/models/depth-v1.1/": 0.5}
    with FakeHost(config_of(control_net=nets)) as host:
        for order in (units, units[::-1]):
            answer = post(host, "txt2img", {"alwayson_scripts": {"ControlNet": {"args": order}}})
            assert answer.status_code == 200, answer.text
            assert host.seen[-1].control_image == [two, one]
            assert host.seen[-1].controlnet_scale == [1.0, 0.3]
        for args, says in (
            ([units[0], units[0]], "'depth-v1.1' is named by two units"),
            ([*units, units[1]], "at most 2 enabled units, as launched; got 3"),
        ):
            answer = post(host, "txt2img", {"alwayson_scripts": {"ControlNet": {"args": args}}})
            assert answer.status_code == 422 and says in answer.json()["detail"]


def test_disabled_networks_are_taken_out_of_the_prompt_and_not_used(host: FakeHost) -> None:
    for disabled, scales in ((True, None), (False, {"x": 0.5})):
        body = {"prompt": "a cat<lora:x:0.5>", "disable_extra_networks": disabled}
        assert post(host, "txt2img", body).status_code == 200
        assert (host.seen[-1].positive, host.seen[-1].lora_scales) == ("a cat", scales)


def test_denoising_strength_is_how_much_of_img2img_is_run() -> None:
    image = base64.b64encode(picture(size=(16, 9))).decode()
    body: dict[str, Any] = {"init_images": [image]}
    sd1 = MODELS["sd1"]
    able = replace(sd1, fields=sd1.fields | IMAGE)
    config = config_of()
    samplers = samplers_for(config)
    for asked, strength in (
        ({}, 0.75),
        ({"denoising_strength": None}, 0.75),
        ({"denoising_strength": 0.3}, 0.3),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(MODELS, "sd1", able)
            data = translate(body | asked, config, samplers, with_image=True).data
        assert (data["strength"], data["image"]) == (strength, image)
    for name in ("sdup", "svd"):
        with FakeHost(config_of(name)) as host:
            answer = post(host, "img2img", body | {"denoising_strength": 0.3}).json()
            [told] = answer["warnings"]
            assert told.startswith(f"denoising_strength: type {name} (") and host.seen[-1].strength is None
            answer = post(host, "img2img", body | {"denoising_strength": 7})
            assert answer.status_code == 422 and "denoising_strength: must be at most 1, got 7" in answer.text
            assert "warnings" not in post(host, "img2img", body).json()


def test_options_of_img2img_alone(host: FakeHost) -> None:
    image = base64.b64encode(picture(size=(16, 16))).decode()
    with FakeHost(config_of("sdup")) as upscaler:
        for option, value in (("image_cfg_scale", 3.5), ("enable_hr", True), ("latent_mask", image)):
            answer = post(upscaler, "img2img", {"init_images": [image], option: value})
            assert answer.status_code == 422 and f"{option}: is not supported" in answer.json()["detail"]
        passing = {"image_cfg_scale": 1.5, "enable_hr": False, "mask_blur": 4}
        assert post(upscaler, "img2img", {"init_images": [image], **passing}).status_code == 200


def test_progress_and_interrupt(host: FakeHost) -> None:
    idle = get(host, "progress")
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    assert post(host, "interrupt", None).json() == {}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, host, "txt2img", {"prompt": "slow", "steps": 100, "n_iter": 3})
        wait_for(lambda: host.steps_run >= 2)
        running = get(host, "progress")
        assert 0 < running["progress"] < 1 and running["eta_relative"] > 0
        assert (running["state"]["job_count"], running["state"]["sampling_steps"]) == (1, 100)
        assert running["textinfo"] is None
        assert post(host, "interrupt", None).json() == {}
        assert answer.result().status_code == 499 and answer.result().json()["detail"] == "cancelled"
    assert len(host.seen) == 1


def test_progress_shows_the_picture_so_far_and_who_waits(host: FakeHost) -> None:
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(post, host, "txt2img", {"prompt": "slow", "steps": 400})
        wait_for(lambda: host.steps_run >= 2)
        second = pool.submit(post, host, "txt2img", {"prompt": "x"})
        wait_for(lambda: len(host.queue) == 1)
        assert get(host, "progress?skip_current_image=true")["current_image"] is None
        wait_for(lambda: host.steps_run >= 10)
        assert get(host, "progress?skip_current_image=true")["current_image"] is None
        assert host.queue.generation is not None
        assert host.queue.generation.preview is None  # nobody asked for one
        wait_for(lambda: get(host, "progress")["current_image"])
        seen = get(host, "progress")
        shown = Image.open(io.BytesIO(base64.b64decode(seen["current_image"])))
        red, green, blue = shown.convert("RGB").tobytes()[:3]
        assert shown.size == (4, 2) and red > 240 and max(green, blue) < 15
        assert seen["textinfo"] == "1 waiting" and seen["state"]["job_count"] == 2
        began = time.mktime(time.strptime(seen["state"]["job_timestamp"], "%Y%m%d%H%M%S"))
        assert 0 <= time.time() - began < 20
        assert post(host, "interrupt", None).json() == {}
        assert answer.result().status_code == 499 and second.result().status_code == 200


def test_the_key_as_bearer_or_as_password() -> None:
    with FakeHost(config_of(api_key="secret")) as host:
        url = f"{host.url}/sdapi/v1/sd-models"
        assert requests.get(url, timeout=5).status_code == 401
        assert requests.get(url, auth=("me", "wrong"), timeout=5).json()["error"] == "HTTPException"
        assert requests.get(url, auth=("me", "secret"), timeout=5).status_code == 200
        assert requests.get(url, headers={"Authorization": "Bearer secret"}, timeout=5).status_code == 200
        assert requests.get(f"{host.url}/progress", auth=("me", "secret"), timeout=5).status_code == 401


def test_no_pictures_are_refused_not_made_one(host: FakeHost) -> None:
    for key, value in (("batch_size", 0), ("n_iter", True), ("n_iter", 0)):
        answer = post(host, "txt2img", {"prompt": "x", key: value})
        assert answer.status_code == 422 and key in answer.text, answer.text
    assert not host.seen


def test_a_picture_to_start_from_is_not_read_by_txt2img(host: FakeHost) -> None:
    answer = post(host, "txt2img", {"prompt": "x", "init_images": ["eA=="], "width": 64, "height": 64}).json()
    assert answer["warnings"] == ["options that nothing here reads were left out: 'init_images'"]
