"""Clients take turns in the queue: who is next, and that nobody starves."""

from __future__ import annotations

import random

import pytest

from shared.api.fair import Turns
from shared.api.jobs import GenerationJob
from shared.api.queue import ClientFullError, JobQueue, QueueFullError
from shared.api.requests import GenerateRequest


def job(client: str, number: int = 0) -> GenerationJob:
    return GenerationJob(GenerateRequest(), id=f"{client}{number}", client=client)


def ids(turns: Turns | JobQueue) -> list[str]:
    return [one.id for one in (turns if isinstance(turns, Turns) else turns.waiting())]


def test_clients_take_turns_and_a_clients_own_jobs_stay_in_order() -> None:
    turns = Turns()
    turns.add([*(job("a", n) for n in range(4)), job("b"), *(job("c", n) for n in range(2))])
    assert ids(turns) == ["a0", "b0", "c0", "a1", "c1", "a2", "a3"] and len(turns) == 7
    assert turns.next().id == "a0"
    turns.add([job("d"), job("b", 1)])
    assert ids(turns) == ["b0", "c0", "a1", "d0", "b1", "c1", "a2", "a3"]
    assert (turns.of("a"), turns.of("b"), turns.of("nobody")) == (3, 2, 0)
    left = list(turns)
    assert turns.remove(left[2]) and not turns.remove(left[2])
    assert turns.remove(left[3]) and turns.of("d") == 0
    assert ids(turns) == ["b0", "c0", "a2", "b1", "c1", "a3"]
    turns.clear()
    assert not len(turns) and not ids(turns)
    with pytest.raises(StopIteration):
        turns.next()


@pytest.mark.parametrize("seed", range(20))
def test_the_place_that_is_told_is_the_one_that_comes_true(seed: int) -> None:
    draw, turns, count = random.Random(seed), Turns(), 0
    for _ in range(200):
        if draw.random() < 0.6 or not len(turns):
            count += 1
            turns.add([job(draw.choice("abcde"), count)])
        elif draw.random() < 0.2:
            assert turns.remove(draw.choice(list(turns)))
        else:
            told = ids(turns)
            assert turns.next().id == told[0]
            assert ids(turns) == told[1:], "a job that is taken changes nobody's order"


def test_nobody_starves_behind_a_client_that_always_asks_for_more() -> None:
    queue = JobQueue(limit=100)
    for number in range(50):
        queue.submit(job("greedy", number))
    for number in range(3):
        queue.submit(job("modest", number))
    order = []
    for number in range(50, 58):
        taken = queue.take(0)
        assert taken is not None
        order.append(taken.client)
        queue.release()
        queue.submit(job("greedy", number))  # as soon as one is done
    assert order == ["greedy", "modest"] * 3 + ["greedy"] * 2


def test_what_one_client_may_let_wait() -> None:
    queue = JobQueue(limit=5, per_client=2)
    for number in range(3):  # the first goes to the ranks at once
        queue.submit(job("a", number))
    with pytest.raises(ClientFullError, match="3 of your requests are waiting; at most 2 of one client"):
        queue.submit(job("a", 3))
    taken = queue.take(0)
    assert taken is not None and taken.id == "a0"
    with pytest.raises(ClientFullError):
        queue.submit(job("a", 3))
    for client in "bcd":
        queue.submit(job(client))
    with pytest.raises(QueueFullError):  # the whole queue is full for those that have nothing there
        queue.submit(job("e"))
    assert ids(queue) == ["a1", "b0", "c0", "d0", "a2"]
    queue.drop(queue.waiting()[0])
    queue.submit(job("a", 4))
    assert ids(queue) == ["a2", "b0", "c0", "d0", "a4"]


def test_jobs_of_the_host_before_count_and_are_all_taken_back() -> None:
    queue = JobQueue(limit=1, per_client=1)
    queue.restore([job("a", 0), job("a", 1), job("a", 2), job("b")])
    assert ids(queue) == ["a0", "b0", "a1", "a2"]
    with pytest.raises(ClientFullError):
        queue.submit(job("a", 3))
