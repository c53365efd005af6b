"""Qwen-Image-Edit: its three kinds on ranks, one picture or several, sizes, pictures read with Pillow."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.sizes import with_aspect
from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.launch.errors import LoadError
from shared.launch.flags import HostConfig
from shared.parallel.method import Unwatched
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from shared.ranks.groups import World, make_groups
from tests import tiny, tiny_qwen
from tests.parallel.test_xdit import EXACT, Case, psnr
from tests.pool import RankPool, is_last, once
from tests.seldom import seldom

WIDE = tiny.picture(48, 2).resize((96, 48))
CALLS: list[Case] = [
    {"steps": 3},
    {"height": 80, "width": 48, "image": WIDE, "prompt": "a"},  # 15 tokens, and 3 x 1 of what is seen
    {"true_cfg_scale": 1.0, "prompt": "two blue dogs"},
]
TWO: Case = {"image": [WIDE, tiny.picture()], "negative_prompt": "blur, and many more words"}


@cache
def pipeline(kind: str) -> Any:
    folder = tiny_qwen.edit(kind)
    parts = tiny.own_parts("qwenedit", folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact(kind: str, cases: list[Case]) -> tuple[bool, list[list[float]]]:
    """On each rank: whether steps would be captured, and how close each case comes to the plain pipeline."""
    pipe, found = pipeline(kind), []
    calls = CALLS + ([] if kind == "first" else [TWO])
    plain = once(lambda: [tiny.run(pipe, "qwenedit", **call) for call in calls])
    for case in cases:
        with XDiT(pipe, Degrees(**case)) as parallel:
            row = []
            for call, wanted in zip(calls, plain, strict=True):
                parallel.begin(call.get("steps", 2))
                run = tiny.run(lambda **given: parallel.run(given, Unwatched()), "qwenedit", **call)
                row.append(psnr(run, wanted))
            found.append(row)
            captures = parallel.plan["cuda_graph"]
    assert not is_last() or np.array_equal(tiny.run(pipe, "qwenedit", **calls[0]), plain[0])
    return captures, found


@pytest.mark.parametrize("kind", seldom([kind for kind in tiny_qwen.EDITS if kind != "2511"], ("first",)))
def test_two_ranks_equal_the_plain_pipeline(pool: RankPool, kind: str) -> None:
    tiny_qwen.edit(kind)
    for captures, rows in pool.run(exact, 2, kind, [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}]):
        assert captures and min(min(row) for row in rows) >= EXACT, rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_qwen.EDITS)
def test_three_ranks_share_what_they_do_not_divide(pool: RankPool, kind: str) -> None:
    tiny_qwen.edit(kind)
    for captures, rows in pool.run(exact, 3, kind, [{"ring": 3}]):
        assert captures == (kind != "2511")  # which makes a tensor on the CPU in each call
        assert min(min(row) for row in rows) >= EXACT, rows


def config(kind: str, **flags: Any) -> HostConfig:
    return tiny.config("qwenedit", checkpoint=str(tiny_qwen.edit(kind)), width=64, height=64, **flags)


@cache
def engine(kind: str) -> PipelineEngine:
    launch = config(kind)
    needs = BACKENDS["xdit"].needs(launch, 1)
    pipe = load_pipeline(launch.spec, launch, torch.device("cpu"), needs, quiet=True)
    return PipelineEngine(pipe, launch, tiny.world())


def made(kind: str, *pictures: Image.Image, **fields: Any) -> tuple[np.ndarray, tuple[int, int]]:
    on = engine(kind)
    files = [encode_image(one, "png") for one in pictures]
    body = {"positive": "a small red cat", "cfg": 5.0, "seed": 0, "steps": 2} | fields
    if files:
        body["image"] = files[0] if len(files) == 1 else files
    reply = on.generate(check_request(body, on.config), lambda step, steps: None)
    assert reply is not None
    return np.asarray(reply.pictures[0]) / 255, (reply.width, reply.height)


@pytest.mark.parametrize("kind", tiny_qwen.EDITS)
def test_a_host_makes_what_diffusers_makes(kind: str) -> None:
    seen = [WIDE] if kind == "first" else [tiny.picture(), WIDE]
    ours, size = made(kind, *seen)
    # Without a size diffusers takes the last picture's aspect; the tests' sizes are of a 16th of the sides.
    given = {"image": seen if kind != "first" else seen[0], "height": None, "width": None}
    plain = tiny.run(pipeline(kind), "qwenedit", **given)[0]
    assert plain.shape == ours.shape and size == (plain.shape[1], plain.shape[0]) == (96, 32)
    assert psnr(ours, plain) > 45
    other, asked = made(kind, tiny.picture(64, 7), *seen[1:], width=96, height=32)
    assert asked == size and psnr(other, ours) < 45


def sharded() -> tuple[float | None, dict[str, dict[str, int]]]:
    """On each rank: how far sharded weights change the picture's latents, and the bytes that it keeps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    body: dict[str, Any] = {"positive": "a cat", "seed": 1, "steps": 2, "output_format": "latent"}
    body["image"] = [encode_image(one, "png") for one in (WIDE, tiny.picture())]
    found = []
    for shards in (False, True):
        more = {"compile_unet": True, "compile_backend": "eager", "shard_weights": True} if shards else {}
        launch = config("2511", ulysses_degree=2, **more)
        check_config(launch, BACKENDS["xdit"], size)
        engine = BACKENDS["xdit"].build_engine(launch, world)
        reply = engine.generate(check_request(body, launch).filled(launch), lambda step, steps: None)
        found.append(None if reply is None else load(reply.output[0])["latent"])
        kept = engine.parameters
        engine.close()
    whole, parts = found
    return (None if whole is None or parts is None else float((whole - parts).abs().max())), kept


@pytest.mark.slow
def test_what_sees_is_sharded_too(pool: RankPool) -> None:
    tiny_qwen.edit("2511")
    ranks = pool.run(sharded, 2, timeout=240)
    assert [far is None for far, _ in ranks] == [False, True] and ranks[0][0] < 1e-4
    for _, kept in ranks:
        for model in ("transformer", "text_encoder"):
            assert kept[model]["kept"] < 0.6 * kept[model]["whole"]


def test_what_a_kind_cannot_is_refused() -> None:
    def refusal(kind: str, *pictures: Image.Image, **fields: Any) -> str:
        with pytest.raises(RequestError) as error:
            made(kind, *pictures, **fields)
        return str(error.value)

    one = tiny.picture()
    assert "must be one picture for type qwenedit, got a list of 2" in refusal("first", one, one)
    assert "must be at most 8 pictures for type qwenedit, got a list of 9" in refusal("2511", *[one] * 9)
    assert "type qwenedit (Qwen-Image-Edit) needs an input image" in refusal("2509")
    assert "steps: must be at least 2 for type qwenedit, got 1" in refusal("2509", one, steps=1)
    assert "does not support mask" in refusal("first", one, mask=encode_image(one.convert("L"), "png"))


def test_a_kind_is_told_by_its_configuration() -> None:
    found = {kind: config(kind).spec for kind in tiny_qwen.EDITS}
    assert {kind: (spec.pipeline, spec.most_pictures) for kind, spec in found.items()} == {
        "2511": ("QwenImageEditPlusPipeline", 8),
        "2509": ("QwenImageEditPlusPipeline", 8),
        "first": ("QwenImageEditPipeline", 1),
    }
    needs = BACKENDS["xdit"].needs(config("first"), 1)
    other = tiny.config("qwen", checkpoint=str(tiny_qwen.edit("first")))
    with pytest.raises(LoadError, match="is a QwenImageEditPipeline, so its type is qwenedit; got --type=qw"):
        load_pipeline(other.spec, other, torch.device("cpu"), needs)


def test_the_size_is_the_one_that_diffusers_takes() -> None:
    launch = HostConfig(backend="xdit", type="qwenedit", checkpoint="/m/x")
    plain: Any = pipeline_qwenimage_edit_plus.calculate_dimensions  # as tests/tiny.py has it, of a 16th
    for of in ((1024, 1024), (4000, 3000), (300, 1000), (1664, 928), (7, 8)):
        assert with_aspect(of, launch) == plain.args[0](1024 * 1024, of[0] / of[1])[:2]


@pytest.mark.parametrize("form", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "saved"])
def test_pictures_are_read_without_torchvision(form: str, tmp_path: Path) -> None:
    plain = pipeline("2511").processor
    if form == "saved":
        plain.save_pretrained(tmp_path)
    else:
        tiny_qwen.processor_files(tmp_path, plain.tokenizer, form)
    read = tiny_qwen.picture_processor(tmp_path, "Qwen2VLProcessor")
    text = ["<|vision_start|><|image_pad|><|vision_end|> red"]
    given: Any = {"text": text, "images": [WIDE], "padding": True, "return_tensors": "pt"}
    found, wanted = read(**given), plain(**given)
    assert found["image_grid_thw"].tolist() == [[1, 4, 6]] and found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert "".join(read.tokenizer.convert_ids_to_tokens(found["input_ids"][0])).count("<|image_pad|>") == 6


def test_a_processor_without_files_is_refused(tmp_path: Path) -> None:
    pipeline("2509").save_pretrained(tmp_path)
    for file in (tmp_path / "processor").iterdir():
        file.unlink()
    launch = tiny.config("qwenedit", checkpoint=str(tmp_path))
    with pytest.raises(LoadError, match=r"--checkpoint: '.*processor' cannot be loaded"):
        load_pipeline(launch.spec, launch, torch.device("cpu"), BACKENDS["xdit"].needs(launch, 1))
