"""Checkpoints stored in another dtype than they run in: converted once a machine, mapped by all ranks.

A rank that converts while it loads has a copy of the whole model of its own.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.api.hashes import cache_folder
from shared.launch.flags import HostConfig
from shared.pipeline.store import FORMAT, entry_of, file_states, write_tensors

LEAST = 64 << 20
"""Bytes of a component below which each rank converts it itself."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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


def _differing(files: list[Path], dtype: torch.dtype, exact: tuple[str, ...]) -> int:
    """Bytes that are not stored in this dtype; 0 where a file cannot be read, which loading tells."""
    total = 0
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(key)
                    kind, stays = part.get_dtype(), any(word in key for word in exact)
                    if kind in SIZES and kind != NAMES[dtype] and not stays:
                        total += SIZES[kind] * int(torch.Size(part.get_shape()).numel())
    except (OSError, SafetensorError):
        return 0
    return total


def _kept(
    config: HostConfig, folder: Path, files: list[Path], dtype: torch.dtype, exact: tuple[str, ...]
) -> Path | None:
    """A component's folder with weights of this dtype. None where it cannot be kept."""
    key = {
        "format": FORMAT,
        "dtype": str(dtype),
        "exact": exact,
        "files": file_states(file for file in folder.iterdir() if file.is_file()),
        "versions": {package: version(package) for package in ("torch", "diffusers", "transformers")},
    }

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
