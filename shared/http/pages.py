"""The browser's side of a host: the page and its files, what the launch offers, and the stream of events.

Imports no torch.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from flask import Response, jsonify
from flask import request as http
from PIL import Image
from pydantic import BaseModel, Field
from werkzeug.exceptions import NotFound

from shared.api.codecs import MAX_FRAMES, MAX_INPUTS, MAX_SIDE
from shared.api.jobs import GenerationJob, Preview
from shared.api.media import encode_image
from shared.api.queue import JobQueue
from shared.api.requests import COMMON_FIELDS, FIELD_NOTES, NEEDS_FLAG, GenerateRequest, launch_defaults
from shared.api.status import HostStatus
from shared.api.store import state_of
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.negotiate import RAW_FORMATS
from shared.http.routes import Answer, App, Route, stream
from shared.http.wsgi import MAX_WATCHERS
from shared.launch.checks import start_problem, too_long
from shared.launch.flags import HostConfig
from shared.models import ModelSpec, Start, schedulers_for
from shared.models.spec import Kind

FOLDER = Path(__file__).parent / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {path.name: _TYPES[path.suffix] for path in sorted(FOLDER.iterdir())}
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data: blob:",
    "media-src blob:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
POLL = 0.1  # seconds between two checks of the queue
HEARTBEAT = 5.0  # seconds of silence at most: proxies cut idle streams, and clients that are gone are noticed
MAX_UNSENT = 1 << 20  # bytes; a client that leaves more unread is disconnected and may reconnect


FILE = stream("The file", "*/*")  # it holds nothing of the launch, so its routes ask for no token


class LaunchField(BaseModel):
    """A field of POST /generate as a form shows it. Bounds have JSON Schema's names."""

    label: Annotated[str, Field(description="empty: no form needs it")]
    kind: Literal["text", "number", "switch", "choice", "image", "tensor", "object"]
    unit: str = ""
    step: Annotated[float | None, Field(description="of a number; absent: any")] = None
    minimum: float | None = None
    maximum: float | None = None
    exclusiveMinimum: float | None = None
    exclusiveMaximum: float | None = None
    choices: list[str] | None = None
    most: Annotated[int | None, Field(description="pictures that it takes; absent: one")] = None


class Launch(BaseModel):
    """Answer of GET /launch."""

    backend: str
    type: str
    title: str
    output: Literal["image", "video"]
    fields: Annotated[
        dict[str, LaunchField], Field(description="of POST /generate, in the order of its schema")
    ]
    needs: list[str]
    edits: Annotated[bool, Field(description="whether the model looks at `image`, and starts from noise")]
    defaults: dict[str, Any]
    strengths: Annotated[
        dict[str, float], Field(description="the default of `strength` with `image`, and with `mask` too")
    ]
    size_multiple: Annotated[int, Field(description="pixels")]
    sizes: Annotated[
        list[tuple[int, int]],
        Field(description="widths and heights in pixels: the launch's own, others of as many pixels"),
    ]
    schedulers: list[str]
    formats: list[str]


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add GET /, /web/..., /launch and /events."""
    files = {name: (FOLDER / name).read_bytes() for name in FILES}
    watchers = Watchers(dispatcher.status, dispatcher.queue)

    @app.serve("GET", "/", Route("The web page", FILE, errors=(), is_open=True))
    def page() -> Response:
        return Response(files["index.html"], mimetype=FILES["index.html"], headers=HEADERS)

    @app.serve(
        "GET",
        "/web/<name>",
        Route("The page's style, script and icon", FILE, errors=(404,), is_open=True),
    )
    def web_file(name: str) -> Response:
        if name not in files:
            raise NotFound
        return Response(files[name], mimetype=FILES[name], headers=HEADERS)

    @app.serve(
        "GET",
        "/launch",
        Route(
            "What this launch takes: fields, defaults, schedulers, formats",
            Answer("All that a form for it needs", Launch),
            errors=(),
        ),
    )
    def launch() -> Response:
        return jsonify(offer(dispatcher.config))

    @app.serve(
        "GET",
        "/events",
        Route(
            "What happens, as server-sent events: host, jobs, preview (a JPEG), end, beat",
            stream("Without end; each event's data is JSON", "text/event-stream"),
            errors=(503,),
        ),
    )
    def events() -> Response:
        return watchers.stream()


def offer(config: HostConfig) -> dict[str, Any]:
    """What this launch takes and what it fills in itself: all that a form for it needs."""
    spec = config.spec
    missing = {name for name, flag in NEEDS_FLAG.items() if not getattr(config, flag)}
    needs = [
        name for name, on in (("image", spec.image == "needed"), ("control_image", config.control_net)) if on
    ]
    defaults = launch_defaults(config) | {
        "controlnet_scale": _alike(config.control_net),
        "ip_adapter_scale": _alike(config.ip_adapter),
    }
    starts = _starts(config)
    strengths = {name: start.strength for name, start in starts.items() if start.strength is not None}
    if spec.image == "start" or spec.refers:
        missing |= {"image", "mask"} - starts.keys() | (set() if strengths else {"strength"})
    missing |= {f"{name}_scale" for name in missing}  # of a picture that is not taken
    fields = (spec.fields | COMMON_FIELDS) - missing
    schedulers = schedulers_for(spec)
    formats = [f for f in RAW_FORMATS[spec.output] if f != "latent"]
    choices = {"scheduler": schedulers, "output_format": formats}
    found = sizes(*config.size, spec.size_multiple) if "width" in fields else []
    return {
        "backend": config.backend,
        "type": spec.name,
        "title": spec.title,
        "output": spec.output,
        "fields": {
            name: _field(name, spec, choices.get(name)) | _most(name, config) | _longest(name, config)
            for name in FIELD_NOTES
            if name in fields
        },
        "needs": needs,
        "edits": spec.refers,
        "defaults": {name: value for name, value in defaults.items() if name in fields and value is not None},
        "strengths": strengths,
        "size_multiple": spec.size_multiple,
        "sizes": [size for size in found if not any(too_long(config, side) for side in size)],
        "schedulers": schedulers,
        "formats": formats,
    }


def _starts(config: HostConfig) -> dict[str, Start]:
    """By request field diffusers' pipeline that starts from it with this launch."""
    kinds: dict[str, Kind] = {"image": "image", "mask": "inpaint"}
    starts = {
        name: config.spec.start(kind, bool(config.control_net))
        for name, kind in kinds.items()
        if start_problem(config, kind) is None
    }
    return {name: start for name, start in starts.items() if start}


def _alike(scales: Mapping[str, float] | None) -> float | None:
    """The scale of all of them, if they have one: a request's one number would be all of theirs."""
    found = set((scales or {}).values())
    return found.pop() if len(found) == 1 else None


def _most(name: str, config: HostConfig) -> dict[str, int]:
    """`most` of a field that takes several pictures."""
    start = config.spec.start("image", bool(config.control_net))
    adapters = len(config.ip_adapter or ())
    together = adapters == 1 and config.spec.ip_adapter_takes == "several"
    most = {
        "image": MAX_FRAMES if start is not None and start.frames else config.spec.most_pictures,
        "control_image": len(config.control_net or ()),
        "ip_image": MAX_INPUTS if together else adapters,
    }.get(name, 1)
    return {"most": most} if most > 1 else {}


def _longest(name: str, config: HostConfig) -> dict[str, int]:
    """`maximum` of a side that the checkpoint has positions for."""
    if name not in ("width", "height") or config.position_table is None:
        return {}
    return {"maximum": min(math.prod(config.position_table), MAX_SIDE)}


_SHAPES = ((1, 1), (4, 3), (3, 2), (16, 9))


def sizes(width: int, height: int, multiple: int) -> list[tuple[int, int]]:
    """This size, a square, and wide and tall ones: of about as many pixels, and not of more."""
    area = width * height
    grid = math.lcm(multiple, 64 if area >= 320 * 320 else 16)
    found = [(width, height)]
    for wide, tall in _SHAPES:
        short = max(round(math.sqrt(area * tall / wide) / grid), 1) * grid
        long = area // short // grid * grid
        if long >= short:
            found += [(long, short), (short, long)]
    return list(dict.fromkeys(found))


_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _field(name: str, spec: ModelSpec, choices: list[str] | None) -> dict[str, Any]:
    """A LaunchField, from what its definition says."""
    schema = _schema(name)
    field: dict[str, Any] = {"label": FIELD_NOTES[name].label, "kind": _kind(schema)}
    field |= {bound: schema[bound] for bound in _BOUNDS if bound in schema}
    if FIELD_NOTES[name].unit:
        field["unit"] = FIELD_NOTES[name].unit
    if schema.get("type") == "integer":
        field["step"] = 1
    if "multipleOf" in schema:
        field["step"] = spec.size_multiple
        field["minimum"] = -(-schema["minimum"] // spec.size_multiple) * spec.size_multiple
    if choices is None and field["kind"] == "choice":
        choices = schema.get("enum") or [schema["const"]]
    if choices is not None:
        field |= {"kind": "choice", "choices": choices}
    return field


def _schema(name: str) -> dict[str, Any]:
    """The JSON schema of a field that is not null."""
    schema: dict[str, Any] = _PROPERTIES[name]
    return next((one for one in schema.get("anyOf", []) if one.get("type") != "null"), schema)


_PROPERTIES = GenerateRequest.model_json_schema()["properties"]


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return "choice"
    if "contentEncoding" in schema:
        return "image" if "contentMediaType" in schema else "tensor"
    kinds = {"integer": "number", "number": "number", "boolean": "switch", "object": "object"}
    kind = schema["type"]  # a field that also takes a list of them shows as one
    return kinds.get(kind[0] if isinstance(kind, list) else kind, "text")


class Watchers:
    """Streams of server-sent events: the host's state, the running and the waiting requests, previews.

    Each stream compares the state with what it last sent, a few times a second; rank 0's loop never waits for
    one. A stream holds a thread of the server, so there are at most MAX_WATCHERS.
    """

    def __init__(self, status: HostStatus, queue: JobQueue) -> None:
        self.status = status
        self.queue = queue
        self._lock = threading.Lock()

    def stream(self) -> Response:
        """The response to GET /events. Raises ApiError 503 beyond MAX_WATCHERS."""
        with self._lock:
            if self.queue.watchers >= MAX_WATCHERS:
                raise ApiError.unavailable("full", f"at most {MAX_WATCHERS} clients may watch at once")
            self.queue.watchers += 1
        gone: Callable[[], bool] = http.environ.get("waitress.client_disconnected", lambda: False)
        unsent: Callable[[], int] = http.environ.get("host.unsent", lambda: 0)
        response = Response(self._events(gone, unsent), mimetype="text/event-stream")
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold the events back
        # A generator that was never started runs no `finally`, so its place is freed here.
        seat = contextlib.ExitStack()
        seat.callback(self._leave)
        response.call_on_close(seat.close)
        return response

    def _leave(self) -> None:
        with self._lock:
            self.queue.watchers -= 1

    def _events(self, gone: Callable[[], bool], unsent: Callable[[], int]) -> Iterator[bytes]:
        sent: dict[str, str] = {}
        shown: tuple[str, Preview] | None = None
        latest = self.queue.last
        open_job = latest if latest is not None and not latest.done else None
        sent_at = time.monotonic()
        while not gone() and unsent() <= MAX_UNSENT:
            ending = self.queue.closed
            news = [(name, text) for name, text in self._state() if sent.get(name) != text]
            sent.update(news)
            if open_job is not None and open_job.done:
                news.append(("end", json.dumps(_end(open_job))))
                open_job = None
            if open_job is None and self.queue.last is not latest:
                latest = open_job = self.queue.last
            preview = self._preview()
            if preview is not None and preview != shown and not unsent():
                shown = preview
                news.append(("preview", _preview_text(*preview)))
            if not news and time.monotonic() - sent_at > HEARTBEAT - POLL:
                news.append(("beat", "{}"))
            if news:
                sent_at = time.monotonic()
                yield "".join(f"event: {name}\ndata: {text}\n\n" for name, text in news).encode()
            if ending:
                return
            time.sleep(POLL)

    def _state(self) -> Iterator[tuple[str, str]]:
        health = self.status.health(self.queue)
        del health["uptime_seconds"], health["queue_length"]
        yield "host", json.dumps(health)
        running = self.queue.generation
        jobs = {
            "running": None
            if running is None or running.done
            else {
                "id": running.id,
                "step": running.step,
                "steps": running.steps or running.request.steps,
                "picture": min(len(running.made) + 1, running.pictures),
                "pictures": running.pictures,
                "progress": round(running.progress, 1),
            },
            "waiting": [job.id for job in self.queue.waiting()],
        }
        yield "jobs", json.dumps(jobs)

    def _preview(self) -> tuple[str, Preview] | None:
        job = self.queue.generation
        return None if job is None or job.done or job.preview is None else (job.id, job.preview)


@functools.lru_cache(maxsize=2)
def _preview_text(id: str, preview: Preview) -> str:
    """Encoded once for all who watch."""
    picture = Image.frombytes("RGB", (preview.width, preview.height), preview.rgb)
    data = base64.b64encode(encode_image(picture, "jpeg")).decode()
    return json.dumps({"id": id, "step": preview.step, "jpeg": data})


def _end(job: GenerationJob) -> dict[str, Any]:
    message = "OK" if job.error is None else job.error.reason
    return {"id": job.id, "outcome": state_of(job.error), "message": message}
