"""Ends a rank's process: on a signal, or when the launcher or another rank is gone. Imports no torch."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from shared.launch.logs import finish
from shared.launch.parser import RANK_0_SECONDS
from shared.ranks.liveness import STALL_SHARE, STOP_TOGETHER, LocalProcesses, dead_ranks, died, stop_others

log = logging.getLogger("host")

EXIT_FAILED = 1
LINGER_SECONDS = 0.2  # that a signalled worker stays, so that its peers get the signal before they miss it
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Lifeline:
    """Ends the process on a signal, or when the launcher or another rank is gone or stopped.

    It works in any state of the main thread, which may load or wait in a collective for any time.

    The C handler only records signals (`signal.set_wakeup_fd`) and a thread reads them, because a Python
    handler would wait for the main thread to return from a collective. After the first SIGTERM or SIGHUP the
    running request of a host may end within `grace` seconds; any other signal ends at once. A rank that
    gets a signal stops the others too, so that all of them end with 0 and the launcher restarts none.

    Args:
        launched: whether a launcher started this process; if that dies, this process ends too.
        timeout: seconds in which a stopped rank or launcher must be noticed.
        rank: this process's.
        grace: seconds between the first signal and the end.
    """

    def __init__(self, launched: bool, timeout: float, rank: int, grace: float) -> None:
        self.serving = False  # written by the main thread, once all ranks are loaded
        self.stopping = ""  # the reason, between the first signal and the end
        self.immediate = True  # whether the end does not wait for answers to be sent
        self._rank, self._grace = rank, grace
        self._deadline = math.inf  # time.monotonic()
        self._launched = launched
        self._when_stopped: list[Callable[[], None]] = [stop_others] if launched else []
        self._told = False  # this rank itself got a signal
        self._failing = False
        self._signalled = threading.Event()
        self._on_stop: list[Callable[[str], None]] = []
        self._callbacks: list[Callable[[str, bool], None]] = []
        self._lock = threading.Lock()
        self._every = min(0.5, timeout / 10)
        self._watched: list[Callable[[], str | None]] = []
        if launched:
            self.watch(LocalProcesses(timeout * STALL_SHARE, self._every).fault)
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in ENDING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        signal.signal(STOP_TOGETHER, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def watch(self, fault: Callable[[], str | None]) -> None:
        """Poll `fault`; if it returns a reason, the process ends with it."""
        self._watched.append(fault)

    def when_stopped(self, tell: Callable[[], None]) -> None:
        """Call `tell` when this rank itself gets the signal to stop, so that other ranks stop as well."""
        self._when_stopped.append(tell)

    def before_stop(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` at the first signal of a host that serves."""
        self._on_stop.append(callback)

    def before_end(self, callback: Callable[[str, bool], None]) -> None:
        """Call `callback(reason, failed)` before the process ends."""
        self._callbacks.append(callback)

    def end(self, code: int, reason: str, failed: bool = True) -> NoReturn:
        """Run the callbacks, which answer the clients, and end the process at once."""
        with self._lock:
            self.immediate = failed or not self.stopping or time.monotonic() > self._deadline
            for callback in self._callbacks:
                callback(reason, failed)
            log.disabled = True  # errors of the main thread from here on are consequences of the end
            if not self._callbacks:
                time.sleep(LINGER_SECONDS)
            finish()
            os._exit(code)

    def fail(self, code: int, reason: str, report: Callable[[], None]) -> NoReturn:
        """End as failed. While loading, only the lowest failed rank reports, as most fail alike.

        The launcher ends all ranks of a machine with the first one, so the others wait for rank 0. A rank
        that gets the launcher's signal before its turn reports nothing if a lower rank has reported.
        A failure after a stop has begun counts as the stop.
        """
        # Another rank's message to stop comes before its end.
        time.sleep(LINGER_SECONDS if self._launched else 0.0)
        if self.stopping:
            self.end(0, self.stopping, failed=False)
        if self._rank and not self.serving:
            self._failing = True
            self._signalled.wait(RANK_0_SECONDS + self._rank - 1)
        if self.serving or min(dead_ranks(), default=self._rank) >= self._rank:
            report()
        self.end(code, reason)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], self._every)
            if ready:
                self._signal(os.read(self._read, 1)[0])
            for fault in list(self._watched):
                if reason := fault():
                    log.error("%s, ending", reason)
                    self.end(EXIT_FAILED, f"broken: {reason}")
            if time.monotonic() > self._deadline:
                log.warning("the running request did not end within %g s, ending", self._grace)
                self.end(0, f"{self.stopping} and --stop_grace is over", failed=False)

    def _signal(self, number: int) -> None:
        if number not in (*ENDING_SIGNALS, STOP_TOGETHER):
            return
        if self._failing:
            self._signalled.set()
            return
        own = number != STOP_TOGETHER
        reason = f"{signal.Signals(number).name} was received" if own else "another rank was told to stop"
        # The launcher also sends its signal when a rank has died: the running request has failed then.
        if own and number != signal.SIGINT and not self.stopping and (dead := dead_ranks()):
            log.log(logging.INFO if self._rank else logging.ERROR, "%s, ending", died(dead))
            self.end(EXIT_FAILED, f"broken: {died(dead)}")
        again, self._told = self._told and own, self._told or own
        if own and number != signal.SIGINT and not again:
            for tell in list(self._when_stopped):
                tell()
        if number == signal.SIGINT or not self.serving or again:
            log.info("%s, ending", reason)
            self._deadline = 0.0
            self.end(128 + number if number == signal.SIGINT else 0, reason, failed=False)
        if self.stopping:
            return
        self.stopping = reason
        self._deadline = time.monotonic() + self._grace
        log.info(
            "%s: the running request may end within %g s; a second signal ends the host at once",
            reason,
            self._grace,
        )
        for callback in self._on_stop:
            callback(self.stopping)
