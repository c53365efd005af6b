"""Progress and previews of one request, from GET /events."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from .host import Host, HostError

log = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0  # what the stream gets to end


class Watch:
    """Follows one request. Without events from the host, there is only its progress.

    Args:
        host: that makes it.
        id: the request's name (`Host.generate`).
    """

    def __init__(self, host: Host, id: str) -> None:
        self.host, self.id = host, id
        self._percent = 0.0
        self._picture: Image.Image | None = None
        self._refused = False
        self._ended = False
        self._hang_up: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._hang_up()
        self._thread.join(CLOSE_SECONDS)

    def percent(self) -> float:
        """Of the request, 0 to 100. Raises HostError where the host does not answer."""
        if not self._refused:
            return self._percent
        percent = self.host.progress()
        return 0.0 if percent == 100 else percent  # it may still be the request's before

    def picture(self) -> Image.Image | None:
        """The newest preview, each once."""
        picture, self._picture = self._picture, None
        return picture

    def _follow(self) -> None:
        try:
            with self.host.events() as (self._hang_up, stream):
                for name, data in events(stream):
                    if self._ended:
                        return
                    self._take(name, data)
            reason = "they ended"
        except (HostError, OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
        if not self._ended:
            self._refused = True
            log.info("no previews from the host at %s: %s", self.host.url, reason)

    def _take(self, name: str, data: Any) -> None:
        if name == "jobs" and data["running"] and data["running"]["id"] == self.id:
            self._percent = float(data["running"]["progress"])
        elif name == "preview" and data["id"] == self.id:
            picture = Image.open(io.BytesIO(base64.b64decode(data["jpeg"])))
            picture.load()
            self._picture = picture


def events(stream: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    """Server-sent events as (name, data), the data parsed. Raises ValueError where it is no JSON."""
    name, data = "message", ""
    for line in stream:
        field, _, value = line.decode().rstrip("\r\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data += value
        elif not field:
            if data:
                yield name, json.loads(data)
            name, data = "message", ""
