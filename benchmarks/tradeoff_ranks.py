"""What the launches of benchmarks/tradeoff.py draw, on ranks that work side by side, and how close it is."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from checkpoints import Checkpoint  # noqa: E402
from draw import PIXELS, Scene, judge  # noqa: E402
from evaluate import load, paint  # noqa: E402

from benchmarks.quality import psnr  # noqa: E402
from benchmarks.tradeoff_launches import GPUS, Launch  # noqa: E402
from shared.backends import BACKENDS  # noqa: E402
from tests.pool import RankPool  # noqa: E402

EQUAL = 100.0  # dB of pictures that are equal; one value that differs by one makes 95
LIMIT = {"cpu": 3600.0, "cuda": 150.0}  # seconds that a launch may take for its prompts


@dataclass(frozen=True)
class Drawn:
    """What is known of one picture; of plain diffusers' own only whether it is right."""

    kind: str
    host: str
    flags: str
    ranks: int
    prompt: int
    right: bool
    psnr: float = EQUAL
    ssim: float = 1.0
    late: int | None = None
    """How many steps were asynchronous, where the launch chooses them."""
    device: str = "cpu"

    @property
    def key(self) -> tuple[str, str, int]:
        return self.host, self.flags, self.ranks


@dataclass(frozen=True)
class Part:
    """Some of the prompts, drawn by each launch before any draws the next part."""

    scenes: list[Scene]
    first: int
    """Number of the first one, and its seed."""
    device: str = "cpu"
    together: int = 1
    """How many are drawn at the same time where that makes the same pictures."""

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.scenes))

    def only(self, numbers: range) -> Part:
        low, high = numbers.start - self.first, numbers.stop - self.first
        return replace(self, scenes=self.scenes[low:high], first=numbers.start)


def exact_sums(device: str) -> None:
    """fp32 on GPUs is fp32."""
    import torch

    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def plain(kind: Checkpoint, scheduler: str | None, part: Part) -> list[Image.Image]:
    """Runs on a rank alone."""
    from shared.models import MODELS
    from shared.pipeline.schedulers import set_scheduler

    exact_sums(part.device)
    pipe = load(kind).to(part.device)
    set_scheduler(pipe, MODELS[kind.type], scheduler, kind.steps)
    return paint(
        pipe, part.scenes, steps=kind.steps, cfg=kind.cfg, seed=part.first, batch=max(part.together, 8)
    )


@contextlib.contextmanager
def together(part: Part, most: int) -> Iterator[None]:
    """Inside, several pictures of a request are those of the prompts that their seeds stand for.

    A host draws pictures of one prompt together; their prompts do not matter to that. All are decoded by the
    rank that decodes one.
    """
    import torch

    def several(arguments: dict[str, Any], seed: int, pictures: int) -> dict[str, Any]:
        asked = part.scenes[seed - part.first :][:pictures]
        generators = [torch.Generator("cpu").manual_seed(seed + k) for k in range(pictures)]
        return arguments | {"prompt": [scene.caption for scene in asked], "generator": generators}

    with (
        mock.patch("shared.pipeline.engine.several", several),
        mock.patch("shared.pipeline.engine.Batches.next", lambda _, request, left, method: min(left, most)),
        mock.patch("shared.pipeline.engine.decoders", return_value=1),
    ):
        yield


def launched(kind: Checkpoint, launch: Launch, part: Part) -> tuple[list[Image.Image], list[int | None]]:
    """Runs on every rank: what the host's engine draws, on the rank that has the pictures; else nothing.

    And of each picture how many steps were asynchronous, where the launch chooses them.
    """
    import torch
    import torch.distributed as dist

    from shared.api.parsing import check_request
    from shared.launch.parser import parse_config
    from shared.ranks.groups import World, make_groups

    rank, size, cuda = dist.get_rank(), dist.get_world_size(), part.device == "cuda"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    place = torch.device("cpu")
    if cuda:
        exact_sums(part.device)
        place = torch.device("cuda", rank if size > 1 else os.getpid() % torch.cuda.device_count())
        torch.cuda.set_device(place)
    world = World(rank, size, rank, place, *make_groups(600, "nccl" if cuda else "gloo"))
    own = [f"--type={kind.type}", f"--checkpoint={kind.path}", "--variant=fp32", f"--device={part.device}"]
    own += [f"--width={PIXELS}", f"--height={PIXELS}", *(["--no_cuda_graph"] if cuda else [])]
    config = parse_config(BACKENDS[launch.host], BACKENDS, [*own, *launch.flags.split()])
    engine = importlib.import_module(f"shared.backends.{launch.host}").build_engine(config, world)

    def request(seed: int, scene: Scene) -> Any:
        body = {"positive": scene.caption, "seed": seed, "steps": kind.steps, "cfg": kind.cfg}
        return check_request(body, config)

    made: list[Image.Image] = []
    late: list[int | None] = []
    try:
        if part.together > 1 and engine.parallel.batches:
            with together(part, part.together):
                first, count = request(part.first, part.scenes[0]), len(part.scenes)
                for reply in engine.generate_all(first, lambda step, steps: None, count):
                    made += reply.pictures
            return made, [None] * count
        for seed, scene in enumerate(part.scenes, part.first):
            found = engine.generate(request(seed, scene), lambda step, steps: None)
            made += found.pictures if found is not None else []
            chosen = engine.parallel.choice or ""  # such as "17 of 30 steps were asynchronous: 8-24"
            late.append(int(chosen.split()[0]) if "steps were asynchronous" in chosen else None)
    finally:
        engine.close()
    return made, late


def measured(
    name: str, kind: Checkpoint, launch: Launch, part: Part, wanted: list[Image.Image]
) -> tuple[list[Drawn], list[Image.Image]]:
    """Runs on every rank: what `launched` draws, compared where it is; its pictures for a strip only."""
    made, late = launched(kind, launch, part)
    if not made:
        return [], []
    drawn = compared(name, launch, part, made, late, wanted)
    return drawn, made if launch.pictured and part.first == 0 else []


def compared(
    kind: str,
    launch: Launch,
    part: Part,
    made: list[Image.Image],
    late: list[int | None],
    wanted: list[Image.Image],
) -> list[Drawn]:
    return [
        Drawn(
            kind,
            *launch.key,
            part.first + k,
            all(judge(a).right(scene).values()),
            min(EQUAL, psnr([a], [b])),
            ssim(a, b),
            late[k],
            part.device,
        )
        for k, (scene, a, b) in enumerate(zip(part.scenes, made, wanted, strict=True))
    ]


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Mean structural similarity of two pictures, 1 where they are equal."""
    from scipy.ndimage import gaussian_filter

    x, y = (np.asarray(picture, dtype=np.float64) for picture in (a, b))
    blur = functools.partial(gaussian_filter, sigma=(1.5, 1.5, 0), truncate=3.5)
    small, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + small) * (2 * both + contrast)
    return float((top / ((mean_x**2 + mean_y**2 + small) * (var_x + var_y + contrast))).mean())


_starting = threading.Lock()
"""Held while the environment is that of ranks which start."""


@dataclass
class Machine:
    """Pools of ranks, of which so many ranks work at the same time; who asks first has them first."""

    cores: int
    device: str = "cpu"
    gpus: int = 0
    turn: threading.Condition = field(default_factory=threading.Condition)
    idle: list[RankPool] = field(default_factory=list)
    waiting: deque[object] = field(default_factory=deque)
    made: int = 0

    def _new(self) -> RankPool:
        """On CPUs its ranks see no GPU, else the next two."""
        with _starting:
            if self.device == "cuda":
                first = GPUS * (self.made % (self.gpus // GPUS))
                # A process whose parent has used CUDA cannot, and CUDA and NCCL keep threads of their own.
                pool = RankPool(timeout=LIMIT["cuda"], method="spawn", most_threads=None)
                ranks, seen = GPUS, f"{first},{first + 1}"
            else:
                pool, ranks, seen = RankPool(timeout=LIMIT["cpu"]), 1, ""
            self.made += 1
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=seen):
                pool.start(ranks)
        return pool

    @contextlib.contextmanager
    def pool(self, ranks: int) -> Iterator[RankPool]:
        """A pool for so many ranks, which is closed where its work fails."""
        if self.device == "cuda":
            ranks = max(ranks, GPUS)  # so that the pools stay as many, each with its ranks
        mine = object()
        with self.turn:
            self.waiting.append(mine)
            self.turn.wait_for(lambda: self.waiting[0] is mine and self.cores >= ranks)
            self.waiting.popleft()
            self.cores -= ranks
            pool = self.idle.pop() if self.idle else None
            self.turn.notify_all()
        try:
            pool = pool or self._new()
            yield pool
        except BaseException:
            if pool is not None:
                pool.close()
            pool = None
            raise
        finally:
            with self.turn:
                self.cores += ranks
                self.idle += [] if pool is None else [pool]
                self.turn.notify_all()
