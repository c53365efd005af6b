"""Which layers compute in 8 bits: not slower ones, all ranks alike, measured once, all if memory asks."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shared.backends import BACKENDS
from shared.launch.flags import COMPUTED, HostConfig
from shared.models import MODELS
from shared.pipeline import eight_bits, layer_choice, layer_timing, memory_plan, quantize
from shared.pipeline.compile import graph_count
from shared.pipeline.eight_bits import EightBitLinear, computing_layers
from shared.pipeline.layer_choice import Chosen, rows_of
from shared.pipeline.layer_timing import Shape
from shared.pipeline.sharding import parameter_bytes
from shared.ranks.channel import Channel
from shared.ranks.groups import World, make_groups
from tests import tiny
from tests.pipeline.test_memory_plan import flags_of, plan_of
from tests.pool import RankPool
from tests.seldom import seldom

CPU = torch.device("cpu")
GIB = 2**30


class FakeTimer:
    """Layers with as many inputs as outputs are slower in 8 bits; notes what it times."""

    def __init__(self) -> None:
        self.timed: list[Shape] = []

    def __call__(self, shape: Shape, *rest: Any) -> tuple[float, float]:
        self.timed.append(shape)
        return 10.0, 12.0 if shape.inputs == shape.outputs else 8.0


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTimer]:
    fake = FakeTimer()
    fakes(monkeypatch, fake)
    yield fake


def fakes(patch: pytest.MonkeyPatch, timer: Any) -> None:
    """A GPU's choice on a CPU."""
    patch.setattr(eight_bits, "LEAST", 1)
    patch.setattr(layer_choice, "measures", lambda config, device: config.quantize_to in COMPUTED)
    patch.setattr(layer_choice, "both", timer)


def planned(config: HostConfig, free: int = GIB) -> tuple[HostConfig, Chosen]:
    """As a host plans it on one rank."""
    plan = memory_plan.plan_of(config, BACKENDS[config.backend], 1, "cpu", torch.float32, [free], False)
    assert plan is not None
    made = plan.choose_bits(Channel(World(0, 1, 0, CPU, None, None, None)))  # type: ignore[arg-type]
    assert plan.bits is not None and plan.config == made
    return made, plan.bits


def flux(tmp_path: Path, **flags: Any) -> HostConfig:
    size = {"width": tiny.PIXELS, "height": tiny.PIXELS}
    return tiny.config("flux", **(size | {"quantize_to": "int8", "cache_dir": str(tmp_path)} | flags))


def loaded(config: HostConfig) -> Any:
    given = {name: getattr(config, name) for name in ("quantize_to", "cache_dir", "in_16_bits")}
    return tiny.host(config.type, **given)


def test_slower_layers_stay_as_they_are(
    tmp_path: Path, timer: FakeTimer, caplog: pytest.LogCaptureFixture
) -> None:
    config, bits = planned(flux(tmp_path))
    pipe = loaded(config)
    plain = tiny.load("flux").transformer
    names = computing_layers(plain, MODELS["flux"].kept)
    assert {f"transformer.{name}" for name in names} == set(bits.layers)
    kinds = {True: 0, False: 0}
    for name, layer in pipe.transformer.named_modules():
        if name in names:
            square = layer.in_features == layer.out_features
            assert type(layer) is (torch.nn.Linear if square else EightBitLinear), name
            kinds[square] += 1
            if square:
                assert torch.equal(layer.weight, plain.get_submodule(name).weight)
    assert kinds[True] and kinds[False]
    assert bits.line() == (
        f"8 bits: {kinds[False]} of {len(names)} layers; 64x64 of 16 rows stays fp32, 1.2 x slower; "
        "64x64 of 512 rows stays fp32, 1.2 x slower; 64x64 of 528 rows stays fp32, 1.2 x slower; "
        f"measured in {bits.seconds:.1f} s"
    )
    told = bits.told()
    assert (told["layers"], told["in_16_bits"]) == (len(names), kinds[True])
    assert told["microseconds"]["16x64x64"] == [10.0, 12.0] and json.dumps(told)


def test_the_memory_plan_counts_them(tmp_path: Path, timer: FakeTimer) -> None:
    config, _ = planned(flux(tmp_path))
    plan = memory_plan.plan_of(config, BACKENDS["xdit"], 1, "cpu", torch.float32, [GIB], False)
    assert plan is not None
    sizes = {name: kept for name, (kept, _) in parameter_bytes(loaded(config)).items()}
    assert plan.weights_of(config, 1)[0] == sizes
    every = replace(config, in_16_bits=frozenset[str]())
    assert plan.weights_of(every, 1)[0]["transformer"] < sizes["transformer"]


def test_all_compute_in_8_bits_where_memory_asks(tmp_path: Path, timer: FakeTimer) -> None:
    config = flux(tmp_path)
    plan = memory_plan.plan_of(config, BACKENDS["xdit"], 1, "cpu", torch.float32, [GIB], False)
    assert plan is not None
    needed = plan.safe(config)
    made, bits = planned(config, needed)
    assert made.in_16_bits == bits.in_16_bits == frozenset() and bits.memory_asks
    assert "64x64 of 16 rows needs 8 bits by memory, 1.2 x slower" in bits.line()
    assert f"8 bits: {len(bits.layers)} of {len(bits.layers)} layers" in bits.line()
    assert planned(config, 2 * needed)[0].in_16_bits


def test_a_second_start_measures_nothing(tmp_path: Path, timer: FakeTimer) -> None:
    first, one = planned(flux(tmp_path))
    count = len(timer.timed)
    assert count == len(set(timer.timed)) == len(set(one.layers.values()))
    again, two = planned(flux(tmp_path))
    assert len(timer.timed) == count and again == first and two.times == one.times
    planned(flux(tmp_path, quantize_to="float8"))
    assert len(timer.timed) == 2 * count, "another kind has times of its own"
    planned(flux(tmp_path, compile_mode="max-autotune"))
    assert len(timer.timed) == 3 * count, "and so has other code"
    known = len(timer.timed)
    planned(flux(tmp_path, width=128, height=64))
    assert {shape.rows for shape in timer.timed[known:]}, "and other rows"
    assert len(timer.timed) - known < count, "those of the prompt are known"


@pytest.mark.parametrize("content", ["", "[]", '{"times": {"axb": [1, 2]}}', '{"times": {"1x2x3": 4}}'])
def test_broken_times_are_made_anew(
    tmp_path: Path, timer: FakeTimer, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = planned(flux(tmp_path))[1]
    [file] = (tmp_path / "layers").iterdir()
    file.write_text(content)
    assert planned(flux(tmp_path))[1].times == first.times
    assert f"{file} is broken and made anew" in caplog.text
    assert len(timer.timed) == 2 * len(first.times)


def test_what_cannot_be_measured_computes_in_8_bits_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def short(shape: Shape, *rest: Any) -> tuple[float, float]:
        raise torch.OutOfMemoryError("out of memory")

    fakes(monkeypatch, short)
    config, bits = planned(flux(tmp_path))
    assert not config.in_16_bits and not bits.times
    assert f"{len(set(bits.layers.values()))} shapes are not measured yet" in bits.line()
    assert "are not measured: out of memory" in caplog.text
    fakes(monkeypatch, FakeTimer())
    assert planned(flux(tmp_path))[0].in_16_bits


def test_the_largest_products_come_first_and_time_is_bounded(
    tmp_path: Path, timer: FakeTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_choice, "BUDGET", -1.0)
    _, bits = planned(flux(tmp_path))
    assert not timer.timed and not bits.in_16_bits
    monkeypatch.setattr(layer_choice, "BUDGET", 1e9)
    _, bits = planned(flux(tmp_path))
    counts = [list(bits.layers.values()).count(shape) for shape in timer.timed]
    work = [
        count * shape.rows * shape.inputs * shape.outputs
        for count, shape in zip(counts, timer.timed, strict=True)
    ]
    assert work == sorted(work, reverse=True) and len(work) > 5


def test_another_choice_is_kept_beside_the_first(tmp_path: Path, timer: FakeTimer) -> None:
    config, _ = planned(flux(tmp_path))
    for made in (config, replace(config, in_16_bits=frozenset()), config):
        layers = [m for m in loaded(made).transformer.modules() if isinstance(m, EightBitLinear)]
        assert layers
    kept = [path for path in (tmp_path / "weights").iterdir() if path.is_dir()]
    assert len(kept) == 4, "two choices of the transformer, two text encoders"


def test_where_every_layer_is_slower_the_denoiser_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes(monkeypatch, lambda *given: (1.0, 2.0))
    config, bits = planned(flux(tmp_path))
    assert bits.line().startswith(f"8 bits: 0 of {len(bits.layers)} layers; ")
    pipe = loaded(config)
    assert quantize.tensor_bytes(pipe.transformer) == quantize.tensor_bytes(tiny.load("flux").transformer)
    assert quantize.tensor_bytes(pipe.text_encoder_2) < quantize.tensor_bytes(
        tiny.load("flux").text_encoder_2
    )


def ranks_of_two_speeds(folder: str) -> tuple[frozenset[str], int, str]:
    """On each rank of a launch whose GPUs differ: what stays in 16 bits, how often it timed, and its log."""
    import io

    rank = dist.get_rank()
    world = World(rank, 2, rank, CPU, *make_groups(60, "gloo"))
    timer, out, log = FakeTimer(), io.StringIO(), logging.getLogger("host")
    handler = logging.StreamHandler(out)
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        fakes(patch, timer if rank == 0 else lambda *given: (1.0, 9.0))
        config = tiny.config("flux", quantize_to="int8", cache_dir=f"{folder}/{rank}")
        made, plan = memory_plan.planned(config, BACKENDS["xdit"], Channel(world))
    log.setLevel(before)
    log.removeHandler(handler)
    assert plan is not None and plan.bits is not None
    return made.in_16_bits, len(timer.timed), out.getvalue()


def test_all_ranks_choose_alike(pool: RankPool, tmp_path: Path) -> None:
    (first, timed, said), (second, untimed, silent) = pool.run(ranks_of_two_speeds, 2, str(tmp_path))
    assert first == second and first
    assert timed and not untimed
    assert said.count("stays fp32, 1.2 x slower") and "8 bits" not in silent


PROMPT = {"flux": 32, "kontext": 32, "chroma": 32, "flux2": 64, "zimage": 64, "wan": 512}
"""Tokens that prompts of these tests have, where that is not the type's."""
PLACES = {"flux2": 16, "ltx2": 8, "zimage": 32}
"""Tokens of pictures of these tests, whose VAEs have fewer levels than full-size ones, or that are padded."""


@pytest.mark.parametrize("name", seldom(MODELS, ("flux", "sdxl", "zimage")))
def test_rows_are_those_that_layers_see(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of everything that takes the picture, to the row; the prompt's and modulation's are told apart."""
    spec = MODELS[name]
    if spec.packages:
        pytest.importorskip(*spec.packages)
    if name == "sdup":
        pytest.skip("some of its blocks attend only to the prompt, in attn1 too")
    monkeypatch.setattr(eight_bits, "LEAST", 1)
    monkeypatch.setattr(eight_bits, "MULTIPLE", 1)
    pipe = tiny.load(name)
    denoiser, seen = getattr(pipe, spec.denoiser), defaultdict[str, set[int]](set)
    for key, layer in computing_layers(denoiser, spec.kept).items():

        def note(layer: Any, args: Any, key: str = key) -> None:
            seen[key].add(args[0].numel() // args[0].shape[-1])

        layer.register_forward_pre_hook(note)
    alone = spec.tokens is not None and spec.tokens.unguided
    tiny.run(pipe, name, **({"guidance_scale": 1.0 + spec.cfg_offset} if alone else {}))
    side = tiny.PIXELS // spec.size_scale
    config = tiny.config(name, width=side, height=side, **flags_of(name))
    work = plan_of(config).work
    places = PLACES.get(name) or work.places(config, tiny.call_args(name).get("num_frames"))
    levels, blind = work.levels(denoiser), replace(spec, one_row=(), prompt_rows=())
    wrong, counted = dict[str, Any](), 0
    for key, rows in seen.items():
        found = rows_of(key, spec, levels, places, 1, PROMPT.get(name))
        if found == rows_of(key, blind, levels, places, 1, PROMPT.get(name)):
            counted += 1
            if found not in rows:
                wrong[key] = (rows, found)
        elif rows == {rows_of(key, blind, levels, places, 1, PROMPT.get(name))}:
            wrong[key] = (rows, "few")
    assert counted
    assert not wrong, sorted(wrong.items())[:3]


def test_ranks_that_share_the_rows() -> None:
    flux, sdxl, wan = MODELS["flux"], MODELS["sdxl"], MODELS["wan"]
    name = "transformer_blocks.0.ff.net.2"
    assert rows_of(name, flux, 1, 4096) == 4096
    assert rows_of(name, flux, 1, 4096, 2) == 2048
    assert rows_of("transformer_blocks.0.ff_context.net.2", flux, 1, 4096, 2) == 256
    assert rows_of("single_transformer_blocks.0.proj_mlp", flux, 1, 4096, 2) == 2304
    assert rows_of("transformer_blocks.0.norm1.linear", flux, 1, 4096, 2) == 1
    unet = "blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
    assert rows_of(f"down_{unet}", sdxl, 3, 128 * 128) == 8192
    assert rows_of(f"down_{unet}", sdxl, 3, 128 * 128, 2) == 4096
    assert rows_of("mid_block.attentions.0.transformer_blocks.0.ff.net.2", sdxl, 3, 128 * 128) == 2048
    assert rows_of(f"up_{unet}".replace("blocks.1", "blocks.0", 1), sdxl, 3, 128 * 128) == 2048
    assert rows_of("blocks.0.attn2.to_k", wan, 1, 1024, 2) == 512, "each rank has all of the prompt"


@pytest.mark.parametrize("kind", COMPUTED)
def test_both_products_are_timed(kind: str) -> None:
    settings = {"backend": "eager", "fullgraph": True, "dynamic": False}
    sixteen, eight = layer_timing.both(Shape(32, 64, 48), kind, torch.bfloat16, CPU, settings)
    assert sixteen > 0 and eight > 0
    count = graph_count()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for rows in (33, 34, 35):
            layer_timing.both(Shape(rows, 64, 48), kind, torch.bfloat16, CPU, settings)
    assert graph_count() == count + 6, "each is compiled, by itself"
    assert len(layer_timing.layers_of(Shape(1, 64, 48), torch.bfloat16, CPU)) == layer_timing.LAYERS


@pytest.mark.parametrize(
    ("flags", "device", "chooses"),
    [
        ({"quantize_to": "int8", "compile_unet": True}, "cuda", True),
        ({"quantize_to": "int8", "compile_unet": True}, "cpu", False),
        ({"quantize_to": "int8"}, "cuda", False),
        ({"quantize_to": "int8_weight", "compile_unet": True}, "cuda", False),
        ({"compile_unet": True}, "cuda", False),
    ],
)
def test_what_chooses(flags: dict[str, Any], device: str, chooses: bool) -> None:
    assert layer_choice.measures(tiny.config("flux", **flags), torch.device(device)) is chooses
