"""shared.parallel.method and shapes: parts that hold a pipeline together, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from shared.parallel.distrifusion import DistriFusion
from shared.parallel.method import CombinedMethod, Method, Part, Plain, Unwatched, control_nets
from shared.parallel.shapes import Latest
from tests import tiny


def calling(note: Callable[[dict[str, Any]], Any]) -> Any:
    """A pipeline that gives `note` its arguments."""

    def pipe(**arguments: Any) -> Any:
        return note(arguments)

    return pipe


class Noted(Method):
    """Notes what is asked of it."""

    def __init__(self, name: str, told: list[str], calls: int = 1) -> None:
        super().__init__(calling(lambda arguments: (name, arguments)))
        self.name, self.told, self._calls = name, told, calls
        self.held.callback(told.append, f"{name} closed")

    @property
    def plan(self) -> dict[str, Any]:
        return {"method": self.name}

    @property
    def warm_up_calls(self) -> int:
        return self._calls

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self.told.append(f"{self.name} begins {steps} of {pictures}")

    def reset(self) -> None:
        self.told.append(f"{self.name} forgets")


def test_a_combined_method_closes_its_parts_last_first() -> None:
    told: list[str] = []
    with CombinedMethod(Noted("first", told, 2), [Noted("second", told, 5), Part()], {"note": 1}) as both:
        assert (both.plan, both.warm_up_calls) == ({"note": 1, "method": "first"}, 5)
        both.begin(3, 2)
        both.reset()
        assert both.run({"steps": 3}, Unwatched()) == ("first", {"steps": 3})
    both.close()
    assert told == [
        *("first begins 3 of 2", "second begins 3 of 2", "first forgets", "second forgets"),
        *("second closed", "first closed"),
    ]


def test_steps_are_known_once_a_generation_has_begun() -> None:
    part = Part()
    with pytest.raises(RuntimeError, match="must be called before a generation"):
        part.check_begun()
    part.begin(7)
    assert part.check_begun() == 7


def test_the_plain_pipeline_runs_under_its_watch() -> None:
    class Watch(Unwatched):
        def __enter__(self) -> None:
            told.append("watched")

        def __exit__(self, *error: object) -> None:
            told.append("done")

    told: list[str] = []
    Plain(calling(lambda arguments: told.append(f"called {arguments}"))).run({"seed": 1}, Watch())
    assert told == ["watched", "called {'seed': 1}", "done"]


def test_a_control_net_given_twice_is_refused() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert control_nets(SimpleNamespace(controlnet=one)) == [one]
    assert control_nets(SimpleNamespace(controlnet=SimpleNamespace(nets=[one, other]))) == [one, other]
    with pytest.raises(ValueError, match="given twice"):
        control_nets(SimpleNamespace(controlnet=SimpleNamespace(nets=[one, one])))


def test_the_least_recently_used_is_dropped() -> None:
    dropped: list[str] = []
    kept: Latest[str] = Latest(2, dropped.append)
    kept.put("a", "A")
    kept.put("b", "B")
    assert kept.get("a") == "A" and kept.last == "A" and kept.get("c") is None
    kept.put("c", "C")
    assert (dropped, list(kept)) == (["B"], ["A", "C"])
    kept.make_room()
    assert (dropped, len(kept)) == (["B", "A"], 1)
    kept.clear()
    assert (dropped, kept.last) == (["B", "A", "C"], None)


def test_a_model_that_cannot_be_divided_is_left_as_it_was() -> None:
    pipe = tiny.load("sd1")
    pipe.unet.conv_out.padding_mode = "circular"
    with pytest.raises(ValueError, match="only padding mode 'zeros'; got 'circular'"):
        DistriFusion(pipe)
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())
