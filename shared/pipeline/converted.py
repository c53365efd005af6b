"""Weights stored in another dtype than they run in, folders and single files: converted once a machine.

A rank that converts while it loads has a copy of the whole model of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.api.hashes import cache_folder
from shared.launch.flags import HostConfig
from shared.pipeline.store import FILE, FORMAT, NAMES, entry_of, file_states, write_tensors

LEAST = 64 << 20
"""Bytes of a component below which each rank converts it itself."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SCALED = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
"""What else is converted in single files."""


def converted_parts(
    config: HostConfig, folder: Path, given: dict[str, Any], variant: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The components of a diffusers folder whose weights are not stored in `dtype`, loaded in it.

    Args:
        given: components that are taken from elsewhere.
        variant: of the weight files, as diffusers is asked for it.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    found = {}
    index = json.loads((folder / "model_index.json").read_text())
    for name, entry in index.items():
        if name in given or not isinstance(entry, list) or len(entry) != 2 or entry[0] not in libraries:
            continue
        cls: Any = getattr(libraries[entry[0]], entry[1], None)
        if cls is None or torch.nn.Module not in getattr(cls, "__mro__", ()):
            continue
        files = weight_files(folder / name, variant)
        if _differing(files, dtype, ()) < LEAST:
            continue
        exact = _stays_exact(cls, folder / name, dtype)
        if _differing(files, dtype, exact) < LEAST:
            continue
        kept = _kept(config, folder / name, files, dtype, exact)
        if kept is not None:
            named = variant if files[0].name.count(".") > 1 else None
            found[name] = cls.from_pretrained(kept, variant=named, dtype=dtype, local_files_only=True)
    return found


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The `.safetensors` files of a component: the variant's where there are any, else the plain ones."""
    files = sorted(folder.glob("*.safetensors"))
    of_variant = [f for f in files if variant and f.name.split(".")[1].split("-")[0] == variant]
    return of_variant or [f for f in files if f.name.count(".") == 1]


def _stays_exact(cls: Any, folder: Path, dtype: torch.dtype) -> tuple[str, ...]:
    """Words in the names of the tensors that a model loads in fp32, whatever it is asked for."""
    if not hasattr(cls, "config_class"):  # a model of diffusers
        return tuple(sorted(cls._keep_in_fp32_modules or ()))
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = cls(cls.config_class.from_pretrained(folder))  # which adds those of the models inside it
    words = set(model._keep_in_fp32_modules) if dtype == torch.float16 else set()
    return tuple(sorted(words | set(model._keep_in_fp32_modules_strict)))


def ranks_here() -> int:
    """How many ranks this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def once_a_machine(
    config: HostConfig,
    name: str,
    cls: Any,
    files: tuple[Path, Collection[str], Collection[Path]],
    dtype: torch.dtype,
    make: Callable[[], Any],
) -> Any:
    """The model that `make` makes of a single file's tensors.

    Where they are of another dtype and the machine has several ranks, the first one makes it and all map it.

    Args:
        name, cls: of the component.
        files: the single file, the names of those of its tensors that are the model's, and the files that
            configure it.
    """
    file, names, settings = files
    if ranks_here() == 1 or _differing([file], dtype, (), names) < LEAST:
        return make()
    key = _key(dtype, {file, *settings}, {"class": cls.__name__})

    def write(into: Path) -> None:
        model = make()
        (into / "config.json").write_text(_settings(model))
        write_tensors(into / FILE, _apart(model.state_dict()), {"format": "pt"})

    what = f"{name} of {file.name} in {str(dtype).removeprefix('torch.')}"
    kept = entry_of(cache_folder(config) / "weights", what, key, write, lambda entry: _mapped(cls, entry))
    return make() if kept is None else kept


def _key(dtype: torch.dtype, files: Iterable[Path], own: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an entry's weights from others: how they are made, and of what."""
    return {
        "format": FORMAT,
        "dtype": str(dtype),
        **own,
        "files": file_states(files),
        "versions": {package: version(package) for package in ("torch", "diffusers", "transformers")},
    }


def _settings(model: Any) -> str:
    text: str = (
        model.config.to_json_string(False) if hasattr(model, "config_class") else model.to_json_string()
    )
    return text


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no memory, as a file wants them."""
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone() if users[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }


def _mapped(cls: Any, entry: Path) -> Any:
    """The model of an entry, its tensors mapped from the file; None where it is broken."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(cls, "config_class"):
                model = cls(cls.config_class.from_pretrained(entry))
            else:
                model = cls.from_config(json.loads((entry / "config.json").read_text()))
        with safe_open(entry / FILE, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if hasattr(model, "lm_head") and "lm_head.weight" not in tensors:  # words are not written here
            model.lm_head = torch.nn.Identity()
        model.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return None
    return model.eval()


def _differing(
    files: list[Path],
    dtype: torch.dtype,
    exact: tuple[str, ...],
    names: Collection[str] | None = None,
) -> int:
    """Bytes that are not stored in this dtype; 0 where a file cannot be read, which loading tells.

    Args:
        names: of those that count, in a single file; None: all.
    """
    sizes = SIZES if names is None else SIZES | SCALED
    total = 0
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys() if names is None else names:
                    part = opened.get_slice(key)
                    kind, stays = part.get_dtype(), any(word in key for word in exact)
                    if kind in sizes and kind != NAMES[dtype] and not stays:
                        total += sizes[kind] * int(torch.Size(part.get_shape()).numel())
    except (OSError, SafetensorError):
        return 0
    return total


def _kept(
    config: HostConfig, folder: Path, files: list[Path], dtype: torch.dtype, exact: tuple[str, ...]
) -> Path | None:
    """A component's folder with weights of this dtype. None where it cannot be kept."""
    key = _key(dtype, (file for file in folder.iterdir() if file.is_file()), {"exact": exact})

    def convert(tensor: torch.Tensor, name: str) -> torch.Tensor:
        stays = not tensor.is_floating_point() or any(word in name for word in exact)
        return tensor if stays else tensor.to(dtype)

    def make(into: Path) -> None:
        for file in folder.glob("*.json"):
            shutil.copyfile(file, into / file.name)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: convert(opened.get_tensor(name), name) for name in opened.keys()}  # noqa: SIM118
                about = opened.metadata() or {"format": "pt"}
            write_tensors(into / file.name, tensors, about)

    def read(entry: Path) -> Path | None:
        return entry if _readable([entry / file.name for file in files]) else None

    what = f"{folder.name} in {str(dtype).removeprefix('torch.')}"
    return entry_of(cache_folder(config) / "weights", what, key, make, read)


def _readable(files: list[Path]) -> bool:
    try:
        for file in files:
            with safe_open(file, framework="pt"):
                pass
    except (OSError, SafetensorError):
        return False
    return True
