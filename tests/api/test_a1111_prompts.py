"""A1111's notation: what its own parser makes of it."""

from __future__ import annotations

import pytest

from shared.api.a1111_prompts import NotationError, parse, plain, take_networks


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("normal text", [[("normal text", 1.0)]]),
        ("an (important) word", [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        (r"\(literal\]", [[("(literal]", 1.0)]]),
        ("(word:1.3)", [[("word", 1.3)]]),
        ("((word))", [[("word", 1.21)]]),
        ("[word]", [[("word", 1 / 1.1)]]),
        ("(a [b]:2)", [[("a ", 2.0), ("b", 2 / 1.1)]]),
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("a: b", [[("a: b", 1.0)]]),
    ],
)
def test_parse(text: str, parts: list) -> None:
    found = parse(text)
    assert [[w for w, _ in part] for part in found] == [[w for w, _ in part] for part in parts]
    assert [n for p in found for _, n in p] == pytest.approx([n for p in parts for _, n in p])


@pytest.mark.parametrize(
    "text", ["[a:b:0.5]", "[a|b]", "[a::3]", "(" * 65, "(a:1.2.3)", "(a:1000)", "[x [y]:0.3]"]
)
def test_refused(text: str) -> None:
    with pytest.raises(NotationError):
        parse(text)


def test_loras_and_plain_words() -> None:
    taken = take_networks("a cat<lora:x:0.8> <lora:y>")
    assert (taken.text, taken.loras) == ("a cat ", {"x": 0.8, "y": 1.0})
    assert plain("a (red:1.3) cat") == ("a red cat", True) and plain(r"a \(cat\)") == ("a (cat)", False)
