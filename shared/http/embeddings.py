"""GET /embeddings: the textual inversions of --embeddings_dir, by the words that prompts use"""

from __future__ import annotations

from typing import Annotated, Any

from flask import Response, jsonify
from pydantic import BaseModel, Field

from shared.http.dispatch import Dispatcher
from shared.http.routes import Answer, App, Route


class EmbeddingEntry(BaseModel):
    """One embedding: its word, how many vectors it has, and how wide they are in all."""

    name: str
    vectors: int | None = None
    shape: Annotated[int | None, Field(description="width of a vector, of both text encoders together")] = (
        None
    )
    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    left_out: Annotated[str | None, Field(description="why this model cannot use it")] = None


class EmbeddingNames(BaseModel):
    """Answer of GET /embeddings."""

    message: str
    embeddings: list[EmbeddingEntry]


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add the list, and A1111's form of it."""

    @app.serve(
        "GET",
        "/embeddings",
        Route(
            "The embeddings in --embeddings_dir, by the words that prompts use",
            Answer("All of them", EmbeddingNames),
            errors=(503,),
        ),
    )
    def embeddings() -> Response:
        dispatcher.check_ready()
        return jsonify({"message": "OK", "embeddings": dispatcher.status.embeddings})

    @app.serve("GET", "/sdapi/v1/embeddings", Route("A1111: the embeddings, and those that do not fit"))
    def a1111_embeddings() -> Response:
        dispatcher.check_ready()
        return jsonify({"loaded": _theirs(dispatcher, False), "skipped": _theirs(dispatcher, True)})


def _theirs(dispatcher: Dispatcher, left_out: bool) -> dict[str, dict[str, Any]]:
    """A1111's entries. They need a shape and a number of vectors, so broken files are not among them."""
    keys = ("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors")
    return {
        one["name"]: {key: one.get(key) for key in keys}
        for one in dispatcher.status.embeddings
        if ("left_out" in one) == left_out and "vectors" in one
    }
