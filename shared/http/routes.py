"""What a route declares beside its function, for /openapi.json, the token check and the bound of its body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flask import Flask, Request
from pydantic import BaseModel
from werkzeug.formparser import FormDataParser

from shared.http.connections import MAX_BODY, SMALL_BODY
from shared.http.negotiate import JSON

Schema = dict[str, Any]
View = TypeVar("View", bound=Callable[..., Any])


@dataclass(frozen=True)
class Answer:
    """One answer of a route."""

    description: str
    model: type[BaseModel] | None = None  # of its JSON
    media: Mapping[str, Schema] = field(default_factory=dict)  # of other forms: media type -> its object
    headers: Mapping[str, Schema] = field(default_factory=dict)


def text(description: str, example: str, **schema: Any) -> Answer:
    """Plain text."""
    media = {"text/plain": {"schema": {"type": "string", **schema}, "example": example}}
    return Answer(description, media=media)


def stream(description: str, media_type: str) -> Answer:
    """Anything else than JSON, without a schema."""
    return Answer(description, media={media_type: {"schema": {"type": "string"}}})


AS_THERE = Answer("As that API has it", media={JSON: {"schema": {"type": ["object", "array", "null"]}}})


@dataclass(frozen=True)
class Route:
    """One method of one path."""

    summary: str
    answer: Answer = AS_THERE
    others: Mapping[int, Answer] = field(default_factory=dict)  # by status
    errors: tuple[int, ...] | None = None  # beside 401, in this API's form; None: in another API's form
    body: type[BaseModel] | None = None
    query: Mapping[str, str] = field(default_factory=dict)  # parameters that may be given: what they mean
    is_open: bool = False  # asks for no token
    max_body: int = SMALL_BODY  # bytes
    makes_pictures: bool = False  # is counted by /metrics and logged


def picture_route(summary: str, **more: Any) -> Route:
    """A route whose body may hold pictures and whose answer does."""
    return Route(summary, max_body=MAX_BODY, makes_pictures=True, **more)


class _Form(FormDataParser):
    """Werkzeug's, but a form that it cannot read is an error and not an empty form."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"silent": False})


class _Request(Request):
    form_data_parser_class = _Form


class App(Flask):
    """A Flask application whose routes say what they are."""

    request_class = _Request

    def __init__(self) -> None:
        super().__init__("shared.http.server", static_folder=None)
        self.url_map.merge_slashes = False  # a redirect would be an HTML page
        self.routes: dict[str | None, Route] = {}
        """By Flask's name of the endpoint."""

    def serve(self, method: str, path: str, route: Route) -> Callable[[View], View]:
        """Decorator: the function answers this method of this path."""
        endpoint = f"{method} {path}".replace(".", "_")  # Flask takes what is before a dot for a blueprint

        def add(view: View) -> View:
            self.add_url_rule(path, endpoint, view, methods=[method])
            self.routes[endpoint] = route
            return view

        return add
