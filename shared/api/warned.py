"""Warnings: what was cut, left out or changed in a request whose picture was made all the same.

`warn` may be called wherever a request is read (the server's thread) or carried out (any rank). The texts
reach `Reply.warnings`, and from there the answer, its header X-Warnings and the log. Imports no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from shared.launch.wording import cut

HEADER_LENGTH = 2000  # characters; proxies refuse headers of some KB

_collected: ContextVar[list[str] | None] = ContextVar("warnings", default=None)


def warn(text: str) -> None:
    """Add a warning to the request that this thread works on; does nothing while warming up."""
    collected = _collected.get()
    if collected is not None and text not in collected:
        collected.append(text)


@contextlib.contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """The list that `warn` fills inside."""
    collected: list[str] = []
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def merged(*lists: Iterable[str]) -> list[str]:
    """All texts, each once, in order: several ranks give the same warning."""
    return list(dict.fromkeys(text for texts in lists for text in texts))


def with_warnings(body: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """A JSON answer, with `warnings` where there are any."""
    return body | {"warnings": warnings} if warnings else body


def header_text(warnings: Iterable[str]) -> str:
    """Warnings as one header: in latin-1, without control characters, bounded."""
    text = " ".join("; ".join(warnings).split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text.encode("latin-1", "backslashreplace").decode("latin-1")
    return cut(text, HEADER_LENGTH)
