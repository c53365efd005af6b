"""The demo's trainings: what they compute is what the pipelines compute, and what they made obeys."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quality import psnr
from benchmarks.tradeoff_launches import Launch
from benchmarks.tradeoff_ranks import Part, launched
from tests.pool import RankPool
from tests.test_demo import DEMO

sys.path.insert(0, str(DEMO))

from checkpoints import CHECKPOINTS
from diffusers import DDIMScheduler, SD3Transformer2DModel
from draw import held_out_scenes, judge
from evaluate import count_right, load, paint
from train_student import Steps
from train_transformer import T5_SHOWN, T5_TOKENS, FewerZeros


def test_all_checkpoints_together_are_small_and_hold_no_pickle() -> None:
    files = [f for kind in CHECKPOINTS.values() for f in kind.path.rglob("*") if f.is_file()]
    assert {kind.path for kind in CHECKPOINTS.values()} <= {f.parent for f in files}
    assert sum(f.stat().st_size for f in files) <= 40_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors"}


@pytest.mark.parametrize(("kind", "steps"), [("student", 4), ("transformer", 8)])
def test_the_new_checkpoints_obey_held_out_prompts(kind: str, steps: int) -> None:
    pipe, asked = load(CHECKPOINTS[kind]), held_out_scenes(6)
    pictures = paint(pipe, asked, steps=steps, cfg=CHECKPOINTS[kind].cfg)
    right, wrong = count_right(asked, [judge(picture) for picture in pictures])
    assert right >= 5, wrong


class AcceptedError(Exception):
    """A command's flags have been parsed."""


MADE_BY = re.findall(r"`python demo/(\w+\.py[^`]*)`", (DEMO.parent / "docs" / "MEASURED.md").read_text())


@pytest.mark.parametrize("command", MADE_BY)
def test_the_commands_that_made_and_judged_the_checkpoints_are_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *flags = shlex.split(command)
    module = importlib.import_module(Path(script).stem)

    def stop(*_: object) -> None:
        raise AcceptedError

    monkeypatch.setattr(module, "load" if script == "evaluate.py" else "prepare", stop)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(AcceptedError):
        module.main()


def test_every_checkpoint_has_the_command_that_made_it() -> None:
    made = {flags[flags.index("--out") + 1] for flags in map(shlex.split, MADE_BY) if "--out" in flags}
    assert {f"demo/{kind.folder}" for kind in CHECKPOINTS.values()} <= made


def test_few_zeros_in_training_are_the_many_of_the_pipeline() -> None:
    transformer = SD3Transformer2DModel.from_pretrained(
        CHECKPOINTS["transformer"].path / "transformer"
    ).float()
    draw, words = torch.Generator().manual_seed(0), 24
    latents, states, pooled = (
        torch.randn(shape, generator=draw) for shape in ((2, 4, 16, 16), (2, words, 192), (2, 192))
    )

    def guess(zeros: int) -> torch.Tensor:
        text = torch.nn.functional.pad(states, (0, 0, 0, zeros))
        with torch.no_grad():
            return transformer(latents, text, pooled, torch.tensor([900.0, 300.0])).sample

    many, few = guess(T5_TOKENS), guess(T5_SHOWN)
    transformer.set_attn_processor(FewerZeros(64 + words + T5_SHOWN, latents.device))
    assert torch.allclose(guess(T5_SHOWN), many, atol=1e-4)
    assert not torch.allclose(few, many, atol=1e-2)


def test_a_step_of_the_student_is_the_schedulers() -> None:
    scheduler = DDIMScheduler.from_pretrained(CHECKPOINTS["student"].path / "scheduler")
    steps = Steps(scheduler, 4)
    assert steps.times == [999, 749, 499, 249]
    draw = torch.Generator().manual_seed(0)
    for k, moment in enumerate(steps.times):
        x, v = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
        there = scheduler.step(v, moment, x).prev_sample
        assert torch.allclose(steps.step(k, x, v), there, atol=1e-5)
        assert torch.allclose(steps.needed(k, x, there), v, atol=1e-4)


def test_steps_chosen_by_measurement_are_many_and_close_where_flow_is_predicted(pool: RankPool) -> None:
    kind, asked = CHECKPOINTS["transformer"], held_out_scenes(1)
    launch = Launch("asyncdiff", "--use_cfg_parallel --async_steps=auto")
    found = pool.run(launched, 2, kind, launch, Part(asked, 0))
    made, [late] = next(one for one in found if one[0])
    assert late is not None and 6 <= late <= 16
    assert 40 < psnr(made, paint(load(kind), asked, steps=kind.steps, cfg=kind.cfg)) < 70


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "host", "cache"),
    [("transformer", "xdit", "fbcache:0.12"), ("unet", "asyncdiff", "deepcache:3")],
)
def test_a_step_cache_that_leaves_steps_out_still_obeys(
    pool: RankPool, name: str, host: str, cache: str
) -> None:
    kind, asked = CHECKPOINTS[name], held_out_scenes(4)
    launch = Launch(host, f"--step_cache={cache}", 1)
    [(made, _)] = pool.run(launched, 1, kind, launch, Part(asked, 0))
    right, wrong = count_right(asked, [judge(picture) for picture in made])
    assert right >= 3, wrong
    [plain] = paint(load(kind), asked[:1], steps=kind.steps, cfg=kind.cfg)
    assert 20 < psnr([made[0]], [plain]) < 60  # steps were left out
