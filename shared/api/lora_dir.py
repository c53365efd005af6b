"""--lora_dir: the LoRAs that clients may name, and their metadata. Imports no torch.

A name is a file's path in its folder, or its last part, with or without `.safetensors`; or, as with A1111,
what its trainer called it (`ss_output_name`). Names are looked up among the files that are there and never
joined to a path, and links that lead out of a folder are not followed: no name reaches a file elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.launch.flags import HostConfig

SUFFIX = ".safetensors"
HEADER_BYTES = 16 << 20  # the longest header that is read for its metadata
TRIGGER_WORDS = 10
SHOWN = 10  # names in an error


class LoraNameError(ValueError):
    """A name that no LoRA has, or several; the sentence lists those that there are."""


class AmbiguousLoraError(LoraNameError):
    """A name that several LoRAs have."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in a folder: `name` is what tells it from all others."""

    name: str
    path: str
    size: int
    changed: int  # st_ctime_ns, since a file may replace another of the same st_mtime_ns


def is_named(path: str, name: str) -> bool:
    """Whether a file's path ends in a name, with or without its suffix."""
    parts = [part for part in name.removesuffix(SUFFIX).split("/") if part]
    whole = Path(path.removesuffix(SUFFIX)).parts
    return name == path or (bool(parts) and not name.startswith("/") and list(whole[-len(parts) :]) == parts)


def files_in(folder: str, suffixes: str | tuple[str, ...]) -> Iterator[str]:
    """The paths of files with these suffixes in a folder and those in it; none outside of it, by a link."""
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path = os.path.join(place, file)
            real = os.path.realpath(path)
            inside = real.startswith(root.rstrip("/") + "/")
            if file.endswith(suffixes) and inside and os.path.isfile(real):
                yield path


def lora_files(config: HostConfig) -> list[LoraFile]:
    """The files in all folders of the launch, as they are now, by name."""
    found: dict[str, tuple[str, str, os.stat_result]] = {}  # by path: folder, name in it
    for folder in config.lora_dir or ():
        root = os.path.realpath(folder)
        for path in files_in(root, SUFFIX):
            inner = os.path.relpath(path, root).removesuffix(SUFFIX)
            with contextlib.suppress(FileNotFoundError):  # it may be removed meanwhile
                found.setdefault(path, (root, inner, os.stat(path)))
    roots: dict[str, list[str]] = {}
    for root, inner, _ in found.values():
        roots.setdefault(inner, []).append(root)
    listed = [
        LoraFile(_told_apart(root, roots[inner], inner), path, stat.st_size, stat.st_ctime_ns)
        for path, (root, inner, stat) in found.items()
    ]
    return sorted(listed, key=lambda file: file.name)


def _told_apart(root: str, roots: list[str], inner: str) -> str:
    """A name that the same path in another folder does not have: with as much of its folder as that takes."""
    heads = [Path(other).parts[1:] for other in roots]
    own = Path(root).parts[1:]
    for count in range(len(own) + 1):
        if sum(head[len(head) - count :] == own[len(own) - count :] for head in heads) < 2:
            return "/".join((*own[len(own) - count :], inner))
    return "/".join((*own, inner))


def find_lora(config: HostConfig, name: str, loaded: Iterable[str] = ()) -> LoraFile:
    """The one file that a name means: its whole name or path first, else the end of one.

    Args:
        loaded: paths of LoRAs that may be named too, wherever they are; a file has the path it was loaded by.

    Raises:
        LoraNameError: none or several.
    """
    elsewhere = {os.path.realpath(path): path for path in loaded}
    files = [
        replace(file, path=elsewhere.pop(os.path.realpath(file.path), file.path))
        for file in lora_files(config)
    ]
    files += [LoraFile(path, path, 0, 0) for path in elsewhere.values()]
    bare = name.removesuffix(SUFFIX)
    found = [f for f in files if bare == f.name or name == f.path]
    found = found or [f for f in files if is_named(f.path, name)]
    found = found or [f for f in files if _metadata(f.path, f.changed).get("ss_output_name") == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise AmbiguousLoraError(f"LoRA {name!r} is ambiguous: {_names(found)}")
    if not config.lora_dir:
        raise LoraNameError(f"LoRA {name!r} is not loaded, and the host was started without --lora_dir")
    raise LoraNameError(f"LoRA {name!r} is not in --lora_dir, which has {_names(files) or 'none'}")


def _names(files: list[LoraFile]) -> str:
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(file.name for file in files[:SHOWN]) + more


def lora_path(config: HostConfig, given: str) -> str:
    """The path of a LoRA that a client wants to add, by name or, where the launch allows it, by path.

    Raises:
        LoraNameError: no such name, or a path that is not in --lora_dir.
    """
    try:
        return find_lora(config, given).path
    except LoraNameError as error:
        if given in (config.lora or {}) or given in (config.motion_adapter_lora or {}):
            return given
        if config.allow_lora_paths and not isinstance(error, AmbiguousLoraError):
            return given
        hint = "" if config.allow_lora_paths else "; other paths need --allow_lora_paths"
        raise LoraNameError(f"{error}{hint}") from None


def list_loras(config: HostConfig) -> list[dict[str, Any]]:
    """What GET /loras tells of each file: name, size in bytes, title, base model and trigger words."""
    return [
        {"name": file.name, "size": file.size, **_told(file.path, file.changed)}
        for file in lora_files(config)
    ]


def a1111_loras(config: HostConfig) -> list[dict[str, Any]]:
    """What A1111's GET /sdapi/v1/loras tells of each file; `path` is that in its folder."""
    listed = []
    for file in lora_files(config):
        metadata = _metadata(file.path, file.changed)
        alias = metadata.get("ss_output_name") or file.name
        listed.append(
            {
                "name": file.name,
                "alias": alias,
                "path": file.name + SUFFIX,
                "metadata": {key: _unfolded(value) for key, value in metadata.items()},
            }
        )
    return listed


def _unfolded(value: str) -> Any:
    """A JSON object in a metadata text as such, as A1111 tells it; another text as it is."""
    try:
        return json.loads(value) if value.startswith("{") else value
    except (ValueError, RecursionError):
        return value


@functools.lru_cache(maxsize=4096)
def _told(path: str, changed: int) -> dict[str, Any]:
    """What the header says, by the keys of modelspec and of kohya's trainer; {} where it says nothing."""
    metadata = _metadata(path, changed)
    phrase = metadata.get("modelspec.trigger_phrase")
    told = {
        "title": metadata.get("modelspec.title") or metadata.get("ss_output_name"),
        "base": metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version"),
        "trigger_words": [phrase] if phrase else _commonest_tags(metadata),
    }
    return {key: value for key, value in told.items() if value}


def _commonest_tags(metadata: dict[str, str]) -> list[str]:
    """The tags that most of the pictures had which the LoRA was trained with."""
    tags = Counter[str]()
    try:
        for counts in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            tags.update({tag.strip(): int(count) for tag, count in counts.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [tag for tag, _ in tags.most_common(TRIGGER_WORDS) if tag]


@functools.lru_cache(maxsize=256)
def _metadata(path: str, changed: int) -> dict[str, str]:
    """The texts under `__metadata__` in a file's header; {} where there are none, or no header."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = json.loads(file.read(length)) if length <= HEADER_BYTES else {}
        found = data.get("__metadata__", {}).items()
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {key: value for key, value in found if isinstance(value, str)}
