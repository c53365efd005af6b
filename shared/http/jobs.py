"""/jobs: what was accepted, how far it is, and its answer, for clients that do not wait or were cut off."""

from __future__ import annotations

import math
import threading
import time
from typing import Annotated, Any, Literal

from flask import Response, jsonify
from flask import request as http
from pydantic import BaseModel, Field

from shared.api.faults import FieldProblem, RequestError
from shared.api.replies import ErrorAnswer, GenerateAnswer
from shared.api.requests import MIME_TYPES
from shared.api.store import JobRecord
from shared.http.dispatch import DISCONNECT_POLL, ApiError, Dispatcher
from shared.http.incoming import caller
from shared.http.routes import Answer, App, Route, Schema
from shared.http.wsgi import MAX_POLLS
from shared.launch.wording import shown

MAX_WAIT = 60.0  # seconds that ?wait= may ask for
MAX_LISTED = 1000
STATES = ("queued", "running", "done", "failed", "cancelled")
_LOCATION: Schema = {"schema": {"type": "string"}, "description": "/jobs/{id}"}


class Accepted(BaseModel):
    """Answer of POST /generate with `Prefer: respond-async`, status 202."""

    message: str = "accepted"
    id: str


class JobState(BaseModel):
    """One accepted job."""

    id: Annotated[str, Field(description="its X-Request-Id")]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    route: Annotated[str, Field(description="that it came to, such as POST /generate")]
    place: Annotated[int | None, Field(description="in the queue, 1 is next; null where it does not wait")]
    progress: Annotated[float, Field(description="0 to 100")]
    seconds_waited: Annotated[float, Field(description="from its acceptance to the ranks, or until now")]
    wait_estimate: Annotated[
        float | None, Field(description="seconds until it is done, from measured ones; null where unknown")
    ]
    accepted: Annotated[float, Field(description="seconds since the epoch")]
    finished: Annotated[float | None, Field(description="seconds since the epoch")]
    seed: int | None
    pictures: int
    message: Annotated[str, Field(description="why it failed; OK where it is done")]
    prompt: Annotated[str, Field(description="its first 200 characters")]


class Jobs(BaseModel):
    """Answer of GET /jobs."""

    jobs: Annotated[list[JobState], Field(description="the newest first")]


class JobAnswer(JobState):
    """Answer of GET /jobs/{id}."""

    answer: Annotated[GenerateAnswer | None, Field(description="as POST /generate gives it; when done")] = (
        None
    )
    error: Annotated[
        ErrorAnswer | None, Field(description="as POST /generate gives it; when failed or cancelled")
    ] = None
    status: Annotated[
        int | None, Field(description="the HTTP status that POST /generate has with that answer or error")
    ] = None


class Discarded(BaseModel):
    """Answer of DELETE /jobs/{id}."""

    message: str
    id: str
    cancelled: Annotated[bool, Field(description="it waited or ran; false: it was over and is forgotten")]


ACCEPTED = Answer(
    "Accepted, with `Prefer: respond-async`; GET /jobs/{id} has the answer",
    Accepted,
    headers={"Location": _LOCATION, "X-Request-Id": {"schema": {"type": "string"}}},
)


def accepted(record: JobRecord) -> Response:
    """The answer 202 of a request whose client does not wait."""
    response: Response = jsonify(Accepted(id=record.id).model_dump())
    response.status_code = 202
    response.headers["Location"] = f"/jobs/{record.id}"
    response.headers["Preference-Applied"] = "respond-async"
    return response


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add /jobs."""
    store, polls = dispatcher.store, threading.BoundedSemaphore(MAX_POLLS)

    @app.serve(
        "GET",
        "/jobs",
        Route(
            "The accepted jobs",
            Answer("Newest first", Jobs),
            errors=(400,),
            query={
                "limit": f"at most so many, 1 to {MAX_LISTED}; default: 100",
                "state": f"only those in one of these states, separated by commas: {', '.join(STATES)}",
            },
        ),
    )
    def jobs() -> Response:
        limit = int(_number("limit", 1, MAX_LISTED, 100))
        states = set(filter(None, http.args.get("state", "").split(",")))
        if unknown := states - set(STATES):
            text = f"must be {', '.join(STATES)}, separated by commas; got {shown(min(unknown))}"
            raise RequestError(400, [FieldProblem("state", text)])
        found = [record for record in store.all() if not states or record.state in states]
        outlook = Outlook(dispatcher)
        return jsonify({"jobs": [describe(record, outlook) for record in found[:limit]]})

    @app.serve(
        "GET",
        "/jobs/<id>",
        Route(
            "One job, with its answer when it is done",
            Answer("Its state", JobAnswer),
            errors=(400, 404, 503),
            query={"wait": f"seconds to wait for its end, 0 to {MAX_WAIT:g}; the answer may come before"},
        ),
    )
    def job(id: str) -> Response:
        record = _found(id)
        seconds = _number("wait", 0, MAX_WAIT, 0)
        if seconds and polls.acquire(blocking=False):
            try:
                _wait(record, seconds)
            finally:
                polls.release()
        body = describe(record, Outlook(dispatcher)) | {"status": None, "answer": None, "error": None}
        if record.state == "done":
            reply, *others = dispatcher.replies(record)
            body |= {"status": 200, "answer": reply.answer(others)}
        elif record.error is not None and record.finished is not None:
            problems = [problem.told() for problem in record.error.problems]
            error = ErrorAnswer(message=body["message"], errors=problems)
            body |= {"status": record.error.status, "error": error.model_dump()}
        return jsonify(body)

    @app.serve(
        "GET",
        "/jobs/<id>/output",
        Route(
            "The file that a job made",
            Answer(
                "The file itself",
                media={t: {"schema": {"type": "string", "contentMediaType": t}} for t in MIME_TYPES.values()},
            ),
            errors=(400, 404, 409),
            query={"n": "which of several pictures or frames, from 0; default: 0"},
        ),
    )
    def output(id: str) -> Response:
        record = _found(id)
        n = int(_number("n", 0, 1 << 20, 0))
        if record.state != "done":
            raise ApiError(409, f"the job {id} is {record.state}, not done")
        files = [(file, reply) for reply in dispatcher.replies(record) for file in reply.output]
        if n >= len(files):
            raise ApiError(404, f"n must be below {len(files)}, the files that the job {id} made; got {n}")
        file, reply = files[n]
        response = Response(file, mimetype=MIME_TYPES.get(reply.format, "application/octet-stream"))
        response.headers["X-Seed"] = str(reply.seed)
        response.headers["Content-Disposition"] = f'inline; filename="{id}-{n}.{reply.format}"'
        return response

    @app.serve(
        "DELETE",
        "/jobs/<id>",
        Route(
            "Cancel a job that waits or runs; forget one that is over, with its files",
            Answer("What was done", Discarded),
            errors=(404,),
        ),
    )
    def discard(id: str) -> Response:
        record = _found(id)
        runs = record.job is not None
        dispatcher.discard(record)
        return jsonify(Discarded(message="OK", id=id, cancelled=runs).model_dump())

    def _found(id: str) -> JobRecord:
        if (record := store.accepted(id)) is None:
            raise ApiError(404, f"there is no job {shown(id)}; it may have been forgotten (--keep_jobs)")
        return record

    def _wait(record: JobRecord, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (job := record.job) is not None and not caller().gone():
            if (left := until - time.monotonic()) <= 0 or job.settled.wait(min(DISCONNECT_POLL, left)):
                return


def _number(name: str, least: float, most: float, default: float) -> float:
    """A number of the query. Raises RequestError 400."""
    text = http.args.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    whole = name != "wait"
    if not least <= value <= most or (whole and not value.is_integer()):
        kind = "a whole number" if whole else "a number"
        raise RequestError(
            400, [FieldProblem(name, f"must be {kind}, {least:.0f} to {most:.0f}; got {shown(text)}")]
        )
    return value


class Outlook:
    """What is ahead of the jobs that wait and run: by id the place, from 1, and the seconds until the end."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        running, waiting = dispatcher.queue.running, dispatcher.queue.waiting()
        self.places = {job.id: place for place, job in enumerate(waiting, 1)}
        self.seconds = dispatcher.finisher.pace.estimates(running, waiting)


def describe(record: JobRecord, outlook: Outlook) -> dict[str, Any]:
    """A JobState."""
    state, error = record.state, record.error
    seconds = outlook.seconds.get(record.id) if record.finished is None else None
    message = ""
    if state == "done":
        message = "OK"
    elif error is not None and record.finished is not None:
        message = error.reason
    return {
        "id": record.id,
        "state": state,
        "route": record.route,
        "place": outlook.places.get(record.id) if state == "queued" else None,
        "progress": round(record.progress, 1),
        "seconds_waited": round(record.seconds_waited(), 3),
        "wait_estimate": None if seconds is None else round(seconds, 1),
        "accepted": round(record.accepted, 3),
        "finished": None if record.finished is None else round(record.finished, 3),
        "seed": record.seed,
        "pictures": record.pictures,
        "message": message,
        "prompt": record.prompt,
    }
