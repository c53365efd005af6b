"""Values for error texts and the log, cut to a bounded length."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_TEXT = 1000  # characters of one text of an answer or of the log
MAX_VALUE = 60  # characters of a value that such a text quotes


def cut(text: str, most: int = MAX_TEXT) -> str:
    """The text, cut to at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class _Repr(reprlib.Repr):
    """`repr` with a bounded cost for values as large as a request body."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = MAX_VALUE
        self.maxlevel = 3

    def repr_str(self, value: str, level: int) -> str:
        return repr(cut(value, self.maxstring))

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 10_000:  # Python writes no more than 4300 digits out
            return "a number of thousands of digits"
        return cut(repr(value), self.maxlong)


_REPR = _Repr()


def shown(value: Any, most: int = MAX_VALUE) -> str:
    """A value of a request or a flag, as `repr` shows it, in at most `most` characters."""
    return cut(_REPR.repr(value), most)
