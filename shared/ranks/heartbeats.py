"""A machine's heartbeat, sent by a process of its own, so that no long call of a rank delays it.

A call that holds Python's lock (a compiler, a slow extension) looks like a dead rank from another machine.
This process asks Linux instead: it sends heartbeats while the rank exists and is not stopped (SIGSTOP).
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
    """Send heartbeats for this process until it ends. Call it in the main thread.

    Args:
        keys: the prefix in torchrun's store of this generation's heartbeats.
        machine: whose counter is incremented.
        every: seconds between two heartbeats.
    """
    command = [sys.executable, "-m", "shared.ranks.heartbeats", str(os.getpid()), keys, machine, str(every)]
    environment = {**os.environ, "RANK": "1"}  # one that finds the store, as rank 0 would make it
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=nothing, stdout=nothing, stderr=nothing)


def send(rank: int, keys: str, machine: str, every: float) -> None:
    """Increment the counter while the parent process `rank` exists and is not stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even while this process waits
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
    send(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
