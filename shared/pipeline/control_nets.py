"""ControlNets: loading them from folders and single files, and their arguments for a pipeline call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shared.launch.errors import first_line
from shared.models import ModelSpec, Start
from shared.parallel.method import control_nets
from shared.parallel.pipeline import Pipeline, model_of
from shared.pipeline.adapters import MISMATCH_ERRORS, AdapterError, one_each, read_tensors

UNET_CONTROL_NET = "ControlNetModel"
# Names in files that are no plain ControlNet, and what they are.
OTHERS = {
    "lora_controlnet": "a Control-LoRA", "control_add_embedding.": "a union of several control types",
    "task_embedding": "a union of several control types", "lllite_": "a ControlLLLite model",
    "difference": "the difference of a ControlNet to a checkpoint", "adapter.body.": "a T2I-Adapter",
    "body.": "a T2I-Adapter",
}  # fmt: skip


def load_control_nets(
    spec: ModelSpec, paths: Mapping[str, float], dtype: torch.dtype, denoiser: Path | None = None
) -> Any:
    """One ControlNet, or a list of several, from diffusers folders and from single files.

    Args:
        denoiser: the folder that configures the checkpoint's denoiser, for files without a config.json.

    Raises AdapterError.
    """
    nets = []
    for path in paths:
        try:
            nets.append(_load(spec, Path(path), dtype, denoiser).eval())
        except (OSError, *MISMATCH_ERRORS) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"ControlNet {path!r} cannot be read: {first_line(error)}") from None
    return nets[0] if len(nets) == 1 else nets


def _load(spec: ModelSpec, path: Path, dtype: torch.dtype, denoiser: Path | None) -> Any:
    import diffusers

    cls = getattr(diffusers, spec.control_net_class or "")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or (folder / "config.json").is_file():
        _check_config(spec, path, folder)
    if path.is_dir():
        return cls.from_pretrained(path, dtype=dtype, local_files_only=True)
    tensors = read_tensors(path, "ControlNet")
    other = next((what for mark, what in OTHERS.items() if any(key.startswith(mark) for key in tensors)), "")
    if other:
        raise AdapterError(
            f"ControlNet {str(path)!r} is {other}, which is not supported; use a plain ControlNet"
        )
    if (folder / "config.json").is_file():
        net = cls.from_config(json.loads((folder / "config.json").read_text()))
    elif spec.control_net_class != UNET_CONTROL_NET or denoiser is None:
        raise AdapterError(
            f"ControlNet {str(path)!r} has no config.json beside it, and type {spec.name} needs one: the "
            "file alone does not say how the ControlNet is built"
        )
    else:
        net, tensors = _for_unet(path, tensors, json.loads((denoiser / "config.json").read_text()))
    known = net.state_dict()
    wrong = [key for key in tensors.keys() & known.keys() if tensors[key].shape != known[key].shape]
    missing, unknown = known.keys() - tensors.keys(), tensors.keys() - known.keys()
    if wrong or missing or unknown:
        sizes = f", such as {min(wrong)!r}" if wrong else ""
        raise AdapterError(
            f"ControlNet {str(path)!r} does not fit this checkpoint: {len(wrong)} tensors of another "
            f"size{sizes}, {len(missing)} missing, {len(unknown)} unknown"
        )
    net.load_state_dict(tensors, assign=True)
    return net.to(dtype).requires_grad_(False)


def _check_config(spec: ModelSpec, path: Path, folder: Path) -> None:
    """Check the class of a ControlNet by its config.json. Raises AdapterError."""
    if not (folder / "config.json").is_file():
        raise AdapterError(
            f"ControlNet {str(path)!r} must be a diffusers folder with a config.json, or a .safetensors file"
        )
    try:
        settings = json.loads((folder / "config.json").read_text())
        found, modes = settings.get("_class_name"), settings.get("num_mode")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"ControlNet {str(path)!r}: config.json must hold a JSON object: {first_line(error)}"
        ) from None
    if found != spec.control_net_class:
        raise AdapterError(
            f"ControlNet {str(path)!r} is a {found}; type {spec.name} takes {spec.control_net_class}"
        )
    if modes:
        raise AdapterError(
            f"ControlNet {str(path)!r} is a union of {modes} control types, and a request cannot choose one "
            "of them; use a ControlNet of one type"
        )


def _for_unet(path: Path, tensors: Mapping[str, Any], unet: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A ControlNet for this UNet, and its tensors in diffusers' names, from lllyasviel's or these."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    if not any("input_hint_block." in key or key.startswith("controlnet_cond_embedding.") for key in tensors):
        raise AdapterError(f"{str(path)!r} is no ControlNet: it holds {', '.join(sorted(tensors)[:3])}")
    settings = {
        key: [kind.replace("Motion", "2D") for kind in value] if key == "down_block_types" else value
        for key, value in unet.items()
        if key != "mid_block_type"  # AnimateDiff's has its own; a ControlNet's is always the same
    }
    found = convert_controlnet_checkpoint(dict(tensors), settings)
    found = {key: tensor for key, tensor in found.items() if tensor is not None}
    hint = {key: t.shape for key, t in found.items() if key.startswith("controlnet_cond_embedding.")}
    widths = [hint["controlnet_cond_embedding.conv_in.weight"]]
    while shape := hint.get(f"controlnet_cond_embedding.blocks.{2 * len(widths) - 1}.weight"):
        widths.append(shape)
    settings |= {
        "in_channels": found["conv_in.weight"].shape[1],
        "conditioning_channels": widths[0][1],
        "conditioning_embedding_out_channels": tuple(shape[0] for shape in widths),
    }
    known = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    with torch.device("meta"):  # without memory for its weights
        return diffusers.ControlNetModel(**{k: v for k, v in settings.items() if k in known}), found


def check_control_nets(pipe: Pipeline, spec: ModelSpec) -> None:
    """Check that the ControlNets' inner widths are the denoiser's. Raises AdapterError."""
    denoiser = model_of(pipe, spec.denoiser)
    for net in control_nets(pipe):
        for key in ("cross_attention_dim", "block_out_channels", "joint_attention_dim", "attention_head_dim"):
            ours, theirs = denoiser.config.get(key), net.config.get(key)
            if ours is not None and theirs is not None and _listed(ours) != _listed(theirs):
                raise AdapterError(
                    f"the ControlNet does not fit this checkpoint: its {key} is {theirs}, the checkpoint's "
                    f"is {ours}"
                )


def control_arguments(
    spec: ModelSpec,
    launch: Mapping[str, float],
    images: Sequence[Image.Image],
    scales: Sequence[float] = (),
    size: tuple[int, int] = (512, 512),
    frames: int = 1,
    start: Start | None = None,
) -> dict[str, Any]:
    """Keyword arguments of the ControlNet pipeline.

    Args:
        launch: scale per path, from --control_net.
        images: the control images: one for all ControlNets, or one for each; none runs with scale 0.
        scales: instead of the launch's: one for all ControlNets, or one for each.
        size: (width, height) of the picture, pixels.
        frames: of a video; each gets the image.
        start: what kind of pipeline it is, if it starts from a picture.
    """
    count = len(launch)
    name = spec.control_image_field if start is None else start.control_image
    seen = bool(images) or name is None
    wanted = one_each(scales or list(launch.values()), count) if seen else [0.0] * count
    pictures: list[Any] = one_each(images or [Image.new("RGB", size)], count)
    if spec.output == "video":
        pictures = [[picture] * frames for picture in pictures]
    shown = {} if name is None else {name: pictures if count > 1 else pictures[0]}
    return shown | {"controlnet_conditioning_scale": wanted if count > 1 else wanted[0]}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
