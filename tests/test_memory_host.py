"""Memory of real hosts under torchrun, over HTTP: sharded weights, no room for a picture, what is advised."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from safetensors.torch import load_file

from shared.backends import BACKENDS
from shared.models import MODELS
from shared.ranks.device import LIMIT
from tests import tiny
from tests.parallel.test_sharded import MOST
from tests.pipeline.test_memory_plan import plan_of
from tests.test_end_to_end import drawn, picture, plain, post
from tests.test_host import DEMO_CHECKPOINT, DEMO_STEPS, ROOT, Launch, children
from tests.test_matrix import EXACT_DB, psnr

__all__ = ["plain"]
pytestmark = pytest.mark.slow
SMALL = ("--variant=fp32", "--device=cpu", "--width=128", "--height=128")
FLAGS = (f"--checkpoint={DEMO_CHECKPOINT}", *SMALL)
ROOM = 32 << 20
"""Bytes of addresses that a rank gets beyond those that it has: enough for 128x128, not for 1024x1024."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    flags = [*FLAGS, f"--warm_up_steps={DEMO_STEPS}", "--shard_weights"]
    launch = Launch(tmp_path_factory.mktemp("sharded"), 2, *flags, script="asyncdiff_host.py")
    try:
        yield launch.ready(300)
    finally:
        launch.end()


def health(host: Launch) -> Any:
    return requests.get(f"{host.url}/health", timeout=10).json()


def test_its_picture_is_the_plain_one(host: Launch, plain: Any) -> None:
    assert psnr(picture(post(host)) / 255, drawn(plain) / 255) >= EXACT_DB


def test_health_tells_what_each_rank_keeps_and_its_last_peak(host: Launch) -> None:
    assert post(host).status_code == 200
    told = health(host)
    assert len(told["ranks"]) == 2
    for rank in told["ranks"]:
        models = rank["parameters"].values()
        kept, whole = (sum(model[side] for model in models) for side in ("kept", "whole"))
        assert 0.4 * whole < kept <= 0.55 * whole, rank["parameters"]
        assert 0 < rank["memory_request_peak_mib"] < 8192
    assert told["plan"]["memory"]["total"] > 0


def bytes_in_fp32(component: Path) -> int:
    """Of the parameters that its file of weights holds."""
    tensors = load_file(component / "diffusion_pytorch_model.safetensors")
    tensors.pop("pos_embed.pos_embed", None)  # a buffer
    return 4 * sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_of_four_ranks_keeps_its_part_of_every_model(tmp_path: Path, backend: str) -> None:
    name, folder = ("sd3", ROOT / "demo" / "transformer") if backend == "xdit" else ("sd1", DEMO_CHECKPOINT)
    flags = (f"--type={name}", f"--checkpoint={folder}", *SMALL, "--shard_weights")
    host = Launch(tmp_path, 4, *flags, script=f"{backend}_host.py")
    denoiser = MODELS[name].denoiser
    try:
        told = health(host.ready(300))
    finally:
        host.end()
    assert len(told["ranks"]) == 4
    for rank in told["ranks"]:
        assert {denoiser, "vae", *MODELS[name].text_encoders} - {"text_encoder_3"} == set(rank["parameters"])
        for model, bytes_ in rank["parameters"].items():
            assert 0 < bytes_["kept"] <= MOST[4] * bytes_["whole"], (model, rank["parameters"])
    of_denoiser = [rank["parameters"][denoiser] for rank in told["ranks"]]
    whole = bytes_in_fp32(folder / denoiser)
    assert {bytes_["whole"] for bytes_ in of_denoiser} == {whole}
    assert sum(bytes_["kept"] for bytes_ in of_denoiser) >= whole


def test_a_picture_without_room_gets_advice_and_the_host_goes_on(tmp_path: Path) -> None:
    """The system refuses its memory, by a bound of addresses; one rank, for which no other waits."""
    host = Launch(tmp_path, 1, *FLAGS, script="asyncdiff_host.py")
    try:
        before = picture(post(host.ready(300), steps=1))
        (rank,) = children(host.process.pid)
        usual = resource.prlimit(rank, resource.RLIMIT_AS)
        pages = int(Path(f"/proc/{rank}/statm").read_text().split()[0])
        resource.prlimit(rank, resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, usual[1]))
        full = post(host, width=1024, height=1024, steps=1)
        said = full.json()["message"]
        assert full.status_code == 507 and said.startswith("out of memory (rank 0: "), said
        assert re.search(r"\): it would fit with \S+", said), said
        assert np.array_equal(picture(post(host, steps=1)), before), "there is room for this one all along"
        assert health(host)["state"] == "ready" and host.log.read_text().count("ready after") == 1
    finally:
        host.end()


def test_what_is_advised_is_started_under_the_same_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags and numbers of ranks, each with a picture, said by a launch that does not fit and ends with 2."""
    config = tiny.config("sd1", checkpoint=str(DEMO_CHECKPOINT), width=128, height=128)
    need = plan_of(config).need(config)
    monkeypatch.setenv(LIMIT, f"{0.9 * (need.total - need.margin) / 2**30:.6f}")
    refused = Launch(tmp_path, 0, *FLAGS, script="asyncdiff_host.py")
    assert refused.process.wait(300) == 2, refused.log.read_text()
    said = refused.log.read_text().strip().splitlines()[-1].partition("it would fit with ")[2]
    advised = [re.sub(r" \([\d.]+ GiB\)", "", one) for one in said.split(", or ")]
    assert len(advised) >= 2 and any("ranks and " in one for one in advised), said
    for one in advised:
        ranks, _, flag = one.rpartition(" ranks and ")
        host = Launch(tmp_path, int(ranks or 1), *FLAGS, flag, script="asyncdiff_host.py")
        try:
            host.ready(300)
            assert post(host, steps=1).status_code == 200, one
        finally:
            host.end()
