"""The HTTP side of a host, on rank 0: one application of all routes, and how it is served.

Imports no torch and answers from the first second, while the model is loading.
"""

from __future__ import annotations

from werkzeug.exceptions import HTTPException

from shared.api.queue import JobQueue
from shared.api.status import HostStatus
from shared.api.store import JobStore
from shared.http import (
    a1111,
    embeddings,
    generate,
    jobs,
    legacy,
    loras,
    openai,
    openapi,
    pages,
    state,
    videos,
)
from shared.http.access import AccessRules
from shared.http.answers import Json
from shared.http.connections import MAX_BODY, SMALL_BODY
from shared.http.dispatch import Dispatcher
from shared.http.frame import add_frame, token_fits
from shared.http.routes import App
from shared.http.wsgi import Bound, Server
from shared.launch.flags import HostConfig

__all__ = ["Server", "body_bound", "create_app"]


def create_app(config: HostConfig, status: HostStatus, queue: JobQueue, store: JobStore | None = None) -> App:
    """The WSGI application of one host; it shares no state with another one.

    Args:
        config: the launch.
        status: what the host says of itself; written by rank 0's loop.
        queue: where requests wait for rank 0's loop.
        store: the accepted jobs; None: a new one, in memory.
    """
    app = App()
    app.config["MAX_CONTENT_LENGTH"] = app.config["MAX_FORM_MEMORY_SIZE"] = MAX_BODY
    app.json = Json(app)
    dispatcher = Dispatcher(config, status, queue, store)
    add_frame(app, dispatcher)
    for part in (state, generate, jobs, loras, embeddings, openai, videos, a1111, pages):
        part.add_routes(app, dispatcher)
    if config.legacy_pickle:
        legacy.add_routes(app, dispatcher)
    openapi.add_route(app, config)
    return app


def body_bound(app: App, config: HostConfig) -> Bound:
    """How large a body the server receives: none of foreign pages, and none without the token."""
    api_key, access = config.api_key, AccessRules(config)
    routes = app.url_map.bind("")

    def bound(method: str, path: str, headers: dict[str, str]) -> int:
        try:
            route = app.routes.get(routes.match(path, method)[0])
        except HTTPException:
            route = None
        refused = access.refusal(headers.get("HOST", ""), headers.get("ORIGIN")) or (
            api_key is not None
            and not (route and route.is_open)
            and not token_fits(api_key, path, headers.get("AUTHORIZATION", ""))
        )
        return 0 if refused else route.max_body if route else SMALL_BODY

    return bound
