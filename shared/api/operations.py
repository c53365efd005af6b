"""What the host does to the pipeline between two generations, on all ranks alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AddLora:
    """Load a LoRA and make it active beside the others."""

    path: str
    scale: float


@dataclass(frozen=True)
class RemoveLora:
    """Take a LoRA off."""

    path: str


Operation = AddLora | RemoveLora
