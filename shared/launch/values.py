"""Parse the text or YAML value of a flag. Each function raises ValueError with what the value must be."""

from __future__ import annotations

import ipaddress
import json
import math
import re
from dataclasses import fields
from typing import Any

from shared.models import CACHES, CacheSettings

NOT_NUMBERS = (ValueError, TypeError, OverflowError)


def as_number(value: Any) -> float:
    """A finite number. Raises one of NOT_NUMBERS."""
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def from_json(text: str) -> Any:
    """Parse JSON. Raises ValueError, also for NaN (which JSON does not have) and too deep nesting."""
    try:
        return json.loads(text, parse_constant=as_number)
    except RecursionError:
        raise ValueError from None


def as_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a non-empty text")
    return value


def as_integer(value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError("a whole number") from None


def as_count_or_auto(value: Any) -> int | str:
    if str(value).strip() == "auto":
        return "auto"
    try:
        return as_integer(value)
    except ValueError:
        raise ValueError("a whole number or auto") from None


def as_seconds(value: Any) -> float:
    try:
        seconds = as_number(value)
    except NOT_NUMBERS:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError("a number of seconds above 0")
    return seconds


def as_folders(value: Any) -> tuple[str, ...]:
    """Folders: a list, or a text with commas between; each text of a list may be either."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError("folders separated by commas")
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


def as_scales(value: Any) -> dict[str, float]:
    """JSON `{"path": scale, ...}`."""
    wanted = 'JSON such as {"path": 1.0}'
    try:
        data = from_json(value) if isinstance(value, str) else value
        scales = {str(path): as_number(scale) for path, scale in data.items()}
        if len(scales) != len(data) or not scales:
            raise ValueError
    except (*NOT_NUMBERS, AttributeError):
        raise ValueError(wanted) from None
    return scales


def as_scales_or_path(value: Any) -> dict[str, float]:
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        return {as_text(value): 1.0}
    return as_scales(value)


def as_json_object(value: Any) -> dict[str, Any]:
    try:
        data = from_json(value) if isinstance(value, str) else value
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise ValueError("a JSON object")
    return data


def as_scheduler(value: Any) -> str | dict[str, Any]:
    if isinstance(value, dict) or str(value).lstrip().startswith("{"):
        data = as_json_object(value)
        if not isinstance(data.get("scheduler"), str):
            raise ValueError('a name, or JSON with the name under "scheduler"')
        return data
    return as_text(value)


def as_truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def as_step_cache(value: Any) -> CacheSettings:
    """A name, `name:value` with the setting that matters most, or JSON with the name under "cache"."""
    if isinstance(value, dict) or str(value).lstrip().startswith("{"):
        data = as_json_object(value)
    else:
        name, _, given = str(value).partition(":")
        data = {"cache": name} | ({FIRST_SETTINGS.get(name, "threshold"): given} if given else {})
    if data.get("cache") not in CACHES:
        raise ValueError(f'{", ".join(CACHES)}, or JSON with one of them under "cache"')
    numbers = {"threshold": as_number, "retention_ratio": as_number, "mag_ratios": as_weights}
    known = {field.name for field in fields(CacheSettings)}
    settings: dict[str, Any] = {}
    for name, given in data.items():
        if name not in known:
            raise ValueError(f"JSON without {name}: {data['cache']} has {_settings(data['cache'])}")
        parse: Any = str if name in ("cache", "mask") else as_truth if name == "calibrate" else as_integer
        try:
            settings[name] = numbers.get(name, parse)(given)
        except NOT_NUMBERS:
            kind = "true or false" if name == "calibrate" else "a number, or numbers for mag_ratios"
            raise ValueError(f"a step cache whose {name} is {kind}") from None
    try:
        return CacheSettings(**settings)
    except ValueError as error:
        raise ValueError(f"a step cache whose settings fit: {error}") from None


FIRST_SETTINGS = {"taylorseer": "cache_interval", "deepcache": "cache_interval", "mask": "mask"}


def _settings(cache: Any) -> str:
    return ", ".join(sorted(CacheSettings.settings_of(cache)))


def as_weights(value: Any) -> tuple[float, ...]:
    try:
        data = value if isinstance(value, list | tuple) else str(value).strip("[]").split(",")
        weights = tuple(as_number(w) for w in data)
    except NOT_NUMBERS:
        weights = ()
    if not weights or min(weights) <= 0:
        raise ValueError("numbers above 0 separated by commas, such as 1,1,0.5")
    return weights


def as_counts(value: Any) -> tuple[int, ...]:
    try:
        data = value if isinstance(value, list | tuple) else str(value).strip("[]").split(",")
        counts = tuple(int(str(n)) for n in data)
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError("whole numbers above 0 separated by commas, such as 10,9")
    return counts


def as_sizes(value: Any) -> tuple[tuple[int, int], ...]:
    """(width, height) of pictures, pixels; each once."""
    given = value if isinstance(value, list | tuple) else str(value).split(",")
    found = [re.fullmatch(r"\s*(\d{1,5})\s*[xX]\s*(\d{1,5})\s*", str(size)) for size in given]
    sizes = [(int(size[1]), int(size[2])) for size in found if size]
    if not sizes or len(sizes) < len(found) or not all(16 <= side <= 8192 for size in sizes for side in size):
        raise ValueError("sizes such as 1024x1024,832x1216, with sides of 16 to 8192 pixels")
    return tuple(dict.fromkeys(sizes))


def as_names(value: Any) -> tuple[str, ...]:
    """Names with commas between, or a list of YAML."""
    names = value if isinstance(value, list | tuple) else str(value).split(",")
    names = tuple(str(name).strip() for name in names)
    if not all(names):
        raise ValueError("names separated by commas")
    return names


def as_hosts(value: Any) -> tuple[str, ...]:
    names = as_names(value)
    if any("/" in name for name in names):
        raise ValueError("host names without http:// and without a path, such as gpu.example.org")
    return names


def as_origins(value: Any) -> tuple[str, ...]:
    origins = as_names(value)
    if not all(o in ("*", "null") or re.fullmatch(r"[\w.+-]+://[^/]+/?", o) for o in origins):
        raise ValueError("origins such as https://app.example.org, without a path; or *")
    return origins


def as_networks(value: Any) -> tuple[str, ...]:
    try:
        return tuple(str(ipaddress.ip_network(name)) for name in as_names(value))
    except ValueError:
        raise ValueError("addresses or networks such as 127.0.0.1,10.0.0.0/8") from None
