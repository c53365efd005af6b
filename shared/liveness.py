"""Which of the processes around a rank has stopped. Imports no torch: it watches from the first second."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

# Of --collective_timeout: how long somebody may stand still. The rest is for noticing it and ending.
PATIENCE = 0.65


class Patience:
    """Says when a sign has not changed for `limit` seconds.

    Only time in which somebody looked counts: whoever was stopped himself, or kept from looking by a long
    call that holds the GIL, blames nobody for it.

    Args:
        limit: seconds.
        every: seconds between two looks.
    """

    def __init__(self, limit: float, every: float) -> None:
        self.limit, self.every = limit, every
        self._sign: Any = None
        self._looked, self._waited = time.monotonic(), 0.0

    def over(self, sign: Any) -> bool:
        """Look: `sign` is anything that differs from look to look while all is well."""
        now = time.monotonic()
        if sign == self._sign:
            self._waited += min(now - self._looked, 2 * self.every)
        else:
            self._sign, self._waited = sign, 0.0
        self._looked = now
        return self._waited >= self.limit


class Family:
    """The launcher and the ranks that it started on this machine.

    Linux says of each whether it is stopped (SIGSTOP, a debugger), however busy it is otherwise: a rank in a
    long kernel, a compiler or a call that holds the GIL is not taken for dead.

    Args:
        limit: seconds that one of them may be stopped.
        every: seconds between two looks.
    """

    def __init__(self, limit: float, every: float) -> None:
        self.launcher = os.getppid()
        self._patience = Patience(limit, every)

    def fault(self) -> str | None:
        """Why this rank must end; None while all is well."""
        if os.getppid() != self.launcher:
            return "the launcher is gone"
        stopped = self._stopped()
        # Without a stopped process every look is a new sign.
        if self._patience.over(stopped or object()):
            return f"{stopped} has been stopped for {self._patience.limit:g} s"
        return None

    def _stopped(self) -> str | None:
        if _is_stopped(self.launcher):
            return "the launcher"
        for task in Path(f"/proc/{self.launcher}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has just ended
                for child in task.read_text().split():
                    if _is_stopped(int(child)) and (rank := _rank_of(child)):
                        return f"rank {rank}"
        return None


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _rank_of(pid: str) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((item[5:].decode() for item in environment if item.startswith(b"RANK=")), None)
