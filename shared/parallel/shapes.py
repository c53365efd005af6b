"""What is kept for each of the latest shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Latest(Generic[Value]):
    """Values by key, the least recently used ones dropped.

    Args:
        size: how many are kept, at least 1.
        drop: called with each value that goes.
    """

    def __init__(self, size: int, drop: Callable[[Value], None] = lambda value: None) -> None:
        self.size, self._drop = size, drop
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Value]:
        """From the least to the most recently used."""
        return iter(self._values.values())

    @property
    def last(self) -> Value | None:
        """The most recently used one."""
        return next(reversed(self._values.values()), None)

    def get(self, key: Hashable) -> Value | None:
        """What is kept under a key, which counts as a use."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def make_room(self) -> None:
        """Drop what must go before another one is made."""
        while len(self._values) >= self.size:
            self._drop(self._values.popitem(last=False)[1])

    def put(self, key: Hashable, value: Value) -> Value:
        """Keep `value` under a key that nothing is kept under, and give it back."""
        self.make_room()
        self._values[key] = value
        return value

    def clear(self) -> None:
        """Drop all."""
        while self._values:
            self._drop(self._values.popitem(last=False)[1])
