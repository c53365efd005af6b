"""The request that this thread answers, from Flask: who sent it, and its JSON body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import g
from flask import request as http

from shared.api.parsing import parse_object
from shared.http.dispatch import ApiError, Caller
from shared.launch.wording import shown


def enter(id: str) -> None:
    """A request has come; `caller` gives who sent it from now on."""
    gone: Callable[[], bool] = http.environ.get("waitress.client_disconnected", lambda: False)
    g.caller = Caller(id, gone)


def caller() -> Caller:
    """Who sent this request, and what was noted for the answer."""
    found: Caller = g.caller
    return found


def check_json_type() -> None:
    """Raise ApiError 415 unless the body says that it is JSON in UTF-8, uncompressed."""
    charset = http.mimetype_params.get("charset", "utf-8").lower()
    coding = http.headers.get("Content-Encoding", "identity").lower()
    if http.mimetype != "application/json" or charset not in ("utf-8", "utf8", "us-ascii"):
        given = http.headers.get("Content-Type") or "none"
        raise ApiError(415, f"Content-Type must be application/json (UTF-8); got {shown(given)}")
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding must be absent; got {shown(coding)}")


def json_body() -> dict[str, Any]:
    """The JSON object of the body. Raises RequestError 400; `check_json_type` comes before."""
    return parse_object(http.get_data(cache=False))
