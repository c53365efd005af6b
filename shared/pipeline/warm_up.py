"""Steps before the first request, which trace, compile, capture and open connections."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from PIL import Image

from shared.api.media import encode_image
from shared.api.requests import GenerateRequest
from shared.launch.flags import HostConfig
from shared.ranks.loop import Engine
from shared.ranks.messages import StoppedError, Verdict

log = logging.getLogger("host")


def warm_up(
    engine: Engine,
    config: HostConfig,
    steps: int,
    twice: bool,
    refined: int = 0,
    size: tuple[int, int] | None = None,
    most_frames: int | None = None,
) -> None:
    """Generate up to step `steps`; with decoding, where the VAE is compiled.

    Args:
        size: width and height in pixels; None: the launch's.
        twice: also generate with another prompt: text encoders are captured at their second call, and the
            same prompt is not encoded again.
        refined: also steps of the refiner, at least so many.
        most_frames: that the model makes, where this is known.
    """
    whole = config.compile_vae
    image = encode_image(Image.new("RGB", (64, 64)), "png")
    inputs: dict[str, Any] = {"seed": 0, "output_format": "png" if whole else "latent"}
    inputs["width"], inputs["height"] = size or config.size
    if config.spec.image == "needed":
        inputs["image"] = image
    if config.control_net:
        inputs["control_image"] = image
    request = GenerateRequest.model_construct(**inputs).filled(config)
    if most_frames is not None and request.frames is not None:
        request = request.model_copy(update={"frames": min(request.frames, most_frames)})

    def run(words: str | None, last: int | None) -> None:
        """A generation up to step `last`; None: to its end."""

        def on_step(step: int, _: int) -> None:
            if last is not None and step >= last:
                raise StoppedError(Verdict.FINISHED)

        with contextlib.suppress(StoppedError):
            engine.generate(request.model_copy(update={"positive": words}), on_step)

    run(None, None if whole else steps)
    if twice:
        run("again", 1)
    if refined and not whole:
        steps = refined + 2
        late = {"steps": steps, "refiner_start": 1.5 / steps}  # after one or two steps
        engine.generate(request.model_copy(update=late), lambda step, steps: None)
