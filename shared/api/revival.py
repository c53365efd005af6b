"""The jobs that a host before this one had accepted and not finished: which go on, and why others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shared.api.faults import FieldProblem
from shared.api.jobs import GenerationJob, JobError, Order
from shared.api.requests import NEEDS_FLAG, GenerateRequest
from shared.api.store import MOST_ATTEMPTS, JobRecord, JobStore
from shared.api.stored import StoredError
from shared.launch.checks import scheduler_problem
from shared.launch.flags import HostConfig
from shared.launch.wording import shown

Scheduler = str | dict[str, Any] | None


def launch_of(config: HostConfig) -> str:
    """What a job was accepted for; another launch would make another picture."""
    return f"type {config.type} of {config.model_id}"


def revived(
    store: JobStore, config: HostConfig, attend: Callable[[JobRecord, Order], GenerationJob]
) -> list[GenerationJob]:
    """The jobs to be queued again, those that ran first, then in the order in which they came.

    Args:
        attend: makes the job of a record.
    """
    jobs = []
    for record in sorted(store.unfinished(), key=lambda record: not record.attempts):
        try:
            record.order = order = _order(store, record, config)
        except JobError as error:
            store.finish(record, error, [])
            continue
        record.kept = True
        jobs.append(attend(record, order))
    return jobs


def _order(store: JobStore, record: JobRecord, config: HostConfig) -> Order:
    """What is to be made, with the seed that was drawn. Raises JobError where it cannot be."""
    if record.attempts >= MOST_ATTEMPTS:
        raise JobError(500, "the host ended twice while this ran")
    if record.launch != (now := launch_of(config)):
        raise JobError(422, f"was accepted for {record.launch}, but the host was started again with {now}")
    try:
        order = store.order(record)
    except StoredError as error:
        raise JobError(500, str(error)) from None
    except KeyError:
        raise JobError(500, "its file in --state_dir is gone") from None
    for request in (order.request, order.last):
        for name, flag in NEEDS_FLAG.items():
            if getattr(request, name) is not None and not getattr(config, flag):
                text = f"the host was started again without --{flag}"
                raise JobError(422, f"{name}: {text}", [FieldProblem(name, text)])
    return order if config.scheduler == record.scheduler else _rescheduled(order, record.scheduler, config)


def _rescheduled(order: Order, before: Scheduler, config: HostConfig) -> Order:
    """An order with the launch's scheduler before this one, where it names none. Raises JobError."""

    def filled(request: GenerateRequest) -> GenerateRequest:
        if isinstance(before, dict) or isinstance(config.scheduler, dict):
            why = "its settings hold for every scheduler"
        elif request.scheduler is not None:
            return request
        elif before is None:
            why = "the checkpoint's own has no name to ask for"
        elif problem := scheduler_problem(config.spec, before):
            why = problem
        else:
            return request.model_copy(update={"scheduler": before})
        was, now = (shown(one) if one else "none" for one in (before, config.scheduler))
        text = f"--scheduler was {was} when it was accepted and is {now} now: {why}"
        raise JobError(422, f"scheduler: {text}", [FieldProblem("scheduler", text)])

    second = order.second
    return replace(
        order,
        request=filled(order.request),
        second=second and replace(second, request=filled(second.request)),
    )
