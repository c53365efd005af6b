"""shared.http.dispatch without a web framework: a caller, a parser, and rank 0's loop."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import shared.http.dispatch
from shared.api.faults import FieldProblem, RequestError
from shared.api.jobs import GenerationJob, JobError, OperationJob, Order
from shared.api.operations import AddLora, RemoveLora
from shared.api.queue import JobQueue
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.status import HostStatus
from shared.api.warned import warn
from shared.http.dispatch import ApiError, Caller, Dispatcher
from tests.httphost import config_of, wait_for

REQUEST = GenerateRequest(seed=7, pictures=2)


@dataclass(frozen=True)
class Asked(Order):
    form: str = ""


def dispatcher() -> Dispatcher:
    return Dispatcher(config_of(), HostStatus("asyncdiff", "sd1", 1, state="ready"), JobQueue(2))


def played(made: Dispatcher, play: Callable[[GenerationJob | OperationJob], None]) -> threading.Thread:
    """Rank 0's loop for one job."""

    def loop() -> None:
        job = made.queue.take(5)
        assert job is not None
        play(job)
        made.queue.release()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def draw(job: GenerationJob | OperationJob) -> None:
    assert isinstance(job, GenerationJob)
    seconds = {"total": 1.0, "denoise": 0.5, "decode": 0.5}
    while not job.done:
        request, _ = job.draw(1)
        warning = f"of {request.seed}"
        job.add([Reply([b"file"], "png", request.seed or 0, 8, 8, 2, dict(seconds), warnings=[warning])])


def test_a_caller_gets_what_was_parsed_and_made_and_the_warnings() -> None:
    made, caller = dispatcher(), Caller("abc")

    def parse() -> Asked:
        warn("of the parser")
        return Asked(REQUEST, form="as it was asked")

    played(made, draw)
    asked, replies = made.run(caller, parse)
    assert asked.form == "as it was asked" and [reply.seed for reply in replies] == [7, 8]
    assert caller.warnings == ["of the parser", "of 7", "of 8"]
    assert isinstance(caller.job, GenerationJob) and caller.job.id == "abc" and caller.job.made is replies


def test_a_caller_that_is_gone_cancels_its_job() -> None:
    made, caller = dispatcher(), Caller("abc", gone=lambda: True)

    def play(job: GenerationJob | OperationJob) -> None:
        wait_for(lambda: job.cancelled)
        job.finish(JobError(499, "cancelled"))

    played(made, play)
    with pytest.raises(ApiError) as caught:
        made.run(caller, lambda: Order(REQUEST))
    assert caught.value.status == 499


def test_what_the_parser_refuses_reaches_no_queue_and_frees_its_place() -> None:
    made, caller = dispatcher(), Caller("abc")

    def parse() -> Order:
        raise RequestError(422, [FieldProblem("steps", "too many")])

    for _ in range(20):  # more than there are places
        with pytest.raises(ApiError) as caught:
            made.run(caller, parse)
        assert caught.value.status == 422 and caught.value.problems[0].field == "steps"
    assert caller.job is None and not made.queue.waiting()


def test_an_operation_gives_what_the_engine_returned_or_its_error() -> None:
    made = dispatcher()

    def play(job: GenerationJob | OperationJob) -> None:
        assert isinstance(job, OperationJob)
        if isinstance(job.operation, AddLora):
            job.succeed([job.operation.path])
        else:
            job.finish(JobError(409, "it is not loaded"))

    played(made, play)
    assert made.operate(Caller("a"), AddLora("file", 1.0)) == ["file"]
    wait_for(lambda: made.queue.running is None)
    played(made, play)
    with pytest.raises(ApiError, match="it is not loaded") as caught:
        made.operate(Caller("b"), RemoveLora("file"))
    assert caught.value.status == 409


def test_the_dispatcher_imports_no_flask() -> None:
    tree = ast.parse(Path(shared.http.dispatch.__file__).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert not {name for name in modules if name.split(".")[0] in ("flask", "werkzeug")}
