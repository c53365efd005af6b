"""Rendezvous and liveness: generations of ranks in one store, and machines that fall silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from shared.ranks import heartbeats, liveness
from shared.ranks.liveness import StallTimer, _is_in
from shared.ranks.rendezvous import Rendezvous

pytestmark = pytest.mark.alone


class Clock:
    """time.monotonic by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class OneStore(Rendezvous):
    """A rank whose store is given, not torchrun's."""

    def __init__(self, store: Any, rank: int, size: int = 2, timeout: float = 60.0) -> None:
        self.store = store
        super().__init__(rank, size, timeout)

    def _connect(self) -> Any:
        return self.store


@pytest.fixture(autouse=True)
def no_beater(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneStore's store is of this process alone."""
    monkeypatch.setattr(heartbeats, "start", lambda *_: None)


def met(stores: list[Any]) -> bool:
    """Whether all of these hold one another's entries."""
    stores[0].set("key", "mine")
    return all(store.check(["key"]) and store.get("key") == b"mine" for store in stores)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GROUP_RANK", "0")
    return dist.HashStore()


@pytest.mark.parametrize("late", [0, 1])
def test_a_generation_shares_a_store_that_no_other_had(store: Any, late: int) -> None:
    old: list[Any] = []
    with ThreadPoolExecutor() as threads:
        for _ in range(3):
            first = threads.submit(OneStore(store, 1 - late).join)
            time.sleep(0.15)  # it finds what the last generation left
            assert not first.done()
            stores = [OneStore(store, late).join(), first.result(5)]
            assert not stores[0].check(["key"])
            assert met(stores)
            old += stores
    assert [one.get("key") for one in old] == [b"mine"] * 6


def test_a_rank_that_never_comes(store: Any) -> None:
    rank = OneStore(store, 0)
    rank.timeout = 0.2
    with pytest.raises(TimeoutError, match="not all 2 ranks joined"):
        rank.join()


def test_a_machine_that_falls_silent(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    for rank in (0, 1):
        monkeypatch.setenv("GROUP_RANK", str(rank))
        ranks.append(OneStore(store, rank, timeout=2.0))
    silent = threading.Event()
    beat: Any = Rendezvous._send_heartbeats

    class Still:
        def __init__(self, store: Any) -> None:
            self.store = store

        def add(self, key: str, count: int) -> int:
            silent.wait(60)
            raise RuntimeError("the test is over")

    monkeypatch.setattr(
        ranks[1], "_send_heartbeats", lambda store, others: beat(ranks[1], Still(store), others)
    )
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda rank: rank.join(), ranks))
    began, faults = time.monotonic(), [None, None]
    while not all(faults) and time.monotonic() - began < 5:
        faults = [rank.fault() for rank in ranks]  # type: ignore[misc]
        time.sleep(0.1)
    assert time.monotonic() - began < 2.5
    assert faults == [
        "machine 1 has been silent for 1.3 s",
        "torchrun's store has not answered for 1.3 s",
    ]
    silent.set()


HOLDER = """
import ctypes, os
from shared.ranks import heartbeats
heartbeats.start("beats", "0", 0.1)
ctypes.PyDLL(None).sleep(300)  # holds Python's lock
"""


def test_a_rank_that_holds_the_lock_beats_and_one_that_is_stopped_does_not() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "0", "WORLD_SIZE": "2"}
    count = dist.PrefixStore("beats", server)

    def grows(seconds: float) -> bool:
        before, end = count.add("0", 0), time.monotonic() + seconds
        while time.monotonic() < end:
            if count.add("0", 0) > before + 1:
                return True
            time.sleep(0.05)
        return False

    with subprocess.Popen([sys.executable, "-c", HOLDER], env={**os.environ, **where}) as rank:
        try:
            assert grows(60)
            [beater] = liveness._children(rank.pid)
            os.kill(rank.pid, signal.SIGSTOP)
            time.sleep(0.5)
            assert not grows(1.5)
            os.kill(rank.pid, signal.SIGCONT)
            assert grows(10)
        finally:
            rank.kill()
    end = time.monotonic() + 5
    while not _is_in(beater, "ZX") and time.monotonic() < end:
        time.sleep(0.05)
    assert _is_in(beater, "ZX")


def test_a_machine_that_is_told_to_stop_tells_the_others(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    for rank in (0, 1):
        monkeypatch.setenv("GROUP_RANK", str(rank))
        ranks.append(OneStore(store, rank, timeout=1.0))
    told: list[int] = []
    heard, over = threading.Event(), threading.Event()
    beat: Any = Rendezvous._send_heartbeats

    class Ending:
        """A store that is gone with the test, for the threads outlast it."""

        def __init__(self, store: Any) -> None:
            self.store = store

        def add(self, key: str, count: int) -> int:
            if over.is_set():
                raise RuntimeError("the test is over")
            return int(self.store.add(key, count))

    def kill(pid: int, number: int) -> None:
        told.append(number)
        if threading.current_thread() is ranks[0]._heartbeats:  # the other one hears itself too, and sooner
            heard.set()

    monkeypatch.setattr(os, "kill", kill)
    for one in ranks:
        monkeypatch.setattr(
            one, "_send_heartbeats", lambda store, others, one=one: beat(one, Ending(store), others)
        )
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda rank: rank.join(), ranks))
    try:
        time.sleep(0.3)
        assert not told
        ranks[1].stop_others()
        assert heard.wait(5) and set(told) == {signal.SIGUSR1}
    finally:
        over.set()
        for one in ranks:
            assert one._heartbeats is not None
            one._heartbeats.join(5)


def test_a_stall_counts_only_while_somebody_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    stall = StallTimer(limit=3.0, every=1.0)
    assert not stall.over("a")
    for clock.now in (1.0, 2.0):
        assert not stall.over("a")
    clock.now = 100.0  # this process itself did not run
    assert not stall.over("b") and not stall.over("b")
    clock.now = 200.0
    assert not stall.over("b")
    clock.now = 201.0
    assert stall.over("b")


def test_a_process_that_is_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert not _is_in(process.pid, "Tt")
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)
        assert _is_in(process.pid, "Tt")
        process.kill()
    assert not _is_in(process.pid, "Tt")
