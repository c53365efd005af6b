"""What a start leaves for the next one in --cache_dir: compiled code, within bounds. Imports no torch"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from importlib.metadata import version
from pathlib import Path

from shared.api.hashes import cache_folder
from shared.launch.errors import first_line
from shared.launch.flags import HostConfig

log = logging.getLogger("host")

COMPILED_BYTES = 8 << 30
"""What the compiled code of all launches may take before the types used longest ago are dropped."""


def keep_compiled(config: HostConfig, trims: bool) -> None:
    """Have torch's compilers keep what they make in --cache_dir, and find what an earlier start made.

    To be called before torch is imported, which sets a TORCHINDUCTOR_CACHE_DIR of its own; one that is set
    before wins.

    Args:
        trims: whether this rank drops what is too much; one of a machine.
    """
    if not config.compiles or "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    compiled = cache_folder(config) / "compiled"
    mine = compiled / f"{config.type}-torch-{version('torch')}"
    try:
        mine.mkdir(parents=True, exist_ok=True)
        os.utime(mine)
        if trims:
            trim(compiled, COMPILED_BYTES)
    except OSError as error:
        log.warning("compiled code is not kept in %s: %s", mine, first_line(error))
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(mine)


def trim(folder: Path, most: int) -> None:
    """Drop the entries of a folder that were used longest ago until the others take at most `most` bytes."""
    entries = {entry: entry.stat().st_mtime_ns for entry in folder.iterdir() if entry.is_dir()}
    total = 0
    for entry in sorted(entries, key=entries.__getitem__, reverse=True):
        size = _bytes_of(entry)
        total += size
        if total > most:
            log.info("dropped %s of %.1f MB from the cache", entry, size / 1e6)
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def _bytes_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another host may drop it meanwhile
            status = file.lstat()
            total += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return total
