"""A1111's prompt notation: weights, BREAK and LoRAs, with the meaning that they have there.

Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_DEPTH = 64  # nested brackets
MAX_WEIGHT = 100.0

_TOKENS = re.compile(
    r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:", re.DOTALL
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_NETWORK = re.compile(r"<(\w+):([^<>]*)>")
_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_EDITS = re.compile(r":\s*[+-]?[.\d]+\s*$")

Chunk = list[tuple[str, float]]
"""Words and their weights."""


class NotationError(ValueError):
    """A prompt whose notation means nothing here; the sentence says what."""


def parse(text: str) -> list[Chunk]:
    """Words with their weights, one list for each part between BREAKs.

    Raises:
        NotationError: prompt editing, alternation, brackets nested too deep, or a weight out of bounds.
    """
    _refuse_schedules(text)
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, weight: float) -> None:
        for place in range(start, len(found)):
            words, before = found[place]
            found[place] = (words, before * weight)

    for match in _TOKENS.finditer(text):
        token, weight = match[0], match[1]
        if token in opened:
            opened[token].append(len(found))
            if len(opened["("]) + len(opened["["]) > MAX_DEPTH:
                raise NotationError(f"brackets may be nested at most {MAX_DEPTH} deep")
        elif weight is not None and opened["("]:
            weigh(opened["("].pop(), _number(weight))
        elif token == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND)
        elif token == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE)
        else:
            found.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    for start in opened["("]:
        weigh(start, ROUND)
    for start in opened["["]:
        weigh(start, SQUARE)
    chunks: list[Chunk] = [[]]
    for words, weight in found:
        if abs(weight) > MAX_WEIGHT:
            raise NotationError(f"a weight must be at most {MAX_WEIGHT:g}, got {weight:g} for {words[:40]!r}")
        first, *others = _BREAK.split(words)
        _append(chunks[-1], first, weight)
        for other in others:
            chunks.append([])
            _append(chunks[-1], other, weight)
    return chunks


def _append(chunk: Chunk, words: str, weight: float) -> None:
    if chunk and chunk[-1][1] == weight:
        chunk[-1] = (chunk[-1][0] + words, weight)
    elif words:
        chunk.append((words, weight))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise NotationError(f"a weight must be a number such as 1.3, got {text!r}") from None


def _refuse_schedules(text: str) -> None:
    """Raise NotationError for words that A1111 changes from step to step."""
    left = re.sub(r"\\.", "", text)
    for _ in range(MAX_DEPTH):
        for match in _INNERMOST.finditer(left):
            shown = f"[{match[1][:40]}]"
            if "|" in match[1]:
                raise NotationError(f"alternating words are not supported, got {shown}")
            # A weight ends with a round bracket, so [(word:1.3)] is no edit.
            if _EDITS.search(match[1]):
                raise NotationError(f"prompt editing is not supported, got {shown}")
        shorter = _INNERMOST.sub("", left)
        if shorter == left:
            return
        left = shorter


@dataclass
class Networks:
    """A prompt without its `<lora:name:scale>`, those LoRAs, and what was left out."""

    text: str
    loras: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def take_networks(text: str) -> Networks:
    """Take `<lora:name:scale>` out of a prompt; the scale is 1 where none is given.

    Raises:
        NotationError: a scale that is no number, or a network of another kind.
    """
    taken = Networks("")

    def take(match: re.Match[str]) -> str:
        kind, (name, *scales) = match[1], match[2].split(":")
        if kind != "lora" or not name:
            raise NotationError(f"only <lora:name:scale> is supported, got {match[0][:80]}")
        taken.loras[name] = taken.loras.get(name, 0.0) + (_number(scales[0]) if scales else 1.0)
        if len(scales) > 1:
            taken.left_out.append(":".join(scales[1:]) + f" of {match[0]}")
        return ""

    taken.text = _NETWORK.sub(take, text)
    return taken


def plain(text: str) -> tuple[str, bool]:
    """Only the words, and whether weights or BREAKs were left out. Raises NotationError."""
    chunks = parse(text)
    words = " ".join("".join(part for part, _ in chunk) for chunk in chunks)
    return words, len(chunks) > 1 or any(weight != 1 for chunk in chunks for _, weight in chunk)
