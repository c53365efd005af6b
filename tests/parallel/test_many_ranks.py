"""Four to ten ranks, where degrees multiply: every host equal to plain diffusers, with unequal parts."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shared.backends.asyncdiff import stages
from shared.launch.errors import UsageError
from shared.launch.flags import HostConfig
from tests import test_matrix, tiny
from tests.parallel import test_distrifusion as patches
from tests.parallel import test_xdit as tokens
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_host import DEMO_CHECKPOINT, Launch, alive, children, until

# Sizes in pixels: the rows and columns of latents are no multiples of the ranks.
UNEVEN = {"width": 88, "height": 136}

ASYNCDIFF: dict[str, tuple[int, str, dict[str, Any]]] = {
    "two-pairs": (4, "sd1", {"use_cfg_parallel": True, "async_steps": 2}),
    "two-pairs-sdxl": (4, "sdxl", {"use_cfg_parallel": True, "async_steps": 2}),
    "4-stride-2": (5, "sd1", {"model_n": 4, "stride": 2}),
    "cfg-3": (6, "sdxl", {"use_cfg_parallel": True}),
    "cfg-2-stride-2": (6, "sd1", {"use_cfg_parallel": True, "stride": 2}),
    "cfg-4": (8, "sd1", {"use_cfg_parallel": True, "time_shift": True}),
    "cfg-4-sd3": (8, "sd3", {"use_cfg_parallel": True}),
    "cfg-4-stride-2": (10, "sd1", {"use_cfg_parallel": True, "model_n": 4, "stride": 2}),
}


@pytest.mark.parametrize("case", seldom(ASYNCDIFF, ["two-pairs"]))
def test_asyncdiff(pool: RankPool, case: str) -> None:
    """CFG halves x stages; "two-pairs": in each pair a window of asynchronous steps between exact ones."""
    ranks, name, flags = ASYNCDIFF[case]
    tiny.checkpoint(name)
    asked = {**flags, "ask": {"width": 80, "height": 144} if name == "sd3" else UNEVEN}
    found = pool.run(test_matrix.run_cell, ranks, "asyncdiff", name, {}, asked, False, timeout=300)
    test_matrix.check_plans(found)


@pytest.mark.parametrize(("ranks", "hint"), [(8, "; with --use_cfg_parallel twice as many"), (5, "")])
def test_a_number_of_ranks_that_needs_halves_says_so(ranks: int, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"fit this stride: 2, 3, 4{hint}\)$"):
        stages(HostConfig(backend="asyncdiff", type="sdxl"), ranks)


WARM: dict[str, Any] = {"warm_up_steps": 99}
WHOLE: dict[str, Any] = {"split_batch": False}
COLUMNS: dict[str, Any] = {"split_scheme": "col"}
ALTERNATE: dict[str, Any] = {"parallelism": "naive_patch", "split_scheme": "alternate"}
PATCHES: dict[str, list[dict[str, Any]]] = {
    "rows": [WARM, WARM | WHOLE],
    "columns": [WARM | COLUMNS, WARM | COLUMNS | WHOLE],
    "alternate": [WARM | ALTERNATE, WARM | ALTERNATE | WHOLE],
    "synchronous": [{"sync_mode": "full_sync", "warm_up_steps": 0}, {"parallelism": "tensor"} | WHOLE],
}


@pytest.mark.parametrize(
    ("ranks", "name", "scheme"),
    seldom(
        [(n, name, s) for n, name in ((4, "sd1"), (6, "sdxl"), (7, "sd1"), (8, "sdxl")) for s in PATCHES],
        [],  # of three ranks in every run: test_distrifusion.py
    ),
)
def test_distrifusion(pool: RankPool, ranks: int, name: str, scheme: str) -> None:
    """With the guidance branches on halves of an even number of ranks, and without."""
    tiny.checkpoint(name)
    size = {"rows": UNEVEN, "columns": {"width": 136, "height": 88}}.get(
        scheme, {"width": 136, "height": 152}
    )
    found = pool.run(patches.exact, ranks, name, PATCHES[scheme], size, timeout=300)
    for rank in found:
        assert rank["given back"] and min(rank["psnr"]) >= patches.EXACT, rank


XDIT: dict[str, tuple[int, list[dict[str, int]]]] = {
    "sd3": (8, [{"cfg": 2, "ulysses": 2, "ring": 2}, {"data": 2, "ulysses": 4}, {"cfg": 2, "ulysses": 4}]),
    "flux": (8, [{"ulysses": 4, "ring": 2}, {"tensor": 2, "ulysses": 2, "ring": 2}, {"ring": 8}]),
    "qwen": (6, [{"cfg": 2, "ring": 3}, {"ulysses": 2, "ring": 3}]),
    "wan": (8, [{"cfg": 2, "ulysses": 4}, {"cfg": 2, "ulysses": 2, "ring": 2}]),
    "pixs": (8, [{"data": 2, "cfg": 2, "ulysses": 2}, {"data": 4, "ring": 2}]),
    "zimage": (6, [{"cfg": 2, "ring": 3}, {"ring": 6}]),
}
"""Type: ranks, and products of degrees. The tiny types have four attention heads."""


@pytest.mark.slow
@pytest.mark.parametrize("name", XDIT)
def test_xdit(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    ranks, cases = XDIT[name]
    sizes = tokens.SIZES_OF.get(name, tokens.SIZES)[-1:]
    for rank in pool.run(tokens.exact, ranks, name, cases, sizes, timeout=300):
        assert min(min(row) for row in rank) >= tokens.EXACT, rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "degrees"),
    [
        ("sd3", 8, {"pipefusion": 2, "cfg": 2, "ulysses": 2}),
        ("pixa", 8, {"pipefusion": 4, "cfg": 2}),
        ("flux", 8, {"pipefusion": 2, "ulysses": 4}),
    ],
)
def test_pipefusion(pool: RankPool, name: str, ranks: int, degrees: dict[str, int]) -> None:
    tiny.checkpoint(name)
    calls: list[dict[str, Any]] = [{"steps": 2, "height": 128, "width": 48, "prompt": "a"}]
    for rank in pool.run(tokens.pipefused, ranks, name, degrees, [99], calls, timeout=300):
        assert min(min(row) for row in rank) >= tokens.EXACT, rank


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("asyncdiff_host.py", ["--use_cfg_parallel", "--async_steps=2"]),
        ("distrifuser_host.py", []),
        ("xdit_host.py", ["--type=sd3"]),
    ],
)
def test_a_host_of_four_ranks_comes_back(tmp_path: Path, script: str, flags: list[str]) -> None:
    """A rank other than the first is killed in the middle: the host is there again, with the same picture."""
    checkpoint = tiny.checkpoint("sd3") if script == "xdit_host.py" else DEMO_CHECKPOINT
    launch = [*flags, f"--checkpoint={checkpoint}", "--variant=fp32", "--width=64", "--height=64"]
    host = Launch(tmp_path, 4, *launch, script=script, torchrun=("--max-restarts=1",))
    try:
        body = {"positive": "a red circle", "steps": 4, "seed": 3}
        first = host.ready().ask(body)
        _, answers = host.post_later(steps=1000)
        old = children(host.process.pid)
        os.kill(old[2], signal.SIGKILL)
        until(lambda: not any(map(alive, old)) and bool(answers), 30)
        assert answers[0].status_code in (500, 503)
        assert first == host.ready().ask(body) and len(children(host.process.pid)) == 4
    finally:
        host.end()
