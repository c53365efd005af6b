"""The measured link between ranks, and what xDiT chooses by it."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from shared.backends import BACKENDS
from shared.backends.xdit import link_lines
from shared.backends.xdit_cost import Step, choose
from shared.backends.xdit_plan import link_choice
from shared.parallel.xdit.degrees import Degrees
from shared.ranks.groups import make_groups
from shared.ranks.link import Link, measured_link
from tests import tiny
from tests.pool import RankPool

NVLINK = Link(latency=2e-5, bandwidth=150e9, pair=150e9, flops=790e12)
NO_PEER_COPY = Link(latency=4e-5, bandwidth=26e9, pair=26e9, flops=790e12)
CROWD = Link(latency=5e-5, bandwidth=6e9, pair=6e9, flops=790e12)
FLUX = Step(blocks=57, channels=3072, tokens=4608, branches=1)


def linked() -> tuple[dict[str, float], str] | None:
    """On each rank."""
    _, voting, compute = make_groups(60, "gloo")
    link = measured_link(torch.device("cpu"), compute, voting)
    return None if link is None else (asdict(link), str(link))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_the_same_link(pool: RankPool, ranks: int) -> None:
    (link, text), *others = pool.run(linked, ranks)
    assert all(other == (link, text) for other in others)
    assert 1e-6 < link["latency"] < 1 and 1e6 < link["bandwidth"] < 1e12 and 1e8 < link["flops"] < 1e14
    assert (link["pair"] == link["bandwidth"]) == (ranks == 2)
    assert "GB/s" in text and ("neighbours" in text) == (ranks == 4)


def test_one_rank_has_no_link(pool: RankPool) -> None:
    assert pool.run(linked, 1) == [None]


def test_a_step_is_what_was_counted_and_measured() -> None:
    """FLUX 1024²: 74 TFLOP; 132 ms compiled on one H200, and 1.6 GB for each of two ranks."""
    assert FLUX.products + FLUX.attention == pytest.approx(74.4e12, rel=0.01)
    assert FLUX.seconds(Degrees(), NVLINK) == pytest.approx(0.132, rel=0.07)
    assert (
        FLUX.received(Degrees(ring=2)) == FLUX.received(Degrees(ulysses=2)) == pytest.approx(1.61e9, rel=0.01)
    )
    four = [FLUX.received(Degrees(ring=r, ulysses=u)) for r, u in ((4, 1), (1, 4))]
    assert four[0] == 2 * four[1]
    assert replace(FLUX, branches=2).received(Degrees(cfg=2, ring=2)) == FLUX.received(Degrees(ring=2))


@pytest.mark.parametrize(
    ("link", "usual", "degrees", "overlap"),
    [
        (NVLINK, Degrees(ulysses=2), Degrees(ring=2), False),
        (NO_PEER_COPY, Degrees(ulysses=2), Degrees(ring=2), True),
        (NVLINK, Degrees(data=2), Degrees(data=2), False),
        (CROWD, Degrees(cfg=2, ulysses=4), Degrees(cfg=2, ulysses=4), False),
    ],
)
def test_the_sequence_is_shared_as_suits_the_link(
    link: Link, usual: Degrees, degrees: Degrees, overlap: bool
) -> None:
    found = choose(FLUX, link, usual, True, 24)
    assert (found.degrees, found.overlap) == (degrees, overlap)
    assert found.degrees.world == usual.world
    kept = choose(FLUX, link, usual, False, 24)
    assert kept.degrees == usual


def test_a_plan_that_gains_nothing_says_so() -> None:
    config = tiny.config("flux")
    slow, fast = (choose(FLUX, link, Degrees(ulysses=2), True, 24) for link in (CROWD, NVLINK))
    lines = link_lines(config, slow)
    assert [level for level, _ in lines] == [logging.INFO, logging.WARNING] and slow.slow
    assert "ring 2, overlapped" in lines[0][1] and "--exchange_dtype=int8" in lines[1][1]
    assert [level for level, _ in link_lines(config, fast)] == [logging.INFO] and not fast.slow
    lines = link_lines(replace(config, exchange_dtype="int8"), slow)
    assert "exchange in int8" in lines[0][1] and "--exchange_dtype" not in lines[1][1]


@pytest.mark.parametrize("backend", ["xdit", "distrifuser"])
def test_auto_sends_8_bits_only_where_the_link_is_slow(backend: str) -> None:
    name = "flux" if backend == "xdit" else "sd1"
    config = replace(tiny.config(name), backend=backend, exchange_dtype="auto", width=1024, height=1024)
    for link, expected in ((replace(CROWD, bandwidth=1e5, pair=1e5), "int8"), (None, None)):
        world: Any = replace(tiny.world(), size=2, link=link)
        assert BACKENDS[backend].choose(config, world).exchange_dtype == expected
    fast = Link(1e-9, 1e15, 1e15, 1e12)
    chosen = BACKENDS[backend].choose(config, replace(tiny.world(), size=2, link=fast))
    assert chosen.exchange_dtype is None


def test_given_degrees_stay_and_left_out_ones_are_filled_in() -> None:
    config = replace(tiny.config("flux"), backend="xdit")
    world = replace(tiny.world(), size=2, link=NO_PEER_COPY)
    chosen = BACKENDS["xdit"].choose(config, world)
    assert (chosen.ulysses_degree or 0) * (chosen.ring_degree or 0) == 2
    given = BACKENDS["xdit"].choose(replace(config, ulysses_degree=2), world)
    assert (given.ulysses_degree, given.ring_degree) == (2, 1)
    pipefused = replace(config, pipefusion_parallel_degree=2)
    assert link_choice(pipefused, 2, NO_PEER_COPY, "cuda") is None
    assert BACKENDS["xdit"].choose(pipefused, world) == pipefused
