"""What a client gets: the answers as models, and what the ranks made. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, Field

from shared.api.embedded import Metadata
from shared.api.media import Sound, encode
from shared.api.warned import merged, with_warnings


class Seconds(BaseModel):
    """Where the time of one request went, in seconds."""

    total: float
    denoise: float
    decode: float


class GenerateAnswer(BaseModel):
    """Answer of POST /generate, status 200."""

    message: str = "OK"
    output: str | list[str]
    format: str
    is_image: bool
    seed: int
    width: int
    height: int
    steps: int
    seconds: Seconds
    latent: str | list[str] | None = None
    seeds: list[int] | None = None  # of several pictures
    warnings: Annotated[
        list[str], Field(description="what was cut, left out or changed; absent where nothing was")
    ] = []


class ErrorAnswer(BaseModel):
    """Answer of every route when something is wrong."""

    message: str
    output: None = None
    is_image: bool = False
    errors: list[dict[str, str]] = []


class File:
    """Bytes that an answer holds as base64; no dataclass, which pydantic's encoder would take apart."""

    def __init__(self, data: bytes) -> None:
        self.data = data


@dataclass
class Reply:
    """What the ranks made. `output` holds one encoded file, or one a frame; all of it is bytes, no tensor.

    The ranks may leave `pictures` to be encoded by whoever answers, so that they can go on meanwhile.
    """

    output: list[bytes]
    format: str
    seed: int
    width: int
    height: int
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    latent: bytes | None = None  # safetensors with `latent`, where the launch asks for it
    pictures: list[Image.Image] = field(default_factory=list)
    fps: int | None = None  # frames per second, where the pictures are a video's frames
    sound: Sound | None = None  # of that video, for mp4
    warnings: list[str] = field(default_factory=list)  # by `shared.api.warned.warn`
    infotext: str = ""  # how it was made, in A1111's words; filled in by whoever answers

    def paste(self, call: Callable[[Image.Image], Image.Image]) -> None:
        """Have the pictures, which are not encoded yet, put into larger ones."""
        self.pictures = [call(picture) for picture in self.pictures]
        for picture in self.pictures[:1]:
            self.width, self.height = picture.size

    def encode(self, metadata: Metadata | None = None) -> None:
        """Fill `output` from `pictures`; the seconds that it takes count as decoding."""
        if not self.pictures:
            return
        began = time.perf_counter()
        self.output = encode(self.pictures, self.format, self.fps, metadata, self.sound)
        self.pictures, self.sound = [], None
        took = time.perf_counter() - began
        for name in ("total", "decode"):
            self.seconds[name] = round(self.seconds[name] + took, 4)

    def answer(self, others: Sequence[Reply] = ()) -> dict[str, Any]:
        """A GenerateAnswer for `shared.http.answers.Json`, its files not yet base64.

        Args:
            others: the other pictures of the same request; `output`, `latent` and `seeds` are lists then.
        """
        files = [File(data) for data in self.output]
        answer = GenerateAnswer(
            output="",
            format=self.format,
            is_image=self.format != "latent" and self.format != "mp4",
            seed=self.seed,
            width=self.width,
            height=self.height,
            steps=self.steps,
            seconds=Seconds(**self.seconds),
        )
        body = answer.model_dump(exclude={"seeds", "warnings"}) | {
            "output": files if len(files) > 1 else files[0],
            "latent": None if self.latent is None else File(self.latent),
        }
        if others:
            all_of_them = (self, *others)
            body["output"] = [File(reply.output[0]) for reply in all_of_them]
            body["seeds"] = [reply.seed for reply in all_of_them]
            for name in body["seconds"]:
                body["seconds"][name] = round(sum(reply.seconds[name] for reply in all_of_them), 4)
            if self.latent is not None:
                body["latent"] = [File(reply.latent or b"") for reply in all_of_them]
        return with_warnings(body, merged(*(r.warnings for r in (self, *others))))
