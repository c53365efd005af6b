"""The queue between HTTP threads and rank 0's loop."""

from __future__ import annotations

import threading
import time

import pytest

from shared.api.jobs import GenerationJob, JobError, OperationJob
from shared.api.operations import RemoveLora
from shared.api.queue import JobQueue, QueueFullError
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.status import HostStatus


def a_reply(request: GenerateRequest | None) -> Reply:
    return Reply([b"a"], "png", (request and request.seed) or 0, 8, 8, 2)


def job() -> GenerationJob:
    return GenerationJob(GenerateRequest())


def test_first_in_first_out_and_one_running() -> None:
    queue = JobQueue(3)
    jobs = [job() for _ in range(3)]
    for j in jobs:
        queue.submit(j)
    assert len(queue) == 3 and queue.running is None
    for j in jobs:
        assert queue.take(0) is j and queue.running is j and queue.last is j
        queue.release()
    assert queue.take(0.01) is None and queue.running is None


def test_the_limit_counts_those_that_wait_behind_the_running_one() -> None:
    queue = JobQueue(1)
    queue.submit(job())
    assert queue.take(0)
    queue.submit(job())
    with pytest.raises(QueueFullError, match="1 requests are waiting; at most 1 may"):
        queue.submit(job())
    queue.release()
    assert queue.take(0)
    queue.submit(job())


def test_a_queue_without_waiting_room_serves_one_at_a_time() -> None:
    queue = JobQueue(0)
    queue.submit(job())
    assert queue.take(0)
    with pytest.raises(QueueFullError):
        queue.submit(job())


@pytest.mark.alone
def test_take_wakes_up_for_a_job() -> None:
    queue = JobQueue(1)
    threading.Timer(0.05, lambda: queue.submit(job())).start()
    began = time.monotonic()
    assert queue.take(5) is not None
    assert time.monotonic() - began < 1


def test_a_dropped_job_that_waits_is_ended_at_once() -> None:
    queue = JobQueue(2)
    first, second = job(), job()
    queue.submit(first)
    queue.submit(second)
    queue.drop(first)
    assert first.done and first.error is not None and first.error.status == 499
    assert queue.take(0) is second
    queue.drop(second)
    assert second.cancelled and not second.done


def test_a_job_cancelled_while_it_waits_is_passed_over() -> None:
    queue = JobQueue(2)
    first, second = job(), job()
    queue.submit(first)
    queue.submit(second)
    first.cancel()
    assert queue.take(0) is second
    assert first.error is not None and first.error.status == 499


def test_cancel_takes_the_running_job_else_the_next() -> None:
    queue = JobQueue(2)
    assert queue.cancel_running() is False
    first, second = job(), job()
    queue.submit(first)
    queue.submit(second)
    assert queue.take(0) is first
    assert queue.cancel_running() is True
    assert first.cancelled and not second.cancelled
    queue.release()
    assert queue.cancel_running() is True
    assert second.done and queue.take(0) is None


def test_a_change_of_loras_is_cancelled_while_it_waits_alone() -> None:
    queue = JobQueue(2)
    running, waiting = (OperationJob(RemoveLora(path)) for path in "ab")
    queue.submit(running)
    assert queue.take(0) is running
    assert queue.cancel_running() is False and queue.cancel(running.id) is False and not running.cancelled
    queue.submit(waiting)
    assert queue.cancel(waiting.id) is True and waiting.done


def test_progress_of_the_running_else_of_the_last() -> None:
    queue = JobQueue(2)
    assert queue.progress() == 0
    first, call = job(), OperationJob(RemoveLora("a"))
    queue.submit(first)
    queue.submit(call)
    assert queue.progress() == 0
    queue.take(0)
    first.at_step(1, 2)
    first.at_step(1, 4)
    assert queue.progress() == 49.5
    first.at_step(9, 4)
    assert queue.progress() == 99
    first.finish()
    queue.release()
    assert queue.progress() == 100
    assert queue.take(0) is call
    assert queue.progress() == 100


def test_progress_runs_over_all_pictures() -> None:
    several = GenerationJob(GenerateRequest(pictures=4, seed=7))
    seen = []
    while not several.done:
        request, at_once = several.draw(3)
        several.at_step(1, 2)
        seen.append((request.seed, at_once, several.progress))
        several.add([a_reply(request)] * at_once)
    assert seen == [(7, 3, 99 * 1.5 / 4), (10, 1, 99 * 3.5 / 4)]
    assert len(several.made) == 4 and several.progress == 100
    short = GenerationJob(GenerateRequest(pictures=2))
    short.draw(2)
    short.add([a_reply(short.request)])
    assert str(short.error) == "the ranks returned 1 pictures instead of 2"


def test_the_first_end_counts() -> None:
    j = job()
    j.finish(JobError(504, "late"))
    j.finish()
    assert j.error is not None and j.error.status == 504 and j.progress == 0
    assert j.wait(0) and j.done


def test_close_ends_all_and_refuses_new_ones() -> None:
    queue = JobQueue(2)
    running, waiting = job(), job()
    queue.submit(running)
    queue.submit(waiting)
    queue.take(0)
    queue.close(JobError(500, "rank 1 died"))
    queue.close(JobError(503, "later"))
    for j, status in ((running, 500), (waiting, 503)):  # what has not begun has not failed
        assert j.error is not None and (j.error.status, str(j.error)) == (status, "rank 1 died")
    with pytest.raises(JobError, match="rank 1 died") as caught:
        queue.submit(job())
    assert caught.value.status == 503
    assert queue.take(0) is None


def test_many_threads() -> None:
    queue = JobQueue(1000)
    jobs = [job() for _ in range(200)]

    def submit(part: list[GenerationJob | OperationJob]) -> None:
        for j in part:
            queue.submit(j)

    threads = [threading.Thread(target=submit, args=(part,)) for part in (jobs[i::8] for i in range(8))]
    for thread in threads:
        thread.start()
    taken: list[GenerationJob | OperationJob] = []
    while len(taken) < len(jobs) and (j := queue.take(2)):
        taken.append(j)
        j.finish()
        queue.release()
    assert {id(j) for j in taken} == {id(j) for j in jobs}


def test_health() -> None:
    queue = JobQueue(2)
    queue.submit(job())
    health = HostStatus("asyncdiff", "sd1", 2).health(queue)
    assert (health["state"], health["queue_length"], health["world_size"]) == ("loading", 1, 2)
    assert health["loaded"] == 0


def test_loading_is_told_until_the_host_is_ready_or_broken() -> None:
    status, queue = HostStatus("asyncdiff", "sd1", 2), JobQueue(2)

    def told() -> tuple[str, int, str]:
        health = status.health(queue)
        return health["state"], health["loaded"], health["message"]

    status.at(20, "loading the model")
    assert told() == ("loading", 20, "loading the model")
    status.ready()
    assert told() == ("ready", 100, "")
    status.state, status.message = "broken", "rank 1 died"
    status.at(75, "warming up")
    assert told() == ("broken", 100, "rank 1 died")
