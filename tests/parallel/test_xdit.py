"""shared.parallel.xdit on CPU ranks: exact methods equal plain diffusers, PipeFusion as far as it can."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from shared.api.jobs import GenerationJob, JobError
from shared.api.parsing import check_request
from shared.api.queue import JobQueue
from shared.api.requests import GenerateRequest
from shared.backends import BACKENDS
from shared.backends.xdit_plan import xdit_degrees
from shared.launch.checks import check_config
from shared.models import MODELS, CacheSettings
from shared.parallel.method import Plain, Unwatched
from shared.parallel.rounding import BITS, packed, unpacked, width_of
from shared.parallel.xdit import groups
from shared.parallel.xdit.cpu import trimmed
from shared.parallel.xdit.degrees import Degrees, choose_degrees
from shared.parallel.xdit.exact import XDiT, attention_backend
from shared.parallel.xdit.groups import XfuserGroups
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from shared.parallel.xdit.stages import StepReporter
from shared.pipeline.compile import blocks, graph_count
from shared.ranks.channel import Channel
from shared.ranks.groups import World, make_groups
from shared.ranks.loop import RankLoop
from tests import test_matrix, tiny, tiny_original
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

STEPS = 2
EXACT = 80.0
"""dB in fp32 that count as equal to the plain pipeline; most reach 120 and more."""
TYPES = (
    "chroma",
    "flux",
    "flux2",
    "hv15",
    "hy",
    "kontext",
    "ltx2",
    "pixa",
    "pixs",
    "qwen",
    "qwenedit",
    "sd3",
    "wan",
    "wani2v",
    "zimage",
)

Case = dict[str, Any]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, in dB; 200 when equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 200.0 if error == 0 else float(-10 * np.log10(error))


@functools.cache
def pipeline(name: str) -> Any:
    pipe = tiny.load(name)
    if name == "hv15":
        pipe.tokenizer_max_length = 120  # of 1000, nearly all of them padding
    return pipe


def picture(pipe: Any, name: str, parallel: Any = None, **changes: Any) -> np.ndarray:
    changes = {"steps": STEPS} | changes
    if name == "hv15":
        scale = changes.pop("guidance_scale", 6.0)
        pipe.register_modules(guider=pipe.guider.new(guidance_scale=scale))
    if parallel is not None:
        parallel.begin(changes["steps"])
    heard: list[torch.Tensor] = []

    def call(**arguments: Any) -> Any:
        made = pipe(**arguments) if parallel is None else parallel.run(arguments, Unwatched())
        heard.extend([made.audio] if MODELS[name].sound else [])
        return made

    frames = tiny.run(call, name, **changes)
    return np.concatenate([frames.ravel(), *(sound.numpy().ravel() for sound in heard)]) if heard else frames


def exact(name: str, cases: list[Case], sizes: list[Case]) -> list[list[float]]:
    """On each rank: how close each case comes to the plain pipeline, for each of the calls in `sizes`."""
    pipe = pipeline(name)
    plain = once(lambda: [picture(pipe, name, **size) for size in sizes])
    text = repr(pipe.transformer)
    found = []
    for case in cases:
        options: Any = {"parallel_vae": True} if "ring" in case else {}
        options |= {name: case[name] for name in ("overlap", "bits", "join") if name in case}
        degrees = Degrees(**{k: v for k, v in case.items() if k not in options})
        with XDiT(pipe, degrees, **options) as parallel:
            assert json.dumps(parallel.plan)
            assert repr(pipe.transformer) == text
            made = [picture(pipe, name, parallel, **size) for size in sizes]
            found.append([psnr(a, b) for a, b in zip(made, plain, strict=True)])
        assert not any("forward" in m.__dict__ for m in pipe.transformer.modules())
        assert not is_last() or np.array_equal(picture(pipe, name, **sizes[0]), plain[0])
    return found


CASES_2: list[Case] = [{"ulysses": 2, "join": True}, {"ring": 2, "join": True}]
# 104 x 72 pixels make 13 x 9 latents, which no model takes; 80 x 48 make 5 x 3 tokens: one is left over.
SIZES = [{}, {"height": 80, "width": 48, "steps": 3}]
SIZES_OF = {"ltx2": [{"height": 96, "width": 96, "frames": 0}], "hv15": SIZES[1:], "wan": SIZES[1:]}
"""Of LTX-2, whose sides are multiples of more: 9 tokens, and one of sound. Of long videos, only one size."""
# What xfuser's own pipelines would not hear, or do wrong.
MORE: dict[str, list[Case]] = {
    "wan": [{"guidance_scale": 1.0, "num_frames": 1}, {"negative_prompt": "blur", "num_frames": 9}],
    "ltx2": [
        {**MODELS["ltx2"].without_guidance, "guidance_scale": 1.0, "height": 96},
        # In two blocks each token keeps its own value, as in LTX-2.3's block 28.
        {"negative_prompt": "blur", "width": 96, "num_frames": 17, "spatio_temporal_guidance_blocks": [1, 2]},
    ],
    "hv15": [
        {"num_frames": 1, "prompt": "a", "guidance_scale": 1.0},
        {"negative_prompt": 'a sign that says "blur", and many more words', "num_frames": 9},
    ],
    "wani2v": [
        {"guidance_scale": 1.0, "num_frames": 1},
        {"negative_prompt": "blur", "num_frames": 9, "image": tiny.picture(96, 2)},
    ],
    "zimage": [
        {"guidance_scale": 0.0},
        {"negative_prompt": "blur, and many more words, so that it is padded longer"},
    ],
    "chroma": [
        {"guidance_scale": 1.0},
        {"negative_prompt": "blur, and many more words", "max_sequence_length": 19},
    ],
    "flux": [
        {"true_cfg_scale": 3.0, "negative_prompt": "blur"},
        {"sigmas": [1.0, 0.7, 0.2], "max_sequence_length": 17},
    ],
    "flux2": [
        {"guidance_scale": 1.0, "image": tiny.picture(), "max_sequence_length": 61},
        {"image": [tiny.picture(96, 1).resize((96, 64)), tiny.picture(64, 2)], "prompt": "a"},
    ],
    "kontext": [
        {"image": None, "max_sequence_length": 17},
        {"true_cfg_scale": 3.0, "negative_prompt": "blur", "image": tiny.picture(48).resize((96, 48))},
    ],
    "qwen": [
        {"true_cfg_scale": 1.0},
        {"negative_prompt": "blur, and many more words", "prompt": "a"},
    ],
    "qwenedit": [
        {"true_cfg_scale": 1.0, "image": tiny.picture(48).resize((96, 48))},
        {"negative_prompt": "blur, and many more words", "image": [tiny.picture(), tiny.picture(40, 2)]},
    ],
    "sd3": [{"guidance_scale": 1.0, "max_sequence_length": 40}, {"sigmas": [1.0, 0.7, 0.2]}],
    "hy": [{"guidance_scale": 1.0}, {"guidance_rescale": 0.7}],
    "pixa": [{"guidance_scale": 1.0}],
    "pixs": [{"negative_prompt": "blur"}],
}


def methods(name: str) -> dict[str, Case]:
    """What two ranks can do of a type: one plan a method."""
    last = "tensor" if name in ("flux", "kontext") else "cfg"
    return {"ulysses": CASES_2[0], "ring": CASES_2[1], last: {last: 2}}


@pytest.mark.parametrize(
    ("name", "method"),
    seldom(
        [(name, method) for name in TYPES for method in methods(name)],
        # Each method of one type, and each type that test_matrix.py leaves out.
        [
            *(("flux", method) for method in methods("flux")),
            ("chroma", "ulysses"),
            ("hv15", "ulysses"),
            ("kontext", "ring"),
            ("ltx2", "ring"),
            ("qwen", "cfg"),
            ("sd3", "cfg"),
            ("wan", "ulysses"),
            ("zimage", "ring"),
        ],
    ),
)
def test_two_ranks_equal_the_plain_pipeline(pool: RankPool, name: str, method: str) -> None:
    tiny.checkpoint(name)
    calls = SIZES_OF.get(name, SIZES) + MORE[name]
    for rank in pool.run(exact, 2, name, [methods(name)[method]], calls):
        assert min(min(row) for row in rank) >= EXACT, rank


@pytest.mark.slow
def test_three_ranks_share_sections_that_they_do_not_divide(pool: RankPool) -> None:
    tiny.checkpoint("zimage")
    for rank in pool.run(exact, 3, "zimage", [{"ulysses": 3}, {"ring": 3}], [{}, *MORE["zimage"]]):
        assert min(min(row) for row in rank) >= EXACT, rank


def pipefused(
    name: str, degrees: Case, warm_ups: list[int], calls: list[Case], refused: Case | None = None
) -> list[list[float]]:
    """On each rank: how close PipeFusion comes to the plain pipeline, by warm-up and call."""
    pipe = pipeline(name)
    whole = {"max_sequence_length": 256} if name == "sd3" else {}
    plain = once(lambda: [picture(pipe, name, **call, **whole) for call in calls])
    text = repr(pipe.transformer)
    state = {key: id(value) for key, value in pipe.transformer.state_dict(keep_vars=True).items()}
    found = []
    for warm_up in warm_ups:
        options: Any = {"parallel_vae": warm_up > 1}
        with XDiTPipeFusion(pipe, Degrees(**degrees), warm_up_steps=warm_up, **options) as parallel:
            from xfuser.core.distributed import get_runtime_state  # importable on CPUs from here on

            row = []
            for call, wanted in zip(calls, plain, strict=True):
                changes = {"steps": STEPS} | call
                known = {key: changes.pop(key) for key in ("steps", "seed", "size") if key in changes}
                arguments = tiny.call_args(name, **known) | changes
                if name == "sd3":
                    arguments["max_sequence_length"] = (
                        None  # 256 is what xfuser takes, and diffusers' default
                    )
                parallel.begin(arguments["num_inference_steps"])
                told: list[Any] = []
                watch = Noting(lambda *step, told=told: told.append(step))
                made = parallel.run(arguments, watch).images
                assert [steps for _, steps in told] == [arguments["num_inference_steps"]] * len(told)
                assert len(told) == arguments["num_inference_steps"] and told[-1][0] is not None
                row.append(psnr(np.asarray(made), wanted))
                assert parallel.plan["patches"] == get_runtime_state().num_pipeline_patch
            found.append(row)
            if refused is not None:
                with pytest.raises(ValueError, match="makes 1 patch"):
                    parallel.run(tiny.call_args(name) | refused)
            if name == "hy":
                with pytest.raises(ValueError, match="PipeFusion does not support guidance_rescale"):
                    parallel.run(tiny.call_args(name) | {"guidance_rescale": 0.5})
        assert repr(pipe.transformer) == text
        assert {k: id(v) for k, v in pipe.transformer.state_dict(keep_vars=True).items()} == state
        assert not is_last() or np.array_equal(picture(pipe, name, **calls[0], **whole), plain[0])
    return found


PIPEFUSION_CALLS: list[Case] = [
    {"steps": 4},
    {"steps": 3, "height": 96, "width": 64, "prompt": "a"},
    {"steps": 5, "prompt": "two large blue dogs on a hill"},
    {"steps": 4, "height": 96},
]
LATENTS = {"flux": (1, 16, 16), "sd3": (1, 16, 8, 8), "hy": (1, 4, 8, 8)}


@pytest.mark.parametrize(
    "name",
    seldom(
        [n for n in TYPES if not BACKENDS["xdit"].refusal(MODELS[n], "pipefusion_parallel_degree")],
        ("flux", "hy"),
    ),
)  # those that xfuser has stages of; the others run on four ranks
def test_pipefusion(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    calls = list(PIPEFUSION_CALLS)
    if name in LATENTS:
        drawn = torch.randn(LATENTS[name], generator=torch.Generator().manual_seed(5))
        calls[1] = {**calls[1], "height": 64, "latents": drawn}
    if name == "flux":  # embeddings whose length is not max_sequence_length
        drawn = torch.randn((1, 33, 32), generator=torch.Generator().manual_seed(6))
        calls.append({"prompt": None, "prompt_embeds": drawn, "pooled_prompt_embeds": drawn[:, 0]})
    for rank in pool.run(pipefused, 2, name, {"pipefusion": 2}, [99, 1], calls):
        exact_ones, stale = rank
        assert min(exact_ones) >= EXACT
        # On random weights; HunyuanDiT's scheduler adds noise at each step.
        assert (18 if name == "hy" else 60) <= min(stale) < EXACT + 30


# A sample in which every pair of methods comes up.
HYBRIDS: dict[str, list[Case]] = {
    "wan": [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}],
    "wani2v": [{"cfg": 2, "ring": 2}, {"data": 2, "ulysses": 2}],
    "ltx2": [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}],
    "hv15": [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}],
    "chroma": [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}],
    "flux": [{"ulysses": 2, "ring": 2}, {"tensor": 2, "ulysses": 2}, {"tensor": 2, "ring": 2}],
    "sd3": [{"cfg": 2, "ulysses": 2}, {"ulysses": 4}],
    "flux2": [{"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}, {"ulysses": 2, "ring": 2}],
    "kontext": [{"ulysses": 2, "ring": 2}, {"data": 2, "ring": 2}],
    "qwen": [{"cfg": 2, "ring": 2}, {"ulysses": 2, "ring": 2}],
    "qwenedit": [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}, {"data": 2, "ring": 2}],
    "zimage": [{"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}],
    "pixs": [{"cfg": 2, "ring": 2}, {"data": 2, "ulysses": 2}],
    "hy": [{"ulysses": 2, "ring": 2}, {"data": 2, "cfg": 2}],
}
PIPEFUSION_HYBRIDS: dict[str, Case] = {
    "flux": {"pipefusion": 2, "ring": 2},
    "sd3": {"pipefusion": 2, "ulysses": 2},
    "hy": {"pipefusion": 2, "cfg": 2},
    "pixa": {"pipefusion": 4},
    "pixs": {"pipefusion": 2, "data": 2},
}


@pytest.mark.parametrize("name", seldom(HYBRIDS, ("flux",)))
def test_hybrids_on_four_ranks(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    for rank in pool.run(exact, 4, name, HYBRIDS[name], SIZES_OF.get(name, SIZES)[-1:]):
        assert min(min(row) for row in rank) >= EXACT, rank


@pytest.mark.parametrize("name", seldom(PIPEFUSION_HYBRIDS, ("pixa", "sd3")))
def test_pipefusion_hybrids_on_four_ranks(pool: RankPool, name: str) -> None:
    tiny.checkpoint(name)
    calls: list[Case] = [{"steps": 2, "height": 64, "width": 48, "prompt": "a"}]
    calls += [
        {"steps": 2, "height": 96, "prompt": "a"}
    ]  # patches of unequal heights, where two ranks share one
    # xfuser would count FLUX's text once a rank.
    refused = {"height": 32} if name == "flux" else None
    for rank in pool.run(pipefused, 4, name, PIPEFUSION_HYBRIDS[name], [99], calls, refused):
        assert min(min(row) for row in rank) >= EXACT, rank


def compiled(name: str, degrees: dict[str, int], **options: Any) -> dict[str, Any]:
    """On each rank: graphs that compiled blocks make under the surgery, and whether the picture stays."""
    torch._dynamo.reset()
    pipe = tiny.load(name)
    plain = picture(pipe, name)
    found: dict[str, Any] = {"blocks": 0, "divided": 0}

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found["divided"] += sum(node.target is torch.addmm for node in graph.graph.nodes)
        return graph.forward

    for block in blocks(pipe.transformer):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        found["blocks"] += 1
    before = graph_count()
    with XDiT(pipe, Degrees(**degrees), **options) as parallel:
        found["joined"], found["psnr"] = parallel.joined, psnr(picture(pipe, name, parallel), plain)
        found["graphs"] = graph_count() - before
        picture(pipe, name, parallel, seed=1)
        found["more"] = graph_count() - before - found["graphs"]
    return found


@pytest.mark.slow  # of flux and ring, test_compiled_blocks_overlap_and_round
@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_compiled_blocks_are_compiled_under_the_surgery(pool: RankPool, name: str, method: str) -> None:
    for rank in pool.run(compiled, 2, name, {method: 2}, join=True):
        assert rank["joined"] > 0 and rank["psnr"] >= EXACT
        # Blocks of one kind share a graph.
        assert 1 <= rank["graphs"] < rank["blocks"], rank
        assert rank["more"] == 0 and not rank["divided"]


# 3 ranks: one part lies between the others' two, and one token is left over.
@pytest.mark.parametrize(("name", "ranks"), seldom([("flux", 2), ("flux", 3), ("qwen", 3), ("sd3", 2)], []))
def test_ring_that_overlaps_equals_the_plain_pipeline(pool: RankPool, name: str, ranks: int) -> None:
    tiny.checkpoint(name)
    for rank in pool.run(exact, ranks, name, [{"ring": ranks, "overlap": True}], SIZES):
        assert min(min(row) for row in rank) >= EXACT, rank


@pytest.mark.parametrize("method", seldom(["ring", "ulysses"], ["ring"]))
def test_an_exchange_in_8_bits_is_close_and_alike_on_all_ranks(pool: RankPool, method: str) -> None:
    tiny.checkpoint("flux")
    cases = [{method: 2, "bits": bits} for bits in ("int8", "float8")] + [
        {"ring": 2, "overlap": True, "bits": "int8"}
    ]
    one, other = pool.run(exact, 2, "flux", cases, SIZES)
    assert one == other
    assert min(min(row) for row in one) > 60, one
    assert max(row[0] for row in one) < 120, one  # unrounded it is 130 and more


def test_multiprocessors_are_reserved_for_nccl_and_left_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, **settings: asked.append(settings))
    nccl = SimpleNamespace(Options=lambda: SimpleNamespace(config=SimpleNamespace()))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    for reserved in (4, None):
        with groups._new_groups("nccl", timedelta(seconds=5), [], reserved):
            dist.new_group([0, 1])
            dist.new_group([0, 1], backend="gloo")
    options = asked[0].pop("pg_options")
    assert options.config.max_ctas == options.config.min_ctas == 4
    assert options._timeout == timedelta(seconds=5)
    assert not any("pg_options" in settings for settings in asked)
    made = XfuserGroups.__new__(XfuserGroups)
    made.reserved = 4
    with pytest.raises(KeyError), made.leaving():
        assert torch._C._get_sm_carveout_experimental() == 4
        raise KeyError
    assert torch._C._get_sm_carveout_experimental() is None
    for count, spares in ((132, True), (108, False)):
        gpu = SimpleNamespace(multi_processor_count=count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        assert groups._spares(torch.device("cuda"), 4) is spares


def test_what_is_sent_in_8_bits_comes_back() -> None:
    torch.manual_seed(0)  # the bounds hold for most rows of 64 numbers, not for all
    x = torch.randn(2, 3, 4, 64) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None]
    for bits, least in zip(BITS, (0.01, 0.04, 0.15), strict=True):
        rows = packed(x, bits)
        assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 4, width_of(64, bits))
        back = unpacked(rows, bits, x.dtype)
        error = (back - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-9)
        assert 0 < error.max() < least
        assert not back[..., 3, :].any()
        broken = torch.full((1, 8), torch.nan)
        assert unpacked(packed(broken, bits), bits, torch.float32).isnan().all()


def test_compiled_blocks_overlap_and_round(pool: RankPool) -> None:
    """And what a step cache measures inside of them compiles nothing more."""
    cache = CacheSettings("teacache", threshold=0)
    for rank in pool.run(compiled, 2, "flux", {"ring": 2}, overlap=True, bits="int8", cache=cache):
        assert rank["psnr"] > 60
        assert 1 <= rank["graphs"] < rank["blocks"] and rank["more"] == 0, rank
        assert rank["divided"] > 0


@pytest.mark.slow  # of flux and ring, test_compiled_blocks_overlap_and_round
@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_products_behind_attention_are_divided(pool: RankPool, name: str, method: str) -> None:
    for rank in pool.run(compiled, 2, name, {method: 2}, overlap=True):
        assert rank["psnr"] >= EXACT
        assert rank["divided"] > 0 and rank["more"] == 0, rank


def fused_projections(name: str) -> float:
    """On each rank: how close ring comes to the plain pipeline where to_v is part of another layer."""
    pipe = tiny.load(name)
    plain = picture(pipe, name)
    for module in pipe.transformer.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    with XDiT(pipe, Degrees(ring=2)) as parallel:
        return psnr(picture(pipe, name, parallel), plain)


def test_ring_takes_values_from_fused_projections(pool: RankPool) -> None:
    assert min(pool.run(fused_projections, 2, "flux")) >= EXACT


class Noting(Unwatched):
    """A watch that hands on what it is told."""

    def __init__(self, note: Callable[[Any, int], None]) -> None:
        super().__init__()
        self.note = note

    def after_step(self, latents: Any, steps: int) -> None:
        self.note(latents, steps)


class EndedError(Exception):
    """What ends a generation in a test."""


def ended_early(name: str, at: int) -> list[float]:
    """On each rank: generations that are to end after step `at`, each followed by a whole one."""
    pipe = pipeline(name)
    arguments = tiny.call_args(name, steps=6) | {"max_sequence_length": 256}
    plain, found = np.asarray(pipe(**arguments).images), []
    with XDiTPipeFusion(pipe, Degrees(pipefusion=2), warm_up_steps=2) as parallel:
        for _ in range(2):
            told: list[int] = []

            def on_step(latents: Any, steps: int, told: list[int] = told) -> None:
                told.append(steps)
                if len(told) == at:
                    raise EndedError

            arguments["generator"].manual_seed(0)
            parallel.begin(6)
            with pytest.raises(EndedError):
                parallel.run(arguments, Noting(on_step))
            assert len(told) == at
            parallel.begin(6)
            arguments["generator"].manual_seed(0)
            found.append(psnr(np.asarray(parallel.run(arguments).images), plain))
    assert found[0] == found[1], "a generation depends on the one before"
    return found


@pytest.mark.parametrize(
    ("name", "at"), seldom([("sd3", 1), ("sd3", 4), ("flux2", 1), ("flux2", 4)], [("sd3", 4)])
)
def test_a_generation_of_pipefusion_ends_early_and_the_next_is_whole(
    pool: RankPool, name: str, at: int
) -> None:
    tiny.checkpoint(name)
    for rank in pool.run(ended_early, 2, name, at):
        assert min(rank) >= 30


def decoded(name: str) -> list[float]:
    """On each rank: how close pictures that all ranks of PipeFusion decode come to those of one rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    flags = {"pipefusion_parallel_degree": 2, "warm_up_steps": 9, "use_parallel_vae": True}
    config = tiny.config(name, width=64, height=64, **flags)
    engine = BACKENDS["xdit"].build_engine(config, world)
    assert engine.plan["parallel_vae"] and engine.plan["previews"] is False

    def pictures() -> list[np.ndarray]:
        requests = [
            GenerateRequest(positive="a cat", seed=seed, steps=STEPS).filled(config) for seed in (1, 2)
        ]
        replies = [engine.generate(request, lambda step, steps: None) for request in requests]
        return [np.asarray(reply.pictures[0]) / 255 for reply in replies if reply is not None]

    made = pictures()
    engine.close()
    engine.parallel = Plain(engine.pipe)
    return [psnr(a, b) for a, b in zip(made, pictures(), strict=True)]


def test_all_ranks_of_pipefusion_decode_a_picture_together(pool: RankPool) -> None:
    tiny.checkpoint("flux")
    close, none = pool.run(decoded, 2, "flux")
    assert len(close) == 2 and min(close) >= 45 and none == []


def end_after(job: GenerationJob, queue: JobQueue) -> None:
    job.wait(60)
    queue.close(JobError(503, "done"))


def several(pictures: int) -> Any:
    """On each rank of two replicas: seeds and files of a job for so many pictures, and of one for each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    config = tiny.config("pixa", width=64, height=64, data_parallel_degree=2, warm_up_steps=1)
    engine = BACKENDS["xdit"].build_engine(config, world)
    request = GenerateRequest(positive="a cat", seed=2**64 - 1, steps=STEPS).filled(config)
    requests = [request.model_copy(update={"pictures": pictures}), request, request.numbered(1)]
    jobs = [GenerationJob(one) for one in requests]
    queue = JobQueue(8) if rank == 0 else None
    if queue is not None:
        for job in jobs:
            queue.submit(job)
        threading.Thread(target=end_after, args=(jobs[-1], queue)).start()
    RankLoop(engine, Channel(world), queue, at_once=2).run()
    engine.close()
    return [[(r.seed, r.pictures[0].tobytes()) for r in job.made] for job in jobs] if rank == 0 else None


def test_several_pictures_are_made_at_the_same_time(pool: RankPool) -> None:
    tiny.checkpoint("pixa")
    both, first, second = pool.run(several, 2, 2)[0]
    assert [seed for seed, _ in both] == [2**64 - 1, 0]
    assert both == first + second
    three = pool.run(several, 2, 3)[0][0]  # two of one replica, one of the other, which draws one more
    assert [seed for seed, _ in three] == [2**64 - 1, 0, 1]
    apart = [
        np.frombuffer(a[1], np.uint8).astype(int) - list(b[1]) for a, b in zip(three, both, strict=False)
    ]
    assert max(np.abs(a).max() for a in apart) <= 1


SETTINGS = test_matrix.SETTINGS | {"gguf_model": lambda name: {"gguf_model": str(tiny_original.gguf(name))}}


PAIRS: list[tuple[str, tuple[str, ...], Case]] = [
    ("flux", ("ip_adapter", "lora"), {"ring_degree": 2}),
    ("flux", ("lora",), {"tensor_parallel_degree": 2}),
    ("flux", ("gguf_model",), {"ulysses_degree": 2}),
    ("sd3", ("ip_adapter", "control_net"), {"ring_degree": 2}),
    ("pixs", ("quantize_to", "lora"), {"pipefusion_parallel_degree": 2, "warm_up_steps": 99}),
    ("zimage", ("control_net", "mask"), {"ulysses_degree": 2}),
    ("qwen", ("control_net",), {"ring_degree": 2}),
    ("qwen", ("control_net",), {"ulysses_degree": 2}),
    ("qwen", ("control_net",), {"use_cfg_parallel": True}),
    ("qwen", ("control_net", "mask"), {"ulysses_degree": 2}),
    ("qwen", ("control_net", "mask"), {"ring_degree": 2}),
    ("flux", ("control_net", "quantize_to"), {"ulysses_degree": 2}),
    ("sd3", ("ip_adapter", "control_net"), {"ulysses_degree": 2}),
    ("hy", ("control_net", "lora"), {"ring_degree": 2}),
    ("sd3", ("compile_unet", "lora"), {"pipefusion_parallel_degree": 2, "warm_up_steps": 99}),
]


@pytest.mark.parametrize(("name", "features", "plan"), seldom(PAIRS, PAIRS[1:6]))
def test_features_in_pairs(pool: RankPool, name: str, features: tuple[str, ...], plan: Case) -> None:
    flags: Case = {}
    for feature in features:
        flags |= SETTINGS[feature](name)
    holder = pool.run(feature_cell, 2, name, flags, plan)[0]
    assert test_matrix.psnr(holder["exact"], holder["plain"]) >= 60


def feature_cell(name: str, flags: Case, plan: Case) -> dict[str, Any]:
    """On each rank: latents of a host with these flags, and of the plain pipeline."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    fitting = test_matrix.fitting(name, flags)
    launched = {flag: value for flag, value in fitting.items() if flag != "start"}
    config = replace(tiny.config(name, width=80, height=48, **launched, **plan), backend="xdit")
    check_config(config, BACKENDS["xdit"], size)
    request = check_request(test_matrix.body(name, flags), config)
    engine = BACKENDS["xdit"].build_engine(config, world)

    def latents() -> np.ndarray | None:
        reply = engine.generate(request, lambda step, steps: None)
        return None if reply is None else load(reply.latent or b"")["latent"].float().numpy()

    exact = latents()
    engine.close()
    engine.parallel = Plain(engine.pipe)
    return {"exact": exact, "plain": latents()}


ORDER_3 = {"scheduler": "dpmpp_2m", "solver_order": 3}
STOCHASTIC = {"scheduler": "flow_euler", "stochastic_sampling": True}


@pytest.mark.parametrize(
    ("name", "flags", "world", "words"),
    [
        ("flux", {"use_cfg_parallel": True}, 2, "only one guidance branch"),
        ("sd3", {"tensor_parallel_degree": 2}, 2, "has no tensor parallelism for it; types with it: flux"),
        ("pixa", {"use_teacache": True}, 2, "types with it: flux"),
        ("flux", {"use_teacache": True, "use_fbcache": True}, 2, "use_fbcache: give only one cache"),
        ("flux", {"use_teacache": True, "step_cache": CacheSettings("mask", mask="10")}, 2, "only one cache"),
        ("qwen", {"step_cache": CacheSettings("magcache")}, 2, "magcache needs mag_ratios.*Qwen-Image"),
        ("sd3", {"step_cache": CacheSettings("teacache")}, 2, "step_cache: teacache does not fit Stable"),
        ("flux", {"use_fbcache": True, "pipefusion_parallel_degree": 2}, 2, "not supported with PipeFusion"),
        (
            "flux",
            {"control_net": {"x": 1.0}, "pipefusion_parallel_degree": 2},
            2,
            "not supported with PipeFusion",
        ),
        (
            "sd3",
            {"ip_adapter": {"x": 1.0}, "pipefusion_parallel_degree": 2},
            2,
            "not supported with PipeFusion",
        ),
        ("sd3", {"pipefusion_parallel_degree": 2, "warm_up_steps": 0}, 2, "at least 1"),
        ("sd3", {"num_pipeline_patch": 2}, 2, "needs PipeFusion"),
        ("sd3", {"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": (4,)}, 2, "got 1"),
        ("hy", {"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": (4, 4)}, 2, "equal stages"),
        ("sd3", {"pipefusion_parallel_degree": 2, "height": 80}, 4, "64 and 96"),
        ("flux", {"tensor_parallel_degree": 2, "quantize_to": "int8"}, 2, "plain weights"),
        ("sd3", {"ulysses_degree": 3}, 3, "4 attention heads"),
        ("pixs", {"use_parallel_vae": True}, 1, "share a picture"),
        (
            "flux",
            {"exchange_dtype": "int4", "ring_degree": 2},
            2,
            "--exchange_dtype: int4 is for differences",
        ),
        (
            "sd3",
            {"exchange_dtype": "int8", "pipefusion_parallel_degree": 2},
            2,
            "not supported with PipeFusion",
        ),
        ("flux", {"exchange_dtype": "auto", "ring_degree": 2}, 4, "with Ulysses or with ring, not both"),
        ("flux", {"xformers_efficient": True}, 2, "attention of its own"),
        (
            "flux",
            {"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": (2, 3)},
            2,
            "sum 6, .* got .2, 3",
        ),
        ("hy", {"pipefusion_parallel_degree": 3}, 3, "even number of equal stages"),
        ("pixs", {"pipefusion_parallel_degree": 5}, 5, "without any of 4 blocks"),
        (
            "flux",
            {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 1},
            4,
            "num_pipeline_patch: .* 2 or",
        ),
        ("flux", {"pipefusion_parallel_degree": 2, "height": 32}, 4, "height: must be 64 or more"),
        ("flux", {"pipefusion_parallel_degree": 2, "scheduler": "flow_dpmpp_2m"}, 2, "scheduler: .* got DPM"),
        ("sd3", {"pipefusion_parallel_degree": 2, "scheduler": "flow_heun"}, 2, "got FlowMatchHeun"),
        ("pixa", {"pipefusion_parallel_degree": 2, "scheduler": "k_euler"}, 2, "got EulerDiscrete"),
        ("pixs", {"pipefusion_parallel_degree": 2, "scheduler": ORDER_3}, 2, "solver_order 2 only; got 3"),
        ("sd3", {"pipefusion_parallel_degree": 2, "scheduler": STOCHASTIC}, 2, "stochastic_sampling False"),
    ],
)
def test_launches_that_cannot_work_are_refused(name: str, flags: Case, world: int, words: str) -> None:
    config = tiny.config(name, **({"width": 64, "height": 64, "ulysses_degree": None} | flags))
    if name == "sd3" and "height" in flags:
        config = replace(config, ulysses_degree=2)
    with pytest.raises(ValueError, match=words):
        BACKENDS["xdit"].check(replace(config, backend="xdit"), world)


@pytest.mark.parametrize("name", ["pixa", "flux"])
def test_schedulers_of_pipefusion_are_let_through(name: str) -> None:
    mine = {
        "flux": "FlowMatchEulerDiscreteScheduler",
        "pixa": {"scheduler": "k_dpmpp_2m_sde", "solver_order": 2},
    }
    flags: Case = {"pipefusion_parallel_degree": 2, "width": 64, "height": 64}
    for scheduler in (None, mine[name]):
        BACKENDS["xdit"].check(replace(tiny.config(name, **flags, scheduler=scheduler), backend="xdit"), 2)


def changed(root: Path, name: str, path: str, changes: Case) -> str:
    """The checkpoint's configurations alone, with changes to one of them."""
    for file in tiny.checkpoint(name).rglob("*.json"):
        copy = root / file.relative_to(tiny.checkpoint(name))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    settings = json.loads((root / path).read_text()) | changes
    (root / path).write_text(json.dumps(settings))
    return str(root)


@pytest.mark.parametrize(
    ("name", "path", "changes", "words"),
    [
        ("sd3", "transformer/config.json", {"dual_attention_layers": [0, 1]}, "dual attention"),
        ("pixa", "scheduler/scheduler_config.json", {"solver_order": 1}, "solver_order 2 only; got 1"),
        ("hy", "scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "got PNDMScheduler"),
    ],
)
def test_checkpoints_that_pipefusion_cannot_run_are_refused(
    tmp_path: Path, name: str, path: str, changes: Case, words: str
) -> None:
    config = tiny.config(
        name,
        checkpoint=changed(tmp_path, name, path, changes),
        **{"width": 64, "height": 64, "pipefusion_parallel_degree": 2, "ulysses_degree": 2},
    )
    with pytest.raises(ValueError, match=words):
        BACKENDS["xdit"].check(replace(config, backend="xdit"), 4)
    plain = replace(config, backend="xdit", pipefusion_parallel_degree=None, warm_up_steps=1)
    BACKENDS["xdit"].check(plain, 4)


def test_the_heads_of_a_control_net_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6}')
    config = tiny.config("flux", width=64, height=64, control_net={str(tmp_path): 1.0})
    assert xdit_degrees(config, 4) == Degrees(ulysses=2, ring=2)
    with pytest.raises(ValueError, match="the 6 attention heads of --control_net"):
        xdit_degrees(replace(config, ulysses_degree=4), 4)


def test_ranks_share_the_sequence_of_a_type_without_guidance_unless_asked() -> None:
    config = tiny.config("zimage", width=64, height=64)
    assert xdit_degrees(config, 2) == Degrees(ulysses=2)
    assert xdit_degrees(config, 4) == Degrees(ulysses=2, ring=2)  # of 6 heads
    assert xdit_degrees(replace(config, use_cfg_parallel=True), 4) == Degrees(cfg=2, ulysses=2)


def test_stages_that_pipefusion_cannot_have_are_refused() -> None:
    pipe, degrees = tiny.load("sd3"), Degrees(pipefusion=2, ulysses=2)
    pipe.transformer.register_to_config(dual_attention_layers=(0, 1))
    with pytest.raises(ValueError, match="dual attention"):
        XDiTPipeFusion(pipe, degrees)
    with pytest.raises(ValueError, match="1 patch"):
        XDiTPipeFusion(pipeline("flux"), degrees, patches=1)
    with pytest.raises(ValueError, match="sum 4, the blocks"):
        XDiTPipeFusion(pipeline("pixa"), degrees, stages=(1, 2))


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [(torch.float16, (7, 5), {"SDPA_EFFICIENT"}), (torch.bfloat16, (8, 0), {"CUDNN", "SDPA_FLASH"})],
)
def test_gpus_get_an_attention_that_they_have(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], expected: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention_backend(torch.device("cuda", 1), dtype, Degrees()) in expected


def test_log_sum_exps_are_of_the_rows_that_there_are() -> None:
    query = torch.zeros(1, 2, 33, 4)
    answer, log_sum_exp = trimmed(lambda q, k, v: (q, torch.zeros(1, 2, 64)))(query, query, query)
    assert answer is query and log_sum_exp.shape == (1, 2, 33)


def test_steps_are_told_on_the_gpu_that_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, torch.device]] = []
    note = lambda device: chosen.append((threading.current_thread().name, device))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", note)
    gpu = torch.device("cuda", 1)
    assert StepReporter(1, lambda latents, steps: None, gpu).finish() is None
    assert chosen == [("steps", gpu)]


@pytest.mark.parametrize(
    ("name", "degrees", "options", "words"),
    [
        ("sd1", {}, {}, "no transformer"),
        ("sd3", {"tensor": 2}, {}, "does not shard the layers of SD3Transformer2DModel"),
        ("flux", {"cfg": 2}, {}, "only one guidance branch"),
        ("sd3", {}, {"cache": CacheSettings("teacache")}, "teacache does not fit Stable Diffusion 3"),
        ("pixa", {"ulysses": 3}, {}, "4 attention heads"),
        ("flux", {"ring": 2, "ulysses": 2}, {"bits": "int8"}, "Ulysses or with ring, not both"),
        ("flux", {"ring": 2}, {"bits": "int4"}, "too coarse"),
    ],
)
def test_plans_that_a_model_cannot_have_are_refused(
    name: str, degrees: Case, options: Case, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        XDiT(pipeline(name), Degrees(**degrees), **options)


def unheard(name: str, calls: list[tuple[Case, str]]) -> None:
    """On each rank: calls that PipeFusion refuses."""
    pipe = pipeline(name)
    with XDiTPipeFusion(pipe, Degrees(pipefusion=2)) as parallel:
        for changes, words in calls:
            with pytest.raises(ValueError, match=words):
                parallel.run(tiny.call_args(name) | {"max_sequence_length": 256} | changes)
        scheduler = pipe.scheduler
        stochastic = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        for other, words in (
            (diffusers.FlowMatchHeunDiscreteScheduler(), "FlowMatchHeun"),
            (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "got DPMSolver"),
            (stochastic, "stochastic_sampling"),
        ):
            pipe.scheduler = other
            with pytest.raises(ValueError, match=words):
                parallel.run(tiny.call_args(name) | {"max_sequence_length": 256})
        pipe.scheduler = scheduler


def test_pipefusion_refuses_unsupported_arguments(pool: RankPool) -> None:
    calls: list[tuple[Case, str]] = [
        ({"sigmas": [1.0, 0.5]}, "sigmas"),
        ({"max_sequence_length": 77}, "max_sequence_length"),
        ({"guidance_scale": 1.0}, "above 1"),
        ({"height": 72}, "64 and 80"),
        ({"ip_adapter_image": tiny.picture()}, "ip_adapter_image"),
    ]
    pool.run(unheard, 2, "sd3", calls)


@pytest.mark.parametrize(
    ("world", "given", "branches", "heads", "expected"),
    [
        (1, {}, 2, 24, {}),
        (2, {}, 2, 24, {"cfg": 2}),
        (2, {}, 1, 24, {"ulysses": 2}),
        (8, {}, 2, 24, {"cfg": 2, "ulysses": 4}),
        (8, {}, 2, 18, {"cfg": 2, "ulysses": 2, "ring": 2}),
        (5, {}, 2, 24, {"ring": 5}),
        (6, {"ring": 2}, 2, 24, {"ring": 2, "ulysses": 3}),
        (4, {"ulysses": 2}, 2, 16, {"ulysses": 2, "cfg": 2}),
        (4, {"pipefusion": 2}, 1, None, {"pipefusion": 2, "ulysses": 2}),
        (4, {"data": 4}, 2, 24, {"data": 4}),
    ],
)
def test_degrees_are_chosen_by_the_rule(
    world: int, given: dict[str, int], branches: int, heads: int | None, expected: dict[str, int]
) -> None:
    degrees = choose_degrees(world, given, branches, heads)
    assert degrees == Degrees(**expected) and degrees.world == world


@pytest.mark.parametrize(
    ("world", "given", "words"),
    [
        (4, {"ring": 3}, "divide the world size 4; got ring 3, product 3"),
        (2, {"ulysses": 2, "ring": 2}, "got ulysses 2 x ring 2, product 4"),
        (5, {"ulysses": 5}, "must divide the model's 24 attention heads; got ulysses 5"),
        (4, {"ulysses": 2, "ring": 1, "cfg": 1}, "must be the world size 4"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(world: int, given: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_degrees(world, given, 2, 24)
