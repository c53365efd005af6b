"""SHA-256 of models' and LoRAs' files as A1111 and Civitai know them: computed once, in a thread, and kept.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.launch.flags import HostConfig

log = logging.getLogger("host")

INDEX = "hashes.json"
BLOCK = 1 << 22  # bytes read at once
WEIGHTS = ".safetensors"
_HASH = re.compile("[0-9a-f]{64}")


class FileHashes:
    """Hashes of files, kept in an index by path, size and time of the last change.

    Args:
        folder: where the index is; made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._index = folder / INDEX
        self._lock = threading.Lock()
        self._known: dict[str, Any] | None = None  # read when first needed
        self._pending: dict[str, tuple[tuple[str, ...], bool]] = {}
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None

    def model(self, config: HostConfig) -> str | None:
        """A1111's short hash of the launch's denoiser; None until it is computed, or without its files."""
        digest = self._of(denoiser_files(config), tensors_only=False)
        return digest and digest[:10]

    def lora(self, path: str) -> str | None:
        """A1111's short hash of a LoRA, which leaves the file's header out; None until it is computed."""
        digest = self._of((path,), tensors_only=True)
        return digest and digest[:12]

    def begin(self, config: HostConfig) -> None:
        """Have what the launch names computed, so that it is there when a picture is made."""
        self.model(config)
        for path in config.lora or {}:
            self.lora(path)

    def wait(self) -> None:
        """Block until all that was asked for is computed."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()

    def _of(self, paths: Sequence[str], tensors_only: bool) -> str | None:
        try:
            stats = [os.stat(path) for path in paths if not os.path.isdir(path)]
        except OSError:
            return None
        if not stats:
            return None
        state = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
        key = json.dumps([*paths, tensors_only])
        with self._lock:
            if self._known is None:
                self._known = _read(self._index)
            entry = self._known.get(key)
            if entry is not None and entry.get("state") == state:
                return str(entry["sha256"])
            if key not in self._failed:
                self._pending[key] = (tuple(paths), tensors_only)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._compute, name="hashes", daemon=True)
                    self._thread.start()
        return None

    def _compute(self) -> None:
        with contextlib.suppress(OSError):  # after everything else that wants the processor
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while True:
            with self._lock:
                if not self._pending:
                    self._thread = None
                    return
                key, (paths, tensors_only) = next(iter(self._pending.items()))
            entry = None
            try:
                entry = _entry(paths, tensors_only)
            except OSError as error:
                log.warning("no hash of %s: %s", paths[0], error.strerror or error)
            with self._lock:
                del self._pending[key]
                if entry is None:
                    self._failed.add(key)
                    continue
                assert self._known is not None
                self._known = _read(self._index) | self._known | {key: entry}
                self._known = {key: kept for key, kept in self._known.items() if _is_there(key)}
                try:
                    _write(self._index, self._known)
                except OSError as error:
                    log.warning("hashes of files are not kept in %s: %s", self._index, error.strerror)


def cache_folder(config: HostConfig) -> Path:
    """--cache_dir, or its default."""
    if config.cache_dir:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multigpu_diffusion"


def denoiser_files(config: HostConfig) -> tuple[str, ...]:
    """The files that make a launch's denoiser: the checkpoint where that is one; () where there are none."""
    if config.gguf_model:
        return (config.gguf_model,)
    folder = Path(config.checkpoint)
    if not folder.is_dir():
        return (config.checkpoint,)
    by_variant: dict[str, list[str]] = {}  # "": the plain files; as diffusers names them
    for path in sorted(folder.glob(f"{config.spec.denoiser}/diffusion_pytorch_model*{WEIGHTS}")):
        variant = path.name.removesuffix(WEIGHTS).partition(".")[2].partition("-")[0]
        by_variant.setdefault(variant, []).append(str(path))
    chosen = by_variant.get(config.variant or "") or by_variant.get("") or next(iter(by_variant.values()), [])
    return tuple(chosen)


def _entry(paths: Sequence[str], tensors_only: bool) -> dict[str, Any]:
    digest, state = hashlib.sha256(), []
    for path in paths:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            state.append([stat.st_size, stat.st_mtime_ns])
            if tensors_only and path.endswith(WEIGHTS):
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            while block := file.read(BLOCK):
                digest.update(block)
    return {"state": state, "sha256": digest.hexdigest()}


def _is_there(key: str) -> bool:
    try:
        return os.path.exists(json.loads(key)[0])
    except (ValueError, IndexError, KeyError, TypeError):
        return False


def _read(index: Path) -> dict[str, Any]:
    try:
        found = json.loads(index.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {
        key: entry
        for key, entry in (found.items() if isinstance(found, dict) else ())
        if isinstance(entry, dict) and _HASH.fullmatch(str(entry.get("sha256")))
    }


def _write(index: Path, known: dict[str, Any]) -> None:
    """In one piece: several hosts may keep their hashes in one folder."""
    index.parent.mkdir(parents=True, exist_ok=True)
    number, draft = tempfile.mkstemp(dir=index.parent, prefix=INDEX)
    try:
        with os.fdopen(number, "w") as file:
            json.dump(known, file)
        os.replace(draft, index)
    except OSError:
        os.unlink(draft)
        raise
