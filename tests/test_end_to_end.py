"""A real host under torchrun on the demo checkpoint, as its users know it: HTTP in, pictures out."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from shared.api.embedded import KEY
from tests.test_host import DEMO_CHECKPOINT, DEMO_STEPS, ROOT, Launch, until
from tests.test_matrix import psnr

STEPS = DEMO_STEPS
BODY = {"positive": "a red circle on a blue background", "seed": 7, "cfg": 4.0, "steps": STEPS}


@pytest.fixture(scope="module")
def plain() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(DEMO_CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def host(demo_host: Launch) -> Launch:
    return demo_host


def post(host: Launch, accept: str | None = None, **changes: Any) -> requests.Response:
    headers = {"Accept": accept} if accept else {}
    body = {k: v for k, v in (BODY | changes).items() if v is not None}
    return requests.post(f"{host.url}/generate", json=body, headers=headers, timeout=120)


def picture(answer: requests.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["output"]))))


def drawn(plain: Any, width: int = 128, height: int = 128, steps: int = STEPS) -> np.ndarray:
    output = plain(
        BODY["positive"],
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=BODY["cfg"],
        generator=torch.Generator("cpu").manual_seed(7),
    )
    return np.asarray(output.images[0])


def test_the_picture_is_plain_diffusers_at_every_size(host: Launch, plain: Any) -> None:
    first = post(host)
    assert first.json()["seed"] == 7 and first.json()["steps"] == STEPS and first.json()["format"] == "png"
    assert psnr(picture(first), drawn(plain)) >= 45
    assert post(host).json()["output"] == first.json()["output"], "the same seed gives other bytes"
    other = picture(post(host, width=96, height=160))
    assert other.shape == (160, 96, 3)
    assert psnr(other, drawn(plain, 96, 160)) >= 45


def test_steady_state_is_close_and_not_the_same(host: Launch, plain: Any) -> None:
    stale = picture(post(host, steps=3 * STEPS))
    assert 20 < psnr(stale, drawn(plain, steps=3 * STEPS)) < 60


def test_formats_and_raw_bytes(host: Launch) -> None:
    for format in ("jpeg", "webp"):
        data = base64.b64decode(post(host, output_format=format).json()["output"])
        assert Image.open(io.BytesIO(data)).format == format.upper()
    raw = post(host, accept="image/png", seed=-1)
    assert Image.open(io.BytesIO(raw.content)).size == (128, 128)
    assert int(raw.headers["X-Seed"]) >= 0


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_the_body_in_a_file_gives_the_same_bytes(host: Launch, format: str) -> None:
    made = post(host, seed=None, scheduler="euler_a", output_format=format).json()
    image = Image.open(io.BytesIO(base64.b64decode(made["output"])))
    body = json.loads(image.info[KEY] if format == "png" else image.getexif()[0x010E])
    assert body["seed"] == made["seed"]
    again = requests.post(f"{host.url}/generate", json=body, timeout=120).json()
    assert again["output"] == made["output"]


def close(one: str, other: str) -> bool:
    """Whether two files are one picture, to the rounding of another batch."""
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))).astype(int) for file in (one, other))
    return a.shape == b.shape and int(np.abs(a - b).max()) <= 1


def test_the_body_in_each_of_several_files_gives_its_picture(host: Launch) -> None:
    made = post(host, seed=2**64 - 1, pictures=2, scheduler="euler_a").json()
    assert made["seeds"] == [2**64 - 1, 0]
    for output, seed in zip(made["output"], made["seeds"], strict=True):
        body = json.loads(Image.open(io.BytesIO(base64.b64decode(output))).info[KEY])
        assert (body["seed"], body["pictures"]) == (seed, 1)
        again = requests.post(f"{host.url}/generate", json=body, timeout=120).json()
        assert close(again["output"], output)
    assert not close(*made["output"])


def test_the_openai_sdk(host: Launch) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{host.url}/v1", api_key="none", max_retries=0, timeout=120)
    (model,) = client.models.list().data
    assert model.id == "checkpoint"
    answer = client.images.generate(
        model=model.id,
        prompt=str(BODY["positive"]),
        n=2,
        size="128x128",
        response_format="b64_json",
        extra_body={"seed": 7, "cfg": BODY["cfg"], "steps": STEPS},
    )
    assert answer.data is not None and [getattr(made, "seed", None) for made in answer.data] == [7, 8]
    assert close(answer.data[0].b64_json or "", post(host).json()["output"])
    assert close(answer.data[1].b64_json or "", post(host, seed=8).json()["output"])
    with pytest.raises(openai.BadRequestError, match="multiple of 8"):
        client.images.generate(model=model.id, prompt="x", size="130x128")


def test_a_schedule_run_in_two_parts_is_the_whole(host: Launch) -> None:
    whole = picture(post(host))
    first = post(host, denoising_end=0.5, output_format="latent").json()
    assert first["steps"] == STEPS // 2 and not first["is_image"]
    second = post(host, denoising_start=0.5, latent=first["output"])
    assert second.json()["steps"] == STEPS - STEPS // 2
    assert psnr(picture(second), whole) >= 45
    assert post(host, denoising_start=0.5).status_code == 422


def test_noise_on_given_latents_is_image_to_image(host: Launch, plain: Any) -> None:
    import safetensors.torch
    from diffusers import StableDiffusionImg2ImgPipeline

    made = post(host, seed=3, return_latent=True).json()
    assert made["format"] == "png" and made["is_image"]
    latent = safetensors.torch.load(base64.b64decode(made["latent"]))["latent"]
    again = post(host, latent=made["latent"], denoise=0.5, add_noise=True)
    assert again.json()["steps"] == STEPS // 2
    pipe = StableDiffusionImg2ImgPipeline(**plain.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        BODY["positive"],
        image=latent,
        strength=0.5,
        num_inference_steps=STEPS,
        guidance_scale=BODY["cfg"],
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    assert psnr(picture(again), np.asarray(expected)) >= 45
    refused = post(host, denoise=0.5, add_noise=True)
    assert refused.status_code == 400 and "add_noise: needs latent" in refused.text


def test_own_schedules_schedulers_and_start_latents(host: Launch) -> None:
    usual = picture(post(host))
    assert psnr(picture(post(host, scheduler="k_euler")), usual) < 60
    assert np.array_equal(picture(post(host)), usual), "a request's scheduler stayed on"
    import safetensors.torch

    def encoded(**tensors: torch.Tensor) -> str:
        return base64.b64encode(safetensors.torch.save(tensors)).decode()

    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator("cpu").manual_seed(7))
    assert np.array_equal(picture(post(host, latent=encoded(latent=noise), seed=99)), usual)
    wrong = post(host, latent=encoded(latent=noise[:, :3]))
    assert wrong.status_code == 422 and "[1, 4, 16, 16]" in wrong.text
    timesteps = torch.tensor([900.0, 500.0, 100.0])
    own = post(host, timesteps=encoded(timesteps=timesteps), scheduler="euler")
    assert own.status_code == 422 or own.json()["steps"] == 3
    sigmas = post(host, sigmas=encoded(sigmas=torch.tensor([9.0, 3.0, 0.0])), scheduler="euler")
    assert sigmas.status_code == 200 and sigmas.json()["steps"] == 2  # the last sigma is the end


@pytest.mark.alone
def test_cancel_ends_within_a_step_and_the_host_goes_on(host: Launch) -> None:
    answers: list[requests.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(host, steps=400)))
    thread.start()
    until(lambda: 0 < float(requests.get(f"{host.url}/progress", timeout=5).text) < 50, 20)
    began = time.monotonic()
    assert requests.post(f"{host.url}/cancel", timeout=5).status_code == 200
    thread.join(10)
    assert time.monotonic() - began < 3
    assert answers[0].status_code == 499 and answers[0].json()["message"] == "cancelled"
    assert post(host).status_code == 200


def test_a_client_that_disconnects_frees_the_host(host: Launch) -> None:
    with socket.create_connection(("127.0.0.1", host.port)) as client:
        body = b'{"steps": 900, "positive": "x"}'
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: requests.get(f"{host.url}/health", timeout=5).json()["state"] == "busy", 10)
        time.sleep(0.5)
    until(lambda: requests.get(f"{host.url}/health", timeout=5).json()["state"] == "ready", 5)


def test_health_tells_the_plan_and_progress_ends_at_100(host: Launch) -> None:
    assert post(host).status_code == 200
    assert float(requests.get(f"{host.url}/progress", timeout=5).text) == 100
    health = requests.get(f"{host.url}/health", timeout=5).json()
    assert health["state"] == "ready" and health["world_size"] == 2 and len(health["ranks"]) == 2
    assert len(health["plan"]["stages"]) == 2 and health["plan"]["spread"] <= 0.15
    assert health["versions"]["torch"] and Path(ROOT / "asyncdiff_host.py").exists()


def test_a_lora_comes_and_goes_on_a_running_host(host: Launch, tmp_path: Path, plain: Any) -> None:
    import safetensors.torch

    usual = picture(post(host))
    generator = torch.Generator("cpu").manual_seed(1)
    tensors = {}
    for name, module in plain.unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_v")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(tensors, path)
    added = requests.post(f"{host.url}/lora", json={"path": str(path), "scale": 0.3}, timeout=60)
    assert added.status_code == 200, added.text
    assert psnr(picture(post(host)), usual) < 40
    assert psnr(picture(post(host, lora_scales={"style": 0.0})), usual) >= 45
    assert requests.delete(f"{host.url}/lora", json={"path": str(path)}, timeout=60).status_code == 200
    assert np.array_equal(picture(post(host)), usual)
