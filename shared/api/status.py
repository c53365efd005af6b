"""What the host says of its own state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.api.queue import JobQueue

State = Literal["loading", "ready", "busy", "broken", "stopping"]


@dataclass
class HostStatus:
    """What /health and /initialize tell. Written by rank 0's main thread, read by HTTP threads."""

    backend: str
    type: str
    world_size: int
    state: State = "loading"
    message: str = ""  # why the host is broken, or what it does while it loads
    loaded: int = 0  # percent loaded, by the stages of loading
    plan: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)  # device and memory of each rank
    versions: dict[str, str] = field(default_factory=dict)
    embeddings: list[dict[str, Any]] = field(default_factory=list)  # of --embeddings_dir
    started: float = field(default_factory=time.time)
    when_ready: list[Callable[[], None]] = field(default_factory=list)  # called once the host is loaded

    def at(self, loaded: int, message: str) -> None:
        """The host has come so far in loading, percent, and is at `message`; nothing once it is broken."""
        if self.state == "loading":
            self.loaded, self.message = loaded, message

    def ready(self) -> None:
        """The host is loaded and takes requests."""
        self.at(100, "")
        self.state = "ready"
        for call in self.when_ready:
            call()

    def health(self, queue: JobQueue) -> dict[str, Any]:
        """The JSON of GET /health."""
        return {
            "state": self.state,
            "message": self.message,
            "loaded": self.loaded,
            "backend": self.backend,
            "type": self.type,
            "plan": self.plan,
            "world_size": self.world_size,
            "queue_length": len(queue),
            "ranks": self.ranks,
            "versions": self.versions,
            "uptime_seconds": round(time.time() - self.started, 1),
        }
