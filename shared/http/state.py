"""The host's state over HTTP: whether it is loaded, ready and whole, how far a request is, and its end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from flask import Response, jsonify
from flask import request as http
from pydantic import BaseModel, Field

from shared.http.dispatch import Dispatcher
from shared.http.metrics import MEDIA_TYPE
from shared.http.routes import Answer, App, Route, text
from shared.launch.wording import shown


class Cancelled(BaseModel):
    """Answer of POST /cancel."""

    message: str
    cancelled: bool


class Health(BaseModel):
    """Answer of GET /health."""

    state: Literal["loading", "ready", "busy", "broken", "stopping"]
    message: Annotated[str, Field(description="why the host is broken, or what it is loading")]
    loaded: Annotated[int, Field(description="percent of the way to ready, by stages of loading")]
    backend: str
    type: str
    plan: Annotated[dict[str, Any], Field(description="how the work is divided over the ranks")]
    world_size: int
    queue_length: Annotated[int, Field(description="requests that wait")]
    ranks: Annotated[
        list[dict[str, Any]],
        Field(description="device; memory in MiB, now and at the latest request's peak; bytes of parameters"),
    ]
    versions: dict[str, str]
    uptime_seconds: float
    step_age_seconds: Annotated[
        float | None, Field(description="since the running request's last step; null where none runs")
    ]


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add /initialize, /ready, /progress, /cancel, /health and /metrics."""
    status, queue = dispatcher.status, dispatcher.queue

    @app.serve(
        "GET",
        "/initialize",
        Route(
            "Whether the model is loaded",
            text("Ready", "OK"),
            others={202: text("Still loading", "WAIT")},
            errors=(503,),
        ),
    )
    def initialize() -> Response:
        if status.state == "loading":
            return _text("WAIT", 202)
        dispatcher.check_ready()
        return _text("OK")

    @app.serve(
        "GET",
        "/progress",
        Route(
            "Progress of the running request, else of the last one",
            text("0 to 100", "42", pattern="^[0-9]+$"),
            errors=(),
        ),
    )
    def progress() -> Response:
        return _text(str(int(queue.progress())))

    @app.serve(
        "POST",
        "/cancel",
        Route(
            "Cancel the running request at the next step boundary",
            Answer("Whether there was one", Cancelled),
            errors=(),
            query={"id": "X-Request-Id of one request, which may still wait; absent: the running one"},
        ),
    )
    def cancel() -> Response:
        id = http.args.get("id")
        cancelled = queue.cancel_running() if id is None else queue.cancel(id)
        message = (
            "OK"
            if cancelled
            else "no request is running"
            if id is None
            else f"no request {shown(id)} is running or waiting"
        )
        return jsonify({"message": message, "cancelled": cancelled})

    @app.serve(
        "GET",
        "/ready",
        Route("For probes: whether requests are taken", text("Ready or busy", "OK"), errors=(503,)),
    )
    def ready() -> Response:
        dispatcher.check_ready()
        return _text("OK")

    @app.serve(
        "GET",
        "/health",
        Route(
            "State of the host and its ranks",
            Answer("Alive and whole", Health),
            others={503: Answer("Broken, or a step is older than all time-outs", Health)},
            errors=(),
            is_open=True,
        ),
    )
    def health() -> Response:
        age = queue.step_age()
        patience = max(dispatcher.config.request_timeout, dispatcher.config.collective_timeout)
        stuck = age is not None and age > patience
        response = jsonify(
            status.health(queue) | {"step_age_seconds": None if age is None else round(age, 1)}
        )
        response.status_code = 503 if stuck or status.state == "broken" else 200
        return response

    @app.serve(
        "GET",
        "/metrics",
        Route("Prometheus metrics", text("Prometheus text", "diffusion_queue_length 0.0"), errors=()),
    )
    def metrics() -> Response:
        return Response(dispatcher.metrics.text(), content_type=MEDIA_TYPE)


def _text(text: str, status: int = 200) -> Response:
    return Response(text, status, mimetype="text/plain")
