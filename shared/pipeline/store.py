"""Weights that are made once a machine and kept in --cache_dir: found by what they were made of, bounded."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shared.api.hashes import cache_folder
from shared.launch.errors import first_line
from shared.launch.flags import HostConfig
from shared.pipeline.kept import trim

log = logging.getLogger("host")

FORMAT = 1
"""Of the entries; another one is not read."""
BYTES = 64 << 30
"""What all entries may take before those used longest ago are dropped."""
FILE = "weights.safetensors"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "optimum-quanto", "torchao")
UNRELATED = frozenset(
    {
        *("height", "width", "scheduler", "vae", "control_net", "compel"),
        *("lora_dir", "embeddings_dir", "allow_lora_paths"),
    }
)
"""Flags of models and features that change no weight of a denoiser or a text encoder."""

Tensors = dict[str, torch.Tensor]
Found = TypeVar("Found")


class KeptWeights:
    """The tensors that one launch makes of its files, each set under a name.

    Args:
        config: the launch: its files, by path, size and time of the last change, and its flags are the key.
        dtype, device: in and on which they are made, which may change them too.
    """

    def __init__(self, config: HostConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = cache_folder(config) / "weights"
        self._key = {
            "format": FORMAT,
            "versions": {package: version(package) for package in PACKAGES},
            "made": [str(dtype), device.type],
            "flags": {name: value for name, value, _ in _related(config)},
            "files": _states(config),
        }

    def tensors(self, name: str, names: set[str], make: Callable[[], Tensors]) -> Tensors | None:
        """The tensors of this name, mapped from their file; made by the first rank of the machine that asks.

        Args:
            names: what they must be called; an entry with others is made anew.
            make: makes them; not called where they are found.

        Returns:
            None where nothing can be kept; `make` may not have been called then.
        """

        def write(folder: Path) -> None:
            write_tensors(folder / FILE, make(), {"key": json.dumps([name, self._key])})

        return entry_of(self.folder, name, self._key, write, lambda folder: _read(folder / FILE, names))


def entry_of(
    folder: Path,
    name: str,
    key: Mapping[str, Any],
    make: Callable[[Path], None],
    read: Callable[[Path], Found | None],
) -> Found | None:
    """What an entry of the store holds, a folder; made whole or not at all, by the first rank that asks.

    Args:
        name, key: what it is, and what it was made of, as JSON.
        make: fills an empty folder.
        read: what an entry holds; None for one that is broken, which is made anew.

    Returns:
        None where nothing can be kept; `make` may not have been called then.
    """
    digest = hashlib.sha256(json.dumps([name, key], sort_keys=True).encode()).hexdigest()[:32]
    entry, unfinished = folder / digest, folder / f"{digest}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{digest}.lock"):
            found = read(entry) if entry.exists() else None
            if found is None:
                for old in (unfinished, entry):
                    shutil.rmtree(old, ignore_errors=True)
                unfinished.mkdir()
                try:
                    make(unfinished)
                    unfinished.rename(entry)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
                log.info("%s is kept in %s", name, entry)
                trim(folder, BYTES)
                found = read(entry)
            os.utime(entry)
    except OSError as error:
        log.warning("%s is not kept in %s: %s", name, folder, error.strerror or first_line(error))
        return None
    return found


def file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of the last change of each file, by which an entry knows what it was made of."""
    states = [(str(file), file.stat()) for file in sorted(files)]
    return [(path, state.st_size, state.st_mtime_ns) for path, state in states]


def write_tensors(file: Path, tensors: Tensors, about: dict[str, str]) -> None:
    """Write a safetensors file to the disk. Raises OSError, also where room is scarce."""
    if shutil.disk_usage(file.parent).free < 2 * sum(tensor.nbytes for tensor in tensors.values()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file, about)
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error)) from error
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def _read(file: Path, names: set[str]) -> Tensors | None:
    """The tensors of an entry; None where it is broken, which is logged."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if set(found) != names:
            raise SafetensorError("it holds other tensors")
    except (OSError, SafetensorError) as error:
        log.warning("%s is broken and made anew: %s", file.parent, first_line(error))
        return None
    return found


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone on this machine, also among hosts. A process that dies gives the lock back."""
    with open(file, "w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _related(config: HostConfig) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The flags that weights depend on: name, value, what is known of the flag."""
    for flag in fields(config):
        if flag.metadata.get("group") in ("model", "features") and flag.name not in UNRELATED:
            yield flag.name, getattr(config, flag.name), flag.metadata


def _states(config: HostConfig) -> list[tuple[str, int, int]]:
    """Of every file that the weights are made of."""
    given = list[Path]()
    if Path(config.checkpoint).is_file():
        given.append(Path(config.checkpoint).with_suffix(""))  # what it lacks lies there
    for _, value, about in _related(config):
        if about.get("path") and value:
            given += map(Path, value if isinstance(value, dict | tuple) else [value])
    return file_states({file for path in given for file in (path, *path.rglob("*")) if file.is_file()})
