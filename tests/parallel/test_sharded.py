"""Sharded weights on CPU ranks: equal to plain, the parts that ranks keep, and all of it given back."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from shared.backends import BACKENDS
from shared.models import MODELS
from shared.parallel import sharded as sharding
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.asyncdiff.weights import StageWeights
from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.sharded import ShardedWeights, blocks_of
from shared.pipeline.engine import PipelineEngine
from tests import tiny, tiny_extras, tiny_original
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom
from tests.test_matrix import EXACT_DB, SETTINGS, Flags, cells, flags_of, launch, psnr

MOST = {2: 0.55, 3: 0.4, 4: 0.3}
"""Share of a model's parameters that a rank may keep, by the number of parts."""


def sharded(backend: str, name: str, flags: Flags, plan: Flags, lora: str = "") -> dict[str, Any]:
    """On one rank: latents of a sharded host, twice, and of the plain pipeline after it is closed."""
    torch._dynamo.reset()
    config, world, host, latents = launch(backend, name, flags, {"shard_weights": True} | plan)
    engine = host.build_engine(config, world)
    if lora:
        engine.add_lora(lora, 1.0)
    text, first = repr(getattr(engine.pipe, config.spec.denoiser)), latents(engine)
    again, kept = latents(engine), engine.parameters
    engine.close()
    after = PipelineEngine(engine.pipe, config, world)
    assert repr(getattr(engine.pipe, config.spec.denoiser)) == text
    assert all(sizes["kept"] == sizes["whole"] for sizes in after.parameters.values())
    plain = None if first is None else latents(after)
    found = {"exact": first, "again": again, "plain": plain, "parameters": kept}
    if backend != "xdit":
        found["stale"] = stale(host, config, world, latents, {"warm_up_steps": 1})
        found["sharded stale"] = found["stale"] if flags.get("compile_unet") else stale(
            host, config, world, latents, {"warm_up_steps": 1, "shard_weights": True}
        )  # fmt: skip
    return found


def stale(host: Any, config: Any, world: Any, latents: Any, changes: Flags) -> np.ndarray | None:
    engine = host.build_engine(replace(config, **{"shard_weights": False} | changes), world)
    made = latents(engine)
    engine.close()
    return made


def check(ranks: list[dict[str, Any]], name: str, plan: Flags, parts: int, quantized: bool = False) -> None:
    holder = next(r for r in ranks if r["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= EXACT_DB
    assert np.array_equal(holder["exact"], holder["again"])
    if "stale" in holder:
        # AsyncDiff cuts otherwise for equal weights; DistriFusion has the same sums, maybe in another order.
        close = psnr(holder["sharded stale"], holder["stale"])
        assert close >= 80 if "no_split_batch" in plan else close > 10
    for rank in ranks:
        for model, sizes in rank["parameters"].items():
            patched = MODELS[name].decodes_in_patches
            if model in (
                *(MODELS[name].denoiser, "controlnet", *MODELS[name].text_encoders, "image_encoder"),
                *(("vae",) if patched else ()),
            ):
                # HunyuanDiT has a parameter outside of all layers, 6 % of a tiny one that is not quantized.
                most = MOST[parts] + 0.05 * (name == "hy" and (quantized or model == "controlnet"))
                if not (model == MODELS[name].denoiser and plan.get("pipefusion_parallel_degree")):
                    assert sizes["kept"] <= most * sizes["whole"], (model, sizes)


PLANS: list[tuple[int, str, str, Flags]] = [
    (4, "asyncdiff", "sdxl", {}),
    (4, "asyncdiff", "sd3", {}),
    (3, "asyncdiff", "sd1", {"stride": 2}),
    (4, "asyncdiff", "sdxl", {"model_n": 3, "stride": 2}),
    (2, "asyncdiff", "sd1", {"use_cfg_parallel": True}),
    (4, "asyncdiff", "sdxl", {"use_cfg_parallel": True}),
    (4, "xdit", "flux", {"ulysses_degree": 2, "ring_degree": 2}),
    (4, "xdit", "hy", {"use_cfg_parallel": True}),
    (2, "xdit", "sd3", {"use_cfg_parallel": True}),
    (4, "xdit", "pixs", {"data_parallel_degree": 2}),
    (2, "xdit", "flux", {"use_fbcache": True}),
    (4, "distrifuser", "sdxl", {"no_split_batch": False}),
    (2, "distrifuser", "sd1", {"no_split_batch": True, "sync_mode": "full_sync"}),
    (2, "distrifuser", "sdxl", {"no_split_batch": True, "parallelism": "naive_patch"}),
]


def one_of_two() -> list[Any]:
    """(backend, type, feature) of every cell of the matrix."""
    found = []
    for backend in BACKENDS:
        for cell in cells(backend):
            name, feature = getattr(cell, "values", cell)
            with_net = feature in ("control_net", "everything")
            if feature == "refiner" or (with_net and MODELS[name].control_net_shares):
                continue  # refused
            found.append((backend, name, feature))
    return seldom(found, [("distrifuser", "sd1", "nothing"), ("xdit", "flux", "everything")])


def test_what_only_holds_others_is_no_block() -> None:
    """Z-Image's first and last layers lie in a ModuleDict, which nobody calls."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
            self.last = nn.ModuleDict({"2-1": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))})

    model = Model()
    found = [module for block in blocks_of(model, 2) for module in block.modules]
    assert found == [*model.layers, model.last["2-1"]]


@pytest.mark.parametrize(("backend", "name", "feature"), one_of_two())
def test_two_ranks_make_the_plain_picture(pool: RankPool, backend: str, name: str, feature: str) -> None:
    flags = flags_of(backend, name, feature)
    plan: Flags = {"no_split_batch": True} if backend == "distrifuser" else {}
    ranks = pool.run(sharded, 2, backend, name, flags, plan, timeout=240)
    check(ranks, name, plan, 2, "quantize_to" in flags)


@pytest.mark.parametrize(("size", "backend", "name", "plan"), seldom(PLANS, (PLANS[2], PLANS[4])))
def test_plans(pool: RankPool, size: int, backend: str, name: str, plan: Flags) -> None:
    ranks = pool.run(sharded, size, backend, name, {}, plan)
    parts = size // plan.get("data_parallel_degree", 1)
    if backend == "asyncdiff" and size > 2:
        parts = size // (2 if plan.get("use_cfg_parallel") else 1) - plan.get("stride", 1) + 1
    check(ranks, name, plan, parts)


PACKED = [(*host, flag) for host in (("xdit", "flux"), ("asyncdiff", "sd1")) for flag in ("int4", "gguf")]


@pytest.mark.parametrize(("backend", "name", "packed"), seldom(PACKED, PACKED[:1]))
def test_packed_weights_are_gathered_as_they_are_stored(
    pool: RankPool, backend: str, name: str, packed: str
) -> None:
    flags = {"quantize_to": packed} if packed == "int4" else {"gguf_model": str(tiny_original.gguf(name))}
    check(pool.run(sharded, 2, backend, name, flags, {}), name, {}, 2)


@pytest.mark.parametrize(
    ("backend", "name"),
    seldom([("xdit", "flux"), ("distrifuser", "sd1"), ("asyncdiff", "sdxl")], [("xdit", "flux")]),
)
def test_a_lora_added_to_sharded_weights(pool: RankPool, backend: str, name: str) -> None:
    (added, *_), (loaded, *_) = (
        pool.run(sharded, 2, backend, name, given, {}, late)
        for given, late in (({}, str(tiny_extras.lora(name))), (SETTINGS["lora"](name), ""))
    )
    assert psnr(added["exact"], loaded["plain"]) >= EXACT_DB
    assert psnr(added["exact"], added["plain"]) >= EXACT_DB


def other_sizes() -> list[float]:
    """On each rank: how close exact pictures come, of sizes first asked for without the weights."""
    pipe = tiny.load("sdxl")
    sizes = [{"size": 64}, {"size": 96}, {"size": 64}]
    plain = once(lambda: [tiny.run(pipe, "sdxl", **size) for size in sizes])
    device, group = torch.device("cpu"), dist.new_group(backend="gloo")
    with StageWeights(pipe.unet, group, device) as weights:
        with AsyncDiff(pipe, 2, warm_up_steps=99, group=group, weights=weights) as parallel:
            found = []
            for size, wanted in zip(sizes, plain, strict=True):
                parallel.begin(2)
                made = tiny.run(pipe, "sdxl", **size)
                found.append(psnr(made, wanted))
            stages, first = weights.stages, parallel.partition
            assert first is not None and set(first.names(0)) == {n for n, s in stages.items() if s == 0}
        with AsyncDiff(pipe, 2, warm_up_steps=1, group=group, weights=weights) as parallel:
            parallel.begin(4)
            assert np.isfinite(tiny.run(pipe, "sdxl", steps=4)).all()
            assert weights.stages == stages
    assert not is_last() or np.array_equal(tiny.run(pipe, "sdxl", size=64), plain[0])
    return found


def test_the_stages_stay_at_other_sizes(pool: RankPool) -> None:
    tiny.checkpoint("sdxl")
    for rank in pool.run(other_sizes, 2):
        assert min(rank) >= 80


class Two(nn.Module):
    """Two lists of blocks, a norm, and an order of its own at every call."""

    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(5))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for number in order:
            x = self.norm(x + self.blocks[number](x))
        return x


def in_any_order() -> None:
    """On each rank: blocks left out, repeated and in other orders, tensors that stay what they are."""
    torch.manual_seed(0)
    model, x = Two().eval().requires_grad_(False), torch.randn(3, 64)
    model.blocks[1][0].weight.data = model.blocks[1][0].weight.data.t()  # another memory layout
    model.blocks[4][0].weight = model.blocks[3][0].weight  # shared: stays whole
    orders = [(0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (4, 0, 0, 2), (2, 2), (), (1, 3, 1, 3), (0, 1, 2, 3, 4)]
    wanted = [model(x, order) for order in orders]
    state = {name: (id(p), p.clone(), p.stride()) for name, p in model.named_parameters()}
    group = dist.new_group(backend="gloo")
    with ShardedWeights({"two": model}, group, torch.device("cpu")) as weights:
        for order, expected in zip(orders, wanted, strict=True):
            assert torch.equal(model(x, order), expected), order
        addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
        assert torch.equal(model(x, orders[0]), wanted[0])
        assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}
        whole = {p.untyped_storage().data_ptr() for p in model.parameters()}
        # The buffer, the norm, the shared weight, the biases beside it; the last rank has the other biases.
        assert len(whole) == 1 + 5 + dist.get_rank()
        assert weights.saved_bytes("two") == 3 * (64 * 64 + 64) * 4 // 2
        with pytest.raises(TypeError):
            model(None, orders[0])  # a call that fails with a block on its way
        assert torch.equal(model(x, orders[2]), wanted[2])
    for name, parameter in model.named_parameters():
        known, value, stride = state[name]
        assert id(parameter) == known and parameter.stride() == stride and torch.equal(parameter, value)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(x, orders[0]), wanted[0])


def test_blocks_in_any_order(pool: RankPool) -> None:
    pool.run(in_any_order, 2)


def of_a_mapped_file(file: str) -> list[bool]:
    """On each rank: whether a file's pages are mapped while its model is whole, and then sharded."""
    model = Two().eval().requires_grad_(False)
    model.load_state_dict(load_file(file), assign=True)
    order, mapped = (0, 1, 2), [file in Path("/proc/self/maps").read_text()]
    wanted = model(torch.ones(1, 64), order)
    with ShardedWeights({"two": model}, dist.new_group(backend="gloo"), torch.device("cpu")):
        mapped.append(file in Path("/proc/self/maps").read_text())
        assert torch.equal(model(torch.ones(1, 64), order), wanted)
    return mapped


def test_sharded_weights_keep_no_file_mapped(pool: RankPool, tmp_path: Path) -> None:
    """Though norms stay whole: the pages of a file would be as much memory again."""
    save_file(Two().state_dict(), tmp_path / "two.safetensors")
    assert pool.run(of_a_mapped_file, 2, str(tmp_path / "two.safetensors")) == [[True, False]] * 2


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "qwen", "ltx2"])
def test_encoders_are_gathered_layer_by_layer(name: str) -> None:
    """Wherever a model has its list of layers: transformers wraps some twice."""
    pipe = tiny.load(name)
    for part in MODELS[name].text_encoders:
        encoder = getattr(pipe, part)
        lists = [part for part in encoder.modules() if isinstance(part, nn.ModuleList)]
        within = {id(inner) for one in lists for part in one for inner in part.modules()}
        outer = [one for one in lists if id(one) not in within and any(one[0].children())]
        assert outer and len(blocks_of(encoder, 2)) >= sum(map(len, outer))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_fetches_what_it_lacks_and_copies_what_is_cut(ranks: int) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 64)).requires_grad_(False)
    wanted = [p.clone() for p in layer.parameters()]
    blocks = [
        sharding.Block([copy.deepcopy(layer)], [n for n, _ in layer.named_parameters()], ranks)
        for _ in range(ranks)
    ]
    for rank, block in enumerate(blocks):
        block.divide(torch.zeros(block.nbytes, dtype=torch.uint8), Ranks(None, rank, ranks))
    parts: list[Any] = [block.part for block in blocks]
    copied = 0
    for rank, block in enumerate(blocks):
        buffer = torch.full((block.nbytes,), 255, dtype=torch.uint8)
        block.put(buffer)
        for number, part in enumerate(parts):
            place = buffer.split(len(part))[number]
            for begin, end in block.cut if number == rank else [(0, len(part))]:
                place[begin:end] = part[begin:end]
                copied += (end - begin) * (number == rank)
        assert all(map(torch.equal, block.modules[0].parameters(), wanted))
    smallest, largest = 64 * 64 * 4, 64 * 256 * 4  # of two ranks each has one of the largest whole
    assert copied == {2: smallest, 3: 2 * largest, 4: 2 * largest}[ranks]


class Block(nn.Module):
    """As a block of a transformer: it calls its layers in another order than it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.first = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.relu(self.up(self.first(x))))


class Large(nn.Module):
    blocks: Any

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


UP, FIRST = (64 * 256 + 256) * 4, (64 * 64 + 64) * 4


def in_parts(largest: int) -> tuple[int, list[list[str]]]:
    """On each rank: bytes of the buffer of blocks above `largest`, and what is gathered before what runs."""
    torch.manual_seed(0)
    model, x = Large().eval().requires_grad_(False), torch.randn(3, 64)
    wanted = model(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LARGEST", largest)
        weights: Any = ShardedWeights({"large": model}, None, torch.device("cpu"))
    names = {id(p): name for name, p in model.named_parameters()}
    runs = list[list[str]]()
    with weights:
        assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)
        gather, called = weights._gather, list[str]()

        def noting(block: Any) -> None:
            called.append(names[id(block.pieces[0].tensor)].removesuffix(".weight"))
            gather(block)

        weights._gather = noting
        for block in model.blocks:
            for part in ("first", "up", "down"):
                getattr(block, part).register_forward_hook(lambda *_: runs.append([*called]))
        assert torch.equal(model(x), wanted)
        weights._gather = gather
        size = weights.buffer_bytes
    assert torch.equal(model(x), wanted)
    return size, runs


def test_large_blocks_are_gathered_in_parts(pool: RankPool) -> None:
    whole, _ = pool.run(in_parts, 2, 1 << 20)[0]
    size, runs = pool.run(in_parts, 2, UP)[0]
    aligned = -(-UP // 128) * 128
    assert size == 2 * aligned < whole / 1.9
    assert runs[0] == ["blocks.0.first", "blocks.0.up"], "down does not fit beside them"
    assert runs[1][2:] == ["blocks.0.down"] and runs[2][3:] == ["blocks.1.first"]
    assert sorted(runs[-1]) == sorted(
        f"blocks.{n}.{part}" for n in range(3) for part in ("first", "up", "down")
    )


class CopiedAtOnce:
    """As `Fetched`, without a stream."""

    count = 0

    def __init__(self, whole: torch.Tensor, parts: Any, own: int, cut: Any, streams: Any) -> None:
        for number, place in enumerate(whole.fill_(255).split(len(parts[0]))):
            for begin, end in cut if number == own else [(0, len(place))]:
                place[begin:end] = parts[number][begin:end]
        CopiedAtOnce.count += 1

    def wait(self) -> None:
        pass


def copied() -> int:
    """On each rank: how many blocks were copied from memory that stands for that of all ranks."""
    torch.manual_seed(0)
    model, x, CopiedAtOnce.count = Large().eval().requires_grad_(False), torch.randn(3, 64), 0
    wanted = model(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "seen_by_all", lambda own, ranks: [*all_gather(own[None], ranks.group)])
        patch.setattr(sharding, "Fetched", CopiedAtOnce)
        patch.setattr(torch.cuda, "Stream", lambda device: "beside")
        with ShardedWeights({"large": model}, None, torch.device("cpu")) as weights:
            assert weights.copied
            assert torch.equal(model(x), wanted) and torch.equal(model(x), wanted)
            count = CopiedAtOnce.count
    assert torch.equal(model(x), wanted)
    return count


def test_blocks_are_copied_where_all_ranks_see_each_others_memory(pool: RankPool) -> None:
    assert pool.run(copied, 3) == [2 * 3] * 3


def test_what_reads_the_weights_inside_it_stays_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LARGEST", 1)
    model = Large()
    assert len(blocks_of(model, 2)) == 9 and len(blocks_of(model, 2, splits=False)) == 3
    with torch.device("meta"):
        model.blocks[0].down = nn.MultiheadAttention(64, 4)
    compiled: Any = model.blocks[1]
    compiled.forward = torch.compile(compiled.forward)
    assert [len(block.parameters) for block in blocks_of(model, 2)] == [9, 7, 2, 2, 2]


def ahead() -> list[tuple[str, int]]:
    """On each rank: which gathers start before which blocks run, in the third forward."""
    torch.manual_seed(0)
    model, x = Two().eval().requires_grad_(False), torch.randn(3, 64)
    order, events = (3, 1, 0, 2, 4), list[tuple[str, int]]()
    number = {id(block[0].weight): i for i, block in enumerate(model.blocks)}
    with ShardedWeights({"two": model}, None, torch.device("cpu")) as weights:
        model(x, order)
        gather = weights._gather

        def noting(block: Any) -> Any:
            events.append(("gather", number[id(block.pieces[0].tensor)]))
            return gather(block)

        sharded_weights: Any = weights
        sharded_weights._gather = noting
        for i, block in enumerate(model.blocks):
            block[1].register_forward_hook(lambda *_, i=i: events.append(("run", i)))
        model(x, order)
        sharded_weights._gather = gather
    return events


def test_the_next_block_comes_while_this_one_runs(pool: RankPool) -> None:
    wanted = [("gather", 3)]
    for block, following in zip((3, 1, 0, 2), (1, 0, 2, 4), strict=True):
        wanted += [("gather", following), ("run", block)]
    assert pool.run(ahead, 2) == [[*wanted, ("run", 4)]] * 2
