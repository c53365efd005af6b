"""GET /openapi.json: the API of one host as OpenAPI 3.1, made from the pydantic models."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from shared.api.requests import (
    COMMON_FIELDS,
    MIME_TYPES,
    ErrorAnswer,
    GenerateAnswer,
    GenerateRequest,
    LoraAnswer,
    LoraChange,
)
from shared.http.negotiate import JSON, RAW_FORMATS
from shared.launch.flags import HostConfig

ERRORS = {
    400: "Bad request; all of its faults at once",
    401: "No bearer token, or not this host's --api_key",
    404: "No such route",
    405: "No such method on this route",
    409: "Not in this state: the LoRA's weights were fused, quantized or compiled, or it is loaded already",
    408: "The request came too slowly",
    413: "The body is larger than this route takes (64 MiB with pictures, else 64 KiB)",
    415: "The body is not JSON",
    422: "A request that this model or this launch cannot serve",
    499: "Cancelled, by POST /cancel or because the client left",
    500: "The model failed at this request; the host goes on",
    503: "Loading, queue full, or broken; see Retry-After",
    504: "Timed out (--request_timeout)",
    507: "The temporary folder or the memory has no room for this request",
}
_GENERATE_ERRORS = (400, 408, 413, 415, 422, 499, 500, 503, 504, 507)
_RETRIES = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}

_EXAMPLES: dict[str, Any] = {
    "positive": "a red circle on a blue background",
    "negative": "blurry",
    "steps": 20,
    "seed": 7,
    "output_format": "png",
}
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def openapi(config: HostConfig) -> dict[str, Any]:
    """The document of one launch: defaults are its own, fields that its type refuses say so."""
    _, schema = models_json_schema(
        [
            (GenerateRequest, "validation"),
            (GenerateAnswer, "serialization"),
            (ErrorAnswer, "serialization"),
            (LoraChange, "validation"),
            (LoraAnswer, "serialization"),
        ],
        ref_template="#/components/schemas/{model}",
    )
    schemas = schema["$defs"]
    _tell_launch(schemas["GenerateRequest"], config)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": f"multigpu diffusion: {config.spec.title} on {config.backend}",
            "version": "1",
            "description": "One request at a time reaches the ranks, in order of arrival; the rest wait.",
        },
        "paths": _paths(config) | _guest_paths(),
        "components": {"schemas": schemas | _SCHEMAS, "responses": _responses()},
    }
    if config.api_key is not None:
        document["components"]["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"api_key": []}]
        document["paths"]["/health"]["get"]["security"] = []
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
    spec, (width, height) = config.spec, config.size
    defaults = {
        "steps": spec.steps,
        "cfg": spec.cfg,
        "width": width,
        "height": height,
        "frames": spec.frames,
        "fps": spec.fps if spec.output == "video" else None,
        "output_format": "png",
    }
    schema["examples"] = [example_request(config)]
    for name, field in schema["properties"].items():
        field.pop("default", None)
        if name not in spec.fields | COMMON_FIELDS:
            field["description"] = f"type {spec.name} takes no {name}: answered 422"
        elif defaults.get(name) is not None:
            field["default"] = defaults[name]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _text(description: str, example: str, **schema: Any) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string", **schema}, "example": example}}
    return {"description": description, "content": content}


def _json(description: str, name: str) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": _ref(name)}}}


def _errors(*codes: int) -> dict[str, Any]:
    return {str(code): {"$ref": f"#/components/responses/{code}"} for code in (401, *codes)}


def _responses() -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for code, description in ERRORS.items():
        responses[str(code)] = _json(description, "ErrorAnswer")
        if code == 503:
            responses[str(code)]["headers"] = _RETRIES
    return responses


_EVENTS: dict[str, Any] = {
    "description": "Without end; each event's data is JSON",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
_PAGE: dict[str, Any] = {"description": "The file", "content": {"*/*": {"schema": {"type": "string"}}}}
_CANCEL_ID: dict[str, Any] = {
    "name": "id",
    "in": "query",
    "schema": {"type": "string"},
    "description": "X-Request-Id of one request, which may still wait; absent: the running one",
}

_SCHEMAS: dict[str, Any] = {
    "Cancelled": {
        "type": "object",
        "required": ["message", "cancelled"],
        "properties": {"message": {"type": "string"}, "cancelled": {"type": "boolean"}},
    },
    "LoraNames": {
        "type": "object",
        "required": ["message", "loras"],
        "properties": {
            "message": {"type": "string"},
            "loras": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name", "size"],
                    "properties": {
                        "name": {"type": "string"},
                        "size": {"type": "integer", "description": "bytes"},
                        "title": {"type": "string"},
                        "base": {"type": "string", "description": "the model that it was made for"},
                        "trigger_words": {"type": "array", "items": {"type": "string"}},
                    },
                },
            },
        },
    },
    "Launch": {
        "type": "object",
        "required": ["backend", "type", "title", "output", "fields", "needs", "defaults", "size_multiple"],
        "properties": {
            "backend": {"type": "string"},
            "type": {"type": "string"},
            "title": {"type": "string"},
            "output": {"enum": ["image", "video"]},
            "fields": {"type": "array", "items": {"type": "string"}, "description": "of POST /generate"},
            "needs": {"type": "array", "items": {"type": "string"}},
            "defaults": {"type": "object"},
            "size_multiple": {"type": "integer", "description": "pixels"},
            "schedulers": {"type": "array", "items": {"type": "string"}},
            "formats": {"type": "array", "items": {"type": "string"}},
        },
    },
    "Health": {
        "type": "object",
        "required": ["state", "backend", "type", "plan", "world_size", "queue_length", "ranks", "versions"],
        "properties": {
            "state": {"enum": ["loading", "ready", "busy", "broken", "stopping"]},
            "message": {
                "type": "string",
                "description": "why the host is broken, or what it is at in loading",
            },
            "loaded": {"type": "integer", "description": "percent of the way to ready, by stages of loading"},
            "backend": {"type": "string"},
            "type": {"type": "string"},
            "plan": {"type": "object", "description": "how the work is divided over the ranks"},
            "world_size": {"type": "integer"},
            "queue_length": {"type": "integer", "description": "requests that wait"},
            "ranks": {"type": "array", "items": {"type": "object"}, "description": "device, memory in MiB"},
            "versions": {"type": "object", "additionalProperties": {"type": "string"}},
            "uptime_seconds": {"type": "number"},
            "step_age_seconds": {
                "type": ["number", "null"],
                "description": "since the running request's last step; null where none runs",
            },
        },
    },
}


def _paths(config: HostConfig) -> dict[str, Any]:
    raw = {
        MIME_TYPES[f]: {"schema": {"type": "string", "contentMediaType": MIME_TYPES[f]}}
        for f in RAW_FORMATS[config.spec.output]
    }
    made = _json("The picture or video", "GenerateAnswer")
    made["content"] |= raw
    made["headers"] = {
        "X-Request-Id": {"schema": {"type": "string"}},
        "X-Seed": {"schema": {"type": "integer"}, "description": "with the bytes themselves"},
        "X-Warnings": {"schema": {"type": "string"}, "description": "`warnings` of the JSON answer"},
    }
    return {
        "/initialize": {
            "get": {
                "summary": "Whether the model is loaded",
                "responses": {
                    "200": _text("Ready", "OK"),
                    "202": _text("Still loading", "WAIT"),
                    **_errors(503),
                },
            }
        },
        "/ready": {
            "get": {
                "summary": "For probes: whether requests are taken",
                "responses": {"200": _text("Ready or busy", "OK"), **_errors(503)},
            }
        },
        "/progress": {
            "get": {
                "summary": "Progress of the running request, else of the last one",
                "responses": {"200": _text("0 to 100", "42", pattern="^[0-9]+$"), **_errors()},
            }
        },
        "/generate": {
            "post": {
                "summary": "Make a picture or a video",
                "requestBody": {"required": True, "content": {JSON: {"schema": _ref("GenerateRequest")}}},
                "responses": {"200": made, **_errors(*_GENERATE_ERRORS)},
            }
        },
        "/cancel": {
            "post": {
                "summary": "Cancel the running request at the next step boundary",
                "parameters": [_CANCEL_ID],
                "responses": {"200": _json("Whether there was one", "Cancelled"), **_errors()},
            }
        },
        "/events": {
            "get": {
                "summary": "What happens, as server-sent events: host, jobs, preview (a JPEG), end, beat",
                "responses": {"200": _EVENTS, **_errors(503)},
            }
        },
        "/launch": {
            "get": {
                "summary": "What this launch takes: fields, defaults, schedulers, formats",
                "responses": {"200": _json("All that a form for it needs", "Launch"), **_errors()},
            }
        },
        "/": {"get": {"summary": "The web page", "responses": {"200": _PAGE}, "security": []}},
        "/web/{name}": {
            "get": {
                "summary": "The page's style, script and icon",
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
                "responses": {"200": _PAGE, "404": {"$ref": "#/components/responses/404"}},
                "security": [],
            }
        },
        "/lora": {
            "get": {
                "summary": "The LoRAs in use",
                "responses": {"200": _json("All of them", "LoraAnswer"), **_errors(503)},
            },
            "post": _lora_change("Add a LoRA between two pictures"),
            "delete": _lora_change("Remove a LoRA between two pictures"),
        },
        "/loras": {
            "get": {
                "summary": "The LoRAs in --lora_dir, by the names that lora_scales and /lora take",
                "responses": {"200": _json("All of them", "LoraNames"), **_errors()},
            }
        },
        "/metrics": {
            "get": {
                "summary": "Prometheus metrics",
                "responses": {"200": _text("Prometheus text", "diffusion_queue_length 0.0"), **_errors()},
            }
        },
        "/health": {
            "get": {
                "summary": "State of the host and its ranks",
                "responses": {
                    "200": _json("Alive and whole", "Health"),
                    "503": _json("Broken, or a step is older than all time-outs", "Health"),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "summary": "This document",
                "responses": {
                    "200": {"description": "OpenAPI 3.1", "content": {JSON: {"schema": {"type": "object"}}}},
                    **_errors(),
                },
            }
        },
    }


def _lora_change(summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref("LoraChange")}}},
        "responses": {
            "200": _json("The LoRAs in use now", "LoraAnswer"),
            **_errors(400, 409, 413, 415, 422, 499, 500, 503),
        },
    }


def _guest_paths() -> dict[str, Any]:
    """The routes of other APIs, whose own documents say what goes in and out."""
    routes = {
        "/v1/models": ("get", "OpenAI: the one model here"),
        "/v1/images/generations": ("post", "OpenAI: pictures from a prompt; /generate's fields may be added"),
        "/v1/images/edits": ("post", "OpenAI: a picture from a picture, where the type takes one"),
        "/sdapi/v1/txt2img": ("post", "A1111: pictures from a prompt"),
        "/sdapi/v1/img2img": ("post", "A1111: a picture from a picture, where the type takes one"),
        "/sdapi/v1/png-info": ("post", "A1111: what a picture's file says of how it was made"),
        "/sdapi/v1/progress": ("get", "A1111: progress and jobs"),
        "/sdapi/v1/interrupt": ("post", "A1111: cancel the running request"),
        "/sdapi/v1/options": ("get", "A1111: the checkpoint"),
        "/sdapi/v1/sd-models": ("get", "A1111: the checkpoint, as a list"),
        "/sdapi/v1/samplers": ("get", "A1111: names of the type's schedulers"),
    }
    answer = {
        "description": "As that API has it",
        "content": {JSON: {"schema": {"type": ["object", "array"]}}},
    }
    return {
        path: {method: {"summary": summary, "responses": {"200": answer, "default": answer}}}
        for path, (method, summary) in routes.items()
    }
