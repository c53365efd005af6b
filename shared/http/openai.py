"""OpenAI's image API, for the openai SDK, Open WebUI, InvokeAI and others that use it.

Fields of POST /generate may stand beside OpenAI's own (the SDK's `extra_body`), which decide where both say
the same. Fields of OpenAI's that have no meaning here (quality, style, ...) are accepted, with a warning.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, jsonify
from flask import request as http
from pydantic_core import PydanticCustomError

from shared.api.codecs import check_image, has_alpha
from shared.api.faults import FieldProblem, RequestError
from shared.api.jobs import Order
from shared.api.media import encode_image, open_image
from shared.api.parsing import check_request
from shared.api.replies import File
from shared.api.requests import json_value
from shared.api.retouch import transparent_mask
from shared.api.warned import merged, warn, with_warnings
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.incoming import caller, check_json_type, json_body
from shared.http.routes import App, Route, picture_route
from shared.launch.flags import HostConfig
from shared.launch.wording import shown

MAX_PICTURES = 10  # of one request, as in OpenAI's API
PREFIX = "/v1/"
# OpenAI's fields that have no meaning here, and the values that ask for nothing.
_MEANINGLESS: dict[str, tuple[object, ...]] = {
    "quality": ("auto", "standard", "medium"),
    "style": (),
    "output_compression": (100,),
    "input_fidelity": ("low",),
}
_UNREAD = frozenset({"model", "user", "moderation"})  # for OpenAI's own models and accounts
_OURS = {"prompt": "positive", "negative_prompt": "negative"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()} | {
    "width": "size",
    "height": "size",
    "pictures": "n",
}
_SEVERAL = "[]"  # suffix of the name of a part that may be repeated
_TEXTS = frozenset({"prompt", "positive", "negative", "negative_prompt", "size"})


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error shape; `errors` beside it has every fault, as /generate tells them."""
    first = error.problems[0].field if error.problems else None
    codes = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded", 503: "unavailable"}
    return {
        "error": {
            "message": error.message,
            "type": "server_error" if error.status >= 500 else "invalid_request_error",
            "param": first and _THEIRS.get(first, first),
            "code": codes.get(error.status),
        },
        "errors": [{"field": _THEIRS.get(p.field, p.field), "problem": p.problem} for p in error.problems],
    }


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add /v1/models and /v1/images."""
    config = dispatcher.config
    model = {
        "id": config.model_id,
        "object": "model",
        "created": int(dispatcher.status.started),
        "owned_by": config.backend,
    }

    @app.serve("GET", "/v1/models", Route("OpenAI: the one model here"))
    def openai_models() -> Response:
        return jsonify({"object": "list", "data": [model]})

    @app.serve("GET", "/v1/models/<path:name>", Route("OpenAI: the one model here, by its name"))
    def openai_model(name: str) -> Response:
        if name != model["id"]:
            raise ApiError(404, f"there is no model {shown(name)}; the only one is {model['id']!r}")
        return jsonify(model)

    @app.serve(
        "POST",
        "/v1/images/generations",
        picture_route("OpenAI: pictures from a prompt; /generate's fields may be added"),
    )
    def openai_generations() -> Response:
        check_json_type()
        return _answer(dispatcher, json_body)

    @app.serve(
        "POST",
        "/v1/images/edits",
        picture_route("OpenAI: a picture from a picture, where the type takes one"),
    )
    def openai_edits() -> Response:
        if http.mimetype != "multipart/form-data":
            given = http.headers.get("Content-Type") or "none"
            raise ApiError(415, f"Content-Type must be multipart/form-data; got {shown(given)}")

        def read() -> dict[str, Any]:
            data = _edited(form_body(), config)
            if "positive" not in config.spec.fields:
                # OpenAI's API always asks for a prompt; a type without one ignores it.
                data.pop("prompt", None)
            return data

        return _answer(dispatcher, read)

    @app.serve("POST", "/v1/images/variations", picture_route("OpenAI: refused in words"))
    def openai_variations() -> Response:
        raise ApiError(
            422,
            "variations have no prompt, which is not supported: post the picture and one to /v1/images/edits",
        )


def form_body() -> dict[str, Any]:
    """A multipart form with a picture as the JSON object that it stands for; pictures become base64."""
    data: dict[str, Any] = {}
    try:
        texts, pictures = http.form, http.files
    except (ValueError, TypeError) as error:  # werkzeug's TypeError: a part without a name
        problem = FieldProblem("", f"the body is not valid multipart/form-data: {shown(str(error))}")
        raise RequestError(400, [problem]) from None
    if None in texts or None in pictures:
        raise RequestError(400, [FieldProblem("", "a part of the form has no name")])
    for name, (text, *more) in texts.lists():
        if more:
            raise RequestError(400, [FieldProblem(name, f"must be given once, got {len(more) + 1} times")])
        if "\ufffd" in text:  # what werkzeug puts for bytes that it cannot decode
            raise RequestError(400, [FieldProblem(name, "must be UTF-8")])
        if name in _TEXTS:
            data[name] = text
            continue
        try:
            data[name] = json_value(text)
        except ValueError:
            data[name] = text
    found: dict[str, list[str]] = {}
    for name, files in pictures.lists():
        field = name.removesuffix(_SEVERAL)
        if field in data:
            raise RequestError(400, [FieldProblem(field, "must be given once, got a text and a file")])
        found.setdefault(field, []).extend(base64.b64encode(file.read()).decode() for file in files)
    return data | {name: files[0] if len(files) == 1 else files for name, files in found.items()}


def _edited(data: dict[str, Any], config: HostConfig) -> dict[str, Any]:
    """The fields of an edit with what OpenAI's picture and mask mean here.

    Raises:
        RequestError: 400 with their faults.
    """
    image, mask = data.get("image"), data.get("mask")
    problems = []
    if not image:
        problems.append(FieldProblem("image", "is needed: a file with the picture to edit"))
    elif isinstance(image, list) and config.spec.output == "image" and config.spec.most_pictures == 1:
        text = f"must be one picture for type {config.spec.name}, got {len(image)}"
        problems.append(FieldProblem("image", text))
    masked = mask is not None and "mask" in config.spec.fields
    try:
        if masked:
            picture = open_image(check_image(mask, "mask"))
            data["mask"] = encode_image(transparent_mask(picture), "png")
            if not has_alpha(picture):
                text = "must be transparent where the picture is painted anew, but nothing of it is"
                problems.append(FieldProblem("mask", text))
        elif isinstance(image, str) and has_alpha(open_image(check_image(image))):
            warn("image: what is transparent in it counts only in a mask; the whole picture is painted")
    except PydanticCustomError as error:
        problems.append(FieldProblem("mask" if masked else "image", error.message()))
    if problems:
        raise RequestError(400, problems)
    return data


def _answer(dispatcher: Dispatcher, read: Callable[[], dict[str, Any]]) -> Response:
    config = dispatcher.config

    def parse() -> Order:
        return Order(check_request(translate(read(), config), config))

    _, replies = dispatcher.run(caller(), parse)
    body = {
        "created": int(time.time()),
        "data": [{"b64_json": File(r.output[0]), "seed": r.seed} for r in replies],
        "output_format": replies[0].format,
        "size": f"{replies[0].width}x{replies[0].height}",
        "background": "opaque",
    }
    return jsonify(with_warnings(body, merged(*(r.warnings for r in replies))))


def translate(data: dict[str, Any], config: HostConfig) -> dict[str, Any]:
    """OpenAI's fields -> a body of POST /generate.

    Raises:
        RequestError: 400 with the faults of OpenAI's own fields.
    """
    problems: list[FieldProblem] = []
    ours = {k: v for k, v in data.items() if k not in (*_MEANINGLESS, *_UNREAD) and v is not None}
    warn_of_model(data, config)
    for name, nothing in _MEANINGLESS.items():
        if (value := data.get(name)) is not None and value not in nothing:
            warn(f"{name}: has no effect on this host; got {shown(value)}")
    rename(ours, _OURS | {"n": "pictures"})
    count = ours.pop("pictures", 1)
    if type(count) is not int or not 1 <= count <= MAX_PICTURES:
        problems.append(FieldProblem("n", f"must be 1 to {MAX_PICTURES}, got {shown(count)}"))
    else:
        ours["pictures"] = count
    pop_size(ours, problems)
    for name, allowed in (
        ("response_format", ("b64_json",)),
        ("background", ("auto", "opaque")),
        ("stream", (False,)),
        ("partial_images", (0,)),
    ):
        value = ours.pop(name, allowed[0])
        if value not in allowed:
            texts = " or ".join(str(a).lower() for a in allowed)
            problems.append(FieldProblem(name, f"must be {texts} on this host, got {shown(value)}"))
    if config.spec.output == "video" and "output_format" not in ours:
        ours["output_format"] = "webp"
    if config.spec.output == "video" and ours.get("output_format") == "png":
        problems.append(FieldProblem("output_format", "must be webp, gif or mp4 for a video, got 'png'"))
    if problems:
        _add_own_faults(problems, ours, config)
        raise RequestError(400, problems)
    return ours


def warn_of_model(data: dict[str, Any], config: HostConfig) -> None:
    """Warn where a client names another model than the one here."""
    if (wanted := data.get("model")) not in (None, "", config.model_id):
        warn(f"model: the only one here is {config.model_id!r}, which is used; got {shown(wanted)}")


def rename(ours: dict[str, Any], names: Mapping[str, str]) -> None:
    """OpenAI's fields -> ours, in place; ours have no effect where both are given, with a warning."""
    for theirs, name in names.items():
        if theirs in ours:
            _take(ours, name, ours.pop(theirs), theirs)


def _take(ours: dict[str, Any], name: str, value: Any, theirs: str) -> None:
    """Put a value of a field of OpenAI's in the place of one of ours, which has no effect then."""
    if ours.get(name, value) != value:
        warn(f"{name}: has no effect, as {theirs} is given too")
    ours[name] = value


def pop_size(ours: dict[str, Any], problems: list[FieldProblem]) -> None:
    """OpenAI's `size` -> width and height in pixels; its fault goes to `problems`."""
    size = ours.pop("size", "auto")
    if size == "auto":
        return
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size) if isinstance(size, str) else None
    if match:
        for name, side in zip(("width", "height"), match.groups(), strict=True):
            _take(ours, name, int(side), "size")
    else:
        problems.append(FieldProblem("size", f'must be "auto" or such as "1024x1024", got {shown(size)}'))


def _add_own_faults(problems: list[FieldProblem], ours: dict[str, Any], config: HostConfig) -> None:
    """All faults at once: what /generate would say of the rest."""
    known = {k: v for k, v in ours.items() if k not in {p.field for p in problems}}
    try:
        check_request(known, config)
    except RequestError as error:
        problems += error.problems
