"""The beat of a machine among several, from a process beside its rank: no long call of the rank holds it up.

A call that holds Python's lock (a compiler, a slow extension) stands still as a dead rank does, seen from
another machine. The process asks Linux instead: it beats while the rank is there and not stopped (SIGSTOP).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from shared.ranks.liveness import is_stopped

PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]


def start(keys: str, machine: str, every: float) -> subprocess.Popen[bytes]:
    """Beat for this process until it ends. Call it in the main thread.

    Args:
        keys: the prefix in torchrun's store of the beats of this generation.
        machine: whose count goes up.
        every: seconds between two beats.
    """
    command = [sys.executable, "-m", "shared.ranks.beats", str(os.getpid()), keys, machine, str(every)]
    environment = {**os.environ, "RANK": "1"}  # one that finds the store, as rank 0 would make it
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=nothing, stdout=nothing, stderr=nothing)


def beat(rank: int, keys: str, machine: str, every: float) -> None:
    """Count up while the process `rank`, which is the parent, lives and is not stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # whatever this one waits for then
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store = dist.PrefixStore(keys, next(rendezvous("env://", timeout=timedelta(seconds=60)))[0])
    with contextlib.suppress(RuntimeError):  # the store is gone, which the rank sees by itself
        while os.getppid() == rank:
            if not is_stopped(rank):
                store.add(machine, 1)
            time.sleep(every)


if __name__ == "__main__":
    beat(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
