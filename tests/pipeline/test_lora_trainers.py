"""LoRAs as trainers publish them mean what the same LoRA in diffusers' format means."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.models import MODELS
from shared.pipeline.lora import loras_of
from shared.pipeline.lora_file import LoraError
from shared.pipeline.lora_names import Matched, match_layers
from tests import tiny
from tests.tiny_trainers import TRAINERS, published

WIDE = {
    "flux": "FluxTransformer2DModel",
    "kontext": "FluxTransformer2DModel",
    "chroma": "ChromaTransformer2DModel",
}
"""diffusers' conversion rests on their real width: their layers are compared, at that width, on no device."""
CASES = [(name, trainer) for name, trainers in TRAINERS.items() for trainer in trainers]


@cache
def pipe_of(name: str) -> Any:
    if name not in WIDE:
        return tiny.load(name)
    with torch.device("meta"):
        transformer = getattr(diffusers, WIDE[name])(num_layers=1, num_single_layers=1)
    cls = getattr(diffusers, MODELS[name].pipeline)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    parts = {part: None for part in parts if name != "chroma" or not part.endswith("_2")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return cls(transformer=transformer, scheduler=scheduler, **parts)


@cache
def plain(name: str) -> np.ndarray:
    return tiny.run(pipe_of(name), name)


def changes(matched: Matched) -> dict[str, torch.Tensor]:
    """What each layer adds for some inputs."""
    (layers,) = matched.values()
    added = {}
    for name, update in layers.items():
        down, up = update.tensors["down"], update.tensors["up"]
        inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1))
        added[name] = update.scale * up @ (down @ inputs)
    return added


@pytest.mark.parametrize(("name", "trainer"), CASES)
def test_means_what_diffusers_format_means(name: str, trainer: str, tmp_path: Path) -> None:
    pipe = pipe_of(name)
    theirs, ours = published(pipe.transformer, TRAINERS[name][trainer])
    found, left = match_layers(pipe, MODELS[name], theirs)
    expected, none = match_layers(pipe, MODELS[name], ours)
    assert not left and not none
    wanted, got = changes(expected), changes(found)
    assert got.keys() == wanted.keys() and len(wanted) == len(ours) / 2 >= 8
    for layer, change in wanted.items():
        torch.testing.assert_close(got[layer], change, msg=layer)
    if name in WIDE or trainer != list(TRAINERS[name])[-1]:
        return
    pictures = []
    for label, tensors in (("theirs", theirs), ("ours", ours)):
        file = tmp_path / f"{label}.safetensors"
        save_file(tensors, file)
        loras = loras_of(pipe, MODELS[name])
        entry = loras.add(str(file))
        assert (entry.matched, entry.unmatched) == (len(wanted), 0)
        pictures.append(tiny.run(pipe, name))
        loras.remove(str(file))
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4
    assert np.abs(pictures[0] - plain(name)).max() > 0.01


def test_a_width_that_diffusers_conversion_does_not_expect_is_told(tmp_path: Path) -> None:
    """It knows where to cut joined layers by the width of the released model, and asserts it."""
    pipe = tiny.load("kontext")
    theirs, _ = published(pipe.transformer, TRAINERS["kontext"]["kohya"])
    joined = {key: value for key, value in theirs.items() if "_linear1." in key}
    found, left = match_layers(pipe, MODELS["kontext"], theirs)
    assert set(left) == {key.partition(".")[0] for key in joined} and len(found["transformer"]) == 36
    save_file(joined, tmp_path / "joined.safetensors")
    with pytest.raises(LoraError, match="fits no layer of type kontext: 'lora_unet_single_blocks_0_linear1'"):
        loras_of(pipe, MODELS["kontext"]).add(str(tmp_path / "joined.safetensors"))


def test_of_another_type_is_refused(tmp_path: Path) -> None:
    theirs, _ = published(pipe_of("flux2").transformer, TRAINERS["flux2"]["kohya"])
    save_file(theirs, tmp_path / "other.safetensors")
    with pytest.raises(
        LoraError, match="fits no layer of type qwen: 'lora_unet_double_blocks_0_img_attn_proj'"
    ):
        loras_of(pipe_of("qwen"), MODELS["qwen"]).add(str(tmp_path / "other.safetensors"))
