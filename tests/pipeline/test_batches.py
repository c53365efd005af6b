"""Several pictures of one request in one call of the pipeline: each is the one that is drawn alone."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.requests import GenerateRequest
from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.models import MODELS
from shared.parallel.method import Plain
from shared.pipeline.batches import Batches, most_together
from shared.pipeline.engine import PipelineEngine
from shared.ranks.channel import Channel
from shared.ranks.groups import World, make_groups
from shared.ranks.messages import StoppedError, Verdict
from tests import test_matrix, tiny
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_matrix import SETTINGS, psnr

Case = dict[str, Any]
Made = tuple[int, np.ndarray, np.ndarray]
"""Seed, latents and pixels of a picture."""
SEED = 2**64 - 2
"""The seeds of three pictures go over the largest one."""
BATCHED = [name for name, spec in MODELS.items() if spec.batch_pixels]


def drawn(engine: PipelineEngine, request: GenerateRequest, pictures: int) -> tuple[list[int], list[Made]]:
    """How many pictures each call of the pipeline made, and (seed, latents, pixels) of those held here."""
    calls: list[int] = []
    inner = engine._draw

    def noted(one: GenerateRequest, count: int, *more: Any) -> Any:
        calls.append(count)
        return inner(one, count, *more)

    engine._draw = noted  # type: ignore[method-assign, assignment]
    steps: list[tuple[int, int]] = []
    replies = engine.generate_all(request, lambda step, of: steps.append((step, of)), pictures)
    engine._draw = inner  # type: ignore[method-assign]
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    return calls, [
        (reply.seed, load(reply.latent or b"")["latent"].float().numpy(), np.asarray(reply.pictures[0]))
        for reply in replies
    ]


def together_and_alone(
    backend: str, name: str, flags: Case | None = None, plan: Case | None = None, **fields: Any
) -> tuple[list[int], list[Made], list[Made]]:
    """On each rank: the calls for three pictures at once, those of them that it holds, and those of three
    requests for one each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    flags = flags or {}
    config = replace(tiny.config(name, width=64, height=64, **flags, **(plan or {})), backend=backend)
    check_config(config, BACKENDS[backend], size)
    body = test_matrix.body(name, flags) | {"seed": SEED, "output_format": "png", "return_latent": True}
    request = check_request(body | {"steps": 4} | fields, config)
    engine = BACKENDS[backend].build_engine(config, world)
    calls, several = drawn(engine, request, 3)
    alone = [made for number in range(3) for made in drawn(engine, request.numbered(number), 1)[1]]
    engine.close()
    return calls, several, alone


def check(ranks: list[tuple[list[int], list[Made], list[Made]]], calls: list[int], holders: int = 1) -> None:
    """That all ranks made the same calls, how many hold pictures, and that these are those drawn alone."""
    assert all(of_rank[0] == calls for of_rank in ranks)
    assert sum(bool(several) for _, several, _ in ranks) == holders
    several = [made for _, of_rank, _ in ranks for made in of_rank]
    alone = [made for _, _, of_rank in ranks for made in of_rank]
    several.sort(key=lambda made: (made[0] - SEED) % 2**64)
    assert [seed for seed, *_ in several] == [seed for seed, *_ in alone] == [SEED, SEED + 1, 0]
    assert len({made[1].tobytes() for made in alone}) == 3
    for (_, latents, pixels), (_, latents_alone, pixels_alone) in zip(several, alone, strict=True):
        assert psnr(latents, latents_alone) >= 80
        assert np.abs(pixels.astype(int) - pixels_alone.astype(int)).max() <= 1


PICTURE = base64.b64encode(encode_image(tiny.picture(64, 3), "png")).decode()
ALONE: list[tuple[str, str, tuple[str, ...], Case]] = [
    ("asyncdiff", "sd1", ("control_net", "ip_adapter"), {"scheduler": "euler_a"}),
    ("asyncdiff", "sd1", ("enable_vae_slicing",), {"scheduler": "dpmpp_2m_sde", "cfg": 1.0}),
    ("asyncdiff", "sd1", ("ip_adapter",), {"ip_image": [PICTURE, PICTURE], "guidance_rescale": 0.5}),
    ("asyncdiff", "sd2", ("compel",), {}),
    ("asyncdiff", "sdxl", ("lora",), {"positive": "a red cat, " * 40, "scheduler": "ddpm"}),
    ("asyncdiff", "sd3", ("ip_adapter",), {}),
    ("xdit", "pixa", (), {}),
    ("xdit", "pixs", (), {"scheduler": "dpmpp_2m"}),
    ("xdit", "hy", (), {}),
]


@pytest.mark.parametrize(("backend", "name", "features", "fields"), seldom(ALONE, ALONE[::2]))
def test_each_of_several_pictures_is_the_one_drawn_alone(
    pool: RankPool, backend: str, name: str, features: tuple[str, ...], fields: Case
) -> None:
    flags: Case = {}
    for feature in features:
        flags |= SETTINGS[feature](name) if feature in SETTINGS else {feature: True}
    tiny.checkpoint(name)
    check(pool.run(together_and_alone, 1, backend, name, flags, **fields), [3])


def test_every_type_with_a_batch_is_tested() -> None:
    assert {name for _, name, *_ in ALONE} == set(BATCHED)


ON_RANKS: list[tuple[str, str, int, tuple[str, ...], Case]] = [
    ("asyncdiff", "sd1", 2, (), {"warm_up_steps": 1}),
    ("asyncdiff", "sdxl", 2, (), {"use_cfg_parallel": True, "warm_up_steps": 1}),
    ("distrifuser", "sd1", 2, ("control_net",), {"warm_up_steps": 1}),
    ("distrifuser", "sdxl", 2, (), {"no_split_batch": True, "warm_up_steps": 1}),
    ("distrifuser", "sd1", 2, (), {"no_split_batch": True, "parallelism": "tensor"}),
    ("xdit", "pixa", 2, (), {"ulysses_degree": 2}),
    ("xdit", "hy", 2, (), {"ring_degree": 2}),
    ("xdit", "sd3", 2, (), {"use_cfg_parallel": True}),
    ("xdit", "flux", 2, (), {"ulysses_degree": 2}),
    ("xdit", "qwen", 2, (), {"ulysses_degree": 2}),  # its VAE is one of videos
]


@pytest.mark.parametrize(("backend", "name", "ranks", "features", "plan"), seldom(ON_RANKS, ON_RANKS[4::4]))
def test_so_it_is_under_every_method(
    pool: RankPool, backend: str, name: str, ranks: int, features: tuple[str, ...], plan: Case
) -> None:
    flags: Case = {}
    for feature in features:
        flags |= SETTINGS[feature](name)
    tiny.checkpoint(name)
    # DistriFusion's ranks decode each picture together; of the others each decodes pictures of its own.
    holders = 1 if backend == "distrifuser" else 2
    calls = [3] if MODELS[name].batch_pixels else [1, 1, 1]
    check(pool.run(together_and_alone, ranks, backend, name, flags, plan), calls, holders)


APART: list[tuple[str, str, int, tuple[str, ...], Case, Case]] = [
    # torchsde draws one noise for all; the pictures of some ControlNets are encoded with the global state.
    ("asyncdiff", "sd1", 1, (), {}, {"scheduler": "dpmpp_sde"}),
    ("asyncdiff", "sd3", 1, ("control_net",), {}, {}),
    ("xdit", "pixa", 2, (), {"pipefusion_parallel_degree": 2, "warm_up_steps": 1}, {}),
    ("xdit", "flux", 1, (), {}, {}),
]


@pytest.mark.parametrize(
    ("backend", "name", "ranks", "features", "plan", "fields"), seldom(APART, APART[::2])
)
def test_others_are_drawn_one_by_one(
    pool: RankPool, backend: str, name: str, ranks: int, features: tuple[str, ...], plan: Case, fields: Case
) -> None:
    flags: Case = {}
    for feature in features:
        flags |= SETTINGS[feature](name)
    tiny.checkpoint(name)
    check(pool.run(together_and_alone, ranks, backend, name, flags, plan, **fields), [1, 1, 1])


def test_the_size_says_how_many() -> None:
    sd1, flux = tiny.config("sd1"), tiny.config("flux")

    def most(config: Any, width: int, height: int, **more: Any) -> int:
        return most_together(config, GenerateRequest.model_construct(width=width, height=height, **more))

    assert [most(sd1, side, side) for side in (256, 512, 768, 1024, 2048)] == [16, 4, 1, 1, 1]
    assert most(sd1, 768, 512) == 2
    assert most(flux, 256, 256) == 1
    assert most(replace(sd1, compile_unet=True), 512, 512) == 1
    assert most(sd1, 512, 512, latent=b"x") == most(sd1, 512, 512, image=b"x") == 1


def test_the_memory_of_one_picture_says_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("sd1", width=256, height=256)
    pipe, request = tiny.load("sd1"), check_request({"positive": "x"}, config)
    world = SimpleNamespace(rank=0, size=1, device=torch.device("cuda"))
    batches, method = Batches(pipe, config, world), Plain(pipe)  # type: ignore[arg-type]
    free = {"driver": 1000, "reserved": 400, "allocated": 150}
    monkeypatch.setattr("shared.pipeline.batches.peak_since", lambda device, call: (call(), 100))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["driver"], 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: free["allocated"])
    assert batches.next(request, 8, method) == 1  # the first of a size is drawn alone
    assert batches.measured(request, 1, lambda: "made") == "made"
    assert batches.next(request, 8, method) == 4  # 0.8 x 1000 / 200: captured steps keep as much again
    assert batches.next(request.model_copy(update={"width": 512}), 8, method) == 1
    batches.measured(request, 4, lambda: None)
    free["driver"] = 0
    assert [batches.next(request, left, method) for left in (3, 4, 5)] == [3, 4, 1]  # 4 have fitted before
    eager = Batches(pipe, replace(config, no_cuda_graph=True), world)  # type: ignore[arg-type]
    eager.measured(request, 1, lambda: None)
    assert eager.next(request, 8, method) == 2  # in what was freed: 0.8 x 250 / 100


def agreed() -> int:
    """How many pictures all ranks draw together where rank r has room for r + 2."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    config = tiny.config("sd1", width=64, height=64)
    pipe = tiny.load("sd1")
    batches = Batches(pipe, config, world)
    batches._fitting = lambda request, most: rank + 2  # type: ignore[method-assign]
    return batches.next(check_request({"positive": "x"}, config), 8, Plain(pipe))


def test_the_rank_with_the_least_room_decides(pool: RankPool) -> None:
    assert pool.run(agreed, 2) == [2, 2]


def failed_alone() -> str:
    """What each rank makes of a failure of rank 1 alone between two calls: it votes, the other asks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    if rank == 1:
        return Channel(world).vote(Verdict.FAILED).name
    config = tiny.config("sd1", width=64, height=64)
    pipe = tiny.load("sd1")
    try:
        return str(
            Batches(pipe, config, world).next(check_request({"positive": "x"}, config), 8, Plain(pipe))
        )
    except StoppedError as stopped:
        return stopped.verdict.name


def test_a_rank_that_fails_alone_stops_the_others(pool: RankPool) -> None:
    tiny.checkpoint("sd1")
    assert pool.run(failed_alone, 2) == ["FAILED", "FAILED"]
