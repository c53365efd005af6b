"""Several parallel objects that hold one pipeline together, handled as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Together:
    """Passes `begin` and `reset` on to its members in order, and `close` in reverse order.

    Args:
        members: the first one's plan is the plan; the others may lack `begin` and `reset`.
        note: what the plan says beside it.
    """

    def __init__(self, members: Sequence[Any], note: dict[str, Any] | None = None) -> None:
        self.members, self.note = list(members), note or {}

    @property
    def plan(self) -> dict[str, Any]:
        return self.note | self.members[0].plan

    @property
    def warm_up_calls(self) -> int:
        """Denoiser calls after which every kind of step has run and been captured."""
        return max(getattr(member, "warm_up_calls", 1) for member in self.members)

    def begin(self, steps: int) -> None:
        """A new generation of `steps` steps starts."""
        for member in self.members:
            if hasattr(member, "begin"):
                member.begin(steps)

    def reset(self) -> None:
        """Forget what was traced and captured."""
        for member in self.members:
            if hasattr(member, "reset"):
                member.reset()

    def close(self) -> None:
        """Undo all surgery, the last put on first."""
        for member in reversed(self.members):
            member.close()
