"""The request that this thread answers, from Flask: who sent it, and its JSON body."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from flask import g
from flask import request as http

from shared.api.parsing import parse_object
from shared.http.dispatch import ApiError, Caller
from shared.http.proxies import Proxies
from shared.launch.wording import shown

PIECE = 1 << 20  # bytes of a body that are read at once


def enter(id: str, named: bool, proxies: Proxies) -> None:
    """A request has come; `caller` gives who sent it from now on.

    Args:
        id: its X-Request-Id.
        named: whether the client gave it.
        proxies: those that may say who the client is.
    """
    gone: Callable[[], bool] = http.environ.get("waitress.client_disconnected", lambda: False)
    route = f"{http.method} {http.path}"
    client = proxies.client(http.remote_addr or "", http.headers.get("X-Forwarded-For", ""))
    g.caller = Caller(id, named, route, client, _digest, gone)


def _digest() -> str:
    """Of method, path and body; a form counts without the boundary, which clients draw anew each time."""
    digest = hashlib.sha256(f"{http.method} {http.path}\n".encode("utf-8", "surrogatepass"))
    body = http.environ["wsgi.input"]
    if boundary := http.mimetype_params.get("boundary", "").encode("latin-1", "replace"):
        digest.update(body.read().replace(boundary, b""))
    else:
        while piece := body.read(PIECE):
            digest.update(piece)
    body.seek(0)
    return digest.hexdigest()


def prefers_async() -> bool:
    """Whether the client wants an answer before the work is done (RFC 7240)."""
    preferences = http.headers.get("Prefer", "").lower().split(",")
    return "respond-async" in (text.split(";")[0].strip() for text in preferences)


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
