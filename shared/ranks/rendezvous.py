"""How the ranks of one generation find each other, and how machines detect that another one is silent.

torchrun's store outlives the ranks: after a restart it still holds the keys of the last generation. Nor do
all machines count the same restarts, as a machine that returns is no restart for the others. So rank 0 draws
a name, the others answer under it, and all keys of this generation have this name as their prefix.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from shared.ranks import heartbeats
from shared.ranks.liveness import STALL_SHARE, STOP_TOGETHER, StallTimer

log = logging.getLogger("host")
T = TypeVar("T")

POLL_SECONDS = 0.05
KEYS = "multigpu_diffusion"
JOIN_SECONDS = 60.0  # at least: ranks import torch at different speeds


class Rendezvous:
    """Joins the ranks that torchrun's environment describes; on several machines, sends heartbeats then.

    Args:
        rank, size: this rank's place.
        timeout: seconds in which a silent machine must be noticed (--collective_timeout).
    """

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self.timeout = max(timeout, JOIN_SECONDS)
        self.every = min(1.0, timeout / 10)
        self._limit = timeout * STALL_SHARE
        # Ranks of one launcher watch each other (liveness.LocalProcesses).
        self._machine = os.environ.get("GROUP_RANK", f"rank {rank}")
        self._me = f"{secrets.token_hex(8)} {self._machine}"
        self._rounds = 0  # calls of the store by this rank
        self._stall = StallTimer(self._limit, self.every)
        self._fault: str | None = None
        self._talking = False
        self._heartbeats: threading.Thread | None = None
        self._stop, self._said = threading.Event(), threading.Event()

    def join(self) -> dist.Store:
        """The store of this generation.

        Raises:
            TimeoutError: not all ranks joined.
        """
        store = self._connect()
        self._talking = True
        leader, members = self._lead(store) if self.rank == 0 else self._follow(store)
        machines = {member.partition(" ")[2] for member in members}
        others = sorted(machines - {self._machine})
        if others:
            counters = dist.PrefixStore(f"{leader}/beats", self._connect())
            self._heartbeats = threading.Thread(
                target=self._send_heartbeats, args=(counters, others), name="heartbeats", daemon=True
            )
            self._heartbeats.start()
            if os.environ.get("LOCAL_RANK", "0") == "0":
                heartbeats.start(f"{KEYS}/{leader}/beats", self._machine, self.every)
        else:
            self._talking = False
        return dist.PrefixStore(leader, store)

    def fault(self) -> str | None:
        """Why this rank must end: another machine or the store is silent; None if there is no fault."""
        if self._talking and self._stall.over(self._rounds):
            return f"torchrun's store has not answered for {self._limit:g} s"
        return self._fault

    def stop_others(self) -> None:
        """Ask the ranks on other machines to stop; returns when this is sent, or two heartbeats later."""
        self._stop.set()
        if self._heartbeats is not None:
            self._said.wait(2 * self.every)

    def _connect(self) -> dist.Store:
        store: dist.Store = next(rendezvous("env://", timeout=timedelta(seconds=self.timeout)))[0]
        return dist.PrefixStore(KEYS, store)

    def _lead(self, store: dist.Store) -> tuple[str, list[str]]:
        leader = self._me
        store.set("leader", leader)
        keys = [f"{leader}/{rank}" for rank in range(1, self.size)]

        def answers() -> list[str] | None:
            if keys and not store.check(keys):
                return None
            return [store.get(key).decode() for key in keys]

        members = [leader, *self._until(answers)]
        store.set(f"{leader}/members", json.dumps(members))
        return leader, members

    def _follow(self, store: dist.Store) -> tuple[str, list[str]]:
        """Answer each leader, until one lists this process as a member: the first one found may be dead."""
        answered = ""

        def named() -> tuple[str, list[str]] | None:
            nonlocal answered
            if not store.check(["leader"]):
                return None
            leader = store.get("leader").decode()
            if leader != answered:
                store.set(f"{leader}/{self.rank}", self._me)
                answered = leader
            if not store.check([f"{leader}/members"]):
                return None
            members: list[str] = json.loads(store.get(f"{leader}/members"))
            return (leader, members) if self._me in members else None

        return self._until(named)

    def _until(self, come: Callable[[], T | None]) -> T:
        deadline = time.monotonic() + self.timeout
        while (found := come()) is None:
            self._rounds += 1
            if time.monotonic() > deadline:
                raise TimeoutError(f"not all {self.size} ranks joined within {self.timeout:g} s")
            time.sleep(POLL_SECONDS)
        return found

    def _send_heartbeats(self, store: dist.Store, others: list[str]) -> None:
        """Send heartbeats, and check that the others send theirs and that none was asked to stop."""
        stalls = {machine: StallTimer(self._limit, self.every) for machine in others}
        try:
            while True:
                if self._stop.is_set() and not self._said.is_set():
                    store.add("stop", 1)
                    self._said.set()
                elif store.add("stop", 0):
                    os.kill(os.getpid(), STOP_TOGETHER)
                store.add(self._machine, 1)
                for machine, stall in stalls.items():
                    if stall.over(store.add(machine, 0)):
                        self._fault = f"machine {machine} has been silent for {self._limit:g} s"
                self._rounds += 1
                if self._said.is_set():
                    time.sleep(self.every)
                else:
                    self._stop.wait(self.every)
        except RuntimeError as error:
            log.debug("heartbeats: %s", error)
            self._fault = "torchrun's store is gone"
