"""Text encoders, VAE and image encoders that live once, over all ranks, which also decode together."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from shared.api.requests import GenerateRequest
from shared.backends import BACKENDS
from shared.launch import flags as launch_flags
from shared.models import MODELS
from shared.parallel.method import Plain
from shared.parallel.sharded import ShardedWeights
from shared.ranks.groups import World, make_groups
from tests import tiny
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_matrix import EXACT_DB, SETTINGS, STEPS, Flags, encoded, psnr

MOST = {2: 0.55, 3: 0.4, 4: 0.3}
"""Share of all parameters that a rank may keep."""


def launched(backend: str, name: str, flags: Flags, seconds: float = 60) -> tuple[Any, Any]:
    """On each rank: the launch, and its engine."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(seconds, "gloo"))
    given = {"width": 64, "height": 64, "warm_up_steps": STEPS, "collective_timeout": seconds} | flags
    config = replace(tiny.config(name, **given), backend=backend)
    return config, BACKENDS[backend].build_engine(config, world)


def made(config: Any, engine: Any, start: bool, pictures: int = 1) -> list[np.ndarray]:
    """Decoded pictures in 0..1, where this rank has them; begun from one that the VAE encodes."""
    asked: dict[str, Any] = {"positive": "a red cat", "seed": 3, "steps": STEPS}
    if config.spec.output == "video":
        asked |= {"frames": 4, "decode_chunk_size": 3}
        if config.spec.image == "needed":
            asked["image"] = encoded(config.type, 1)
    if start:
        asked |= {"image": encoded(config.type, 1), "strength": 0.5, "steps": 2 * STEPS}
    if config.ip_adapter:
        asked["ip_image"] = encoded(config.type, 3)
    request = GenerateRequest(**asked).filled(config)
    replies = engine.generate_all(request, lambda step, steps: None, pictures)
    return [np.asarray(picture) / 255 for reply in replies for picture in reply.pictures]


def shared(backend: str, name: str, flags: Flags, start: bool, from_pixels: int | None) -> dict[str, Any]:
    """On each rank: how close a picture of all ranks comes to one rank's, the parameters, and the plan."""
    usual = launch_flags.DECODED_ALONE
    launch_flags.DECODED_ALONE = usual if from_pixels is None else from_pixels - 1
    try:
        config, engine = launched(backend, name, flags)
        queue: Any = SimpleNamespace(wants_preview=lambda: False)
        engine.preview_to(queue if dist.get_rank() == 0 else None)
        decoder = engine.parallel.decoder
        calls = []
        if decoder is not None:
            engine.pipe.vae.decoder.conv_norm_out.register_forward_hook(
                lambda _, args, out: calls.append(args[0].shape[::2])
            )
        first = made(config, engine, start)
        again, parameters = made(config, engine, start), engine.parameters
        plan, told = engine.plan, engine._previewer is not None
        counted = list(calls)
        engine.close()
        engine.parallel = Plain(engine.pipe)
        plain = made(config, engine, start)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        close = [psnr(a, b) for a, b in zip(first, plain, strict=True)]
        return {"close": close, "parameters": parameters, "plan": plan, "calls": counted, "preview": told}
    finally:
        launch_flags.DECODED_ALONE = usual


CASES: list[tuple[int, str, str, Flags, bool]] = [
    (2, "asyncdiff", "sdxl", {}, True),
    (2, "asyncdiff", "sdxl", {"variant": "fp16"}, False),
    (3, "asyncdiff", "svd", {}, False),
    (2, "asyncdiff", "svd", {"variant": "fp16"}, False),
    (3, "asyncdiff", "ad", {}, False),
    (4, "xdit", "flux", {"ulysses_degree": 2, "ring_degree": 2}, False),
    (2, "xdit", "sd3", {"pipefusion_parallel_degree": 2, "warm_up_steps": 9}, False),
    (4, "asyncdiff", "sd1", {}, False),
    (4, "distrifuser", "sdxl", {}, True),
]


def cut(pictures: int, rank: int, ranks: int, apart: bool) -> tuple[int, int]:
    """Pictures and rows of 64 that a rank decodes."""
    if apart:
        return pictures // ranks, 64
    start, stop = (8 * place // ranks * 8 for place in (rank, rank + 1))
    return pictures, stop - start


@pytest.mark.parametrize(("size", "backend", "name", "flags", "start"), seldom(CASES, (CASES[0], CASES[5])))
def test_every_model_lives_once(
    pool: RankPool, size: int, backend: str, name: str, flags: Flags, start: bool
) -> None:
    if start:
        flags = flags | SETTINGS["ip_adapter"](name)
    if name == "ad":
        flags = flags | SETTINGS["motion_adapter"](name)
    ranks = pool.run(shared, size, backend, name, {"shard_weights": True} | flags, start, None, timeout=240)
    assert ranks[0]["close"] and min(ranks[0]["close"]) >= EXACT_DB
    for number, rank in enumerate(ranks):
        # A motion adapter's weights are copied into the UNet; the adapter itself stays whole.
        sizes = [model for key, model in rank["parameters"].items() if key != "motion_adapter"]
        kept, whole = (sum(model[side] for model in sizes) for side in ("kept", "whole"))
        assert kept <= MOST[size] * whole, rank["parameters"]
        chunks = [3, 1] if MODELS[name].output == "video" else [1]
        shares = [cut(count, number, size, name == "ad" and count % size == 0) for count in chunks * 2]
        assert rank["calls"] == shares, "each rank decodes its part"
        assert rank["plan"]["decode_from"] == 0 and rank["preview"] == (number == 0)


@pytest.mark.parametrize(("from_pixels", "rows"), [(64 * 64, [32, 32]), (64 * 64 + 1, [64, 64])])
def test_large_pictures_are_decoded_by_all_ranks(pool: RankPool, from_pixels: int, rows: list[int]) -> None:
    first, second = pool.run(shared, 2, "asyncdiff", "sd1", {}, False, from_pixels)
    assert min(first["close"]) >= EXACT_DB and not second["close"]
    assert first["calls"] == [(1, row) for row in rows]
    assert second["calls"] == ([(1, row) for row in rows] if rows[0] < 64 else [])
    assert first["plan"]["decode_from"] == from_pixels


def failing() -> tuple[str, float]:
    """On each rank: what a rank is told where another one's encoder fails, and after how many seconds."""
    config, engine = launched("distrifuser", "sd1", {"shard_weights": True, "no_split_batch": True}, 5)
    if dist.get_rank() == 1:
        engine.pipe.text_encoder.forward = lambda *_, **__: 1 / 0
    began = time.monotonic()
    try:
        made(config, engine, False)
    except Exception as error:
        return type(error).__name__, time.monotonic() - began
    return "", 0.0


def test_a_rank_that_fails_while_encoding_does_not_hang_the_others(pool: RankPool) -> None:
    (waited, seconds), (failed, _) = pool.run(failing, 2)
    assert waited and failed == "ZeroDivisionError" and seconds < 30


def waiting() -> int:
    """On each rank: a model whose parts wait in host memory gives what it gave."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(4))).eval()
    model.requires_grad_(False)
    whole = nn.ModuleDict({"layers": model})
    x = torch.randn(3, 64)
    wanted = model(x)
    group = dist.new_group(backend="gloo")
    with ShardedWeights({"one": model}, group, torch.device("cpu"), waiting=["one"]) as weights:
        waits = [block.waits for block in weights.blocks["one"]]
        for _ in range(3):
            assert torch.equal(model(x), wanted)
    assert torch.equal(whole["layers"](x), wanted)
    return sum(waits)


def test_parts_wait_in_host_memory(pool: RankPool) -> None:
    assert pool.run(waiting, 2) == [4, 4]
