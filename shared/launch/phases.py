"""What a start is made of: the seconds of each of its phases, for the log and /health. Imports no torch"""

from __future__ import annotations

import contextlib
import os
import time

import psutil


class Phases:
    """The phases of this process, each from its beginning to that of the next one.

    The first are before this program ran a line: torchrun's, up to the process, and Python's.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Of each phase that has ended, in the order in which they began."""
        self.name, self._began = "flags", time.time()
        own = psutil.Process().create_time()
        # A torchrun that starts a host again has run since long ago.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if "TORCHELASTIC_RUN_ID" in os.environ and not again:
            with contextlib.suppress(psutil.Error):
                self.seconds["torchrun"] = own - psutil.Process(os.getppid()).create_time()
        self.seconds["python"] = self._began - own

    def begin(self, name: str) -> None:
        """The phase before this one is over. One that begins again is continued."""
        now = time.time()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._began
        self.name, self._began = name, now

    def told(self) -> dict[str, float]:
        """Seconds by phase, up to now."""
        self.begin(self.name)
        return {name: round(seconds, 1) for name, seconds in self.seconds.items()}

    def line(self) -> str:
        """For the log."""
        told = self.told()
        parts = ", ".join(f"{name} {seconds}" for name, seconds in told.items() if seconds >= 0.1)
        return f"start: {sum(told.values()):.1f} s ({parts})"


PHASES = Phases()
