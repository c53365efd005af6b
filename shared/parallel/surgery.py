"""Override ``forward`` on module instances, and undo it.

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


class Closing(AbstractContextManager[Any]):
    """A `with` block around it ends in `close()`."""

    def close(self) -> None:
        """Undo what was done. May be called any number of times."""
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        self.close()


class Surgery(Closing):
    """A list of overridden forwards that ``close`` takes back, last first.

    A module whose instance already has a ``forward`` of its own (accelerate's hooks and torch.compile leave
    one) gets exactly that one back.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, Forward, Forward | None]] = []

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

        self._undo.append((module, override, module.__dict__.get("forward")))
        module.__dict__["forward"] = override
        return original

    def close(self) -> None:
        """Give every module its former forward back. May be called any number of times.

        Raises:
            RuntimeError: a forward was overridden again by someone else and is still so; all others have
                been given back.
        """
        foreign = []
        while self._undo:
            module, override, previous = self._undo.pop()
            if module.__dict__.get("forward") is not override:
                foreign.append(type(module).__name__)
            elif previous is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = previous
        if foreign:
            raise RuntimeError(
                f"cannot give back the forward of {', '.join(foreign)}: it was overridden again after this "
                "surgery; undo the later override first"
            )
