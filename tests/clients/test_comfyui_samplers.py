"""clients/comfyui's samplers: pictures, previews, progress, warnings and Cancel, against real hosts."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from typing import Any, NoReturn

import numpy as np
import pytest
import requests
import safetensors.torch
import torch
from PIL import Image

from shared.api.codecs import listed, picture_size
from shared.api.requests import MAX_PICTURES
from shared.http.wsgi import MAX_WATCHERS
from shared.models import MODELS
from tests.clients.test_comfyui import defaults
from tests.comfy_stub import ComfyUI, InterruptProcessingException
from tests.httphost import FakeHost, config_of
from tests.test_host import DEMO_CHECKPOINT, DEMO_STEPS, Launch, until
from tests.test_matrix import psnr

STEPS = DEMO_STEPS


def sampler(comfy: ComfyUI, host: Launch | FakeHost, **given: Any) -> tuple[Any, ...]:
    """Execute an attached sampler; values that are no JSON go to it directly."""
    attach = defaults(comfy, "MultiGPUDiffusionAttachHost", url=host.url)
    handle = comfy.run({"1": attach})["1"][0]
    small = {"seed": 7, "steps": STEPS, "cfg": 4.0, "width": 128, "height": 128}
    inputs = defaults(comfy, "MultiGPUDiffusionSampler", **small)["inputs"]
    return comfy.nodes["MultiGPUDiffusionSampler"].execute(**(inputs | {"host": handle} | given)).args


def pixels(image: torch.Tensor) -> np.ndarray:
    return (image[0].numpy() * 255).round().astype(np.uint8)


def test_a_picture_with_progress_is_the_hosts_own(comfy: ComfyUI, demo_host: Launch) -> None:
    comfy.progress.clear()
    image, latent = sampler(comfy, demo_host, steps=12, negative="yellow")
    assert image.shape == (1, 128, 128, 3) and latent["samples"].shape == (1, 4, 16, 16)
    assert comfy.progress == sorted(comfy.progress) and comfy.progress[-1] == 100
    assert any(0 < percent < 100 for percent in comfy.progress)
    body = {"positive": "a red circle on a blue background", "negative": "yellow", "steps": 12, "seed": 7}
    answer = requests.post(
        f"{demo_host.url}/generate", json=body | {"cfg": 4.0, "return_latent": True}, timeout=60
    ).json()
    assert torch.equal(image, comfy.pack["convert"].images(answer["output"]))
    own = comfy.pack["convert"].latent_to_host(latent["samples"], "sd1")
    both = [_latent(base64.b64decode(text)) for text in (own, answer["latent"])]
    torch.testing.assert_close(*both)


def _latent(data: bytes) -> torch.Tensor:
    return safetensors.torch.load(data)["latent"]


def test_latents_in_and_out(comfy: ComfyUI, demo_host: Launch) -> None:
    whole, _ = sampler(comfy, demo_host)
    _, half = sampler(comfy, demo_host, stop_at=0.5)
    rest, _ = sampler(comfy, demo_host, latent=half, denoise=0.5, add_noise=False)
    assert psnr(pixels(rest), pixels(whole)) >= 45
    whole, finished = sampler(comfy, demo_host, steps=6)
    again, _ = sampler(comfy, demo_host, latent=finished, steps=6, denoise=0.34)
    other, _ = sampler(comfy, demo_host, latent=finished, denoise=1.0, seed=8)
    assert 15 < psnr(pixels(again), pixels(whole)) < 45
    assert psnr(pixels(again), pixels(whole)) > psnr(pixels(other), pixels(whole))
    # An empty latent is a size and a number of pictures.
    both, _ = sampler(comfy, demo_host, latent={"samples": torch.zeros(2, 4, 20, 12)}, width=512)
    assert both.shape == (2, 160, 96, 3) and not torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match="latent: needed, or an image, where denoise"):
        sampler(comfy, demo_host, denoise=0.5)


def test_flux_latents_are_packed_and_unpacked(comfy: ComfyUI) -> None:
    convert = comfy.pack["convert"]
    samples = torch.randn(1, 16, 8, 12)
    packed = convert.latent_to_host(samples, "flux")
    assert _latent(base64.b64decode(packed)).shape == (1, 24, 64)
    torch.testing.assert_close(convert.latent_from_host(packed, "flux", 96, 64), samples)
    from diffusers import FluxPipeline

    theirs = FluxPipeline._pack_latents((samples - 0.1159) * 0.3611, 1, 16, 8, 12)
    torch.testing.assert_close(_latent(base64.b64decode(packed)), theirs)


def test_flux2_samples_are_the_hosts_squares(comfy: ComfyUI) -> None:
    convert = comfy.pack["convert"]
    samples = torch.randn(1, 128, 4, 6)
    sent = convert.latent_to_host(samples, "flux2")
    from diffusers import Flux2KleinPipeline

    assert torch.equal(_latent(base64.b64decode(sent)), Flux2KleinPipeline._pack_latents(samples))
    assert torch.equal(convert.latent_from_host(sent, "flux2", 96, 64), samples)
    with FakeHost(config_of("flux2", backend="xdit")) as host:
        host.latent = np.zeros((1, 24, 128), np.float32)
        _, made = sampler(comfy, host, latent={"samples": samples}, denoise=0.5)
    assert made["samples"].shape == samples.shape
    assert (host.seen[0].width, host.seen[0].height) == (96, 64)


def test_conditioning_is_the_prompt(comfy: ComfyUI, demo_host: Launch) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(DEMO_CHECKPOINT / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(DEMO_CHECKPOINT / "text_encoder")

    def encode(text: str) -> list[Any]:
        tokens = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = encoder(tokens.input_ids)
        return [[made[0], {"pooled_output": made[1]}]]

    usual, _ = sampler(comfy, demo_host, negative="yellow")
    prompts = {
        "positive": "",
        "negative": "",
        "positive_conditioning": encode("a red circle on a blue background"),
    }
    same, _ = sampler(comfy, demo_host, **prompts, negative_conditioning=encode("yellow"))
    assert psnr(pixels(same), pixels(usual)) >= 45
    # What is shorter is repeated; attention does not see the difference.
    long = encode("yellow")
    long[0][0] = long[0][0].repeat(1, 2, 1)
    repeated, _ = sampler(comfy, demo_host, **prompts, negative_conditioning=long)
    assert psnr(pixels(repeated), pixels(usual)) >= 45
    masked = [[long[0][0], {"mask": torch.ones(1, 8, 8)}]]
    with pytest.raises(ValueError, match=r"positive_embeds: .* mask"):
        sampler(comfy, demo_host, positive_conditioning=masked)


def test_cancel_frees_the_host_and_errors_are_the_hosts_words(comfy: ComfyUI, demo_host: Launch) -> None:
    comfy.progress.clear()

    def press() -> None:
        until(lambda: any(comfy.progress), 20)
        comfy.interrupted = True

    threading.Thread(target=press, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(InterruptProcessingException):
        sampler(comfy, demo_host, steps=900)
    assert time.monotonic() - began < 20 and not comfy.interrupted
    until(lambda: requests.get(f"{demo_host.url}/health", timeout=5).json()["state"] == "ready", 3)
    error = comfy.pack["host"].HostError
    with pytest.raises(error, match="control_image: the host was started without --control_net"):
        sampler(comfy, demo_host, control_image=torch.rand(1, 64, 64, 3))
    with pytest.raises(error, match=r"no answer from the host at http://127\.0\.0\.1:9:"):
        comfy.run({"1": defaults(comfy, "MultiGPUDiffusionAttachHost", url="http://127.0.0.1:9")})


def noisy(*shape: int) -> dict[str, Any]:
    return {"samples": torch.randn(*shape, generator=torch.Generator().manual_seed(3))}


def by_hand(host: Launch, **body: Any) -> dict[str, Any]:
    """The answer to the sampler's request, written by hand."""
    body = {"positive": "a red circle on a blue background", "steps": STEPS, "seed": 7, "cfg": 4.0, **body}
    answer = requests.post(f"{host.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_denoise_is_the_hosts_strength(comfy: ComfyUI, demo_host: Launch) -> None:
    """Also at 1, where KSampler too mixes a latent that is not empty into the noise."""
    convert, latent = comfy.pack["convert"], noisy(1, 4, 16, 16)
    given = convert.latent_to_host(latent["samples"], "sd1")
    for denoise in (0.5, 1.0):
        image, _ = sampler(comfy, demo_host, latent=latent, denoise=denoise)
        answer = by_hand(demo_host, latent=given, strength=denoise, add_noise=True)
        assert torch.equal(image, convert.images(answer["output"])), denoise
        plain = by_hand(demo_host)
        assert not torch.equal(image, convert.images(plain["output"]))


def test_what_a_latent_becomes_in_a_request(comfy: ComfyUI) -> None:
    assert all("strength" in MODELS[name].fields for name in comfy.pack["convert"].FAMILIES)

    def asked(host: FakeHost, **given: Any) -> tuple[Any, ...]:
        sampler(comfy, host, **given)
        one = host.seen.pop()
        return one.strength, one.denoising_start, one.denoising_end, one.add_noise, one.latent is not None

    full, empty = noisy(1, 4, 16, 16), {"samples": torch.zeros(1, 4, 16, 16)}
    with FakeHost() as host:
        assert asked(host) == asked(host, latent=empty) == (None, None, None, None, False)
        assert asked(host, latent=full, denoise=0.3) == (0.3, None, None, True, True)
        assert asked(host, latent=empty, denoise=0.3) == (0.3, None, None, True, True)
        assert asked(host, latent=full) == (1.0, None, None, True, True)
        assert asked(host, latent=full, denoise=0.6, stop_at=0.8) == (0.6, None, 0.8, True, True)
        # What stop_at left goes on where that was cut.
        assert asked(host, latent=full, denoise=0.4, add_noise=False) == (None, 0.6, None, None, True)
        assert asked(host, latent=full, add_noise=False) == (None, None, None, None, True)


def test_an_image_and_a_mask_of_comfyui_are_the_hosts(comfy: ComfyUI) -> None:
    one, two = torch.zeros(48, 64, 3), torch.ones(48, 64, 3)
    white = torch.zeros(1, 48, 64)
    white[0, 8:16, 8:24] = 1.0
    white[0, 0, 0] = 0.5
    with FakeHost() as host:
        sampler(comfy, host, image=torch.stack([one, two]), denoise=0.6, pictures=2)
        assert [(seen.seed, seen.strength, seen.mask) for seen in host.seen] == [
            *((7, 0.6, None), (8, 0.6, None), (9, 0.6, None), (10, 0.6, None))
        ]
        assert {(seen.width, seen.height) for seen in host.seen} == {(64, 48)}, "the images' own size"
        sent = [opened(seen.image).getpixel((0, 0)) for seen in host.seen]
        assert sent == [(0, 0, 0), (0, 0, 0), (255, 255, 255), (255, 255, 255)]
        sampler(comfy, host, image=one[None], mask=white)
        [_, _, _, _, seen] = host.seen
        mask = opened(seen.mask)
        assert (mask.mode, mask.size, seen.strength) == ("L", (64, 48), 1.0)
        assert [mask.getpixel(at) for at in ((8, 8), (23, 15), (24, 16), (0, 0))] == [255, 255, 0, 128]
        for words, given in (
            ("mask: needs the image", {"mask": white}),
            ("mask: must be one, or one for each of 2 images; got 3", {"mask": torch.zeros(3, 48, 64)}),
            ("latent: give a latent or an image", {"latent": noisy(1, 4, 16, 16)}),
            ("add_noise: must be on", {"add_noise": False}),
        ):
            image = None if words.startswith("mask: needs") else torch.stack([one, two])
            with pytest.raises(ValueError, match=words):
                sampler(comfy, host, image=image, **given)
    assert len(host.seen) == 5


def test_the_frames_of_a_video_are_what_animatediff_starts_from(comfy: ComfyUI) -> None:
    clip = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 48, 64, 3)
    with FakeHost(config_of("ad")) as host:
        attach = defaults(comfy, "MultiGPUDiffusionAttachHost", url=host.url)
        handle = comfy.run({"1": attach})["1"][0]
        inputs = defaults(comfy, "MultiGPUDiffusionAnimateDiffSampler")["inputs"] | {"host": handle}
        node = comfy.nodes["MultiGPUDiffusionAnimateDiffSampler"]
        node.execute(**inputs | {"image": clip, "denoise": 0.6})
        node.execute(**inputs)
    first, second = host.seen
    sent = [opened(file).getpixel((0, 0)) for file in first.images]
    assert sent == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    assert (first.frames, first.width, first.height, first.strength) == (3, 64, 48, 0.6)
    assert (second.image, second.frames, second.width, second.strength) == (None, 16, 512, None)


def test_a_picture_is_what_a_video_begins_with(comfy: ComfyUI) -> None:
    white = torch.ones(1, 48, 64, 3)
    with FakeHost(config_of("wani2v")) as host:
        attach = defaults(comfy, "MultiGPUDiffusionAttachHost", url=host.url)
        handle = comfy.run({"1": attach})["1"][0]
        inputs = defaults(comfy, "MultiGPUDiffusionAnimateDiffSampler")["inputs"] | {"host": handle}
        node = comfy.nodes["MultiGPUDiffusionAnimateDiffSampler"]
        node.execute(**inputs | {"image": white, "frames": 5})
        with pytest.raises(ValueError, match="image: must be one picture; got a batch of 2"):
            node.execute(**inputs | {"image": torch.cat([white, white])})
    [seen] = host.seen
    assert opened(seen.image).size == (64, 48)
    assert (seen.frames, seen.width, seen.height, seen.strength) == (5, 512, 512, None)


def opened(data: bytes | list[bytes] | None) -> Image.Image:
    assert isinstance(data, bytes)
    return Image.open(io.BytesIO(data))


def test_an_image_is_painted_anew_where_the_mask_is_white(comfy: ComfyUI, demo_host: Launch) -> None:
    image, _ = sampler(comfy, demo_host)
    white = torch.zeros(1, 128, 128)
    white[:, :, 64:] = 1.0
    given = {"image": image, "mask": white, "positive": "a blue circle", "denoise": 0.7, "seed": 8}
    made, latent = sampler(comfy, demo_host, **given)
    convert = comfy.pack["convert"]
    files = {"image": convert.picture(image, "image"), "mask": convert.mask(white[0])}
    answer = by_hand(demo_host, positive="a blue circle", seed=8, strength=0.7, **files)
    assert torch.equal(made, convert.images(answer["output"]))
    assert made.shape == (1, 128, 128, 3) and latent["samples"].shape == (1, 4, 16, 16)


def test_further_images_are_looked_at_beside_each_image(
    comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = comfy.pack["convert"]
    monkeypatch.setattr(convert, "latent_from_host", lambda *given: torch.zeros(1, 16, 1, 4, 4))
    images, further = torch.rand(2, 16, 24, 3), torch.rand(2, 32, 16, 3)
    with FakeHost(config_of("qwenedit", backend="xdit")) as host:
        sampler(comfy, host, image=images, further_images=further)
        with pytest.raises(ValueError, match="further_images: needs the image"):
            sampler(comfy, host, further_images=further)
    assert [[picture_size(file) for file in seen.images] for seen in host.seen] == [
        [(24, 16), (16, 32), (16, 32)]
    ] * 2
    assert len({seen.images[0] for seen in host.seen}) == 2


def test_an_empty_latent_is_not_shifted(comfy: ComfyUI) -> None:
    text = comfy.pack["convert"].latent_to_host(torch.zeros(1, 16, 8, 8), "sd3")
    assert not _latent(base64.b64decode(text)).any()


def test_a_batch_is_a_picture_for_each(comfy: ComfyUI) -> None:
    nets = {"/models/canny": 1.0, "/models/depth": 0.5}
    with FakeHost(config_of(control_net=nets, ip_adapter={"/models/ip": 1.0})) as host:
        sampler(comfy, host, control_image=torch.rand(2, 16, 16, 3), ip_image=torch.rand(3, 8, 8, 3))
        sampler(comfy, host, control_image=torch.rand(1, 16, 16, 3))
    several, one = host.seen
    assert [picture_size(data) for data in listed(several.control_image)] == [(16, 16)] * 2
    assert [picture_size(data) for data in listed(several.ip_image)] == [(8, 8)] * 3
    assert isinstance(one.control_image, bytes)


def test_several_pictures_are_one_request(comfy: ComfyUI, demo_host: Launch) -> None:
    three, latents = sampler(comfy, demo_host, pictures=3)
    assert three.shape == (3, 128, 128, 3) and latents["samples"].shape == (3, 4, 16, 16)
    batch, _ = sampler(comfy, demo_host, latent={"samples": torch.zeros(3, 4, 16, 16)})
    assert torch.equal(three, batch)
    for index in range(3):
        one, latent = sampler(comfy, demo_host, seed=7 + index)
        # A batch rounds otherwise.
        torch.testing.assert_close(one[0], three[index], rtol=0, atol=1.01 / 255)
        torch.testing.assert_close(latent["samples"][0], latents["samples"][index], rtol=0, atol=1e-3)


def test_more_pictures_than_a_request_may_have(comfy: ComfyUI) -> None:
    samplers = comfy.pack["samplers"]
    assert samplers.MAX_PICTURES == MAX_PICTURES
    with FakeHost() as host:
        submitted: list[int] = []
        submit = host.queue.submit
        host.queue.submit = lambda job: (submitted.append(job.pictures), submit(job))[1]  # type: ignore
        comfy.progress.clear()
        images, _ = sampler(comfy, host, latent={"samples": torch.zeros(3, 4, 16, 16)}, pictures=7)
        assert submitted == [16, 5] and [one.seed for one in host.seen] == list(range(7, 28))
        assert images.shape[0] == 21 and comfy.progress[-1] == 100
        assert comfy.progress == sorted(comfy.progress)
        submitted.clear()
        sampler(comfy, host, latent=noisy(2, 4, 16, 16), pictures=2, denoise=0.5)
        assert submitted == [2, 2] and [one.seed for one in host.seen[-4:]] == [7, 8, 9, 10]


def test_pictures_that_form_are_shown_and_nobody_elses(comfy: ComfyUI) -> None:
    comfy.progress.clear()
    comfy.previews.clear()
    seen: list[tuple[int, int, int]] = []
    with FakeHost() as host:
        comfy.on_progress = lambda: seen.append((len(host.seen), comfy.progress[-1], len(comfy.previews)))
        other = threading.Thread(target=host.generate, args=({"positive": "slow", "steps": 30},))
        other.start()
        until(lambda: host.steps_run > 0, 5)
        sampler(comfy, host, positive="slow", steps=20)
        other.join()
        comfy.on_progress = lambda: None
        until(lambda: host.queue.watchers == 0, 5)
    assert all((progress, previews) == (0, 0) for running, progress, previews in seen if running < 2)
    assert len(comfy.previews) >= 2 and comfy.previews[0].size == (4, 2)
    red, green, blue = np.asarray(comfy.previews[0].convert("RGB")).mean((0, 1))
    assert red > 240 and green < 15 and blue < 15
    assert any(0 < percent < 100 for percent in comfy.progress)


def test_without_events_there_is_progress(comfy: ComfyUI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    comfy.progress.clear()
    comfy.previews.clear()
    with FakeHost() as host:
        host.queue.watchers = MAX_WATCHERS
        sampler(comfy, host, positive="slow", steps=30)
    assert any(0 < percent < 100 for percent in comfy.progress) and not comfy.previews
    (told,) = [r.getMessage() for r in caplog.records if "no previews" in r.getMessage()]
    assert told == f"no previews from the host at {host.url}: at most 16 clients may watch at once"


def test_an_event_that_is_none_ends_no_picture(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> NoReturn:
        raise ValueError("no JSON")

    watch = comfy.pack["samplers"].ask.__globals__["Watch"].__init__.__globals__
    monkeypatch.setitem(watch, "events", broken)
    with FakeHost() as host:
        assert sampler(comfy, host)[0].shape == (1, 8, 8, 3)


def test_warnings_are_logged_once(comfy: ComfyUI, caplog: pytest.LogCaptureFixture) -> None:
    with FakeHost() as host:
        sampler(comfy, host, positive="warn: the prompt was cut", latent=noisy(2, 4, 16, 16))
        assert len(host.seen) == 2
    told = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "cut" in r.getMessage()
    ]
    assert told == [f"the host at {host.url}: warn: the prompt was cut"]


def test_cancel_ends_this_request_and_no_other(comfy: ComfyUI) -> None:
    answers: list[int] = []
    with FakeHost() as host:

        def other() -> None:
            answers.append(host.generate({"positive": "slow", "steps": 5}).status_code)

        def press() -> None:
            until(lambda: host.steps_run > 0, 5)
            waiting = threading.Thread(target=other)
            waiting.start()
            until(lambda: len(host.queue) == 1, 5)
            comfy.interrupted = True
            waiting.join()

        pressing = threading.Thread(target=press)
        pressing.start()
        with pytest.raises(InterruptProcessingException):
            sampler(comfy, host, positive="slow", steps=500)
        pressing.join()
        assert answers == [200] and host.steps_run < 100


def test_an_attached_host_is_waited_for_while_it_loads(
    comfy: ComfyUI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    comfy.progress.clear()
    with FakeHost(state="loading") as host:
        host.status.at(20, "loading the model")
        attach = defaults(comfy, "MultiGPUDiffusionAttachHost", url=host.url)

        def load() -> None:
            until(lambda: 20 in comfy.progress, 5)
            host.status.at(75, "warming up")
            until(lambda: 75 in comfy.progress, 5)
            host.status.ready()

        loading = threading.Thread(target=load)
        loading.start()
        handle = comfy.run({"1": attach})["1"][0]
        loading.join()
        assert handle.type == "sd1" and comfy.progress == [20, 75]
        told = [r.getMessage() for r in caplog.records if "is loading" in r.getMessage()]
        assert told == ["the host is loading: loading the model", "the host is loading: warming up"]
        host.status.state = "loading"
        comfy.interrupted = True
        with pytest.raises(InterruptProcessingException):
            comfy.run({"2": attach})
