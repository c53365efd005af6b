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
AGAIN_SECONDS = 1.0  # until it is opened again


class Watch:
    """Follows one request, over a restart of the host too. Without its events, there is only its progress.

    Args:
        host: that makes it.
        id: the request's name (`Host.generate`).
    """

    def __init__(self, host: Host, id: str) -> None:
        self.host, self.id = host, id
        self._percent = 0.0
        self._picture: Image.Image | None = None
        self._refused = False
        self._ended = threading.Event()
        self._hang_up: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._hang_up()
        self._thread.join(CLOSE_SECONDS)

    def percent(self) -> float:
        """Of the request, 0 to 100. Raises HostError where the host does not answer."""
        if self._refused:
            self._percent = float(self.host.job(self.id)["progress"])
        return self._percent

    def picture(self) -> Image.Image | None:
        """The newest preview, each once."""
        picture, self._picture = self._picture, None
        return picture

    def _run(self) -> None:
        told = False
        while not self._ended.is_set():
            reason = self._follow()
            self._refused = not self._ended.is_set()
            if self._refused and not told:
                told = True
                log.info("no previews from the host at %s: %s", self.host.url, reason)
            self._ended.wait(AGAIN_SECONDS)

    def _follow(self) -> str:
        """Read the events until they end; why they did."""
        try:
            with self.host.events() as (self._hang_up, stream):
                self._refused = False
                for name, data in events(stream):
                    if self._ended.is_set():
                        break
                    self._take(name, data)
            return "they ended"
        except (HostError, OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            return str(error) or type(error).__name__

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
