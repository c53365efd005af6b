"""ControlNets in single files, in lllyasviel's names and in diffusers'; a picture for each of several."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from shared.api.faults import RequestError
from shared.api.media import decode_mask, decode_picture, encode_image
from shared.api.parsing import check_request
from shared.api.requests import GenerateRequest
from shared.api.warned import collecting_warnings
from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.launch.errors import UsageError
from shared.models import MODELS
from shared.pipeline.control_nets import control_arguments
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import LoadError
from tests import tiny, tiny_extras, tiny_original

Tensors = dict[str, torch.Tensor]


def weights(name: str, seed: int = 0) -> Tensors:
    return load_file(tiny_extras.control_net(name, seed) / "diffusion_pytorch_model.safetensors")


def original(name: str) -> Tensors:
    """The ControlNet in lllyasviel's names."""
    own = weights(name)
    net = diffusers.ControlNetModel.from_pretrained(tiny_extras.control_net(name))
    unet = {key: value for key, value in own.items() if not key.startswith("controlnet_")}
    found = tiny_original.unet(SimpleNamespace(config=net.config, state_dict=lambda: unet))
    for key, value in own.items():
        first, *rest, kind = key.split(".")
        if first == "controlnet_cond_embedding":
            number = {"conv_in": 0, "conv_out": 14}.get(rest[0])
            number = 2 * int(rest[1]) + 2 if number is None else number
            found[f"input_hint_block.{number}.{kind}"] = value
        elif first == "controlnet_down_blocks":
            found[f"zero_convs.{rest[0]}.0.{kind}"] = value
        elif first == "controlnet_mid_block":
            found[f"middle_block_out.0.{kind}"] = value
    assert len(found) == len(own)
    return found


def picture(name: str, path: str) -> np.ndarray:
    pipe = tiny.host(name, control_net={path: 0.8})
    torch.manual_seed(5)
    return tiny.run(
        pipe, name, **control_arguments(MODELS[name], {path: 0.8}, [tiny.picture(64, 1)], frames=4)
    )


FORMS: dict[str, Callable[[str], Tensors]] = {
    "lllyasviel": lambda name: {f"control_model.{key}": value for key, value in original(name).items()},
    "without prefix": original,
    "in a checkpoint": lambda name: (
        {f"control_model.{key}": value for key, value in original(name).items()}
        | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    ),
    "diffusers": weights,
}


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("sd1", form) for form in FORMS), ("sd2", "lllyasviel"), ("sdxl", "diffusers"), ("ad", "lllyasviel")],
)
def test_a_single_file_is_its_folder(name: str, form: str, tmp_path: Path) -> None:
    path = str(tmp_path / "canny.safetensors")
    save_file({key: value.contiguous() for key, value in FORMS[form](name).items()}, path)
    assert np.array_equal(picture(name, path), picture(name, str(tiny_extras.control_net(name))))


def test_a_file_with_its_config_beside_it(tmp_path: Path) -> None:
    folder = tiny_extras.control_net("flux")
    shutil.copy(folder / "config.json", tmp_path)
    path = shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "union-less.safetensors")
    assert np.array_equal(picture("flux", str(path)), picture("flux", str(folder)))


def without(tensors: Tensors, key: str) -> Tensors:
    return {k: v for k, v in tensors.items() if k != key}


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("flux", lambda: weights("flux"), "has no config.json beside it, and type flux needs one"),
        ("sd3", lambda: weights("sd3"), "has no config.json beside it, and type sd3 needs one"),
        ("sd1", lambda: without(weights("sd1"), "conv_in.bias"), "0 tensors of another size, 1 missing"),
        ("sd1", lambda: weights("sd1") | {"extra": torch.zeros(1)}, "0 missing, 1 unknown"),
        ("sd1", lambda: weights("sdxl"), "does not fit this checkpoint"),
        ("sd1", lambda: {"lllite_unet.down.0.weight": torch.zeros(1)}, "is a ControlLLLite model"),
        ("sd1", lambda: {"lora_controlnet": torch.zeros(1)}, "is a Control-LoRA"),
        ("sd1", lambda: weights("sd1") | {"task_embedding": torch.zeros(1)}, "is a union of several control"),
        ("sd1", lambda: {"some.weight": torch.zeros(1)}, "is no ControlNet: it holds some.weight"),
    ],
)
def test_refused_in_words(name: str, make: Callable[[], Tensors], says: str, tmp_path: Path) -> None:
    path = str(tmp_path / "net.safetensors")
    save_file({key: value.contiguous() for key, value in make().items()}, path)
    with pytest.raises(LoadError, match=says):
        tiny.host(name, control_net={path: 1.0})


@pytest.mark.parametrize("name", ["sd1", "ad", "flux", "sd3"])
def test_a_picture_and_a_scale_for_each(name: str) -> None:
    paths = [str(tiny_extras.control_net(name, seed)) for seed in (0, 1)]
    launch = dict(zip(paths, (0.8, 0.5), strict=True))
    pipe = tiny.host(name, control_net=launch)
    one, two = tiny.picture(64, 1), tiny.picture(64, 2)

    def made(images: list[Any], *scales: float) -> np.ndarray:
        torch.manual_seed(5)
        return tiny.run(pipe, name, **control_arguments(MODELS[name], launch, images, scales, frames=4))

    torch.manual_seed(5)
    field, frames = MODELS[name].control_image_field, 4
    images = [[image] * frames for image in (one, two)] if name == "ad" else [one, two]
    theirs = tiny.run(pipe, name, **{field: images}, controlnet_conditioning_scale=[0.8, 0.5])
    ours = made([one, two])
    assert np.array_equal(ours, theirs)
    assert np.abs(ours - made([two, one])).max() > 1e-3
    assert np.array_equal(made([one]), made([one, one]))
    assert np.array_equal(made([one, two], 0.3), made([one, two], 0.3, 0.3))
    assert np.abs(made([one, two], 0.3, 0.9) - made([one, two], 0.3)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "nets", "flags", "words"),
    [
        ("zimage", 2, {}, "--control_net: type zimage takes one ControlNet; got 2"),
        ("qwen", 2, {}, "--control_net: type qwen takes one ControlNet; got 2"),
        (
            "zimage",
            1,
            {"shard_weights": True},
            "--shard_weights: not supported with --control_net, which runs layers of",
        ),
    ],
)
def test_control_nets_that_a_type_does_not_run(
    name: str, nets: int, flags: dict[str, Any], words: str
) -> None:
    paths = {str(tiny_extras.control_net(name, seed)): 1.0 for seed in range(nets)}
    with pytest.raises(UsageError, match=words):
        check_config(tiny.config(name, control_net=paths, **flags), BACKENDS["xdit"], 1)


QWEN: dict[str, Any] = {"seed": 3, "steps": 2, "width": 64, "height": 48, "positive": "a cat", "cfg": 3.0}


def qwen(**more: Any) -> PipelineEngine:
    flags: dict[str, Any] = {"control_net": {str(tiny_extras.control_net("qwen", **more)): 0.8}}
    return PipelineEngine(tiny.host("qwen", **flags), tiny.config("qwen", **flags), tiny.world())


def made_and_wanted(
    on: PipelineEngine, request: GenerateRequest, pipe: Any, **pictures: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the engine, and of diffusers' pipeline called by hand."""
    made = on.generate(request, lambda *_: None)
    assert made is not None and made.latent is not None
    torch.manual_seed(3)
    wanted = pipe(
        prompt="a cat",
        negative_prompt=" ",
        true_cfg_scale=3.0,
        num_inference_steps=2,
        width=64,
        height=48,
        controlnet_conditioning_scale=0.8,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
        **pictures,
    ).images
    return load(made.latent)["latent"], wanted


def test_qwens_control_net_sees_the_control_picture() -> None:
    on, shown = qwen(), encode_image(tiny.picture(64, 1), "png")
    body = QWEN | {"output_format": "latent", "control_image": shown}
    request = check_request(body, on.config)
    made, wanted = made_and_wanted(on, request, on.pipe, control_image=tiny.picture(64, 1))
    assert torch.allclose(made, wanted, atol=1e-4)
    other = on.generate(check_request(body | {"controlnet_scale": 0.1}, on.config), lambda *_: None)
    assert other is not None and (load(other.latent or b"")["latent"] - made).abs().max() > 1e-3
    masked = check_request(body | {"image": shown, "mask": shown}, on.config)
    with pytest.raises(RequestError, match="mask: needs a ControlNet that was trained with masks"):
        on.generate(masked, lambda *_: None)


def test_qwens_control_net_that_was_trained_with_masks_sees_picture_and_mask() -> None:
    on, size = qwen(extra_condition_channels=4), (64, 48)
    shown, mask = (encode_image(tiny.picture(64, seed), "png") for seed in (1, 2))
    body = QWEN | {"output_format": "latent", "image": shown, "mask": mask}
    request = check_request(body, on.config)
    pictures = {
        "control_image": decode_picture(request.images[0], None, size),
        "control_mask": decode_mask(request.mask or b"", size),
    }
    pipe = diffusers.QwenImageControlNetInpaintPipeline(**on.pipe.components)
    made, wanted = made_and_wanted(on, request, pipe, **pictures)
    assert torch.allclose(made, wanted, atol=1e-4)
    with collecting_warnings() as warnings:
        again = on.generate(check_request(body | {"control_image": mask}, on.config), lambda *_: None)
    assert again is not None and torch.equal(load(again.latent or b"")["latent"], made)
    told = "control_image: has no effect; this ControlNet was trained with masks and sees image"
    assert warnings[-1] == told and all("stretched" in text for text in warnings[:-1])
