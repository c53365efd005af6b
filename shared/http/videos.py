"""OpenAI's video API over the jobs, for the openai SDK: a video is asked for, followed, fetched and deleted.

As with pictures, fields of POST /generate may stand beside OpenAI's own (the SDK's `extra_body`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from flask import Response, jsonify
from flask import request as http

from shared.api.codecs import MAX_FRAMES
from shared.api.faults import FieldProblem, RequestError
from shared.api.jobs import Order
from shared.api.parsing import check_request
from shared.api.store import JobRecord
from shared.api.stored import StoredError
from shared.api.warned import warn
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.generate import raw_response
from shared.http.incoming import caller, check_json_type, json_body
from shared.http.openai import form_body, pop_size, rename, warn_of_model
from shared.http.routes import App, Route, picture_route
from shared.launch.flags import HostConfig
from shared.launch.wording import shown
from shared.models import ModelSpec

PATH = "/v1/videos"
MAX_LISTED = 100
_ROUTE = f"POST {PATH}"
_QUERY = {
    "limit": f"at most so many, 1 to {MAX_LISTED}; default: 20",
    "after": "the id of a video: only those behind it",
    "order": "asc or desc, by the time of their acceptance; default: desc",
}
_MEANINGLESS = frozenset({"model", "user"})
_OURS = {"prompt": "positive", "negative_prompt": "negative", "input_reference": "image"}
_STATES = {"queued": "queued", "running": "in_progress", "done": "completed"}  # all else: failed
_NO_RETRY = {"X-Should-Retry": "false"}  # the openai SDK asks again after 409


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add /v1/videos; on a host that makes pictures they say so."""
    config, store = dispatcher.config, dispatcher.store

    def found(id: str) -> JobRecord:
        record = store.accepted(id)
        if record is None or record.route != _ROUTE:
            raise ApiError(404, f"there is no video {shown(id)}; it may have been deleted or forgotten")
        return record

    def serve(method: str, path: str, route: Route) -> Callable[[Callable[..., Response]], Any]:
        def add(view: Callable[..., Response]) -> Any:
            def checked(**names: str) -> Response:
                if config.spec.output != "video":
                    text = f"type {config.spec.name} makes pictures, not videos: ask /v1/images/generations"
                    raise ApiError(422, text)
                return view(**names)

            return app.serve(method, path, route)(checked)

        return add

    @serve("POST", PATH, picture_route("OpenAI: begin a video; /generate's fields may be added"))
    def create() -> Response:
        is_form = http.mimetype == "multipart/form-data"
        if not is_form:
            check_json_type()

        def parse() -> Order:
            return Order(_request(form_body() if is_form else json_body(), config))

        _, record = dispatcher.accept(caller(), parse)
        return jsonify(_video(record, dispatcher))

    @serve("GET", PATH, Route("OpenAI: the videos", query=_QUERY))
    def listed() -> Response:
        limit = http.args.get("limit", "20")
        if not (limit.isdecimal() and 1 <= int(limit[:9]) <= MAX_LISTED):
            raise _refused("limit", f"must be a whole number, 1 to {MAX_LISTED}; got {shown(limit)}")
        if (order := http.args.get("order", "desc")) not in ("asc", "desc"):
            raise _refused("order", f"must be asc or desc, got {shown(order)}")
        videos = [record for record in store.all() if record.route == _ROUTE]
        if order == "asc":
            videos.reverse()
        if (after := http.args.get("after")) is not None:
            place = next((n for n, record in enumerate(videos) if record.id == after), None)
            if place is None:
                raise _refused("after", f"must be the id of a video, got {shown(after)}")
            videos = videos[place + 1 :]
        page = []
        for record in videos[: int(limit)]:
            with contextlib.suppress(ApiError):  # of one that another version stored, or forgotten meanwhile
                page.append(_video(record, dispatcher))
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        body = {"object": "list", "data": page, "first_id": None, "last_id": None} | ends
        return jsonify(body | {"has_more": len(videos) > int(limit)})

    @serve("GET", f"{PATH}/<id>", Route("OpenAI: one video's state"))
    def retrieve(id: str) -> Response:
        return jsonify(_video(found(id), dispatcher))

    @serve(
        "GET",
        f"{PATH}/<id>/content",
        Route("OpenAI: the video's file", query={"variant": "video, the only one here"}),
    )
    def content(id: str) -> Response:
        record, variant = found(id), http.args.get("variant", "video")
        if variant != "video":
            raise _refused("variant", f"must be video on this host, got {shown(variant)}")
        if record.state != "done":
            video = _video(record, dispatcher)
            why = f": {video['error']['message']}" if video["error"] else ""
            raise ApiError(409, f"the video {id} is {video['status']}, not completed{why}", headers=_NO_RETRY)
        return raw_response(dispatcher.replies(record)[0])

    @serve("DELETE", f"{PATH}/<id>", Route("OpenAI: delete a video, or cancel one that is not completed"))
    def delete(id: str) -> Response:
        record = found(id)
        dispatcher.discard(record)
        return jsonify({"id": id, "object": "video.deleted", "deleted": True})


def _refused(field: str, problem: str) -> RequestError:
    return RequestError(400, [FieldProblem(field, problem)])


def _video(record: JobRecord, dispatcher: Dispatcher) -> dict[str, Any]:
    """OpenAI's video object. Raises ApiError 404, 500 where what was asked for cannot be read."""
    try:
        order = dispatcher.store.order(record)
    except KeyError:
        raise ApiError(404, f"the video {record.id} is forgotten") from None
    except StoredError as fault:
        raise ApiError(500, str(fault)) from None
    request = order.request
    status, error = _STATES.get(record.state, "failed"), None
    if status == "failed":
        assert record.error is not None
        code = "cancelled" if record.state == "cancelled" else f"error_{record.error.status}"
        error = {"code": code, "message": record.error.reason}
    over = record.finished
    return {
        "id": record.id,
        "object": "video",
        "status": status,
        "progress": int(record.progress),
        "created_at": int(record.accepted),
        "completed_at": int(over) if over is not None and status == "completed" else None,
        "expires_at": None if over is None else int(over + dispatcher.store.max_age),
        "model": dispatcher.config.model_id,
        "prompt": request.positive,
        "seconds": _seconds((request.frames or 1) / (request.fps or dispatcher.config.spec.fps)),
        "size": f"{request.width}x{request.height}",
        "seed": request.seed,
        "error": error,
        "remixed_from_video_id": None,
        "warnings": record.warnings,
    }


def _seconds(seconds: float) -> str:
    """As OpenAI tells them: "4", and "4.06" where they are not whole."""
    return f"{seconds:.2f}".rstrip("0").rstrip(".")


def _request(data: dict[str, Any], config: HostConfig) -> Any:
    """The request of a body, checked. Raises RequestError, with the fields named as the client did."""
    has_seconds = data.get("seconds") is not None
    theirs = {ours: name for name, ours in _OURS.items()} | {"width": "size", "height": "size"}
    theirs |= {"frames": "seconds"} if has_seconds else {}
    problems: list[FieldProblem] = []
    ours = translate(data, config, problems)
    status = 400
    try:
        request = check_request(ours, config)
        if not problems:
            return request
    except RequestError as error:
        status = 400 if problems else error.status
        known = {problem.field for problem in problems}
        others = [FieldProblem(theirs.get(p.field, p.field), p.problem) for p in error.problems]
        problems += [problem for problem in others if problem.field not in known]
    raise RequestError(status, problems)


def translate(data: dict[str, Any], config: HostConfig, problems: list[FieldProblem]) -> dict[str, Any]:
    """OpenAI's fields -> a body of POST /generate; the faults of OpenAI's own fields go to `problems`."""
    spec = config.spec
    ours = {k: v for k, v in data.items() if k not in _MEANINGLESS and v is not None}
    warn_of_model(data, config)
    rename(ours, _OURS)
    if "positive" not in spec.fields:
        ours.pop("positive", None)  # OpenAI's API always asks for a prompt; a type without one ignores it
    if isinstance(reference := ours.get("image"), dict):
        ours["image"] = reference.get("image_url")
        if set(reference) != {"image_url"} or not str(reference["image_url"]).startswith("data:"):
            del ours["image"]
            text = 'must be a picture\'s file, or {"image_url": "data:…"}; other addresses are not fetched'
            problems.append(FieldProblem("input_reference", text))
    pop_size(ours, problems)
    if (count := ours.pop("n", ours.get("pictures", 1))) != 1:
        problems.append(FieldProblem("n", f"must be 1 for a video, got {shown(count)}"))
    if ours.setdefault("output_format", "mp4") == "png":
        problems.append(FieldProblem("output_format", "must be mp4, webp or gif, got 'png'"))
    if (seconds := ours.pop("seconds", None)) is not None:
        if "frames" in ours:
            problems.append(FieldProblem("seconds", "give seconds or frames, not both"))
        else:
            fps = ours.get("fps", spec.fps)
            try:
                ours["frames"] = frames_of(seconds, fps if type(fps) is int and fps > 0 else spec.fps, spec)
            except ValueError as error:
                problems.append(FieldProblem("seconds", str(error)))
    return ours


def frames_of(seconds: object, fps: int, spec: ModelSpec) -> int:
    """How many frames a video of this length has: the nearest number that the type makes, told if another.

    Args:
        seconds: as a client gave them, a number or its text.
        fps: frames per second.

    Raises:
        ValueError: what is allowed.
    """
    factor = spec.frames_factor
    most = (MAX_FRAMES - 1) // factor * factor + 1
    try:
        wanted = float(seconds) * fps if isinstance(seconds, str | int | float) else math.nan
    except ValueError:
        wanted = math.nan
    if not 0 < wanted <= most or isinstance(seconds, bool):
        longest = f"{_seconds(most / fps)} s, {most} frames at {fps} per second"
        raise ValueError(f"must be a number above 0, at most {longest}; got {shown(seconds)}")
    frames = max(round((wanted - 1) / factor) * factor, 0) + 1
    if frames != wanted:
        rule = f", and type {spec.name} makes a multiple of {factor}, and 1 more" if factor > 1 else ""
        told = f"{float(seconds):g} s at {fps} frames per second are {wanted:g} frames{rule}"  # type: ignore[arg-type]
        warn(f"seconds: {told}: {frames} are made, {_seconds(frames / fps)} s")
    return frames
