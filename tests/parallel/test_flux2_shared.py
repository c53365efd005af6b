"""FLUX.2's checkpoints with one guidance branch, dev and distilled klein, shared by two ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.launch.errors import UsageError
from shared.parallel.method import Unwatched
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from tests import tiny
from tests.parallel.test_xdit import EXACT, psnr
from tests.pipeline.test_flux2 import config_of, engine
from tests.pool import RankPool

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


@pytest.mark.parametrize("kind", ["klein", "distilled", "dev"])
def test_pipefusion_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match=r"--pipefusion_parallel_degree: .* do not make the exact picture"):
        check_config(config_of(kind, pipefusion_parallel_degree=2), BACKENDS["xdit"], 2)
    with pytest.raises(ValueError, match="PipeFusion does not support Flux2Transformer2DModel"):
        XDiTPipeFusion(engine(kind).pipe, Degrees(pipefusion=2))
