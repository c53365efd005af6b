"""shared.backends: whose flag is whose, what a backend needs of a pipeline, and what loading makes of it."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from shared.backends import BACKENDS
from shared.backends.xdit_plan import xdit_degrees
from shared.launch.backend import Needs, runs_plain
from shared.launch.errors import LoadError, UsageError
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.parallel.xdit.degrees import Degrees
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_pipeline
from tests import tiny, tiny_extras

APART = Needs(in_parts=True)
HALVES: dict[str, Any] = {"step_parts": 2, "row_parts": 2}


def test_every_flag_of_a_method_is_named_by_a_backend() -> None:
    flags = [f for f in fields(HostConfig) if f.metadata]
    named = set().union(*(backend.flags for backend in BACKENDS.values()))
    assert named == {f.name for f in flags if not f.metadata["common"]}
    for backend in BACKENDS.values():
        common = {f.name for f in backend.config_flags} - backend.flags
        assert common == {f.name for f in flags if f.metadata["common"]}


def test_every_type_of_a_backend_is_a_model() -> None:
    for name, backend in BACKENDS.items():
        assert backend.name == name and set(backend.types) <= set(MODELS)
        assert set(backend.refuses) <= set(backend.types)


@pytest.mark.parametrize(
    ("backend", "world", "flags", "needs"),
    [
        ("asyncdiff", 1, {}, Needs()),
        # AnimateDiff's 16 frames are more pixels than one rank decodes by itself.
        ("asyncdiff", 2, {}, replace(APART, stage_count=2, decode_parts=2)),
        ("asyncdiff", 2, {"width": 256, "height": 128}, replace(APART, stage_count=2)),
        ("asyncdiff", 2, {"compile_vae": True}, replace(APART, stage_count=2)),
        ("asyncdiff", 2, {"use_cfg_parallel": True}, replace(APART, **HALVES, decode_parts=2)),
        ("distrifuser", 1, {}, Needs()),
        # A guidance branch on each, of whole pictures.
        ("distrifuser", 2, {}, replace(APART, **HALVES, decode_parts=2)),
        (
            "distrifuser",
            2,
            {"no_split_batch": True},
            replace(APART, **HALVES, decode_parts=2, keeps_patches=True),
        ),
        (
            "distrifuser",
            2,
            {"parallelism": "tensor"},
            Needs(in_parts=True, decode_parts=2, divides_weights="--parallelism=tensor"),
        ),
        ("xdit", 2, {}, Needs(step_parts=2)),
        ("xdit", 2, {"ring_degree": 2}, Needs(step_parts=2, row_parts=2, copies=True)),
        ("xdit", 4, {"ring_degree": 2, "ulysses_degree": 2}, Needs(step_parts=4, row_parts=4)),
        ("xdit", 2, {"tensor_parallel_degree": 2}, Needs(divides_weights="--tensor_parallel_degree")),
        (
            "xdit",
            2,
            {"pipefusion_parallel_degree": 2},
            Needs(in_parts=True, divides_weights="--pipefusion_parallel_degree", row_parts=2),
        ),
        (
            "xdit",
            4,
            {"pipefusion_parallel_degree": 2, "ulysses_degree": 2},
            Needs(
                in_parts=True,
                inside_blocks=True,
                divides_weights="--pipefusion_parallel_degree",
                step_parts=2,
                row_parts=4,
            ),
        ),
        ("xdit", 2, {"pipefusion_parallel_degree": 1, "tensor_parallel_degree": 1}, Needs(step_parts=2)),
    ],
)
def test_what_a_backend_needs(backend: str, world: int, flags: dict[str, Any], needs: Needs) -> None:
    config = HostConfig(backend=backend, type=BACKENDS[backend].types[0], checkpoint="x", **flags)
    assert BACKENDS[backend].needs(config, world) == needs


def test_pictures_at_once() -> None:
    config = HostConfig(backend="xdit", type="flux", checkpoint="x", data_parallel_degree=2)
    assert BACKENDS["xdit"].pictures_at_once(config) == 2
    assert BACKENDS["asyncdiff"].pictures_at_once(config) == 1


@pytest.mark.parametrize("needs", [Needs(), Needs(divides_weights="--parallelism=tensor")])
def test_loras_are_fused_where_weights_are_divided(needs: Needs) -> None:
    config = tiny.config("sd1", lora={str(tiny_extras.lora("sd1")): 1.0})
    pipe: Any = load_pipeline(MODELS["sd1"], config, torch.device("cpu"), needs, quiet=True)
    layers = [layer for layer in pipe.unet.modules() if isinstance(layer, BaseTunerLayer)]
    if needs.divides_weights:
        assert "--parallelism=tensor" in pipe.lora_set.frozen and not layers
    else:
        assert pipe.lora_set.frozen is None and layers


@pytest.mark.parametrize(
    ("world", "flags", "words"),
    [
        (
            4,
            {"ring_degree": 3},
            "--ring_degree: the product of all degrees must divide the world size 4; got --ring_degree=3, "
            "product 3 (world sizes that fit: 3, 6)",
        ),
        (
            4,
            {"ulysses_degree": 2, "ring_degree": 1, "data_parallel_degree": 1, "use_cfg_parallel": True},
            None,
        ),
        (
            2,
            {"ulysses_degree": 2, "use_cfg_parallel": True},
            "--use_cfg_parallel: the product of all degrees must divide the world size 2; got "
            "--use_cfg_parallel=2, --ulysses_degree=2, product 4 (world sizes that fit: 4, 8)",
        ),
        (
            3,
            {"ulysses_degree": 3},
            "--ulysses_degree: must divide the model's 4 attention heads; got --ulysses_degree=3 "
            "(fits: 1, 2, 4)",
        ),
        (
            6,
            {"ulysses_degree": 2, "ring_degree": 1},
            "--ring_degree: the product of all degrees must be the world size 6; got --ring_degree=1, "
            "--ulysses_degree=2, product 2",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_told_as_flags(
    world: int, flags: dict[str, Any], words: str | None
) -> None:
    config = replace(tiny.config("sd3"), backend="xdit", **flags)
    if words is None:
        assert xdit_degrees(config, world) == Degrees(cfg=2, ulysses=2)
        return
    with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
        xdit_degrees(config, world)


def test_a_method_that_does_not_fit_the_pipeline_fails_the_load_in_one_line() -> None:
    def refuse(pipe: Any) -> Any:
        raise error

    for error, raised in ((ValueError("2 heads, 3 ranks"), LoadError), (UsageError("--x: no"), UsageError)):
        with pytest.raises(raised, match=f"^{error}$") as caught:
            PipelineEngine(tiny.load("sd1"), tiny.config("sd1"), tiny.world(), refuse)
        assert type(caught.value) is raised


def test_one_rank_is_plain_unless_steps_are_captured() -> None:
    config = tiny.config("sd1")
    assert runs_plain(config, 1, "cpu") and not runs_plain(config, 1, "cuda")
    assert runs_plain(replace(config, no_cuda_graph=True), 1, "cuda") and not runs_plain(config, 2, "cpu")
