"""shared.parallel.surgery: what is overridden is given back, repr and output alike."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from shared.parallel.surgery import Forward, Surgery


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2)).eval()


def doubled(original: Forward, args: tuple, kwargs: dict) -> Any:
    return 2 * original(*args, **kwargs)


def test_repr_and_output_come_back_twice() -> None:
    module, x = net(), torch.randn(3, 4)
    text, keys, output = repr(module), list(module.state_dict()), module(x)
    for _ in range(2):
        surgery = Surgery()
        surgery.override(module[2], doubled)
        assert torch.equal(module(x), 2 * output)
        assert repr(module) == text and list(module.state_dict()) == keys
        surgery.close()
        surgery.close()
        assert torch.equal(module(x), output)
        assert repr(module) == text and "forward" not in module[2].__dict__


def test_an_own_forward_of_the_instance_comes_back() -> None:
    module, x = net()[0], torch.randn(3, 4)
    class_forward = module.forward
    module.forward = functools.update_wrapper(
        functools.partial(lambda m, y: class_forward(y) + 1, module), class_forward
    )
    hooked, output = module.forward, module(x)
    with Surgery() as surgery:
        original = surgery.override(module, doubled)
        assert original is hooked
        assert torch.equal(module(x), 2 * output)
    assert module.forward is hooked
    assert torch.equal(module(x), output)


def test_two_overrides_of_one_module_are_undone_last_first() -> None:
    module, x = net()[0], torch.randn(3, 4)
    output = module(x)
    with Surgery() as surgery:
        surgery.override(module, doubled)
        surgery.override(module, lambda original, args, kwargs: original(*args) + 1)
        assert torch.equal(module(x), 2 * output + 1)
        assert len(surgery) == 2
    assert torch.equal(module(x), output)


def test_a_later_override_by_someone_else_is_reported_and_the_rest_given_back() -> None:
    module, x = net(), torch.randn(3, 4)
    output = module(x)
    surgery = Surgery()
    surgery.override(module[0], doubled)
    surgery.override(module[2], doubled)
    module[0].forward = functools.partial(module[0].forward)
    with pytest.raises(RuntimeError, match=r"Linear\.forward"):
        surgery.close()
    assert "forward" not in module[2].__dict__
    del module[0].forward
    assert torch.equal(module(x), output)


class Base:
    kind = "base"

    @staticmethod
    def name() -> str:
        return "name"


class Derived(Base):
    pass


def test_attributes_of_instances_classes_and_modules_come_back() -> None:
    thing, library = Derived(), types.ModuleType("library")
    library.answer = 1  # type: ignore[attr-defined]
    own_name = vars(Base)["name"]
    with Surgery() as surgery:
        assert surgery.replace(thing, "kind", "own") == "base"
        assert surgery.replace(Derived, "kind", "derived") == "base"
        surgery.replace(Base, "name", staticmethod(lambda: "other"))
        assert surgery.replace(library, "answer", 2) == 1
        assert (thing.kind, Derived().kind, Base.name(), library.answer) == ("own", "derived", "other", 2)
    assert "kind" not in vars(thing) and "kind" not in vars(Derived)
    assert vars(Base)["name"] is own_name and library.answer == 1


def test_a_submodule_comes_back_as_a_submodule() -> None:
    module, x = net(), torch.randn(3, 4)
    before, output, keys = module[0], module(x), list(module.state_dict())
    with Surgery() as surgery:
        surgery.replace(module, "0", nn.Identity())
        assert not torch.equal(module(x), output)
    assert module[0] is before and list(module.state_dict()) == keys
    assert torch.equal(module(x), output)


def test_nothing_is_replaced_where_there_is_nothing() -> None:
    with Surgery() as surgery, pytest.raises(AttributeError):
        surgery.replace(Derived(), "absent", 1)
    assert len(surgery) == 0
