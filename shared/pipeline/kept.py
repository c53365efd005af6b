"""What a start leaves for the next one in --cache_dir: bytecode, compiled code. Imports no torch"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import stat
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from shared.api.hashes import cache_folder
from shared.launch.errors import first_line
from shared.launch.flags import HostConfig

log = logging.getLogger("host")

COMPILED_BYTES = 8 << 30
"""What the compiled code of all launches may take before the types used longest ago are dropped."""
LARGE = ("torch", "diffusers", "transformers")
"""The packages of which bytecode is looked for."""


def keep_bytecode(config: HostConfig) -> None:
    """Have Python keep the bytecode of packages in --cache_dir, where it has none and would keep none.

    Without it every rank compiles thousands of files at each start, three times as long as importing them. To
    be called before the large imports. Child processes do the same. A PYTHONPYCACHEPREFIX wins.
    """
    if sys.pycache_prefix is not None or all(map(_bytecode_is_kept, LARGE)):
        return
    folder = cache_folder(config) / "bytecode"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("bytecode is not kept in %s: %s", folder, first_line(error))
        return
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(folder.absolute())
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _bytecode_is_kept(package: str) -> bool:
    """Whether a package has bytecode beside it, or will have after its first import."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.cached is None or os.path.exists(spec.cached):
        return True
    folder = Path(spec.cached).parent
    return not sys.dont_write_bytecode and os.access(folder if folder.exists() else folder.parent, os.W_OK)


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
