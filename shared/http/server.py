"""The HTTP side of a host, on rank 0: routes, the error table, the bearer token, the log line of a request.

Imports no torch and answers from the first second, while the model is loading.
"""

from __future__ import annotations

import errno
import hmac
import logging
import re
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from flask import Flask, Request, Response, g, jsonify
from flask import request as http
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import HTTPException
from werkzeug.formparser import FormDataParser
from werkzeug.http import HTTP_STATUS_CODES

from shared.api.jobs import GenerationJob, HostStatus, JobQueue, Order
from shared.api.lora_dir import LoraNameError, list_loras, lora_path
from shared.api.operations import AddLora, RemoveLora
from shared.api.requests import (
    MIME_TYPES,
    ErrorAnswer,
    FieldProblem,
    GenerateRequest,
    LoraAnswer,
    LoraEntry,
    Reply,
    RequestError,
    check_request,
    parse_lora_change,
)
from shared.api.warned import header_text
from shared.http import a1111 as a1111_api
from shared.http import legacy, metrics, pages
from shared.http import openai as openai_api
from shared.http.answers import Json
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.doors import Doors, is_preflight
from shared.http.incoming import caller, check_json_type, enter, json_body
from shared.http.negotiate import negotiate
from shared.http.openapi import openapi
from shared.http.wsgi import MAX_BODY, NO_ROOM, SMALL_BODY, Bound, Server
from shared.launch.flags import HostConfig
from shared.launch.wording import cut, shown

__all__ = ["Server", "body_bound", "create_app"]

log = logging.getLogger("host")

REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{8,64}")  # what a client may call its request
MAX_ROUTE = 200  # characters of a path in the log
REASONS = {499: "Client Closed Request"}
OPEN_ROUTES = pages.OPEN_ROUTES | {"health"}  # endpoints that ask for no token
PICTURE_ROUTES = frozenset(
    {"generate", "openai_generations", "openai_edits", "a1111_txt2img", "a1111_img2img"}
)
LARGE_BODIES = PICTURE_ROUTES | {"a1111_png_info"}
ERROR_FORMS = {openai_api.PREFIX: openai_api.error_body, a1111_api.PREFIX: a1111_api.error_body}


class _Form(FormDataParser):
    """Werkzeug's, but a form that it cannot read is an error and not an empty form."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"silent": False})


class _Request(Request):
    form_data_parser_class = _Form


class _App(Flask):
    request_class = _Request


def create_app(config: HostConfig, status: HostStatus, queue: JobQueue) -> Flask:
    """The WSGI application of one host; it shares no state with another one.

    Args:
        config: the launch.
        status: what the host says of itself; written by rank 0's loop.
        queue: where requests wait for rank 0's loop.
    """
    app = _App("shared.http.server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_FORM_MEMORY_SIZE"] = MAX_BODY
    app.json = Json(app)
    app.url_map.merge_slashes = False  # a redirect would be an HTML page
    dispatcher = Dispatcher(config, status, queue)
    _add_frame(app, dispatcher)
    _add_state_routes(app, dispatcher)
    _add_generate(app, dispatcher)
    _add_lora(app, dispatcher)
    metrics.add_routes(app, dispatcher.metrics)
    openai_api.add_routes(app, dispatcher)
    a1111_api.add_routes(app, dispatcher)
    pages.add_routes(app, dispatcher)
    if config.legacy_pickle:
        legacy.add_routes(app, dispatcher)
    document = openapi(config)
    app.add_url_rule("/openapi.json", "openapi", lambda: jsonify(document))
    return app


def _add_frame(app: Flask, dispatcher: Dispatcher) -> None:
    """What surrounds every route: id, token, errors as JSON, headers, count and log line."""
    api_key, doors = dispatcher.config.api_key, Doors(dispatcher.config)

    @app.before_request
    def begin() -> Response | None:
        given = http.headers.get("X-Request-Id", "")
        enter(given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8))
        g.began = time.monotonic()
        if foreign := doors.refusal(http.headers.get("Host", ""), http.headers.get("Origin")):
            raise ApiError(403, foreign)
        if is_preflight(http):  # it carries no token
            return Response(status=204)
        if api_key is not None and http.endpoint not in OPEN_ROUTES:
            _check_token(api_key)
        if refusal := http.environ.get("host.refusal"):
            raise ApiError(*refusal)
        return None

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        return error_response(error)

    @app.after_request
    def end(response: Response) -> Response:
        response.headers["X-Request-Id"] = caller().id
        response.headers.setdefault("Cache-Control", "no-store")
        doors.cors(http, response)
        if warnings := caller().warnings:
            response.headers["X-Warnings"] = header_text(warnings)
        if http.endpoint in PICTURE_ROUTES and http.method == "POST":
            dispatcher.metrics.answered(response.status_code)
        _log_outcome(response)
        return response


def _check_token(api_key: str) -> None:
    """Raise ApiError 401 without the bearer token."""
    if not token_fits(api_key, http.path, http.headers.get("Authorization", "")):
        raise ApiError(401, "this host needs its --api_key as a bearer token", headers=_CHALLENGE)


def token_fits(api_key: str, path: str, authorization: str) -> bool:
    """Whether the header Authorization has the token; on A1111's routes it may be the password of Basic."""
    scheme, _, token = authorization.partition(" ")
    # WSGI hands header bytes over as latin-1.
    given = token.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic" and path.startswith(a1111_api.PREFIX):
        basic = Authorization.from_header(authorization)
        given, scheme = ((basic and basic.password) or "").encode(), "bearer"
    return scheme.lower() == "bearer" and hmac.compare_digest(given, api_key.encode())


def body_bound(app: Flask, config: HostConfig) -> Bound:
    """How large a body the server receives: none of foreign pages, and none without the token."""
    api_key, doors = config.api_key, Doors(config)
    routes = app.url_map.bind("")

    def bound(method: str, path: str, headers: dict[str, str]) -> int:
        try:
            endpoint, _ = routes.match(path, method)
        except HTTPException:
            endpoint = ""
        refused = doors.refusal(headers.get("HOST", ""), headers.get("ORIGIN")) or (
            api_key is not None
            and endpoint not in OPEN_ROUTES
            and not token_fits(api_key, path, headers.get("AUTHORIZATION", ""))
        )
        return 0 if refused else MAX_BODY if endpoint in LARGE_BODIES else SMALL_BODY

    return bound


_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="multigpu diffusion"'}


def error_response(error: Exception) -> Response:
    """Any exception as JSON, in the form of the route's own API (PROTOCOL's but for OpenAI's and A1111's)."""
    api_error = as_api_error(error)
    caller().error = api_error.message
    for prefix, body in ERROR_FORMS.items():
        if http.path.startswith(prefix):
            response = jsonify(body(api_error))
            break
    else:
        problems = [{"field": p.field, "problem": p.problem} for p in api_error.problems]
        response = jsonify(ErrorAnswer(message=api_error.message, errors=problems).model_dump())
    if api_error.status in (500, 504):
        response.headers["X-Should-Retry"] = "false"  # the openai SDK would ask for the same failure again
    response.status = f"{api_error.status} {_reason(api_error.status)}"
    response.headers.update(api_error.headers)
    return response


def as_api_error(error: Exception) -> ApiError:
    """Any exception as the error it is answered with; what nobody foresaw is logged with its stack: 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError.from_request(error)
    if isinstance(error, HTTPException):
        code = error.code or 500
        headers = {k: v for k, v in error.get_headers() if k in ("Allow", "Retry-After")}
        if code == 404:
            return ApiError(404, f"there is no {shown(http.path, MAX_ROUTE)} here; see /openapi.json")
        if code == 405:
            allowed = headers.get("Allow", "")
            path, method = shown(http.path, MAX_ROUTE), cut(http.method, 20)
            return ApiError(405, f"{path} takes {allowed}; got {method}", headers=headers)
        if code == 413:  # of werkzeug, whose words tell neither; bodies are bounded before
            return ApiError(413, "the form has too many parts, or too large ones")
        return ApiError(code, error.description or _reason(code), headers=headers)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("id=%s %s", caller().id, error)
        return ApiError(507, NO_ROOM)
    log.error("id=%s failed in the server", caller().id, exc_info=error)
    return ApiError(500, "the server failed at this request; its log has the reason, under X-Request-Id")


def _reason(status: int) -> str:
    return REASONS.get(status) or HTTP_STATUS_CODES.get(status, "Error")


def _log_outcome(response: Response) -> None:
    """One line a request; requests that reached the queue tell their size, steps and seed."""
    asker = caller()
    fields: dict[str, Any] = {
        "id": asker.id,
        "status": response.status_code,
        "seconds": round(time.monotonic() - g.began, 3),
        "route": cut(f"{http.method} {quote(http.path)}", MAX_ROUTE),
    }
    job = asker.job
    if isinstance(job, GenerationJob):
        made: Reply | GenerateRequest = job.made[0] if job.done and job.error is None else job.request
        fields |= {"size": f"{made.width}x{made.height}", "steps": made.steps, "seed": made.seed}
    text = " ".join(f"{k}={v}" for k, v in fields.items())
    if asker.warnings:
        fields["warnings"] = asker.warnings
        text += f" warnings={'; '.join(asker.warnings)!r}"
    if asker.error:
        message = fields["error"] = cut(asker.error)
        text += f" error={message!r}"
    level = logging.DEBUG
    if response.status_code >= 500:
        level = logging.WARNING
    elif http.endpoint in PICTURE_ROUTES or response.status_code >= 400:
        level = logging.INFO
    log.log(level, "%s", text, extra={"fields": fields})


def _add_state_routes(app: Flask, dispatcher: Dispatcher) -> None:
    status, queue = dispatcher.status, dispatcher.queue

    @app.get("/initialize")
    def initialize() -> Response:
        if status.state == "loading":
            return _text("WAIT", 202)
        dispatcher.check_ready()
        return _text("OK")

    @app.get("/progress")
    def progress() -> Response:
        return _text(str(int(queue.progress())))

    @app.post("/cancel")
    def cancel() -> Response:
        id = http.args.get("id")
        cancelled = queue.cancel_running() if id is None else queue.cancel(id)
        message = (
            "OK"
            if cancelled
            else "no request is running"
            if id is None
            else f"no request {shown(id)} runs or waits"
        )
        return jsonify({"message": message, "cancelled": cancelled})

    @app.get("/ready")
    def ready() -> Response:
        dispatcher.check_ready()
        return _text("OK")

    @app.get("/health")
    def health() -> Response:
        age = queue.step_age()
        patience = max(dispatcher.config.request_timeout, dispatcher.config.collective_timeout)
        stuck = age is not None and age > patience
        response = jsonify(
            status.health(queue) | {"step_age_seconds": None if age is None else round(age, 1)}
        )
        response.status_code = 503 if stuck or status.state == "broken" else 200
        return response


def _text(text: str, status: int = 200) -> Response:
    return Response(text, status, mimetype="text/plain")


@dataclass(frozen=True)
class _Generate(Order):
    """What POST /generate asks for, and in which form."""

    raw: str | None = None  # the format of an answer that is the file itself, not JSON
    pickled: bool = False  # --legacy_pickle: the answer's pictures are pickled


def _add_generate(app: Flask, dispatcher: Dispatcher) -> None:
    config = dispatcher.config

    @app.post("/generate")
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

        asked, (reply, *others) = dispatcher.run(caller(), parse)
        if asked.raw is not None:
            return raw_response(reply)
        return jsonify(legacy.answer(reply, config) if asked.pickled else reply.answer(others))


def _add_lora(app: Flask, dispatcher: Dispatcher) -> None:
    """LoRAs change between two pictures, so a change waits its turn in the queue; the list never waits."""
    in_use = [LoraEntry(path=p, scale=s) for p, s in (dispatcher.config.lora or {}).items()]
    one_at_a_time = threading.Lock()

    @app.get("/lora")
    def lora_list() -> Response:
        dispatcher.check_ready()
        return jsonify(LoraAnswer(loras=in_use).model_dump(exclude_none=True))

    @app.get("/loras")
    def lora_names() -> Response:
        return jsonify({"message": "OK", "loras": list_loras(dispatcher.config)})

    @app.route("/lora", methods=["POST", "DELETE"])
    def lora_change() -> Response:
        nonlocal in_use
        check_json_type()
        change = parse_lora_change(http.get_data(cache=False))
        if http.method == "POST":
            try:
                change.path = lora_path(dispatcher.config, change.path)
            except LoraNameError as error:
                raise RequestError(422, [FieldProblem("path", str(error))]) from None
        # Not awaited: who waits here would hold a thread that is not counted.
        if not one_at_a_time.acquire(blocking=False):
            raise ApiError.unavailable("full", "another LoRA is being changed")
        try:
            if http.method == "POST":
                entries = dispatcher.operate(caller(), AddLora(change.path, change.scale))
            else:
                entries = dispatcher.operate(caller(), RemoveLora(change.path))
            in_use = [LoraEntry.model_validate(entry) for entry in entries]
        finally:
            one_at_a_time.release()
        return jsonify(LoraAnswer(loras=in_use).model_dump(exclude_none=True))


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
