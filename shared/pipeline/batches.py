"""Several pictures in one call of the pipeline: how many fit together, and their arguments.

Each of them is the picture that a call of its own makes: diffusers draws the noise of each from its own
generator. A type's `batch_pixels` says up to which size that gains anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shared.api.requests import GenerateRequest
from shared.api.sizes import Size
from shared.launch.flags import HostConfig
from shared.models import ONE_NOISE
from shared.parallel.method import Method
from shared.parallel.pipeline import Pipeline
from shared.pipeline.from_picture import trained_to_fill
from shared.pipeline.schedulers import SchedulerError, scheduler_for_request
from shared.ranks.device import peak_since
from shared.ranks.groups import World
from shared.ranks.messages import StoppedError, Verdict

log = logging.getLogger("host")

Result = TypeVar("Result")
USED = 0.8  # of the memory that is free


def most_together(config: HostConfig, request: GenerateRequest) -> int:
    """The most pictures of a request that one call of the pipeline may draw, as far as memory allows."""
    spec = config.spec
    starts = request.image is not None or request.latent is not None  # in place of its own noise
    refined = (request.refiner_start or 1) < 1  # by a second pipeline
    # A compiled denoiser would be compiled anew for each number of pictures.
    if starts or refined or config.compile_unet or (config.control_net and spec.control_draws):
        return 1
    return max(spec.batch_pixels // ((request.width or 1) * (request.height or 1)), 1)


def several(arguments: dict[str, Any], seed: int, pictures: int) -> dict[str, Any]:
    """Arguments of a pipeline call for so many pictures, their seeds in a row."""
    if pictures == 1:
        return arguments
    seeds = [(seed + number) % 2**64 for number in range(pictures)]
    generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
    return arguments | {"generator": generators, "num_images_per_prompt": pictures}


class Batches:
    """How many pictures the calls of one pipeline draw together. All ranks make the same calls.

    On a GPU that is as many as fit beside each other in the memory that is free on every rank, judged by
    what one picture of that size has taken; the first of a new size is drawn alone.

    Args:
        pipe: the loaded pipeline.
        config: the launch.
        world: this rank's place.
    """

    def __init__(self, pipe: Pipeline, config: HostConfig, world: World) -> None:
        self.pipe, self.config, self.world = pipe, config, world
        self._taken: dict[Size, int] = {}
        """Bytes that one picture takes beyond the weights, by size."""
        self._drawn: dict[Size, int] = {}
        """The most pictures of a size that were drawn together."""

    def next(self, request: GenerateRequest, left: int, method: Method) -> int:
        """How many of the pictures that are left the next call draws, the same on all ranks.

        Raises:
            StoppedError: another rank has failed.
        """
        most = min(most_together(self.config, request), left)
        if most == 1 or not self._exact(request, method):
            return 1
        fit = self._fitting(request, most)
        if self.world.size > 1:
            # As a vote: a rank that alone has failed in the call before takes part with its verdict, above 0.
            ballot = torch.tensor([-fit])
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.world.voting)
            if ballot > 0:
                raise StoppedError(Verdict(int(ballot)))
            fit = -int(ballot)
        if 0 < fit < most:
            size = f"{request.width}x{request.height}"
            log.info("memory is free for %d of %d pictures of %s together", fit, most, size)
        return max(fit, 1)

    def _exact(self, request: GenerateRequest, method: Method) -> bool:
        """Whether each of several pictures is the one that is drawn alone."""
        spec = self.config.spec
        if not method.batches or trained_to_fill(self.pipe, spec):  # which paints from an empty picture
            return False
        try:
            with scheduler_for_request(self.pipe, spec, request.scheduler, request.steps):
                scheduler = self.pipe.scheduler
        except SchedulerError:
            return False  # the call that draws will tell why
        return type(scheduler).__name__ not in ONE_NOISE and not scheduler.config.get("stochastic_sampling")

    def _fitting(self, request: GenerateRequest, most: int) -> int:
        """How many fit in the free memory of this rank; 0: not known."""
        device, size = self.world.device, _size(request)
        if device.type != "cuda" or self._drawn.get(size, 0) >= most:
            return most
        if not (taken := self._taken.get(size, 0)):
            return 0
        free, _ = torch.cuda.mem_get_info(device)
        if self.config.captures(device.type):
            taken *= 2  # a captured step keeps memory of its own
        else:
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(min(int(USED * free / taken), most), 1)

    def measured(self, request: GenerateRequest, pictures: int, call: Callable[[], Result]) -> Result:
        """What a call of the pipeline for so many pictures returns; it notes the memory that it takes."""
        if self.world.device.type != "cuda":
            return call()
        size = _size(request)
        result, bytes = peak_since(self.world.device, call)
        if pictures == 1:
            self._taken[size] = max(self._taken.get(size, 0), bytes)
        self._drawn[size] = max(self._drawn.get(size, 0), pictures)
        return result


def _size(request: GenerateRequest) -> Size:
    return request.width or 0, request.height or 0
