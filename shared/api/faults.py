"""Faults of a request, by field, and the error that lists them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from shared.launch.wording import MAX_VALUE, cut


@dataclass(frozen=True)
class FieldProblem:
    """One fault of a request: `field` is its name, `problem` says what is allowed and what was given."""

    field: str
    problem: str
    needs: frozenset[str] = frozenset()  # fields that must be valid for this fault to be reported

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", cut(self.field, MAX_VALUE))
        object.__setattr__(self, "problem", cut(self.problem))

    def told(self) -> dict[str, str]:
        """The fault as answers have it."""
        return {"field": self.field, "problem": self.problem}


# What Pillow's decoders raise on damaged files, DecompressionBombError aside.
BROKEN_PICTURE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error),
)
MAX_FAULTS = 20  # reported of one request


def all_faults(texts: Sequence[str], total: int | None = None) -> str:
    """The first faults in one line, and how many more there are of `total`."""
    shown, total = list(texts[:MAX_FAULTS]), len(texts) if total is None else total
    if total > len(shown):
        shown.append(f"and {total - len(shown)} more faults")
    return "; ".join(shown)


class RequestError(ValueError):
    """A refused request. `status` is 400 (bad request) or 422 (this model or launch cannot serve it)."""

    def __init__(self, status: int, problems: list[FieldProblem]) -> None:
        self.status = status
        self.problems = problems
        shown = [f"{p.field}: {p.problem}" if p.field else p.problem for p in problems[:MAX_FAULTS]]
        super().__init__(all_faults(shown, len(problems)))


def refused(field: str, problem: str) -> RequestError:
    """A RequestError 422 for the content of a field."""
    return RequestError(422, [FieldProblem(field, problem)])
