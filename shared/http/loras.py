"""LoRAs over HTTP: those in use, those in --lora_dir, and changes on a running host."""

from __future__ import annotations

import threading
from typing import Annotated

from flask import Response, jsonify
from flask import request as http
from pydantic import BaseModel, Field

from shared.api.faults import FieldProblem, RequestError
from shared.api.lora_dir import LoraNameError, a1111_loras, list_loras, lora_path
from shared.api.operations import AddLora, RemoveLora
from shared.api.parsing import LoraAnswer, LoraChange, LoraEntry, parse_lora_change
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.incoming import caller, check_json_type
from shared.http.routes import Answer, App, Route


class LoraFileEntry(BaseModel):
    """One file in --lora_dir, and what it says of itself."""

    name: str
    size: Annotated[int, Field(description="bytes")]
    title: str = ""
    base: Annotated[str, Field(description="the model that it was made for")] = ""
    trigger_words: list[str] = []


class LoraNames(BaseModel):
    """Answer of GET /loras."""

    message: str
    loras: list[LoraFileEntry]


def _change(summary: str) -> Route:
    return Route(
        summary,
        Answer("The LoRAs in use now", LoraAnswer),
        body=LoraChange,
        errors=(400, 409, 413, 415, 422, 429, 499, 500, 503),
    )


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """LoRAs change between two pictures, so a change waits its turn in the queue; the list never waits."""
    in_use = [LoraEntry(path=p, scale=s) for p, s in (dispatcher.config.lora or {}).items()]
    one_at_a_time = threading.Lock()

    @app.serve("GET", "/lora", Route("The LoRAs in use", Answer("All of them", LoraAnswer), errors=(503,)))
    def lora_list() -> Response:
        dispatcher.check_ready()
        return jsonify(LoraAnswer(loras=in_use).model_dump(exclude_none=True))

    @app.serve(
        "GET",
        "/loras",
        Route(
            "The LoRAs in --lora_dir, by the names that lora_scales and /lora take",
            Answer("All of them", LoraNames),
            errors=(),
        ),
    )
    def lora_names() -> Response:
        return jsonify({"message": "OK", "loras": list_loras(dispatcher.config)})

    @app.serve("GET", "/sdapi/v1/loras", Route("A1111: the LoRAs in --lora_dir, for <lora:name:scale>"))
    def a1111_names() -> Response:
        return jsonify(a1111_loras(dispatcher.config))

    @app.serve("POST", "/sdapi/v1/refresh-loras", Route("A1111: nothing to do, the folders are always read"))
    def a1111_refresh() -> Response:
        return jsonify(None)

    @app.serve("POST", "/lora", _change("Add a LoRA between two pictures"))
    @app.serve("DELETE", "/lora", _change("Remove a LoRA between two pictures"))
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
