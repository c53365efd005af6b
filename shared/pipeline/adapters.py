"""IP-Adapters and motion modules: loading them, and their arguments for a pipeline call."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.api.sizes import warn_of_shapes
from shared.launch.errors import first_line
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, model_of, part_of

log = logging.getLogger("host")

READ_ERRORS = (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError)
MISMATCH_ERRORS = (KeyError, ValueError, RuntimeError, IndexError, TypeError)


class AdapterError(ValueError):
    """An adapter that cannot be used; the message says why."""


def read_tensors(path: str | Path, what: str) -> dict[str, Any]:
    """State dict of a `.safetensors`, or of a `.bin`, `.ckpt`, `.pt` or `.pth` that holds only weights.

    Raises:
        AdapterError: another kind of file, a broken one, or a pickle with more than weights in it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict):
                return state.get("state_dict", state)
            raise AdapterError(f"{what} {str(path)!r} must hold named tensors, got a {type(state).__name__}")
    except READ_ERRORS as error:
        raise AdapterError(f"{what} {str(path)!r} cannot be read: {first_line(error)}") from None
    raise AdapterError(f"{what} {str(path)!r} must be a .safetensors, .bin, .ckpt, .pt or .pth file")


# IP-Adapter


def load_ip_adapters(
    pipe: Pipeline, spec: ModelSpec, launch: Mapping[str, float], dtype: torch.dtype
) -> None:
    """Load IP-Adapters, a scale per path, and the image encoder that fits them all.

    The encoder is looked for in `image_encoder/` beside the first adapter's file, one folder up, in `models/`
    there, and in the checkpoint.

    Raises:
        AdapterError: an unreadable file, one for another model, or no image encoder that fits.
    """
    loaded: list[dict[str, dict[str, torch.Tensor]]] = []
    for path in launch:
        file = _adapter_file(path)
        parts = _ip_parts(read_tensors(file, "IP-Adapter"))
        _check_kind(path, parts)
        if not loaded:
            encoder, processor = _image_encoder(pipe, spec, file, parts["image_proj"], dtype)
            pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
        wanted, plain = _projected_width(file, parts["image_proj"])
        width = _width(encoder.config, plain)
        if width != wanted:
            raise AdapterError(
                f"IP-Adapter {path!r} needs an image encoder of width {wanted}, but that of the first "
                f"adapter, which all share, has {width}"
            )
        loaded.append(parts)
    names = ", ".join(map(repr, launch))
    given: Any = loaded if len(loaded) > 1 else loaded[0]  # SD3's takes no list
    none: Any = [""] * len(loaded) if len(loaded) > 1 else ""
    try:
        pipe.load_ip_adapter(given, subfolder=none, weight_name=none)
    except MISMATCH_ERRORS as error:
        raise AdapterError(f"IP-Adapter {names} does not fit this checkpoint: {first_line(error)}") from None
    used = sum(
        1
        for processor in model_of(pipe, spec.denoiser).attn_processors.values()
        if isinstance(processor, torch.nn.Module)
        for _ in processor.parameters()
    )
    has = sum(len(parts["ip_adapter"]) for parts in loaded)
    if used != has:
        raise AdapterError(
            f"IP-Adapter {names} does not fit this checkpoint: it has {has} tensors, the checkpoint takes "
            f"{used}"
        )
    _set_scales(pipe, list(launch.values()))
    log.info("IP-Adapter %s: %d tensors, scales %s", names, used, list(launch.values()))


def _check_kind(path: str, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    if not parts["image_proj"] or not parts["ip_adapter"]:
        raise AdapterError(f"IP-Adapter {path!r} has no image_proj or no ip_adapter tensors")
    if any("lora" in key for key in parts["ip_adapter"]) or (
        "norm.weight" in parts["image_proj"] and ("proj.0.weight" in parts["image_proj"])
    ):
        raise AdapterError(
            f"IP-Adapter {path!r} is a FaceID adapter, which needs a face detector; use a plain one"
        )


def _set_scales(pipe: Pipeline, scales: list[float]) -> None:
    pipe.set_ip_adapter_scale(scales if len(scales) > 1 else scales[0])


def ip_arguments(
    pipe: Pipeline,
    spec: ModelSpec,
    launch: Mapping[str, float],
    images: Sequence[Image.Image],
    scales: Sequence[float] = (),
) -> dict[str, Any]:
    """Keyword arguments of a pipeline with IP-Adapters; sets the scales on its attention processors.

    Without an image the scale is 0 and the image black, because most pipelines fail without one.

    Args:
        launch: scale per path, from --ip_adapter.
        images: for one adapter any number, which it sees together; for several one for all, or one for each.
        scales: instead of the launch's: one for all adapters, or one for each.
    """
    count = len(launch)
    _warn_of_shapes(pipe, images)
    _set_scales(pipe, one_each(scales or list(launch.values()), count) if images else [0.0] * count)
    black = Image.new("RGB", (224, 224))
    if count > 1:
        arguments = {"ip_adapter_image": one_each(images or [black], count)}
        if (
            spec.ip_adapter_negative
        ):  # of which the pipeline with ControlNet makes one, however many there are
            arguments["negative_ip_adapter_image"] = [black] * count
        return arguments
    if len(images) > 1:
        return {"ip_adapter_image": [list(images)]}
    return {"ip_adapter_image": images[0] if images else black}


def _warn_of_shapes(pipe: Pipeline, images: Sequence[Image.Image]) -> None:
    """Warn of pictures of which the image encoder, which sees a square, sees a part, or another shape."""
    side = part_of(pipe, "image_encoder").config.image_size
    cropped = getattr(part_of(pipe, "feature_extractor"), "do_center_crop", None)
    sizes = [image.size for image in images]
    warn_of_shapes("ip_image", sizes, (side, side), "cropped" if cropped else "stretched")


def one_each(given: Sequence[Any], count: int) -> list[Any]:
    """One for each of `count`, where one may be given for all."""
    return list(given) * count if len(given) == 1 else list(given)


def _adapter_file(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        inside = [f for f in sorted(file.iterdir()) if f.suffix in (".safetensors", ".bin")]
        if len(inside) != 1:
            raise AdapterError(
                f"IP-Adapter folder {path!r} must hold one weight file, got {len(inside)}; name the file"
            )
        return inside[0]
    return file


def _ip_parts(tensors: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The projection's and the attention layers' tensors, in the names that diffusers reads."""
    if isinstance(tensors.get("image_proj"), dict):
        return {"image_proj": dict(tensors["image_proj"]), "ip_adapter": dict(tensors.get("ip_adapter", {}))}
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        if head in ("image_proj", "ip_adapter_proj_model"):
            parts["image_proj"][rest] = value
        elif head in ("ip_adapter", "double_blocks"):
            rest = rest.replace("processor.ip_adapter_double_stream_", "")
            rest = rest.replace("k_proj", "to_k_ip").replace("v_proj", "to_v_ip")
            parts["ip_adapter"][rest] = value
    return parts


# What reads the image encoder's output in each kind of adapter that diffusers loads; plain ones read its
# projected output, the others its hidden states: Plus (a resampler), full-face (an MLP), SD3's resampler.
IP_FORMS = {"proj.weight": True, "proj.3.weight": False, "proj_in.weight": False}
FACE_WIDTH = 512  # of the face recognition's embeddings, which InstantID and FaceID read


def _projected_width(file: Path, projection: Mapping[str, torch.Tensor]) -> tuple[int, bool]:
    """The width that an adapter reads from the image encoder, and whether it is the projected output's."""
    form = next((key for key in IP_FORMS if key in projection), None)
    first = projection.get("proj.0.weight" if form == "proj.3.weight" else form or "")
    if form is None or first is None or first.ndim != 2:
        raise AdapterError(
            f"IP-Adapter {str(file)!r} is not of a supported kind (plain, Plus, full-face); its image_proj "
            f"holds {', '.join(sorted(projection)[:4])}"
        )
    if form == "proj_in.weight" and first.shape[1] == FACE_WIDTH:
        raise AdapterError(
            f"IP-Adapter {str(file)!r} reads the embeddings of a face detector (InstantID); use a plain one"
        )
    return first.shape[1], IP_FORMS[form]


def _image_encoder(
    pipe: Pipeline, spec: ModelSpec, file: Path, projection: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any, Any]:
    import transformers

    wanted, plain = _projected_width(file, projection)
    classes = {
        "clip": (transformers.CLIPVisionModelWithProjection, transformers.CLIPImageProcessor),
        "siglip": (transformers.SiglipVisionModel, transformers.SiglipImageProcessor),
    }
    model_class, processor_class = classes[spec.ip_adapter_encoder or "clip"]
    found = []
    places = [file.parent, file.parent.parent, file.parent.parent / "models"]
    for folder in [place / "image_encoder" for place in places]:
        if (folder / "config.json").is_file():
            config = model_class.config_class.from_pretrained(folder, local_files_only=True)
            width = _width(config, plain)
            found.append(f"{folder} ({width})")
            if width == wanted:
                model = model_class.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
                return model, _processor(processor_class, folder, config.image_size)
    present = part_of(pipe, "image_encoder")
    if present is not None:
        width = _width(present.config, plain)
        found.append(f"the checkpoint ({width})")
        if width == wanted:
            processor = part_of(pipe, "feature_extractor")
            return present, processor or _processor(processor_class, None, present.config.image_size)
    raise AdapterError(
        f"IP-Adapter {str(file)!r} needs an image encoder of width {wanted} in a folder image_encoder "
        f"beside it; found {', '.join(found) or 'none'}"
    )


def _width(encoder: Any, plain: bool) -> int:
    """Of an image encoder's output that an adapter reads, by its config."""
    return encoder.projection_dim if plain else encoder.hidden_size


def _processor(cls: Any, folder: Path | None, size: int) -> Any:
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return cls.from_pretrained(folder, local_files_only=True)
    if "Siglip" in cls.__name__:
        return cls(size={"height": size, "width": size})
    return cls(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


# Motion modules


def load_motion_adapter(path: str, dtype: torch.dtype) -> Any:
    """A MotionAdapter from a diffusers folder or from one file in its authors' naming.

    A file's sizes are read from its tensors; what they do not show (attention heads, norm groups) is what all
    published modules have, unless a folder of the file's name beside it holds a config.json.
    Raises AdapterError.
    """
    from diffusers import MotionAdapter
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    if Path(path).is_dir():
        try:
            return MotionAdapter.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
        except (OSError, *MISMATCH_ERRORS) as error:
            raise AdapterError(f"motion adapter {path!r} cannot be read: {first_line(error)}") from None
    tensors = {key.removeprefix("module."): t for key, t in read_tensors(path, "motion module").items()}
    tensors = {key: t for key, t in tensors.items() if "motion_modules" in key}
    if not tensors:
        raise AdapterError(f"motion module {path!r} has no motion_modules tensors")
    config_file = Path(path).with_suffix("") / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else _motion_config(tensors)
    adapter = MotionAdapter.from_config(config)
    state = convert_animatediff_checkpoint_to_diffusers(tensors)
    state = {k: v for k, v in state.items() if not k.endswith("pos_embed.pe")}
    needed = {k for k in adapter.state_dict() if not k.endswith("pos_embed.pe")}
    if needed ^ set(state):
        raise AdapterError(
            f"motion module {path!r} does not fit: {len(needed - set(state))} tensors missing, "
            f"{len(set(state) - needed)} unknown"
        )
    try:
        adapter.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise AdapterError(f"motion module {path!r} does not fit: {first_line(error)}") from None
    return adapter.to(dtype).eval()


def _motion_config(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    norm = "motion_modules.0.temporal_transformer.norm.weight"
    levels = sum(f"down_blocks.{i}.{norm}" in tensors for i in range(8))
    position = next((t for key, t in tensors.items() if key.endswith("pos_encoder.pe")), None)
    return {
        "block_out_channels": [tensors[f"down_blocks.{i}.{norm}"].shape[0] for i in range(levels)],
        "motion_layers_per_block": sum(
            f"down_blocks.0.motion_modules.{i}.temporal_transformer.norm.weight" in tensors for i in range(8)
        ),
        "motion_max_seq_length": 32 if position is None else position.shape[1],
        "use_motion_mid_block": any(key.startswith("mid_block.") for key in tensors),
    }


def put_motion_adapter(pipe: Pipeline, adapter: Any) -> None:
    """Give the pipeline's motion UNet the adapter's weights: its constructor does so only for plain UNets."""
    unet: Any = model_of(pipe, "unet")
    try:
        unet.load_motion_modules(adapter)
    except MISMATCH_ERRORS as error:
        raise AdapterError(f"the motion adapter does not fit this checkpoint: {first_line(error)}") from None
    pipe.register_modules(motion_adapter=adapter)
