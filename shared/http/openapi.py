"""GET /openapi.json: the API of one host as OpenAPI 3.1, made from what the routes declare."""

from __future__ import annotations

import re
from typing import Any

from flask import Response, jsonify
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from shared.api.replies import ErrorAnswer
from shared.api.requests import COMMON_FIELDS, launch_defaults
from shared.http.negotiate import JSON
from shared.http.routes import AS_THERE, Answer, App, Route
from shared.launch.flags import HostConfig

ERRORS = {
    400: "Bad request; all of its faults at once",
    401: "No bearer token, or not this host's --api_key",
    404: "No such route, job or file",
    405: "No such method on this route",
    409: "Not in this state: the LoRA's weights were fused, quantized or compiled, or it is loaded already; "
    "the job is not done; the X-Request-Id belongs to another request",
    408: "The request came too slowly",
    413: "The body is larger than this route takes (64 MiB with pictures, else 64 KiB)",
    415: "The body is not JSON",
    422: "A request that this model or this launch cannot serve",
    429: "As many requests of this client wait as may (--max_queue_per_client); see Retry-After",
    499: "Cancelled, by POST /cancel or because the client left",
    500: "The model failed at this request; the host goes on",
    503: "Loading, queue full, or broken; see Retry-After",
    504: "Timed out (--request_timeout)",
    507: "The temporary folder or the memory has no room for this request",
}
_RETRIES = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}

_EXAMPLES: dict[str, Any] = {
    "positive": "a red circle on a blue background",
    "negative": "blurry",
    "steps": 20,
    "seed": 7,
    "output_format": "png",
}
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def add_route(app: App, config: HostConfig) -> None:
    """Add GET /openapi.json, last: the document lists all routes."""
    document: dict[str, Any] = {}
    answer = Answer("OpenAPI 3.1", media={JSON: {"schema": {"type": "object"}}})

    @app.serve("GET", "/openapi.json", Route("This document", answer, errors=()))
    def openapi_document() -> Response:
        return jsonify(document)

    document |= openapi(app, config)


def openapi(app: App, config: HostConfig) -> dict[str, Any]:
    """The document of one launch: defaults are its own, fields that its type refuses say so."""
    _, schema = models_json_schema(_models(app), ref_template="#/components/schemas/{model}")
    schemas = schema["$defs"]
    _tell_launch(schemas["GenerateRequest"], config)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": f"multigpu diffusion: {config.spec.title} on {config.backend}",
            "version": "1",
            "description": "One request at a time reaches the ranks; the rest wait. "
            "Clients take turns, and the requests of one client are served in order of arrival.",
        },
        "paths": _paths(app),
        "components": {"schemas": schemas, "responses": _responses()},
    }
    if config.api_key is not None:
        document["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"api_key": []}]
    return document


def example_request(config: HostConfig) -> dict[str, Any]:
    """A request that the launch's type serves."""
    spec = config.spec
    request = {k: v for k, v in _EXAMPLES.items() if k in spec.fields | COMMON_FIELDS}
    if spec.output == "video":
        request["output_format"] = "mp4"
    for name, needed in (("image", spec.image == "needed"), ("control_image", bool(config.control_net))):
        if needed:
            request[name] = _PIXEL
    return request


def _tell_launch(schema: dict[str, Any], config: HostConfig) -> None:
    """Put the launch's defaults and refusals into the schema of GenerateRequest."""
    spec = config.spec
    defaults = launch_defaults(config) | {"output_format": "png"}
    schema["examples"] = [example_request(config)]
    for name, field in schema["properties"].items():
        field.pop("default", None)
        if name not in spec.fields | COMMON_FIELDS:
            field["description"] = f"type {spec.name} does not support {name}: answered 422"
        elif defaults.get(name) is not None:
            field["default"] = defaults[name]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _paths(app: App) -> dict[str, dict[str, Any]]:
    """Every rule of the application, by path and method, from what its route declares."""
    paths: dict[str, dict[str, Any]] = {}
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            operation = _operation(app.routes[rule.endpoint], sorted(rule.arguments))
            paths.setdefault(path, {})[method.lower()] = operation
    return paths


def _operation(route: Route, arguments: list[str]) -> dict[str, Any]:
    string = {"type": "string"}
    parameters = [
        *({"name": name, "in": "path", "required": True, "schema": string} for name in arguments),
        *(
            {"name": name, "in": "query", "schema": string, "description": meaning}
            for name, meaning in route.query.items()
        ),
    ]
    answers: dict[str, Any] = {str(code): _answer(answer) for code, answer in route.others.items()}
    if route.errors is None:
        answers["default"] = _answer(AS_THERE)
    else:
        codes = (*(() if route.is_open else (401,)), *route.errors)
        answers |= {str(code): {"$ref": f"#/components/responses/{code}"} for code in codes}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "responses": {"200": _answer(route.answer), **answers},
    }
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {JSON: {"schema": _ref(route.body.__name__)}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.is_open:
        operation["security"] = []
    return operation


def _answer(answer: Answer) -> dict[str, Any]:
    content = {JSON: {"schema": _ref(answer.model.__name__)}} if answer.model is not None else {}
    made: dict[str, Any] = {"description": answer.description, "content": content | dict(answer.media)}
    return made | ({"headers": dict(answer.headers)} if answer.headers else {})


def _models(app: App) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
    """The models of all bodies and answers."""
    found: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {(ErrorAnswer, "serialization"): None}
    for route in app.routes.values():
        if route.body is not None:
            found[route.body, "validation"] = None
        for answer in (route.answer, *route.others.values()):
            if answer.model is not None:
                found[answer.model, "serialization"] = None
    return list(found)


def _responses() -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for code, description in ERRORS.items():
        responses[str(code)] = _answer(Answer(description, ErrorAnswer))
        if code in (429, 503):
            responses[str(code)]["headers"] = _RETRIES
    return responses
