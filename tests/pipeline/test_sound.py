"""A video with sound: LTX-2 through the engine equals plain diffusers, and the mp4 is heard."""

from __future__ import annotations

import copy
import functools
import subprocess
import tempfile
from typing import Any

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import scipy.io.wavfile
import torch
from PIL import Image

from shared.api.faults import RequestError
from shared.api.media import Sound, encode_video
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.api.warned import collecting_warnings
from shared.models import MODELS
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.latents import picture_latents
from shared.pipeline.preview import fit_projection
from tests import tiny

BODY: dict[str, Any] = {"positive": "a cat", "steps": 2, "seed": 0, "frames": 9, "output_format": "mp4"}
SIZE = {"height": 64, "width": 64}


@functools.cache
def engine() -> PipelineEngine:
    return PipelineEngine(tiny.load("ltx2"), tiny.config("ltx2", **SIZE), tiny.world())


def made(told: list[tuple[int, int]] | None = None, **fields: Any) -> Reply:
    def on_step(step: int, steps: int) -> None:
        if told is not None:
            told.append((step, steps))

    reply = engine().generate(check_request(BODY | fields, engine().config), on_step)
    assert reply is not None
    return reply


def heard(file: bytes) -> tuple[int, np.ndarray, int]:
    """Samples per second and samples [channels, samples] of an mp4, and the number of its frames."""
    frames = len(iio.imread(file, extension=".mp4"))
    with tempfile.TemporaryDirectory() as folder:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", "pipe:", f"{folder}/sound.wav"]
        subprocess.run(command, input=file, capture_output=True, check=True)
        rate, samples = scipy.io.wavfile.read(f"{folder}/sound.wav")
    return rate, samples.T, frames


@pytest.mark.parametrize(("cfg", "passes"), [(3.0, 3), (1.0, 1)])
def test_picture_and_sound_are_those_of_plain_diffusers(cfg: float, passes: int) -> None:
    """Without guidance each step is one pass; with it a batch of two, and one for each other kind."""
    pipe = tiny.load("ltx2")
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    unguided = dict(MODELS["ltx2"].without_guidance) if cfg == 1 else {}
    wanted = pipe(
        prompt="a cat", num_inference_steps=2, guidance_scale=cfg, num_frames=9, frame_rate=12,
        generator=torch.Generator("cpu").manual_seed(0), output_type="np", **SIZE, **unguided,
    )  # fmt: skip
    told: list[tuple[int, int]] = []
    reply = made(told, cfg=cfg, fps=12)
    assert told == [(1, 2), (2, 2)] and reply.steps == 2 and len(calls) == 2 * passes
    frames = np.stack([np.asarray(frame) for frame in reply.pictures])
    assert np.abs(frames - wanted.frames[0] * 255).max() <= 0.51
    assert reply.sound is not None and reply.sound.rate == 24000
    expected = wanted.audio[0].numpy().T
    assert reply.sound.samples.shape == expected.shape and expected.std() > 0.1
    assert np.abs(reply.sound.samples / 32767 - expected).max() < 1e-4


def test_an_mp4_has_the_sound_and_other_files_say_that_they_have_none() -> None:
    reply = made()
    assert reply.sound is not None
    reply.encode()
    rate, _, frames = heard(reply.output[0])
    assert (rate, frames) == (24000, 9)
    with collecting_warnings() as warnings:
        silent = made(output_format="webp")
    assert silent.sound is None and warnings == ["output_format: webp has no sound; only mp4 has it"]


def test_each_channel_is_heard_as_it_is() -> None:
    rate, seconds = 24000, np.arange(24000) / 24000
    tones = [np.sin(2 * np.pi * hertz * seconds) * 20000 for hertz in (440, 880)]
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in range(0, 240, 10)]
    file = encode_video(frames, "mp4", 24, sound=Sound(np.stack(tones, 1).astype(np.int16), rate))
    found, samples, count = heard(file)
    assert (found, count) == (rate, 24) and abs(samples.shape[1] - rate) < 2048
    for channel, hertz in zip(samples, (440, 880), strict=True):
        peak = np.abs(np.fft.rfft(channel)).argmax() * rate / samples.shape[1]
        assert abs(peak - hertz) < 2


def test_a_broken_sound_is_refused() -> None:
    pipe: Any = engine().pipe
    weight = pipe.vocoder.conv_out.weight
    before = weight.data.clone()
    weight.data[0] = float("nan")
    try:
        with pytest.raises(RequestError, match="a video contains NaN or Inf"):
            made()
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"frames": 10}, "frames: must be a multiple of 8, and 1 more; got 10, near it are 9 and 17"),
        ({"steps": 1}, "steps: must be at least 2 for type ltx2, got 1"),
        ({"width": 80}, "multiple of 32"),
    ],
)
def test_what_plain_diffusers_would_change_in_silence_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refusal:
        check_request(BODY | fields, engine().config)
    assert words in "; ".join(f"{one.field}: {one.problem}" for one in refusal.value.problems)


def test_a_latent_is_taken_as_it_is_given() -> None:
    """Drawn by hand as the pipeline draws them, latents make the same latents."""
    noise = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator("cpu").manual_seed(0))
    from safetensors.torch import load, save

    tokens = noise.flatten(2).movedim(1, 2).contiguous()
    extras: list[dict[str, Any]] = [{}, {"latent": save({"latent": tokens})}]
    plain, given = (load(made(output_format="latent", **extra).latent or b"")["latent"] for extra in extras)
    assert plain.shape == (1, 8, 8) and torch.allclose(plain, given, atol=1e-5)


def test_a_copy_of_a_watched_scheduler_steps_alone() -> None:
    from shared.pipeline.steps import StepWatch

    pipe = tiny.load("ltx2")
    with StepWatch(pipe, torch.device("cpu"), lambda step, steps: None) as watch:
        pipe.scheduler.set_timesteps(3, mu=1.0)
        other = copy.deepcopy(pipe.scheduler)
        sample = torch.ones(1, 4)
        other.step(sample, other.timesteps[0], sample)
        assert (watch.step, pipe.scheduler.step_index, other.step_index) == (0, None, 1)
    assert "__deepcopy__" not in vars(pipe.scheduler)


def test_previews_read_the_statistics_of_latents_where_its_vae_has_them() -> None:
    vae = copy.deepcopy(tiny.load("ltx2").vae)
    plain = fit_projection(vae, torch.device("cpu"), MODELS["ltx2"])
    mean, std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 3, 8)
    vae.latents_mean.copy_(mean)
    vae.latents_std.copy_(std)
    fitted = fit_projection(vae, torch.device("cpu"), MODELS["ltx2"])
    wanted = torch.cat([plain[:8] * std[:, None], plain[8:] + mean @ plain[:8]])
    assert torch.allclose(fitted, wanted, rtol=1e-2, atol=1e-2) and not torch.allclose(
        fitted, plain, atol=0.1
    )


def test_a_preview_is_the_middle_frame() -> None:
    video = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()  # [channels, frames, height, width]
    tokens = video.flatten(1).T[None]
    assert torch.equal(picture_latents(tokens, "tokens", (4, 5)), video[:, 1])
