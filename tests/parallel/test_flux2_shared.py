"""FLUX.2's kinds of checkpoints, shared by ranks, and under PipeFusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shared.parallel.method import Unwatched
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from shared.pipeline.engine import PipelineEngine
from tests import test_matrix, tiny, tiny_original
from tests.parallel.test_xdit import EXACT, psnr
from tests.pipeline.test_flux2 import KINDS, config_of, engine
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

LOOKING = {"image": [tiny.picture(80, 1), tiny.picture(64, 2)], "height": 80, "width": 48}


def drawn(run: Any, **changes: Any) -> np.ndarray:
    return tiny.run(run, "flux2", **{"guidance_scale": 3.0, "max_sequence_length": 64} | changes)


def shared(kind: str) -> list[float]:
    """On each rank: how close Ulysses and ring come to the plain pipeline, with pictures to look at."""
    pipe: Any = engine(kind).pipe
    wanted, found = drawn(pipe, **LOOKING), []
    for degrees in (Degrees(ulysses=2), Degrees(ring=2)):
        with XDiT(pipe, degrees) as parallel:
            parallel.begin(2)
            found.append(psnr(drawn(lambda **a: parallel.run(a, Unwatched()), **LOOKING), wanted))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilled", "dev"])
def test_one_branch_is_shared(pool: RankPool, kind: str) -> None:
    config_of(kind)
    for rank in pool.run(shared, 2, kind):
        assert min(rank) >= EXACT, rank


CALLS: list[dict[str, Any]] = [
    {"steps": 4},
    {"steps": 3, "height": 96, "width": 64, "prompt": "a", "guidance_scale": 1.0},
    {"steps": 4, **LOOKING},
    {"steps": 4, "height": 96, "prompt": "two large blue dogs on a hill", "image": tiny.picture(64, 3)},
    {"steps": 4, "height": 64, "width": 48},
]


def pipefused(
    kind: str, degrees: dict[str, int], warm_ups: list[int], calls: list[dict[str, Any]]
) -> list[list[float]]:
    """On each rank: how close it comes to the plain pipeline, by warm-up and call."""
    pipe: Any = engine(kind).pipe
    text, plain = repr(pipe.transformer), once(lambda: [drawn(pipe, **call) for call in calls])
    ended = {"output_type": "latent", "steps": 2}
    found, latents = [], drawn(pipe, **ended)
    for warm_up in warm_ups:
        options: Any = {"warm_up_steps": warm_up, "parallel_vae": warm_up > 1}
        with XDiTPipeFusion(pipe, Degrees(**degrees), **options) as parallel:
            row = []
            for call, wanted in zip(calls, plain, strict=True):
                parallel.begin(call["steps"])
                made = drawn(lambda **arguments: parallel.run(arguments, Unwatched()), **call)
                row.append(psnr(made, wanted))
            parallel.begin(2)
            made = drawn(lambda **arguments: parallel.run(arguments, Unwatched()), **ended)
            assert psnr(made, latents) >= EXACT or warm_up == 1
            if parallel.degrees.sequence > 1:
                with pytest.raises(ValueError, match=r"image: .* must be a multiple of 2; got 25"):
                    parallel.run(tiny.call_args("flux2") | {"image": tiny.picture(80, 1)})
        found.append(row)
    assert repr(pipe.transformer) == text
    assert not is_last() or np.array_equal(drawn(pipe, **calls[0]), plain[0])
    return found


@pytest.mark.parametrize("kind", seldom(KINDS, ("klein",)))
def test_pipefusion(pool: RankPool, kind: str) -> None:
    config_of(kind)
    for exact, stale in pool.run(pipefused, 2, kind, {"pipefusion": 2}, [99, 1], CALLS):
        assert min(exact) >= EXACT, exact
        assert 40 <= min(stale) < EXACT + 30, stale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        ("klein", {"pipefusion": 2, "ulysses": 2}),
        ("klein", {"pipefusion": 2, "cfg": 2}),
        ("dev", {"pipefusion": 2, "ring": 2}),
        ("dev", {"pipefusion": 3}),
    ],
)
def test_pipefusion_on_more_ranks(pool: RankPool, kind: str, degrees: dict[str, int]) -> None:
    config_of(kind)
    # Two patches of two ranks each need 64 pixels, and two ranks an even number of the pictures' tokens.
    calls = [
        call | ({"image": [tiny.picture(64, 1), tiny.picture(64, 2)]} if "image" in call else {})
        for call in CALLS
    ]
    calls = [call | ({"height": 64} if call.get("height", 64) % 32 else {}) for call in calls]
    for exact, stale in pool.run(pipefused, Degrees(**degrees).world, kind, degrees, [99, 1], calls):
        assert min(exact) >= EXACT, exact
        assert 40 <= min(stale) < EXACT + 30, stale


def featured(flags: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """On each rank: latents under PipeFusion and plain, of klein that looks at a picture."""
    asked = {"pipefusion_parallel_degree": 2, "warm_up_steps": 2 * test_matrix.STEPS}
    config, world, host, latents = test_matrix.launch("xdit", "flux2", {"start": "image"} | flags, asked)
    made = host.build_engine(config, world)
    shared = latents(made)
    made.close()
    return shared, None if shared is None else latents(PipelineEngine(made.pipe, config, world))


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["lora", "quantize_to", "gguf_model", "shard_weights", "compile_unet"])
def test_pipefusion_with(pool: RankPool, feature: str) -> None:
    flags = {
        "gguf_model": lambda: {"gguf_model": str(tiny_original.gguf("flux2"))},
        "shard_weights": lambda: {"shard_weights": True},
    }.get(feature, lambda: test_matrix.SETTINGS[feature]("flux2"))()
    tiny.checkpoint("flux2")
    shared, plain = next(rank for rank in pool.run(featured, 2, flags) if rank[0] is not None)
    assert plain is not None and test_matrix.psnr(shared, plain) >= EXACT
