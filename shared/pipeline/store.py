"""Weights that are made once a machine and kept in --cache_dir: found by what they were made of, bounded."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES

from shared.api.hashes import cache_folder
from shared.launch.errors import first_line
from shared.launch.file_header import files_beside
from shared.launch.flags import HostConfig
from shared.pipeline.kept import trim

log = logging.getLogger("host")

FORMAT = 2
"""Of the entries; another one is not read."""
BYTES = 64 << 30
"""What all entries may take before those used longest ago are dropped."""
FILE = "weights.safetensors"
UNSYNCED = "unsynced"
"""Of an entry that is not on the disk yet: the file with the machine's start in which it was made."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
NAMES = {dtype: name for name, dtype in _TYPES.items()}
"""What safetensors calls dtypes."""
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

    def tensors(self, name: str, specs: Tensors, fill: Callable[[Tensors], None]) -> Tensors | None:
        """The tensors of this name, mapped from their file; made by the first rank of the machine that asks.

        Args:
            specs: what they must be, on any device; an entry of others is made anew.
            fill: writes their values; not called where they are found.

        Returns:
            None where nothing can be kept; `fill` may not have been called then.
        """

        def write(folder: Path) -> None:
            fill(new_file(folder / FILE, specs, {"key": json.dumps([name, self._key])}))

        return entry_of(self.folder, name, self._key, write, lambda folder: _read(folder / FILE, specs))


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
            found = read(entry) if entry.exists() and not _lost(entry) else None
            if found is None:
                for old in (unfinished, entry):
                    shutil.rmtree(old, ignore_errors=True)
                unfinished.mkdir()
                try:
                    make(unfinished)
                    (unfinished / UNSYNCED).write_text(_boot())
                    unfinished.rename(entry)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
                log.info("%s is kept in %s", name, entry)
                threading.Thread(target=_sync, args=[entry], name="sync", daemon=True).start()
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
    """Write a safetensors file. Raises OSError, also where room is scarce."""
    for name, place in new_file(file, tensors, about).items():
        place.copy_(tensors[name].detach())


def new_file(file: Path, specs: Tensors, about: dict[str, str]) -> Tensors:
    """The tensors of a new safetensors file of these shapes and dtypes, to be filled in place.

    Raises:
        OSError: it cannot be made, or has no room.
    """
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    # Large elements first, so that all are aligned.
    for name in sorted(specs, key=lambda name: (-specs[name].element_size(), name)):
        spec = specs[name]
        begin, end = end, end + spec.numel() * spec.element_size()
        header[name] = {"dtype": NAMES[spec.dtype], "shape": [*spec.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    with open(file, "xb") as made:
        made.write(len(text).to_bytes(8, "little") + text)
        made.flush()
        os.posix_fallocate(made.fileno(), 0, first + end)  # a full disk would end the process later
    whole = torch.from_file(str(file), shared=True, size=first + end, dtype=torch.uint8)
    found = {}
    for name, spec in specs.items():
        begin, end = (first + offset for offset in header[name]["data_offsets"])
        found[name] = whole[begin:end].view(spec.dtype).view(spec.shape)
    return found


def _boot() -> str:
    """What tells this start of the machine from others."""
    return BOOT.read_text()


def _lost(entry: Path) -> bool:
    """Whether the machine went down before an entry was on its disk."""
    try:
        return (entry / UNSYNCED).read_text() != _boot()
    except FileNotFoundError:
        return False


def _sync(entry: Path) -> None:
    """Bring an entry to the disk, which takes seconds that no rank waits for."""
    with contextlib.suppress(OSError):  # it may be dropped meanwhile
        for file in entry.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        (entry / UNSYNCED).unlink()


def _read(file: Path, specs: Tensors) -> Tensors | None:
    """The tensors of an entry; None where it is broken, which is logged."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if {k: (t.dtype, t.shape) for k, t in found.items()} != {
            k: (t.dtype, t.shape) for k, t in specs.items()
        }:
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
        given += files_beside(Path(config.checkpoint))  # what it lacks lies there
    for _, value, about in _related(config):
        if about.get("path") and value:
            given += map(Path, value if isinstance(value, dict | tuple) else [value])
    return file_states({file for path in given for file in (path, *path.rglob("*")) if file.is_file()})
