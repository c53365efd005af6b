"""What surrounds every route: the request's id, the token, errors as JSON, headers, count and log line."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from urllib.parse import quote

from flask import Response, g, jsonify
from flask import request as http
from werkzeug.datastructures import Authorization
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from shared.api.faults import RequestError
from shared.api.replies import ErrorAnswer
from shared.api.warned import header_text
from shared.http import a1111 as a1111_api
from shared.http import openai as openai_api
from shared.http.access import AccessRules, is_preflight
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.finish import failure, log_outcome
from shared.http.incoming import caller, enter
from shared.http.proxies import Proxies
from shared.http.routes import App
from shared.launch.wording import cut, shown

REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{8,64}")  # what a client may call its request
MAX_ROUTE = 200  # characters of a path in the log
REASONS = {499: "Client Closed Request"}
ERROR_FORMS = {openai_api.PREFIX: openai_api.error_body, a1111_api.PREFIX: a1111_api.error_body}
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="multigpu diffusion"'}


def add_frame(app: App, dispatcher: Dispatcher) -> None:
    """Put it around all routes of an application."""
    api_key, access = dispatcher.config.api_key, AccessRules(dispatcher.config)
    proxies = Proxies(dispatcher.config.trusted_proxies or ())

    @app.before_request
    def begin() -> Response | None:
        given = http.headers.get("X-Request-Id", "")
        named = REQUEST_ID.fullmatch(given) is not None
        enter(given if named else secrets.token_hex(8), named, proxies)
        caller().strange = "" if named else given
        g.began = time.monotonic()
        if foreign := access.refusal(http.headers.get("Host", ""), http.headers.get("Origin")):
            raise ApiError(403, foreign)
        if is_preflight(http):  # it carries no token
            return Response(status=204)
        if api_key is not None and not _is_open(app):
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
        access.cors(http, response)
        if warnings := caller().warnings:
            response.headers["X-Warnings"] = header_text(warnings)
        makes_pictures = http.endpoint in app.routes and app.routes[http.endpoint].makes_pictures
        if makes_pictures and http.method == "POST" and not caller().leaves:
            dispatcher.metrics.answered(response.status_code)
        _log_outcome(response, makes_pictures)
        return response


def _is_open(app: App) -> bool:
    """Whether the route asks for no token."""
    return http.endpoint in app.routes and app.routes[http.endpoint].is_open


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


def error_response(error: Exception) -> Response:
    """Any exception as JSON, in the form of the route's own API (PROTOCOL's but for OpenAI's and A1111's)."""
    api_error = as_api_error(error)
    caller().error = api_error.message
    for prefix, body in ERROR_FORMS.items():
        if http.path.startswith(prefix):
            response = jsonify(body(api_error))
            break
    else:
        problems = [problem.told() for problem in api_error.problems]
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
            return ApiError(404, f"there is no route {shown(http.path, MAX_ROUTE)}; see /openapi.json")
        if code == 405:
            allowed = headers.get("Allow", "")
            path, method = shown(http.path, MAX_ROUTE), cut(http.method, 20)
            return ApiError(405, f"{path} allows only {allowed}; got {method}", headers=headers)
        if code == 413:  # from werkzeug, whose text names neither; bodies are bounded before
            return ApiError(413, "the form has too many parts, or a part is too large")
        return ApiError(code, error.description or _reason(code), headers=headers)
    unforeseen = failure(error, caller().id)
    return ApiError(unforeseen.status, str(unforeseen))


def _reason(status: int) -> str:
    return REASONS.get(status) or HTTP_STATUS_CODES.get(status, "Error")


def _log_outcome(response: Response, makes_pictures: bool) -> None:
    """One line a request."""
    asker = caller()
    level = logging.DEBUG
    if response.status_code == 503 and not makes_pictures:
        pass  # probes of a host that loads come every second
    elif response.status_code >= 500:
        level = logging.WARNING
    elif makes_pictures or response.status_code >= 400 or asker.warnings:
        level = logging.INFO
    seconds, route = time.monotonic() - g.began, cut(f"{http.method} {quote(http.path)}", MAX_ROUTE)
    log_outcome(level, asker.id, response.status_code, seconds, route, asker.job, asker.warnings, asker.error)
