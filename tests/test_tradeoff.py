"""The benchmark of closeness by flags: its launches are possible, its figures those of the pictures."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import psnr
from benchmarks.tradeoff import CHECKPOINTS, PLAIN, agreement, obeyed, parts, plan, read, row, table
from benchmarks.tradeoff_launches import LAUNCHES, Launch
from benchmarks.tradeoff_ranks import Drawn, Machine, Part, compared, launched, ssim
from shared.backends import BACKENDS
from shared.launch.parser import parse_config
from tests.pool import RankPool
from tests.test_demo import Scene, draw, held_out_scenes

SCENES = [Scene("circle", "red", "blue", "large"), Scene("star", "white", "black", "small")]


@pytest.mark.parametrize("kind", LAUNCHES)
def test_every_launch_is_one_that_a_host_takes(kind: str) -> None:
    made = CHECKPOINTS[kind]
    for launch in LAUNCHES[kind]:
        argv = [f"--type={made.type}", f"--checkpoint={made.path}", *launch.flags.split()]
        with mock.patch.dict("os.environ", {"WORLD_SIZE": str(launch.ranks)}):
            parse_config(BACKENDS[launch.host], BACKENDS, argv)


def test_rows_say_equal_and_how_far_off() -> None:
    wanted = [draw(scene, seed) for seed, scene in enumerate(SCENES)]
    launch = Launch("xdit", "--ring_degree=2")
    start = "| xdit | `--ring_degree=2` | 2 | "
    part = Part(SCENES, 0)
    same = compared("unet", launch, part, wanted, [None, None], wanted)
    assert row(same) == f"{start} | equal | equal | 1.0000 | 2 of 2 (100 ± 0 %) |"
    darker = [Image.fromarray(np.asarray(wanted[0]) // 2), wanted[1]]
    found = compared("unet", launch, part, darker, [3, 4], wanted)
    cells = [cell.strip() for cell in row(found).strip("|").split("|")]
    error = np.mean((np.asarray(wanted[0], float) - np.asarray(wanted[0]) // 2) ** 2)
    least = 10 * np.log10(255**2 / error)
    # The equal one counts as 100 dB; of two values the standard error is half of their distance.
    assert cells[3:6] == ["3.5", f"{(100 + least) / 2:.1f} ± {(100 - least) / 2:.1f}", f"{least:.1f}"]
    assert obeyed([True, False]) == "1 of 2 (50 ± 35 %)"


def test_results_are_kept_and_rows_stand_in_the_order_of_the_launches(tmp_path: Path) -> None:
    first, second = LAUNCHES["student"][:2]
    drawn = [Drawn("student", *key, 0, True) for key in (second.key, (PLAIN, "", 1), first.key)]
    file = tmp_path / "results.jsonl"
    assert read(file) == []
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for one in drawn))
    assert read(file) == drawn
    lines = table("student", [*read(file), Drawn("unet", *first.key, 0, False)]).splitlines()[2:]
    assert [line.split("`")[1] for line in lines[1:]] == [first.flags, second.flags]
    assert lines[0].startswith(f"| {PLAIN} |") and all("1 of 1" in line for line in lines)


def test_a_row_is_of_the_device_that_drew_more_and_both_are_compared_by_prompt() -> None:
    launch, other = LAUNCHES["student"][:2]
    cpu = [Drawn("student", *launch.key, k, True, 30.0 + k) for k in range(2)]
    gpu = [Drawn("student", *launch.key, k, k != 1, 30.5 + k, device="cuda") for k in range(3)]
    alone = [Drawn("student", *other.key, 0, True, device="cuda")]
    drawn = [*cpu, *gpu, *alone]
    assert "2 of 3" in table("student", drawn).splitlines()[2]
    assert "2 of 2" in table("student", [*cpu, *gpu[:1]]).splitlines()[2]
    found = "2 prompts, +0.50 dB, at most 0.50, 1 judged otherwise"
    assert agreement("student", drawn) == [f"student, asyncdiff {launch.flags}: {found}"]


def test_prompts_are_drawn_in_parts_each_with_its_own_seeds() -> None:
    [whole] = parts(200, 128, "cuda", 64)
    found = parts(64, 0, "cuda", 64)
    assert [(part.first, len(part.scenes)) for part in found] == [(0, 8), (8, 56)]
    assert [(part.first, len(part.scenes)) for part in parts(20, 3, "cpu", 1)] == [(3, 5), (8, 8), (16, 4)]
    drawn = [scene for part in [*found, *parts(128, 64, "cuda", 64), whole] for scene in part.scenes]
    assert drawn == held_out_scenes(200)


def test_what_is_left_is_drawn_once_and_one_by_one_in_smaller_parts() -> None:
    at_once, alone = LAUNCHES["student"][0], LAUNCHES["student"][-1]
    assert alone.alone and not at_once.alone
    part = parts(64, 0, "cuda", 64)[1]
    known = {("cuda", "student", at_once.key, k) for k in range(40)}
    known |= {("cuda", "student", alone.key, k) for k in range(8, 20)} | {("cpu", "student", alone.key, 63)}
    left = plan([("student", at_once), ("student", alone)], part, known)
    told = [(launch, mine.first, len(mine.scenes)) for _, launch, mine in left]
    assert told == [(at_once, 40, 24), (alone, 20, 12), (alone, 32, 32)]
    assert left[0][2].scenes == held_out_scenes(200)[40:64]


@pytest.mark.parametrize("host", ["distrifuser", pytest.param("asyncdiff", marks=pytest.mark.slow)])
def test_prompts_drawn_together_are_those_drawn_one_by_one(host: str, pool: RankPool) -> None:
    scenes, launch = held_out_scenes(9)[6:], Launch(host, "--warm_up_steps=1")
    alone, at_once = (
        next(made for made, _ in pool.run(launched, 2, CHECKPOINTS["student"], launch, part) if made)
        for part in (Part(scenes, 6), Part(scenes, 6, together=2))
    )
    assert len(at_once) == 3 and all(psnr([a], [b]) > 70 for a, b in zip(alone, at_once, strict=True))
    assert psnr(at_once[:1], at_once[1:2]) < 25


def test_ranks_of_their_own_interpreters_are_kept_whatever_their_threads() -> None:
    pool = RankPool(method="spawn", most_threads=None)
    try:
        [first], [second] = pool.run(os.getpid, 1), pool.run(os.getpid, 1)
    finally:
        pool.close()
    assert first == second != os.getpid()


def test_no_more_ranks_work_than_there_are_cores() -> None:
    machine, events = Machine(3), []

    def work(ranks: int) -> None:
        with machine.pool(ranks):
            events.append(machine.cores)

    with machine.pool(2):
        other = threading.Thread(target=work, args=(2,))
        other.start()
        other.join(0.2)
        assert other.is_alive() and not events
    other.join(10)
    assert events == [1] and machine.cores == 3


def test_ssim_is_that_of_its_authors_on_flat_pictures() -> None:
    light, dark = (Image.new("RGB", (32, 32), (level,) * 3) for level in (200, 100))
    small = (0.01 * 255) ** 2
    assert abs(ssim(light, dark) - (2 * 200 * 100 + small) / (200**2 + 100**2 + small)) < 1e-9
    assert ssim(light, light) == pytest.approx(1.0)
