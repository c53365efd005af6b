"""ComfyUI's side of a long call: its progress bar with pictures, its Cancel button, its log."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import time
from typing import Any

import comfy.model_management
import comfy.utils

from .host import Host, HostError
from .launched import Handle
from .watch import Watch

log = logging.getLogger(__name__)

PREVIEW_SIDE = 512  # pixels that ComfyUI makes a forming picture large, as it does with its own
LOOK_SECONDS = 0.25  # between two checks of a host that loads

check = comfy.model_management.throw_exception_if_processing_interrupted


class Loading:
    """A node's progress bar while its host loads; the log has what it is doing."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(100)
        self._told: tuple[int, str] = (-1, "")

    def show(self, health: dict[str, Any]) -> None:
        """Show what the host's /health says; older hosts without `loaded` report only that they load."""
        told = int(health.get("loaded", 0)), str(health.get("message", ""))
        if told[0] != self._told[0]:
            self._bar.update_absolute(told[0], 100)
        if told[1] and told[1] != self._told[1]:
            log.info("the host is loading: %s", told[1])
        self._told = told


def loaded(host: Host) -> dict[str, Any]:
    """Wait until a running host is loaded; its /health then. Raises HostError."""
    loading = Loading()
    while (health := host.health()).get("state") == "loading":
        check()
        loading.show(health)
        time.sleep(LOOK_SECONDS)
    return health


class _Bar:
    """A node's progress bar over requests for `whole` pictures in all."""

    def __init__(self, whole: int) -> None:
        self.made = 0  # pictures
        self._whole = whole
        self._told = -1
        self._bar = comfy.utils.ProgressBar(100)

    def show(self, watch: Watch, part: int) -> None:
        """What is to be seen of the request that makes the next `part` pictures. Raises when interrupted."""
        check()
        with contextlib.suppress(HostError):  # the request itself reports the error
            percent = int((100 * self.made + watch.percent() * part) / self._whole)
            picture = watch.picture()
            if percent > self._told or picture is not None:
                self._told = max(self._told, min(percent, 99))
                preview = None if picture is None else ("JPEG", picture, PREVIEW_SIDE)
                self._bar.update_absolute(self._told, 100, preview)

    def end(self) -> None:
        self._bar.update_absolute(100, 100)


def ask(handle: Handle, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """POST /generate for each body, in turn; progress counts their pictures.

    The host's warnings are logged, each once. Raises HostError with the host's message.
    """
    bar = _Bar(sum(pictures_of(body) for body in bodies))
    answers: list[dict[str, Any]] = []
    warnings: dict[str, None] = {}

    def away(why: str) -> None:
        log.warning("%s", why)

    for body in bodies:
        part, id = pictures_of(body), secrets.token_hex(8)
        with Watch(handle.host, id) as watch:
            show = functools.partial(bar.show, watch, part)
            answers.append(handle.host.generate(handle.scales | body, show, id=id, on_away=away))
        bar.made += part
        warnings |= dict.fromkeys(answers[-1].get("warnings", []))
    bar.end()
    for warning in warnings:
        log.warning("the host at %s: %s", handle.host.url, warning)
    return answers


def pictures_of(body: dict[str, Any]) -> int:
    """How many pictures a request asks for."""
    return body.get("pictures") or 1
