"""A1111's hires fix: two passes as one job, and the picture that two calls of /generate make by hand."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import safetensors.torch
import torch
import webuiapi
from diffusers import FluxPipeline
from PIL import Image

from shared.api.a1111_samplers import samplers_for
from shared.api.jobs import GenerationJob, JobError, SecondPass
from shared.api.parsing import check_request
from shared.api.queue import JobQueue
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.status import HostStatus
from shared.http.a1111_hires import PIXEL_UPSCALERS, UPSCALERS, two_passes
from shared.http.a1111_request import translate
from shared.models import MODELS
from shared.pipeline.latents import enlarged
from shared.ranks.channel import Channel
from shared.ranks.loop import RankLoop
from tests.httphost import FakeHost, config_of, picture, wait_for
from tests.pool import RankPool
from tests.test_host import Launch
from tests.test_matrix import launch

Json = dict[str, Any]
HIRES: Json = {"enable_hr": True, "prompt": "a red circle", "steps": 4, "seed": 7, "cfg_scale": 4.0}


def post(url: str, route: str, body: Json) -> Json:
    answer = requests.post(f"{url}{route}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def pixels(file: str | bytes) -> tuple[tuple[int, int], bytes]:
    image = Image.open(io.BytesIO(base64.b64decode(file) if isinstance(file, str) else file))
    return image.size, image.tobytes()


def by_hand(
    url: str, first: Json, second: Json, enlarge: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[int, int], bytes]:
    made = post(url, "/generate", first | {"output_format": "latent"})
    latent = safetensors.torch.load(base64.b64decode(made["output"]))["latent"]
    start = safetensors.torch.save({"latent": enlarge(latent).contiguous()})
    again = {"latent": base64.b64encode(start).decode(), "add_noise": True, **first, **second}
    return pixels(post(url, "/generate", again)["output"])


def test_the_picture_is_that_of_two_calls_by_hand(demo_host: Launch) -> None:
    url = demo_host.url
    answer = post(url, "/sdapi/v1/txt2img", HIRES | {"width": 64, "height": 96, "n_iter": 2, "hr_scale": 1.5})
    first = {"positive": "a red circle", "prompt_syntax": "a1111", "steps": 4, "cfg": 4.0}
    first |= {"width": 64, "height": 96}
    for number, image in enumerate(answer["images"]):
        expected = by_hand(
            url,
            first | {"seed": 7 + number},
            {"width": 96, "height": 144, "strength": 0.7},
            lambda latent: torch.nn.functional.interpolate(latent, (18, 12), mode="bilinear"),
        )
        assert expected[0] == (96, 144) and pixels(image) == expected
    info = json.loads(answer["info"])
    assert (info["width"], info["height"], info["steps"], info["all_seeds"]) == (64, 96, 4, [7, 8])
    text = "Denoising strength: 0.7, Hires resize: 96x144, Hires steps: 4, Hires upscaler: Latent"
    assert info["infotexts"][0].endswith(text) and "Size: 64x96," in info["infotexts"][0]
    file = Image.open(io.BytesIO(base64.b64decode(answer["images"][1])))
    assert file.info["parameters"] == info["infotexts"][1]
    made = json.loads(file.info["multigpu_diffusion"])
    assert (made["width"], made["height"], made["strength"], made["seed"]) == (96, 144, 0.7, 8)


def test_the_second_pass_has_options_of_its_own_and_is_cut_from_the_middle(demo_host: Launch) -> None:
    own: Json = {
        "hr_resize_x": 160,
        "hr_resize_y": 96,
        "hr_upscaler": "Latent (bicubic antialiased)",
        "hr_second_pass_steps": 6,
        "denoising_strength": 0.5,
        "hr_prompt": "a blue square",
        "hr_negative_prompt": "green",
        "hr_sampler_name": "DPM++ 2M",
        "hr_scheduler": "Karras",
        "hr_cfg": 2.0,
    }
    size = {"width": 64, "height": 64}
    answer = post(demo_host.url, "/sdapi/v1/txt2img", HIRES | size | own | {"sampler_name": "Euler"})
    first = {"positive": "a red circle", "steps": 4, "cfg": 4.0, "seed": 7, "scheduler": "euler"}
    second = {"positive": "a blue square", "negative": "green", "steps": 6, "cfg": 2.0, "strength": 0.5}
    expected = by_hand(
        demo_host.url,
        first | size | {"prompt_syntax": "a1111"},
        second | {"width": 160, "height": 96, "scheduler": "k_dpmpp_2m"},
        lambda latent: torch.nn.functional.interpolate(latent, (20, 20), mode="bicubic", antialias=True)[
            :, :, 4:16
        ],
    )
    assert expected[0] == (160, 96) and pixels(answer["images"][0]) == expected


@pytest.mark.parametrize(
    ("upscaler", "resample"),
    [("Lanczos", "LANCZOS"), pytest.param("Nearest", "NEAREST", marks=pytest.mark.slow)],
)
def test_an_upscaler_of_pixels_is_image_to_image_of_the_enlarged_picture(
    demo_host: Launch, upscaler: str, resample: str
) -> None:
    size, own = (
        {"width": 64, "height": 64},
        {"hr_resize_x": 128, "hr_resize_y": 96, "denoising_strength": 0.5},
    )
    body = HIRES | size | own | {"hr_upscaler": upscaler, "n_iter": 2}
    answer = post(demo_host.url, "/sdapi/v1/txt2img", body)
    for seed, image in enumerate(answer["images"], 7):
        first = {"positive": "a red circle", "prompt_syntax": "a1111", "steps": 4, "cfg": 4.0, "seed": seed}
        made = post(demo_host.url, "/generate", first | size)["output"]
        # 128x128 covers 128x96, the middle of it is kept.
        large = Image.open(io.BytesIO(base64.b64decode(made))).resize((128, 128), Image.Resampling[resample])
        out = io.BytesIO()
        large.crop((0, 16, 128, 112)).save(out, "PNG")
        second = {"image": base64.b64encode(out.getvalue()).decode(), "width": 128, "height": 96}
        expected = post(demo_host.url, "/generate", first | second | {"strength": 0.5})["output"]
        assert pixels(image) == pixels(expected) and pixels(image)[0] == (128, 96)
    told = json.loads(answer["info"])["infotexts"][0]
    assert told.endswith(f"Hires resize: 128x96, Hires steps: 4, Hires upscaler: {upscaler}")


def test_txt2img_with_hires_fix_as_webuiapi_sends_it() -> None:
    with FakeHost() as host:
        sdk = webuiapi.WebUIApi(port=host.server.port, steps=3)
        for upscaler in (webuiapi.HiResUpscaler.Latent, webuiapi.HiResUpscaler.Lanczos):
            made = sdk.txt2img(
                *(True, 0.6),
                prompt="x",
                hr_upscaler=upscaler,
                hr_scale=1.5,
                width=64,
                height=64,
                hr_second_pass_steps=5,
            )
            assert len(made.images) == 1 and made.info["sampler_name"] == "Euler a"
        names = [one["name"] for one in sdk.get_upscalers()]
    assert [seen.output_format for seen in host.seen] == ["latent", "png", "png", "png"]
    for second, field in ((host.seen[1], "latent"), (host.seen[3], "image")):
        assert (second.width, second.height, second.strength, second.steps) == (96, 96, 0.6, 5)
        assert [name for name in ("latent", "image") if getattr(second, name) is not None] == [field]
    assert names == list(PIXEL_UPSCALERS)


def both_ways(backend: str, name: str, flags: Json, at_once: int) -> tuple[list[Any], list[Any]] | None:
    """On one rank: pictures of the hires fix, and of two jobs by hand; None where no queue is."""
    config, world, module, _ = launch(backend, name, {}, dict(flags))
    engine, channel = module.build_engine(config, world), Channel(world)
    if world.rank:
        RankLoop(engine, channel, at_once=at_once).run()
        return None
    queue, status = JobQueue(99), HostStatus(backend, name, world.size)
    found: list[Any] = []

    def made(job: GenerationJob) -> list[Reply]:
        queue.submit(job)
        assert job.wait(100) and job.error is None, job.error
        for reply in job.made:
            reply.encode()
        return job.made

    def check(options: Json, more: Json) -> GenerateRequest:
        return check_request(translate(options, config, samplers_for(config), False).data | more, config)

    def hand(seed: int) -> Any:
        first: Json = {
            "positive": "a red circle",
            "prompt_syntax": "a1111",
            "steps": 4,
            "cfg": 4.0,
            "seed": seed,
        }
        draft = check_request(first | {"width": 64, "height": 64, "output_format": "latent"}, config)
        latent = safetensors.torch.load(made(GenerationJob(draft))[0].output[0])["latent"]
        if name == "flux":
            latent = FluxPipeline._unpack_latents(latent, 64, 64, engine.pipe.vae_scale_factor)
        larger = [side * 3 // 2 for side in latent.shape[-2:]]
        latent = torch.nn.functional.interpolate(latent, larger, mode="nearest-exact")
        latent = FluxPipeline._pack_latents(latent, *latent.shape) if name == "flux" else latent
        start = {"latent": safetensors.torch.save({"latent": latent.contiguous()}), "add_noise": True}
        second = first | start | {"width": 96, "height": 96, "strength": 0.7}
        return pixels(made(GenerationJob(check_request(second, config)))[0].output[0])

    def drive() -> None:
        try:
            body = HIRES | {"width": 64, "height": 64, "hr_scale": 1.5, "n_iter": 3}
            first, second = two_passes(body | {"hr_upscaler": "Latent (nearest-exact)"}, config, check)
            found.append([pixels(reply.output[0]) for reply in made(GenerationJob(first, second=second))])
            found.append([hand(seed) for seed in (7, 8, 9)])
        finally:
            queue.close(JobError(503, "test is over"))

    threading.Thread(target=drive, daemon=True).start()
    RankLoop(engine, channel, queue, status, at_once=at_once).run()
    return found[0], found[1]


@pytest.mark.parametrize(
    ("backend", "name", "flags", "at_once"),
    [
        pytest.param("asyncdiff", "sd1", {}, 1, marks=pytest.mark.slow),
        pytest.param("asyncdiff", "sdxl", {}, 1, marks=pytest.mark.slow),
        pytest.param("asyncdiff", "sd3", {}, 1, marks=pytest.mark.slow),
        ("xdit", "flux", {"data_parallel_degree": 2}, 2),
    ],
)
def test_every_kind_of_type_makes_what_two_calls_make(
    pool: RankPool, backend: str, name: str, flags: Json, at_once: int
) -> None:
    made, by_hand = pool.run(both_ways, 2, backend, name, flags, at_once)[0]
    assert made == by_hand and len(set(made)) == 3 and made[0][0] == (96, 96)


def test_each_frame_of_a_video_is_enlarged_by_itself() -> None:
    latent = torch.randn(1, 4, 3, 8, 6, generator=torch.Generator().manual_seed(1))
    draft = Reply([safetensors.torch.save({"latent": latent})], "latent", 7, 48, 64, 4)
    request = GenerateRequest(width=96, height=96)
    second = SecondPass(request, "Latent (nearest)", "nearest", False, "ncfhw", (96, 128))
    found = safetensors.torch.load(enlarged(draft, second))["latent"]
    wanted = latent.repeat_interleave(2, 3).repeat_interleave(2, 4)[:, :, :, 2:14]
    assert torch.equal(found, wanted)


def test_both_passes_are_one_job_whose_progress_never_falls() -> None:
    request = GenerateRequest(seed=7, steps=10, width=64, height=64, pictures=2)
    second = request.model_copy(update={"width": 128, "height": 128, "strength": 0.5})
    job = GenerationJob(request, second=SecondPass(second, "Latent", "bilinear", False, "nchw", (128, 128)))
    seen = []
    for seed in (7, 8):
        for asked in (request, second):
            drawn, count = job.draw(1)
            assert drawn == asked.numbered(seed - 7) and count == 1 and not job.done
            job.at_step(5, 10)
            seen.append(job.progress)
            seconds = {"total": 1.0, "denoise": 0.5, "decode": 0.5}
            job.add([Reply([b"x"], "png", seed, 64, 64, 10, seconds, warnings=[f"of {asked.width}"])])
    # A pass of 64x64x10 pixel steps, and one of 128x128x5, which is twice that.
    assert seen == pytest.approx([99 / 2 * part for part in (1 / 6, 2 / 3, 7 / 6, 5 / 3)])
    assert job.done and job.progress == 100 and [reply.seed for reply in job.made] == [7, 8]
    assert job.made[0].warnings == ["of 64", "of 128"] and job.made[0].seconds["total"] == 2.0


def test_the_second_pass_is_cancelled_and_waited_for_as_the_first() -> None:
    with FakeHost(config_of(max_queue=1)) as host, ThreadPoolExecutor(2) as threads:
        body = {"prompt": "x", "hr_prompt": "hold", "enable_hr": True, "steps": 3, "seed": 7}
        answer = threads.submit(host.post, "/sdapi/v1/txt2img", json=body)
        wait_for(lambda: len(host.seen) == 2)
        other = threads.submit(host.generate, {"positive": "other"})
        wait_for(lambda: len(host.queue) == 1)
        progress = host.get("/sdapi/v1/progress").json()
        assert 0 < progress["progress"] < 1 and progress["state"]["job_count"] == 2
        assert host.post("/sdapi/v1/interrupt").status_code == 200
        assert answer.result().status_code == 499 and other.result().status_code == 200
    assert [(seen.positive, seen.width) for seen in host.seen] == [("x", 512), ("hold", 1024), ("other", 512)]
    assert [seen.seed for seen in host.seen[:2]] == [7, 7]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (1024, 1536)),
        ({"hr_scale": 1.3}, (664, 1000)),  # 665.6 and 998.4
        ({"hr_resize_x": 700}, (704, 1048)),  # 1050 high
        ({"hr_resize_y": 1152}, (768, 1152)),
        ({"hr_resize_x": 640.0, "hr_resize_y": 640, "hr_scale": 9}, (640, 640)),
    ],
)
def test_sizes_of_the_second_pass(options: Json, size: tuple[int, int]) -> None:
    with FakeHost() as host:
        body = {"enable_hr": True, "width": 512, "height": 768, "steps": 2, **options}
        assert host.post("/sdapi/v1/txt2img", json=body).status_code == 200
    first, second = host.seen
    assert (first.width, first.height, first.output_format, first.latent) == (512, 768, "latent", None)
    assert (second.width, second.height, second.output_format) == (*size, "png")
    assert (second.steps, second.strength, second.add_noise, second.seed) == (2, 0.7, True, first.seed)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"hr_upscaler": "R-ESRGAN 4x+"}, 422, "hr_upscaler: must be one of Latent, Latent (antialiased), "),
        ({"hr_upscaler": "LDSR"}, 422, "Latent (nearest-exact), None, Lanczos, Nearest; got 'LDSR'"),
        ({"hr_checkpoint_name": "other"}, 422, "hr_checkpoint_name: is not supported: this host has only"),
        ({"hr_scale": 0}, 422, "hr_scale: must be a number above 0"),
        ({"hr_scale": 100}, 400, "hr_scale: makes a width that must be at most 8192, got 51200"),
        (
            {"hr_resize_x": 4000},
            422,
            "hr_resize_x: 4000 x 4000 pixels x 1 frames x 30 steps = 480000000 exceeds",
        ),
        ({"hr_resize_y": -1}, 422, "hr_resize_y: must be a whole number from 0 to 8192, got -1"),
        ({"hr_second_pass_steps": 2000}, 400, "hr_second_pass_steps: must be at most 1000, got 2000"),
        ({"hr_second_pass_steps": 99}, 422, "hr_second_pass_steps: 1024 x 1024 pixels x 1 frames x 99 steps"),
        ({"denoising_strength": 0}, 400, "denoising_strength: must be above 0"),
        ({"denoising_strength": 0.02}, 422, "denoising_strength: leaves no step to run: 0.02 of 30 steps"),
        ({"denoising_strength": "x"}, 400, "denoising_strength: must be a valid number, got 'x'"),
        ({"hr_cfg": 1000}, 400, "hr_cfg: must be at most 100, got 1000"),
        ({"hr_sampler_name": "Nonsense"}, 422, "hr_sampler_name: must be one of DPM++ 2M"),
        ({"hr_prompt": "<lora:x:y>"}, 422, "hr_prompt: "),
        ({"width": 16, "hr_resize_x": 8000, "hr_resize_y": 16}, 422, "hr_resize_x: and hr_resize_y cut"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(options: Json, status: int, words: str) -> None:
    with FakeHost(config_of(max_pixel_steps=10**8)) as host:
        answer = host.post("/sdapi/v1/txt2img", json={"enable_hr": True, **options})
        assert answer.status_code == status and words in answer.json()["detail"], answer.text
    assert not host.seen


def test_faults_of_both_passes_are_told_once_each() -> None:
    with FakeHost() as host:
        body = {"enable_hr": True, "steps": -1, "cfg_scale": 900, "hr_cfg": 901, "hr_upscaler": "x"}
        detail = host.post("/sdapi/v1/txt2img", json=body).json()["detail"]
    told = [fault.split(": ")[0] for fault in detail.split("; ") if ": " in fault]
    assert sorted(told) == ["cfg_scale", "hr_cfg", "hr_upscaler", "steps"], detail


def test_nothing_of_the_second_pass_counts_without_enable_hr() -> None:
    with FakeHost() as host:
        body = {
            "enable_hr": False, "hr_upscaler": "R-ESRGAN 4x+", "hr_scale": 2.0, "hr_prompt": "y",
            "hr_cfg": 1.0, "hr_second_pass_steps": 0, "hr_resize_x": 0, "hr_resize_y": 0,
            "hr_sampler_name": None, "hr_checkpoint_name": None, "hr_negative_prompt": "",
            "denoising_strength": 0,
        }  # fmt: skip
        answer = host.post("/sdapi/v1/txt2img", json=body)
        assert answer.status_code == 200 and "warnings" not in answer.json()
    assert [(seen.output_format, seen.strength) for seen in host.seen] == [("png", None)]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"denoising_strength": "abc"}, 400, "denoising_strength: must be a valid number, got 'abc'"),
        ({"denoising_strength": 7}, 400, "denoising_strength: must be at most 1, got 7"),
        ({"denoising_strength": -1}, 400, "denoising_strength: must be at least 0, got -1"),
        ({"hr_scale": -1}, 422, "hr_scale: must be a number above 0 and at most 8192, got -1"),
        ({"hr_scale": "abc"}, 422, "hr_scale: must be a number above 0 and at most 8192, got 'abc'"),
        ({"hr_resize_x": -8}, 422, "hr_resize_x: must be a whole number from 0 to 8192, got -8"),
        ({"hr_resize_y": 0.5}, 422, "hr_resize_y: must be a whole number from 0 to 8192, got 0.5"),
        ({"hr_second_pass_steps": -3}, 400, "hr_second_pass_steps: must be at least 1, got -3"),
        ({"hr_second_pass_steps": 9999}, 400, "hr_second_pass_steps: must be at most 1000, got 9999"),
        ({"hr_cfg": 1000}, 400, "hr_cfg: must be at most 100, got 1000"),
        ({"hr_prompt": 5}, 400, "hr_prompt: must be a valid string, got 5"),
        ({"hr_negative_prompt": ["x"]}, 400, "hr_negative_prompt: must be a valid string, got ['x']"),
        ({"hr_upscaler": 5}, 422, "hr_upscaler: must be text, got 5"),
        ({"hr_sampler_name": {"a": 1}}, 422, "hr_sampler_name: must be text, got"),
        ({"hr_scale": -1, "hr_cfg": -1, "steps": 0}, 400, "steps: must be at least 1, got 0"),
    ],
)
def test_nonsense_for_the_second_pass_is_refused_without_it(options: Json, status: int, words: str) -> None:
    with FakeHost() as host:
        answer = host.post("/sdapi/v1/txt2img", json={"prompt": "x", **options})
        assert answer.status_code == status and words in answer.json()["detail"], answer.text
        told = [fault.split(": ")[0] for fault in answer.json()["detail"].split("; ")]
        assert sorted(told) == sorted(options)
    assert not host.seen


def test_types_without_latents_to_start_from_refuse_it() -> None:
    for name in sorted(MODELS):
        with FakeHost(config_of(name)) as host:
            names = [mode["name"] for mode in host.get("/sdapi/v1/latent-upscale-modes").json()]
            pixels = [mode["name"] for mode in host.get("/sdapi/v1/upscalers").json()]
            able = MODELS[name].image == "start" and MODELS[name].output == "image"
            assert pixels == (list(PIXEL_UPSCALERS) if able else [])
            answer = host.post("/sdapi/v1/txt2img", json={"enable_hr": True, "prompt": "x"})
            if "strength" not in MODELS[name].fields or MODELS[name].image == "needed":
                assert names == [] and answer.status_code == 422
                assert f"enable_hr: type {name} (" in answer.json()["detail"]
            else:
                assert names == list(UPSCALERS) and answer.status_code == 200, answer.text


def test_control_net_is_in_both_passes() -> None:
    unit = {"image": base64.b64encode(picture()).decode(), "weight": 0.5}
    body = {"enable_hr": True, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    with FakeHost(config_of(control_net={"/models/canny": 1.0})) as host:
        assert host.post("/sdapi/v1/txt2img", json=body).status_code == 200
    assert [(seen.control_image, seen.controlnet_scale) for seen in host.seen] == [(picture(), 0.5)] * 2
