"""Quantization: smaller weights and another picture, alone and with what else a launch may ask for; GGUF."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shared.models import MODELS
from shared.pipeline import quantize
from shared.pipeline.loading import LoadError
from tests import tiny, tiny_extras, tiny_original, tiny_qwen
from tests.seldom import seldom

GGUF_TYPES = [name for name, spec in MODELS.items() if "gguf_model" not in spec.refuses]


@cache
def plain(name: str) -> np.ndarray:
    return tiny.run(tiny.load(name), name)


@pytest.mark.parametrize("name", seldom(MODELS, ("sd1", "flux", "qwen")))
def test_fewer_bits_are_smaller_and_further_off(name: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = MODELS[name]
    full = tiny.load(name)
    parts = [part for part in (spec.denoiser, *spec.text_encoders) if getattr(full, part) is not None]
    sizes = [{part: quantize.tensor_bytes(getattr(full, part)) for part in parts}]
    errors = [0.0]
    for kind in ("int8", "int4", "int2") if name in ("sdxl", "flux") else ("int8", "int2"):
        with caplog.at_level("INFO", "host"):
            pipe = tiny.host(name, quantize_to=kind)
        sizes.append({part: quantize.tensor_bytes(getattr(pipe, part)) for part in parts})
        errors.append(float(np.abs(tiny.run(pipe, name) - plain(name)).max()))
    for part, (more, fewer) in itertools.product(parts, itertools.pairwise(sizes)):
        assert fewer[part] < more[part], (part, fewer, more)
    assert errors == sorted(errors) and errors[1] > 0
    assert re.search(
        rf"{spec.denoiser}: \d+ layers to int2, \d+\.\d MB before, \d+\.\d MB after", caplog.text
    )


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_float8(name: str) -> None:
    pipe = tiny.host(name, quantize_to="float8")
    denoiser = getattr(pipe, MODELS[name].denoiser)
    int8 = tiny.host(name, quantize_to="int8")
    assert quantize.tensor_bytes(denoiser) == quantize.tensor_bytes(getattr(int8, MODELS[name].denoiser))
    assert 0 < np.abs(tiny.run(pipe, name) - plain(name)).max() < 0.3


def test_int8_weights_in_bf16_on_a_cpu() -> None:
    """Where quanto takes a product of torch's that crashes."""
    pipe = tiny.host("flux", quantize_to="int8_weight", variant="bf16")
    assert np.abs(tiny.run(pipe, "flux") - plain("flux")).mean() < 0.02


def test_layers_keep_their_classes_and_the_ends_stay() -> None:
    unet = tiny.host("sd1", quantize_to="int4").unet
    resnet = unet.down_blocks[0].resnets[0]
    assert isinstance(resnet.conv1, nn.Conv2d) and type(resnet.conv1) is not nn.Conv2d
    assert isinstance(resnet.time_emb_proj, nn.Linear) and type(resnet.time_emb_proj) is not nn.Linear
    assert type(unet.conv_in) is nn.Conv2d and type(unet.time_embedding.linear_1) is nn.Linear


def test_unpacking_without_a_build() -> None:
    values = torch.randint(0, 4, (8, 3), dtype=torch.uint8)
    packed = torch.stack([values[2 * i : 2 * i + 2] << (2 * i) for i in range(4)]).sum(0, dtype=torch.uint8)
    assert torch.equal(quantize._unpack(packed, 2), values)


@pytest.mark.parametrize("kind", seldom(("float8", "int4"), ("int4",)))
def test_with_ip_adapter_and_control_net(kind: str) -> None:
    from shared.pipeline.adapters import ip_arguments
    from shared.pipeline.control_nets import control_arguments

    control, ip = {str(tiny_extras.control_net("sdxl")): 1.0}, {str(tiny_extras.ip_adapter("sdxl")): 0.7}
    pipe = tiny.host("sdxl", quantize_to=kind, control_net=control, ip_adapter=ip)

    def made(image: Image.Image | None, face: Image.Image | None) -> np.ndarray:
        arguments = control_arguments(MODELS["sdxl"], control, [image] if image else [], size=(64, 64))
        return tiny.run(
            pipe, "sdxl", **arguments, **ip_arguments(pipe, MODELS["sdxl"], ip, [face] if face else [])
        )

    image = tiny.picture(64, 1)
    assert np.isfinite(made(image, image)).all()
    assert np.abs(made(image, image) - made(None, image)).max() > 0.01
    assert np.abs(made(image, image) - made(image, None)).max() > 0.01


@pytest.mark.parametrize(
    "name", seldom(GGUF_TYPES, ("flux", "flux2", "qwen", "sd3", "sdxl", "wan", "zimage"))
)
def test_gguf(name: str) -> None:
    pipe = tiny.host(name, gguf_model=str(tiny_original.gguf(name)))
    denoiser = getattr(pipe, MODELS[name].denoiser)
    full = getattr(tiny.load(name), MODELS[name].denoiser)
    assert quantize.tensor_bytes(denoiser) < 0.9 * quantize.tensor_bytes(full)
    assert 0 < np.abs(tiny.run(pipe, name) - plain(name)).max() < 0.05


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_gguf_as_published(name: str) -> None:
    """Without a prefix, reshaped to rows of 256, convolutions packed as well."""
    pipe = tiny.host(name, gguf_model=str(tiny_original.gguf(name, "published")))
    assert 0 < np.abs(tiny.run(pipe, name) - plain(name)).max() < 0.02
    half = tiny.host(name, gguf_model=str(tiny_original.gguf(name, "published")), variant="bf16")
    assert np.abs(tiny.run(half, name) - plain(name)).max() < 0.2


def test_gguf_of_qwen_image_edit_2511_is_known_by_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    read = quantize._read_gguf
    launch = {"checkpoint": str(tiny_qwen.edit("2509")), "gguf_model": str(tiny_original.gguf("qwenedit"))}
    assert not tiny.host("qwenedit", **launch).transformer.config.zero_cond_t
    mark = {"__index_timestep_zero__": torch.zeros(())}
    monkeypatch.setattr(quantize, "_read_gguf", lambda *given: read(*given) | mark)
    assert tiny.host("qwenedit", **launch).transformer.config.zero_cond_t


def test_gguf_with_lora() -> None:
    path = str(tiny_extras.lora("sd1"))
    pipe = tiny.host("sd1", gguf_model=str(tiny_original.gguf("sd1")), lora={path: 1.0})
    unfused = tiny.host("sd1", lora={path: 1.0})
    assert np.abs(tiny.run(pipe, "sd1") - tiny.run(unfused, "sd1")).max() < 0.1
    assert np.abs(tiny.run(pipe, "sd1") - plain("sd1")).max() > 0.1


def test_gguf_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"something else")
    with pytest.raises(LoadError, match="is not a GGUF file"):
        tiny.host("sd1", gguf_model=str(tmp_path / "a.gguf"))
    with pytest.raises(LoadError, match="cannot be read: Is a directory"):
        tiny.host("sd1", gguf_model=str(tmp_path))
    whole = tiny_original.gguf("sd1").read_bytes()
    for size in (4, 1000, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(LoadError, match="cannot be read: it is truncated or broken"):
            tiny.host("sd1", gguf_model=str(tmp_path / "cut.gguf"))
    with pytest.raises(LoadError, match=r"does not fit type sd1|lacks"):
        tiny.host("sd1", gguf_model=str(tiny_original.gguf("sdxl")))
    with pytest.raises(LoadError, match=r"does not fit type sdxl|lacks"):
        tiny.host("sdxl", gguf_model=str(tiny_original.gguf("sd1", "published")))
