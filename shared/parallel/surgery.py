"""Override attributes of instances, classes and modules, and undo it.

Nothing is renamed or wrapped: the module tree, the state-dict keys and the ``repr`` stay what they are, so
LoRA, IP-Adapter, quantized layers and hooks keep working underneath.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

Forward = Callable[..., Any]

_ABSENT = object()


class Closing(AbstractContextManager[Any]):
    """A `with` block around it ends in `close()`."""

    def close(self) -> None:
        """Undo what was done. May be called any number of times."""
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        self.close()


class Surgery(Closing):
    """A list of overrides that ``close`` takes back, last first.

    An owner that already has an attribute of its own under the name (accelerate's hooks and torch.compile
    leave a ``forward`` on instances) gets exactly that one back; one that inherits it inherits it again.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any, Any]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def override(self, module: nn.Module, forward: Callable[[Forward, tuple, dict], Any]) -> Forward:
        """Answer calls of ``module`` with ``forward(original, args, kwargs)``.

        Args:
            module: the module whose instance attribute ``forward`` is set.
            forward: gets the forward that was there before, bound to the module, and the call's arguments.

        Returns:
            the forward that was there before.
        """
        original: Forward = module.forward

        @functools.wraps(original)
        def override(*args: Any, **kwargs: Any) -> Any:
            return forward(original, args, kwargs)

        self.replace(module, "forward", override)
        return original

    def replace(self, owner: Any, name: str, value: Any) -> Any:
        """Give ``owner`` (an instance, a class or a module) ``value`` under ``name``.

        Returns:
            what it had there before.

        Raises:
            AttributeError: there was nothing under this name.
        """
        before = getattr(owner, name)
        self.add(owner, name, value)
        return before

    def add(self, owner: Any, name: str, value: Any) -> None:
        """As ``replace``, also where there is nothing under this name."""
        self._undo.append((owner, name, value, _own(owner, name)))
        setattr(owner, name, value)

    def close(self) -> None:
        """Give every owner its former attribute back. May be called any number of times.

        Raises:
            RuntimeError: an attribute was overridden again by someone else and is still so; all others have
                been given back.
        """
        foreign = []
        while self._undo:
            owner, name, value, previous = self._undo.pop()
            if _own(owner, name) is not value:
                foreign.append(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}")
            elif previous is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, previous)
        if foreign:
            raise RuntimeError(
                f"cannot restore {', '.join(foreign)}: it was overridden again later; undo the later "
                "override first"
            )


def _own(owner: Any, name: str) -> Any:
    """What the owner itself holds under a name, as it lies there; _ABSENT where it inherits it."""
    own = vars(owner)
    return own.get(name, own.get("_modules", {}).get(name, _ABSENT))
