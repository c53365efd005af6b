"""shared.ranks.channel and shared.ranks.loop: messages, votes and outcomes over real ranks."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shared.api.jobs import GenerationJob, Job, JobError, OperationJob
from shared.api.operations import AddLora, RemoveLora
from shared.api.queue import JobQueue
from shared.api.requests import GenerateRequest
from shared.api.status import HostStatus
from shared.ranks import channel as channels
from shared.ranks.channel import FRAME, LENGTH, Channel
from shared.ranks.groups import World, make_groups
from shared.ranks.loop import RankLoop, no_advice
from shared.ranks.messages import BrokenJobError, Call, Outcome, Verdict
from tests import tiny
from tests.fake_host import FakeEngine
from tests.pool import RankPool

Told = dict[str, Any]


def world_of_pool(collective_timeout: float = 20.0) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, torch.device("cpu"), *make_groups(collective_timeout, "gloo"))


def a_job(steps: int = 3, seed: int = 1, lora: str = "", pictures: int = 1, **order: Any) -> Job:
    if lora:
        return OperationJob(AddLora(lora, 1.0))
    return GenerationJob(
        GenerateRequest(
            positive=json.dumps(order) if order else None,
            steps=steps,
            seed=seed,
            pictures=pictures,
            width=64,
            height=64,
        )
    )


def told(job: Job) -> Told:
    made = job.made if isinstance(job, GenerationJob) else []
    reply = made[0] if made and not job.error else None
    return {
        "format": reply and reply.format,
        "size": len(reply.output[0]) if reply else 0,
        "error": (job.error.status, str(job.error)) if job.error else None,
        "fields": [problem.field for problem in job.error.problems] if job.error else [],
        "progress": job.progress if isinstance(job, GenerationJob) else None,
        "step": job.step if isinstance(job, GenerationJob) else None,
        "warnings": reply.warnings if reply else [],
        "seeds": [reply.seed for reply in made],
    }


def serve_jobs(
    orders: list[dict[str, Any]],
    collective_timeout: float = 20.0,
    request_timeout: float = 60.0,
    cancel_after: float | None = None,
    advice: Callable[[GenerateRequest | None], str] = no_advice,
) -> Told:
    """Each rank's loop until rank 0's jobs are done: what clients were told, and what each rank did."""
    world = world_of_pool(collective_timeout)
    engine = FakeEngine(world)
    channel = Channel(world)
    result: Told = {"jobs": [], "broken": None}
    if world.rank:
        loop = RankLoop(engine, channel)
    else:
        queue, status = JobQueue(16), HostStatus("asyncdiff", "sd1", world.size)
        loop = RankLoop(engine, channel, queue, status, request_timeout, advice=advice)
        jobs = [a_job(**order) for order in orders]
        for job in jobs:
            queue.submit(job)

        def wait_and_stop() -> None:
            if cancel_after is not None:
                time.sleep(cancel_after)
                queue.cancel_running()
            for job in jobs:
                job.wait(60)
            queue.close(JobError(503, "test is over"))

        threading.Thread(target=wait_and_stop, daemon=True).start()
    try:
        loop.run()
    except BrokenJobError as error:
        result["broken"] = str(error)
    if not world.rank:
        result["jobs"] = [told(job) for job in jobs]
        result["state"] = status.state
    result["done"] = engine.done
    return result


def test_replies_come_from_the_rank_that_holds_them(pool: RankPool) -> None:
    for size in (1, 2, 3):
        ranks = pool.run(serve_jobs, size, [{"seed": 5}, {"seed": 6, "steps": 1}])
        first, second = ranks[0]["jobs"]
        assert first["format"] == "png" and first["size"] > 50 and first["progress"] == 100
        assert (first["step"], second["step"]) == (3, 1)
        assert all(r["done"] == ["5", "6"] and r["broken"] is None for r in ranks)


def test_each_ranks_warnings_reach_the_reply_once(pool: RankPool) -> None:
    first, second = pool.run(serve_jobs, 2, [{"warn": True}, {"seed": 7}])[0]["jobs"]
    assert first["warnings"] == ["of rank 0", "of all", "of rank 1"] and second["warnings"] == []


def test_a_rank_that_fails_between_collectives_fails_one_request_only(pool: RankPool) -> None:
    for rank in (0, 1):
        ranks = pool.run(serve_jobs, 2, [{"do": "raise", "rank": rank, "step": 2}, {"seed": 7}])
        failed, good = ranks[0]["jobs"]
        assert failed["error"] == (500, f"rank {rank}: out of ideas") and failed["step"] < 3
        assert good["format"] == "png"
        assert all(r["done"] == ["7"] for r in ranks)


def test_a_request_that_the_ranks_refuse_is_the_clients_fault(pool: RankPool) -> None:
    ranks = pool.run(serve_jobs, 2, [{"do": "bad_request"}, {"seed": 7}])
    refused = ranks[0]["jobs"][0]
    assert refused["error"] == (422, "positive: the ranks refuse it") and refused["fields"] == ["positive"]
    assert all(r["done"] == ["7"] for r in ranks)


def test_what_one_rank_refuses_is_undone_on_the_others(pool: RankPool) -> None:
    orders: list[dict[str, Any]] = [{"lora": "missing 1"}, {"lora": "here"}, {"seed": 7}]
    began = time.monotonic()
    ranks = pool.run(serve_jobs, 2, orders, collective_timeout=15.0)
    assert time.monotonic() - began < 12  # nobody waits in a collective for the one that refused
    assert ranks[0]["jobs"][0]["error"] == (409, "lora: no such file")
    assert all(r["done"] == ["here", "7"] and r["broken"] is None for r in ranks)


def test_cancel_ends_within_a_step_on_all_ranks(pool: RankPool) -> None:
    ranks = pool.run(serve_jobs, 2, [{"sleep": 0.1, "steps": 50}, {"seed": 8}], cancel_after=0.45)
    cancelled = ranks[0]["jobs"][0]
    assert cancelled["error"] == (499, "cancelled")
    assert 2 <= cancelled["step"] <= 6
    assert all(r["done"] == ["8"] for r in ranks)


def test_a_request_that_takes_too_long_is_timed_out(pool: RankPool) -> None:
    ranks = pool.run(serve_jobs, 2, [{"sleep": 0.1, "steps": 50}, {"seed": 9}], request_timeout=0.35)
    assert ranks[0]["jobs"][0]["error"] == (504, "timed out after 0.35 s")
    assert all(r["done"] == ["9"] for r in ranks)


def test_pictures_of_one_request_are_made_in_a_row_as_one_job(pool: RankPool) -> None:
    ranks = pool.run(serve_jobs, 2, [{"seed": 2**64 - 1, "pictures": 3}, {"seed": 8}])
    several, one = ranks[0]["jobs"]
    assert several["seeds"] == [2**64 - 1, 0, 1] and one["seeds"] == [8]
    assert several["progress"] == 100
    assert all(r["done"] == [str(2**64 - 1), "0", "1", "8"] for r in ranks)


def test_a_replica_makes_several_pictures_at_once(pool: RankPool) -> None:
    ranks = pool.run(serve_jobs, 2, [{"seed": 5, "pictures": 5, "at_once": 3, "steps": 4}])
    (job,) = ranks[0]["jobs"]
    assert job["seeds"] == [5, 6, 7, 8, 9] and job["error"] is None
    assert job["step"] == 8, "the last two pictures have four steps each"
    assert all(r["done"] == ["3 at once", "5", "6", "7", "2 at once", "8", "9"] for r in ranks)


def test_pictures_without_room_together_are_made_one_by_one(pool: RankPool) -> None:
    orders = [{"seed": 5, "pictures": 3, "at_once": 2, "no_room": 1}, {"seed": 1, "no_room": 0}]
    ranks = pool.run(serve_jobs, 2, orders)
    several, one = ranks[0]["jobs"]
    assert several["seeds"] == [5, 6, 7] and several["error"] is None and one["seeds"] == [1]
    assert all(r["done"] == ["2 at once", "5", "6", "7", "1"] and r["broken"] is None for r in ranks)


def test_out_of_memory_on_one_rank_is_tried_once_more_then_507(pool: RankPool) -> None:
    once = {"do": "fill", "rank": 1, "step": 2, "until": 1, "seed": 4, "pictures": 2}
    always = {"do": "fill", "rank": 0, "step": 2, "until": 99, "seed": 6}
    ranks = pool.run(serve_jobs, 2, [once, always, {"seed": 8}])
    first, second, third = ranks[0]["jobs"]
    assert first["error"] is None and first["seeds"] == [4, 5]
    said = "rank 0: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert second["error"] == (507, f"out of memory ({said}): a smaller picture needs less")
    assert third["error"] is None
    assert all(r["done"] == ["freed for 4", "4", "5", "freed for 6", "freed", "8"] for r in ranks)
    assert all(r["broken"] is None for r in ranks)


def plan_says(request: GenerateRequest | None) -> str:
    """The advice of a launch at 256x256 that has memory for 64x64."""
    from tests.pipeline.test_memory_plan import plan_of

    plan = plan_of(tiny.config("sd1", width=256, height=256))
    plan.free = [plan.safe(replace(plan.config, width=64, height=64))]
    return plan.advice_for(request)


def test_507_has_the_advice_for_the_size_of_the_request(pool: RankPool) -> None:
    """A request of 64x64 that had no room, where the plan thinks that it should have."""
    always = {"do": "fill", "rank": 0, "step": 2, "until": 99, "seed": 6}
    first, second = pool.run(serve_jobs, 1, [always, {"seed": 8}], advice=plan_says)[0]["jobs"]
    status, said = first["error"]
    advice = said.partition("Tried to allocate 2.00 GiB): ")[2]
    assert status == 507 and advice.startswith("it would fit with --quantize_to=float8 (0.0"), said
    assert "256x256" not in advice and "64x64" not in advice and second["error"] is None


def plan_fails(request: GenerateRequest | None) -> str:
    raise ZeroDivisionError


def test_507_is_answered_where_there_is_no_advice(pool: RankPool) -> None:
    always = {"do": "fill", "rank": 0, "step": 2, "until": 99, "seed": 6}
    ranks = pool.run(serve_jobs, 2, [always, {"seed": 8}], advice=plan_fails)
    first, second = ranks[0]["jobs"]
    assert first["error"][0] == 507 and first["error"][1].endswith(": a smaller picture needs less")
    assert second["error"] is None and all(r["broken"] is None for r in ranks)


def test_cancel_and_the_time_out_end_all_pictures_of_a_request(pool: RankPool) -> None:
    order = {"seed": 5, "pictures": 9, "steps": 3, "sleep": 0.1}
    for limits, error in (
        ({"cancel_after": 0.5}, (499, "cancelled")),
        ({"request_timeout": 0.5}, (504, "timed out after 0.5 s")),
    ):
        ranks = pool.run(serve_jobs, 2, [order, {"seed": 8}], **limits)
        ended = ranks[0]["jobs"][0]
        assert ended["error"] == error and 5 < ended["progress"] < 50
        assert all(r["done"] == ["5", "8"] for r in ranks)


def test_an_error_inside_a_collective_breaks_the_job_in_time(pool: RankPool) -> None:
    began = time.monotonic()
    ranks = pool.run(serve_jobs, 2, [{"do": "raise_in_step", "rank": 1, "step": 2}], collective_timeout=2.0)
    assert time.monotonic() - began < 15
    assert ranks[0]["broken"] and ranks[1]["broken"]


def test_out_of_memory_inside_a_collective_is_507_though_the_ranks_break(pool: RankPool) -> None:
    order = {"do": "fill_in_step", "rank": 1, "step": 2}
    ranks = pool.run(serve_jobs, 2, [order], collective_timeout=2.0)
    said = "rank 1: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert ranks[0]["jobs"][0]["error"] == (507, f"out of memory ({said}): a smaller picture needs less")
    assert ranks[0]["broken"] and ranks[1]["broken"]


def left_alone() -> tuple[bool, float]:
    """On each rank: whether the compute group works, where one rank never comes, and after how long."""
    channel, began = Channel(world_of_pool(4.0)), time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "WORKS_SECONDS", 1.0)
        works = dist.get_rank() == 1 or channel.compute_works()
    took = time.monotonic() - began
    dist.barrier()
    return works, took


def test_a_compute_group_in_which_one_is_waited_for_does_not_work(pool: RankPool) -> None:
    """Told before the group's own time is over, at which NCCL would end the process."""
    (works, took), _ = pool.run(left_alone, 2)
    assert not works and took < 3


def votes() -> list[int]:
    channel = Channel(world_of_pool())
    rank = dist.get_rank()
    return [
        int(channel.vote(Verdict.GO_ON)),
        int(channel.vote(Verdict.CANCELLED if rank == 0 else Verdict.GO_ON)),
        int(channel.vote(Verdict.FAILED if rank == 1 else Verdict.FINISHED)),
    ]


def late_vote() -> str:
    soon = dist.new_group(backend="gloo", timeout=timedelta(seconds=0.5))
    channel = Channel(replace(world_of_pool(), voting=soon))
    if dist.get_rank() == 1:
        time.sleep(2.0)
    try:
        channel.vote(Verdict.GO_ON)
    except BrokenJobError as error:
        return str(error)
    return ""


def test_the_highest_vote_counts(pool: RankPool) -> None:
    assert pool.run(votes, 3) == [[0, 2, 4]] * 3


def test_a_rank_that_does_not_come_to_the_vote_is_noticed(pool: RankPool) -> None:
    assert "step boundary" in pool.run(late_vote, 2)[0]


def echoed(sizes: list[int]) -> list[tuple[bool, list[int], Any]]:
    """Messages, errors and results of these sizes: what arrived of them."""
    world = world_of_pool()
    channel = Channel(world)
    found = []
    for size in sizes:
        sent = Call("id", RemoveLora("letters " * (size // 8) + "x" * (size % 8)))
        received = channel.publish(sent if world.rank == 0 else None)
        mine = "e" * size if world.rank == 1 else "short"
        outcomes = channel.gather_outcomes(Outcome(world.rank, Verdict.FAILED, mine))
        assert [o.rank for o in outcomes] == list(range(world.size))
        result = b"r" * size if world.rank == 1 else None
        (_, came, _) = channel.gather_outcomes(Outcome(world.rank, Verdict.FINISHED, result=result))
        # None where it travelled to rank 0 alone.
        found.append((received == sent, [len(o.error) for o in outcomes], came.result and len(came.result)))
    return found


def test_messages_and_outcomes_of_any_size(pool: RankPool) -> None:
    call = Call("id", RemoveLora("x" * FRAME))
    outcome = Outcome(1, Verdict.FAILED, "e" * FRAME, result=0)
    # The largest that fit into one frame, and one byte to either side of them.
    limits = [FRAME - LENGTH - (len(pickle.dumps(made)) - FRAME) for made in (call, outcome)]
    sizes = [0, *(limit + more for limit in limits for more in (-1, 0, 1)), FRAME, 300_000, 1]
    ranks = pool.run(echoed, 3, sizes)
    assert ranks[0] == ranks[1] == [(True, [5, size, 5], size or b"") for size in sizes]
    assert [found[:2] for found in ranks[2]] == [found[:2] for found in ranks[0]]
    assert ranks[2][0][2] == b"" and ranks[2][-2][2] is None and ranks[2][-1][2] == 1
