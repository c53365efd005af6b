"""The demo's trained checkpoints: the type that each is for a host, and how it is sampled. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Checkpoint:
    folder: str
    type: str
    host: str
    steps: int
    cfg: float
    warm_up: int
    absent: tuple[str, ...] = ()
    """Parts that its pipeline may have and it has not; diffusers wants to be told."""

    @property
    def path(self) -> Path:
        return HERE / self.folder


CHECKPOINTS = {
    "unet": Checkpoint("checkpoint", "sd1", "asyncdiff", 30, 4.0, 3),
    "transformer": Checkpoint("transformer", "sd3", "xdit", 28, 4.0, 3, ("text_encoder_3", "tokenizer_3")),
    "student": Checkpoint("student", "sd1", "distrifuser", 4, 1.0, 1),
}
