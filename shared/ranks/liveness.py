"""Detects that the launcher or another rank of this machine died or is stopped. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

# Of --collective_timeout: how long a process may be stopped. The rest is for detecting it and ending.
STALL_SHARE = 0.65

# From a rank that got a signal to stop to the others, so that all of them stop.
STOP_TOGETHER = signal.SIGUSR1
HANDLER_SECONDS = 5.0  # in which another rank must have installed its handler


class StallTimer:
    """Says when a value has not changed for `limit` seconds.

    Only time in which this process checked counts: if it was stopped itself, or a long call held the GIL, no
    other process is blamed.

    Args:
        limit: seconds.
        every: seconds between two checks.
    """

    def __init__(self, limit: float, every: float) -> None:
        self.limit, self.every = limit, every
        self._sign: Any = None
        self._looked, self._waited = time.monotonic(), 0.0

    def over(self, sign: Any) -> bool:
        """Check: `sign` is any value that changes between checks as long as there is no fault."""
        now = time.monotonic()
        if sign == self._sign:
            self._waited += min(now - self._looked, 2 * self.every)
        else:
            self._sign, self._waited = sign, 0.0
        self._looked = now
        return self._waited >= self.limit


class LocalProcesses:
    """The launcher and the ranks that it started on this machine.

    Linux reports for each whether it is stopped (SIGSTOP, a debugger), even if it is busy: a rank in a
    long kernel, a compiler or a call that holds the GIL does not count as dead.

    Args:
        limit: seconds for which one of them may be stopped.
        every: seconds between two checks.
    """

    def __init__(self, limit: float, every: float) -> None:
        self.launcher = os.getppid()
        self._stall = StallTimer(limit, every)

    def fault(self) -> str | None:
        """Why this rank must end; None if there is no fault. A rank stopped for too long is killed."""
        if os.getppid() != self.launcher:
            return "the launcher is gone"
        stopped, pid = self._stopped()
        # Without a stopped process every check gets a new value.
        if not self._stall.over(stopped or object()):
            return None
        if pid != self.launcher:
            # A stopped process does not hear SIGTERM, so the launcher would wait 30 s before it restarts the
            # ranks; the rank would hold the port, the memory and --state_dir so long.
            with contextlib.suppress(OSError):  # another rank was faster
                os.kill(pid, signal.SIGKILL)
        return f"{stopped} has been stopped for {self._stall.limit:g} s"

    def _stopped(self) -> tuple[str, int]:
        """Who is stopped, and its process; "" where nobody is."""
        if is_stopped(self.launcher):
            return "the launcher", self.launcher
        for child in _children(self.launcher):
            if is_stopped(child) and (rank := _rank_of(child)):
                return f"rank {rank}", child
        return "", 0


def dead_ranks() -> list[int]:
    """The other ranks of this machine's launcher that no longer run; [] without a launcher."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    mine, count = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    first = mine - int(os.environ["LOCAL_RANK"])
    alive = {
        mine,
        *(int(_rank_of(child) or -1) for child in _children(os.getppid()) if not _is_in(child, "ZX")),
    }
    return sorted(set(range(first, first + count)) - alive)


def stop_others() -> None:
    """Stop the other ranks of this machine's launcher, including those that have just started."""
    others = [child for child in _children(os.getppid()) if child != os.getpid() and _rank_of(child)]
    deadline = time.monotonic() + HANDLER_SECONDS
    for pid in others:
        while not (handles := _handles_stop(pid)) and not _is_in(pid, "ZX") and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # it has just ended
            if handles:
                os.kill(pid, STOP_TOGETHER)


def _handles_stop(pid: int) -> bool:
    """Whether a process handles STOP_TOGETHER, which would kill it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (STOP_TOGETHER - 1) & 1)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger."""
    return _is_in(pid, "Tt")


def died(ranks: list[int]) -> str:
    """For people: which ranks died."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} died"


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has just ended
            found += map(int, task.read_text().split())
    return found


def _is_in(pid: int, states: str) -> bool:
    """Whether a process is in one of Linux' states, such as T for stopped or Z for dead; dead when gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in states
    except OSError:
        return "X" in states


def _rank_of(pid: int) -> str | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return None
    return next((item[5:].decode() for item in environment if item.startswith(b"RANK=")), None)
