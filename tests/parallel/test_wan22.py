"""Wan 2.2: two transformers, and timesteps for each token; on ranks, and with what a launch puts on them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save_file

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.requests import GenerateRequest
from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.launch.errors import LoadError, UsageError
from shared.models import MODELS
from shared.parallel.method import Unwatched
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from shared.pipeline.lora import loras_of
from shared.ranks.groups import World, make_groups
from tests import tiny, tiny_wan
from tests.parallel.test_xdit import EXACT, Case, psnr
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

KINDS = [("wan", "a14b"), ("wani2v", "a14b_i2v"), ("wan", "ti2v"), ("wani2v", "ti2v")]
CALLS: list[Case] = [
    {"steps": 3},
    # One frame of 3 x 3 tokens of TI2V, of 6 x 6 of the others.
    {"steps": 3, "height": 96, "width": 96, "num_frames": 1},
    {"steps": 2, "guidance_scale": 1.0, "num_frames": 9},
]


@cache
def pipeline(name: str, kind: str) -> Any:
    cls = getattr(diffusers, MODELS[name].pipeline)
    pipe = cls.from_pretrained(tiny_wan.wan22(kind), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact(name: str, kind: str, cases: list[Case]) -> list[list[float]]:
    """On each rank: how close each case comes to the plain pipeline, by call."""
    pipe, found = pipeline(name, kind), []
    plain = once(lambda: [tiny.run(pipe, name, **call) for call in CALLS])
    for case in cases:
        with XDiT(pipe, Degrees(**case)) as parallel:
            row = []
            for call, wanted in zip(CALLS, plain, strict=True):
                parallel.begin(call["steps"])
                run = tiny.run(lambda **given: parallel.run(given, Unwatched()), name, **call)
                row.append(psnr(run, wanted))
            found.append(row)
    assert not is_last() or np.array_equal(tiny.run(pipe, name, **CALLS[0]), plain[0])
    return found


@pytest.mark.parametrize(("name", "kind"), seldom(KINDS, KINDS[1:2]))
def test_two_ranks_equal_the_plain_pipeline(pool: RankPool, name: str, kind: str) -> None:
    tiny_wan.wan22(kind)
    for rank in pool.run(exact, 2, name, kind, [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}]):
        assert min(min(row) for row in rank) >= EXACT, rank


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_hybrids_on_four_ranks(pool: RankPool, name: str, kind: str) -> None:
    tiny_wan.wan22(kind)
    for rank in pool.run(exact, 4, name, kind, [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}]):
        assert min(min(row) for row in rank) >= EXACT, rank


def config(name: str, kind: str, **flags: Any) -> Any:
    return tiny.config(name, checkpoint=str(tiny_wan.wan22(kind)), width=64, height=64, **flags)


def host(name: str, kind: str, **flags: Any) -> Any:
    launch = config(name, kind, **flags)
    return load_pipeline(
        launch.spec, launch, torch.device("cpu"), BACKENDS["xdit"].needs(launch, 1), quiet=True
    )


def request(name: str, **fields: Any) -> GenerateRequest:
    image: dict[str, Any] = {"image": encode_image(tiny.picture(64), "png")} if name == "wani2v" else {}
    given: dict[str, Any] = {
        "positive": "a cat",
        "seed": 1,
        "steps": 3,
        "frames": 5,
        "output_format": "latent",
    }
    return GenerateRequest(**given | image | fields)


def latents(engine: PipelineEngine, name: str) -> torch.Tensor | None:
    made = engine.generate(request(name).filled(engine.config), lambda step, steps: None)
    return None if made is None else load(made.output[0])["latent"]


def sharded(name: str, kind: str) -> tuple[float | None, dict[str, dict[str, int]]]:
    """On each rank: how far sharded weights change the latents, and the bytes that it keeps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    made = []
    for shards in (False, True):
        more = {"compile_unet": True, "compile_backend": "eager", "shard_weights": True} if shards else {}
        launch = config(name, kind, ulysses_degree=2, **more)
        check_config(launch, BACKENDS["xdit"], size)
        engine = BACKENDS["xdit"].build_engine(launch, world)
        made.append(latents(engine, name))
        kept = engine.parameters
        engine.close()
    whole, parts = made
    return (None if whole is None or parts is None else float((whole - parts).abs().max())), kept


@pytest.mark.slow  # sharded without compiling: test_single_file_forms.py
def test_both_transformers_are_sharded_and_compiled(pool: RankPool) -> None:
    tiny_wan.wan22("a14b_i2v")
    ranks = pool.run(sharded, 2, "wani2v", "a14b_i2v", timeout=240)
    assert [far is None for far, _ in ranks] == [False, True] and ranks[0][0] < 1e-4
    for _, kept in ranks:
        for model in ("transformer", "transformer_2"):
            assert kept[model]["kept"] < 0.6 * kept[model]["whole"]


def test_both_transformers_are_quantized() -> None:
    pipe = host("wan", "a14b", quantize_to="int8")
    assert all("QLinear" in repr(model) for model in (pipe.transformer, pipe.transformer_2))


def test_a_lora_is_for_the_transformer_that_its_name_tells(tmp_path: Path) -> None:
    pipe = host("wan", "a14b")
    layer = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    for name, wanted in (
        ("Wan22_HighNoise_x", ["transformer"]),
        ("low_noise_model", ["transformer_2"]),
        ("style", ["transformer", "transformer_2"]),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        entry = loras_of(pipe, MODELS["wan"]).add(str(path))
        parts = [part for part in ("transformer", "transformer_2") if "lora_A" in repr(getattr(pipe, part))]
        assert parts == wanted and entry.matched == len(wanted)
        loras_of(pipe, MODELS["wan"]).remove(str(path))


def test_a_launch_has_what_its_checkpoint_is() -> None:
    launch = tiny.config("wan", checkpoint=str(tiny_wan.wan22("ti2v")))
    spec = launch.spec
    assert (*launch.size, spec.frames, spec.fps, spec.size_multiple) == (1280, 704, 121, 24, 32)
    assert tiny.config("wan").spec is MODELS["wan"]
    assert (config("wan", "a14b").spec.steps, config("wani2v", "a14b_i2v").spec.cfg) == (40, 3.5)
    wrong = tiny.config("wan", checkpoint=launch.checkpoint, width=80, height=64)
    with pytest.raises(UsageError, match=r"--width: must be a multiple of 32 .* \(nearest: 64 and 96\)"):
        check_config(wrong, BACKENDS["xdit"], 1)
    file = str(Path(launch.checkpoint) / "model_index.json")
    with pytest.raises(UsageError, match=r"--gguf_model: .*two transformers"):
        check_config(config("wan", "a14b", gguf_model=file), BACKENDS["xdit"], 1)
    with pytest.raises(LoadError, match="its type is wan"):
        host("wani2v", "a14b")


def test_the_second_transformer_has_guidance_of_its_own() -> None:
    launch = config("wan", "a14b")
    pipe = host("wan", "a14b")
    engine = PipelineEngine(pipe, launch, tiny.world())

    def made(**fields: Any) -> torch.Tensor:
        body = {"positive": "a cat", "seed": 1, "steps": 3, "frames": 5, "output_format": "latent"}
        reply = engine.generate(check_request(body | fields, launch).filled(launch), lambda step, steps: None)
        assert reply is not None
        return load(reply.output[0])["latent"]

    wanted = pipe(
        prompt="a cat", num_inference_steps=3, num_frames=5, height=64, width=64, guidance_scale=4.0,
        guidance_scale_2=1.5, generator=torch.Generator().manual_seed(1), output_type="latent",
    ).frames  # fmt: skip
    own = made(guidance_scale_2=1.5)
    assert torch.allclose(own, wanted, atol=1e-5)
    assert torch.equal(made(guidance_scale_2=4.0), made()) and float((made() - own).abs().max()) > 0.01
    for kind in ("ti2v", "wan"):
        other = config("wan", kind) if kind == "ti2v" else tiny.config("wan")
        with pytest.raises(RequestError, match=r"type wan \(.*\) does not support guidance_scale_2"):
            check_request({"positive": "a cat", "guidance_scale_2": 2.0}, other)


def test_latents_have_the_given_frame() -> None:
    launch = config("wani2v", "ti2v")
    pipe = host("wani2v", "ti2v")
    made = latents(PipelineEngine(pipe, launch, tiny.world()), "wani2v")
    wanted = pipe(
        prompt="a cat", image=tiny.picture(64), num_inference_steps=3, num_frames=5, height=64, width=64,
        generator=torch.Generator().manual_seed(1), output_type="latent",
    ).frames  # fmt: skip
    assert made is not None and torch.allclose(made, wanted, atol=1e-5)
