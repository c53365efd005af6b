"""Models made of a single file's tensors: the denoiser, text encoders, VAEs and further parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.launch.file_header import DENOISER, PREFIXES, SingleFileError
from shared.models import VAE_PREFIXES, FilePart, ModelSpec

Tensors = dict[str, torch.Tensor]


def class_of(library: str, name: str) -> Any:
    """A class of model_index.json, or None; `library` may be a folder of diffusers' pipelines."""
    import diffusers
    import transformers

    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    return getattr(home or getattr(diffusers.pipelines, library, None), name, None)


def denoiser_of(
    cls: Any,
    spec: ModelSpec,
    file: Path,
    tensors: Tensors,
    folder: Path,
    dtype: torch.dtype,
    settings: dict[str, Any],
    subfolder: str = "",
) -> Any:
    """The denoiser, in its authors' names or diffusers', with the usual prefix or without one.

    What `cls` keeps in fp32 stays so, as when a diffusers folder is loaded.

    Args:
        folder: has its configuration in `subfolder`, by default that of its name.
        settings: take the place of those of its configuration.

    Raises:
        SingleFileError: tensors of other shapes, in diffusers' names. Else what diffusers raises.
    """
    subfolder = subfolder or spec.denoiser
    config = {**cls.load_config(folder, subfolder=subfolder, local_files_only=True), **settings}
    own = _in_own_naming(cls, config, file, tensors, dtype)
    if own is not None:
        return own
    exact = cls._keep_in_fp32_modules
    model = cls.from_single_file(
        as_converted(tensors, spec),
        config=str(folder),
        subfolder=subfolder,
        dtype=None if exact else dtype,
        local_files_only=True,
        **settings,
    )
    for name, parameter in model.named_parameters() if exact else ():
        if not parameter.is_meta:  # which is reported as missing
            parameter.data = parameter.data.to(_dtype_of(cls, name, dtype))
    return model


def as_converted(tensors: Tensors, spec: ModelSpec) -> Tensors:
    """A denoiser's tensors as diffusers' converters want them; they may have the usual prefix or not.

    The converter of UNets wants it, and not all those of transformers take it; nor do diffusers' own names.
    """
    bare = {name.removeprefix(DENOISER): tensor for name, tensor in tensors.items()}
    if spec.denoiser == "unet" and any(name.startswith("input_blocks.") for name in bare):
        return {DENOISER + name: tensor for name, tensor in bare.items()}
    return bare


def _in_own_naming(cls: Any, config: dict[str, Any], file: Path, tensors: Tensors, dtype: torch.dtype) -> Any:
    """The denoiser, where the file names its tensors as diffusers does; else None."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = cls.from_config(config)
    needed = set(model.state_dict())
    for prefix in PREFIXES:
        if needed <= {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}:
            state = {name: tensors[prefix + name].to(_dtype_of(cls, name, dtype)) for name in needed}
            try:
                model.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise SingleFileError(
                    f"--checkpoint {str(file)!r}: {str(error).splitlines()[-1].strip()}"
                ) from None
            return model.eval()
    return None


def _dtype_of(cls: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    exact = set(cls._keep_in_fp32_modules or ())
    return torch.float32 if exact.intersection(name.split(".")) else dtype


def language_model(class_name: str, tensors: Tensors, prefix: str, folder: Path, dtype: torch.dtype) -> Any:
    """A text encoder that diffusers does not read from single files; `folder` configures it.

    What the tensors lack stays on meta.
    """
    import transformers
    from accelerate import init_empty_weights

    cls = getattr(transformers, class_name)
    with init_empty_weights(include_buffers=False):
        model = cls(cls.config_class.from_pretrained(folder))
    known, named = model.state_dict(), {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        inner = own.removeprefix("model.")
        # With eyes, what reads text has a name of its own, and so has what sees.
        for given in (own, inner, f"model.language_model.{inner}", f"model.{own}"):
            if given in known:
                named[given] = tensor.to(dtype)
                break
    head = "lm_head.weight"
    # Of a whole language model the last layer, and what ComfyUI notes, may be no part of it.
    model.load_state_dict(named, assign=True, strict=False)
    if head not in known:
        model.tie_weights()
    elif head not in named:  # words are not written here
        model.lm_head = torch.nn.Identity()
    return model.eval()


def wan_vae(cls: Any, tensors: Tensors, folder: Path, dtype: torch.dtype) -> Any:
    """A VAE of a class that diffusers does not read from single files, from Wan's layout or diffusers' own.

    Raises:
        ValueError: tensors that are not this VAE's.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with init_empty_weights(include_buffers=False):
        model = cls.from_config(cls.load_config(folder, local_files_only=True))
    known = set(model.state_dict())
    prefix = next((p for p in VAE_PREFIXES if any(name.startswith(p) for name in tensors)), "")
    named = {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in tensors.items()}
    if not known <= named.keys():
        named = convert_wan_vae_to_diffusers(named)
    if lacking := sorted(known - named.keys()):
        raise ValueError(f"it lacks {len(lacking)} tensors, such as {lacking[0]!r}")
    model.load_state_dict({name: named[name] for name in known}, assign=True)
    return model.eval()


def further_part(
    cls: Any, part: FilePart, tensors: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype
) -> Any:
    """A part of a file, converted by its names; what the tensors lack stays on meta.

    Raises:
        RuntimeError: tensors of other shapes.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = cls.from_config(cls.load_config(folder, local_files_only=True))
    known, named = model.state_dict(), {}
    for name, tensor in tensors.items():
        own = name
        for theirs, ours in part.names.items():
            own = own.replace(theirs, ours)
        if own in known:
            named[own] = tensor.to(dtype)
    model.load_state_dict(named, assign=True, strict=False)
    return model.eval()
