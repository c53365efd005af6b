"""Where the seconds of a start go: rank 0's main thread, sampled while a host starts, as a tree a phase.

torchrun --nproc_per_node=2 benchmarks/start.py --backend xdit -- --type=flux --checkpoint=/tmp/flux [FLAGS]
    [--least 0.2]  seconds of the shortest lines    [--skip warm-up,link]  phases that are left out

Start it twice: the second start finds what the first has kept. A line is a function or the import of a
module, with the seconds until it returned; one that spent nearly all of them in one other is left out. The
sampler takes its turn from the main thread 200 times a second, which costs 1 to 3 %. The ranks end once they
are ready.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.launch.phases import PHASES

EVERY = 0.005  # seconds between two samples
NEARLY_ALL = 0.97
HIDDEN = ("<frozen importlib", "<frozen runpy", __file__)


class Tree:
    """Seconds of a call, and of the calls that it made, by name."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: dict[str, Tree] = {}

    def add(self, stack: list[str], seconds: float) -> None:
        """A sample: the names of the calls, the outermost first."""
        self.seconds += seconds
        if stack:
            self.calls.setdefault(stack[0], Tree()).add(stack[1:], seconds)

    def lines(self, least: float, depth: int = 0) -> list[str]:
        """Calls of at least so many seconds, the longest first, each indented below the one that made it."""
        found = []
        for name, call in sorted(self.calls.items(), key=lambda item: -item[1].seconds):
            if call.seconds < least:
                continue
            through = any(inner.seconds >= NEARLY_ALL * call.seconds for inner in call.calls.values())
            if not through:
                found.append(f"{'  ' * depth}{call.seconds:6.2f} {name}")
            found += call.lines(least, depth + (not through))
        return found


def names(frame: FrameType | None) -> list[str]:
    """The calls of a stack, the outermost first; of imports only the modules."""
    found = []
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(HIDDEN):
            module = frame.f_globals.get("__name__", code.co_filename)
            found.append(f"import {module}" if code.co_name == "<module>" else f"{module}.{code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


class Sampler(threading.Thread):
    """Samples the main thread until it is stopped."""

    def __init__(self) -> None:
        super().__init__(name="sampler", daemon=True)
        self.phases: dict[str, Tree] = {}
        self._main = threading.main_thread().ident
        self._done = threading.Event()

    def run(self) -> None:
        last = time.perf_counter()
        while not self._done.wait(EVERY):
            stack = names(sys._current_frames().get(self._main or 0))
            now = time.perf_counter()
            self.phases.setdefault(PHASES.name, Tree()).add(stack, now - last)
            last = now

    def stop(self) -> None:
        self._done.set()
        self.join()


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--backend", default="xdit")
    parser.add_argument("--least", type=float, default=0.2)
    parser.add_argument("--skip", default="")
    parser.add_argument("flags", nargs="*", help="of the host, after --")
    options = parser.parse_args()
    sampler = Sampler()
    if os.environ.get("RANK", "0") == "0":
        sampler.start()
    from shared.api.status import HostStatus
    from shared.backends import BACKENDS
    from shared.host import serve

    usual = HostStatus.ready

    def ready(self: HostStatus) -> None:
        usual(self)
        if not sampler.phases:  # another rank
            return
        sampler.stop()
        print(PHASES.line())
        for name, tree in sampler.phases.items():
            if name not in options.skip.split(","):
                print("\n".join([f"-- {name}: {tree.seconds:.1f} s", *tree.lines(options.least)]), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    HostStatus.ready = ready  # type: ignore[method-assign]
    sys.argv[1:] = options.flags
    serve(BACKENDS[options.backend])


if __name__ == "__main__":
    main()
