"""POST /generate: a picture or a video, as JSON or as the file itself."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Response, jsonify
from flask import request as http

from shared.api.faults import FieldProblem, RequestError
from shared.api.jobs import Order
from shared.api.parsing import check_request
from shared.api.replies import GenerateAnswer, Reply
from shared.api.requests import MIME_TYPES, GenerateRequest
from shared.http import legacy
from shared.http.dispatch import Dispatcher
from shared.http.incoming import caller, check_json_type, json_body, prefers_async
from shared.http.jobs import ACCEPTED, accepted
from shared.http.negotiate import RAW_FORMATS, negotiate
from shared.http.routes import Answer, App, Schema, picture_route

ERRORS = (400, 408, 409, 413, 415, 422, 429, 499, 500, 503, 504, 507)
HEADERS: dict[str, Schema] = {
    "X-Request-Id": {"schema": {"type": "string"}},
    "X-Seed": {"schema": {"type": "integer"}, "description": "with the bytes themselves"},
    "X-Warnings": {"schema": {"type": "string"}, "description": "`warnings` of the JSON answer"},
}


@dataclass(frozen=True)
class _Generate(Order):
    """What POST /generate asks for, and in which form."""

    raw: str | None = None  # the format of an answer that is the file itself, not JSON
    pickled: bool = False  # --legacy_pickle: the answer's pictures are pickled


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add POST /generate."""
    config = dispatcher.config
    files: dict[str, Schema] = {
        MIME_TYPES[f]: {"schema": {"type": "string", "contentMediaType": MIME_TYPES[f]}}
        for f in RAW_FORMATS[config.spec.output]
    }
    made = Answer("The picture or video", GenerateAnswer, files, HEADERS)

    @app.serve(
        "POST",
        "/generate",
        picture_route(
            "Make a picture or a video",
            answer=made,
            others={202: ACCEPTED},
            body=GenerateRequest,
            errors=ERRORS,
        ),
    )
    def generate() -> Response:
        check_json_type()

        def parse() -> _Generate:
            data = json_body()
            pickled = legacy.is_legacy(data, config)
            if config.legacy_pickle:
                data = legacy.translate(data, config)
            raw, problem = negotiate(http.accept_mimetypes, config.spec, data.get("output_format"))
            try:
                request = check_request(data, config, raw)
            except RequestError as error:
                raise RequestError(error.status, error.problems + ([problem] if problem else [])) from None
            if pickled and (request.pictures or 1) > 1:
                problem = FieldProblem("pictures", f"needs an output_format, got {request.pictures} and none")
            if problem:
                raise RequestError(422, [problem])
            return _Generate(request, raw=raw, pickled=pickled)

        if prefers_async():
            _, record = dispatcher.accept(caller(), parse)
            return accepted(record)
        asked, (reply, *others) = dispatcher.run(caller(), parse)
        if asked.raw is not None:
            return raw_response(reply)
        return jsonify(legacy.answer(reply, config) if asked.pickled else reply.answer(others))


def raw_response(reply: Reply) -> Response:
    """The file itself, what is known of it in headers."""
    response = Response(reply.output[0], mimetype=MIME_TYPES[reply.format])
    response.headers["X-Seed"] = str(reply.seed)
    response.headers["X-Steps"] = str(reply.steps)
    response.headers["X-Size"] = f"{reply.width}x{reply.height}"
    for name, seconds in reply.seconds.items():
        response.headers.add("Server-Timing", f"{name};dur={1000 * seconds:.1f}")
    response.headers["Content-Disposition"] = f'inline; filename="{caller().id}.{reply.format}"'
    response.headers["Vary"] = "Accept"
    return response
