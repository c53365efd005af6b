"""What form an answer takes: JSON, or the bytes of one file, by the Accept header and `output_format`."""

from __future__ import annotations

from collections.abc import Iterable

from shared.api.faults import FieldProblem
from shared.api.media import VIDEO_FILES
from shared.api.requests import MIME_TYPES
from shared.launch.wording import cut, shown
from shared.models import ModelSpec

JSON = "application/json"
# Formats of a single file, in the order in which a wildcard prefers them; png frames are a list.
RAW_FORMATS = {"image": ("png", "jpeg", "webp"), "video": VIDEO_FILES}
_ALIASES = {"image/jpg": "image/jpeg"}


def negotiate(
    accept: Iterable[tuple[str, float]], spec: ModelSpec, output_format: object = None
) -> tuple[str | None, FieldProblem | None]:
    """Choose between JSON and the raw formats of a type (RFC 9110, section 12.5.1).

    Args:
        accept: (media range, quality) of the Accept header; nothing means anything.
        output_format: what the body asks for, if it does; anything that is no format is left to the checks.

    Returns:
        The raw format or None for JSON, and the problem where nothing that the type makes is acceptable.
    """
    ranges = [(_ALIASES.get(m, m), q) for m, q in ((m.split(";")[0].strip().lower(), q) for m, q in accept)]
    raw = RAW_FORMATS[spec.output]
    offers = {MIME_TYPES[f]: f for f in raw if output_format is None or f == output_format}
    best: tuple[float, int, int] | None = None
    chosen: str | None = None
    for media_type in (JSON, *offers):
        rank = _rank(media_type, ranges)
        if rank is not None and (best is None or rank > best):
            best, chosen = rank, offers.get(media_type)
    if best is not None or not ranges:
        return chosen, None
    header = cut(", ".join(m for m, q in ranges if q > 0), 200) or "nothing"
    if output_format is not None and any(_rank(MIME_TYPES[f], ranges) for f in raw):
        text = f"is {shown(output_format)}, but Accept allows only {header}"
        return None, FieldProblem("output_format", text)
    text = f"type {spec.name} makes {', '.join((JSON, *(MIME_TYPES[f] for f in raw)))}; got {header}"
    if spec.output == "video" and _rank(MIME_TYPES["png"], ranges):
        text += f" (frames as png come as a list, in {JSON})"
    return None, FieldProblem("Accept", text)


def _rank(media_type: str, ranges: list[tuple[str, float]]) -> tuple[float, int, int] | None:
    """(quality, specificity, earliness) of the most specific range that matches; None where none does."""
    found: tuple[float, int, int] | None = None
    for index, (media_range, quality) in enumerate(ranges):
        if media_range == media_type:
            specificity = 2
        elif media_range == f"{media_type.split('/')[0]}/*":
            specificity = 1
        elif media_range == "*/*":
            specificity = 0
        else:
            continue
        if found is None or specificity > found[1]:
            found = (quality, specificity, -index)
    return found if found is not None and found[0] > 0 else None
