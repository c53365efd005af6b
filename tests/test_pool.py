"""tests.pool: the pool itself."""

from __future__ import annotations

import os
import tempfile
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import MOST_THREADS, RankError, RankPool, once


def summed(value: int) -> tuple[int, int, int]:
    total = torch.tensor([float(value + dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_world_size(), int(total), os.getpid()


def one_fails_inside_a_collective() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such thing")
    dist.barrier()


def one_hangs() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def made_once() -> tuple[int, int]:
    return once(os.getpid), os.getpid()


def leaves_threads() -> int:
    for _ in range(MOST_THREADS):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


def leaves_a_folder() -> str:
    return tempfile.mkdtemp(prefix="kept-")


def test_what_ranks_leave_among_temporary_files_goes_with_the_pool() -> None:
    pool = RankPool()
    try:
        left = pool.run(leaves_a_folder, 2)
        assert all(map(os.path.isdir, left))
    finally:
        pool.close()
    assert not any(map(os.path.exists, left))


def test_world_sizes_change_and_processes_stay(pool: RankPool) -> None:
    first = pool.run(summed, 2, 10)
    assert [r[:2] for r in first] == [(2, 21)] * 2
    assert [r[:2] for r in pool.run(summed, 3, 0)] == [(3, 3)] * 3
    assert pool.run(summed, 2, 10) == first


def test_failures_bring_the_traceback_and_the_pool_recovers() -> None:
    pool = RankPool(timeout=30)
    try:
        with pytest.raises(RankError, match=r"(?s)rank 1.*no such thing"):
            pool.run(one_fails_inside_a_collective, 2)
        with pytest.raises(RankError, match="rank 0: did not answer in time"):
            pool.run(one_hangs, 2, timeout=4)  # the ranks must find each other in it
        assert [r[:2] for r in pool.run(summed, 2, 1)] == [(2, 3)] * 2
    finally:
        pool.close()


def test_what_rank_0_makes_is_on_all_ranks(pool: RankPool) -> None:
    (first, here), (second, other) = pool.run(made_once, 2)
    assert first == second == here != other


def test_ranks_with_many_threads_are_followed_by_others() -> None:
    pool = RankPool()
    try:
        assert pool.run(leaves_threads, 1) != [pool.run(summed, 1, 0)[0][2]]
    finally:
        pool.close()
