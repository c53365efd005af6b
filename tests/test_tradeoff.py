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

from benchmarks.pareto import FAMILIES
from benchmarks.quality import psnr
from benchmarks.tradeoff import (
    CHECKPOINTS,
    PLAIN,
    agreement,
    in_order,
    main,
    obeyed,
    parts,
    plan,
    read,
    row,
    table,
)
from benchmarks.tradeoff_launches import LAUNCHES, WANTED, Launch, shares
from benchmarks.tradeoff_ranks import PIXELS, Drawn, Machine, Part, compared, launched, ssim
from shared.backends import BACKENDS
from shared.launch.parser import parse_config
from tests.pool import RankPool
from tests.test_demo import Scene, draw, held_out_scenes

SIDES = [f"--width={PIXELS}", f"--height={PIXELS}"]
SCENES = [Scene("circle", "red", "blue", "large"), Scene("star", "white", "black", "small")]


@pytest.mark.parametrize("kind", LAUNCHES)
def test_every_launch_is_one_that_a_host_takes(kind: str) -> None:
    made = CHECKPOINTS[kind]
    for launch in LAUNCHES[kind]:
        argv = [f"--type={made.type}", f"--checkpoint={made.path}", *SIDES, *launch.flags.split()]
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
    assert [(part.first, len(part.scenes)) for part in parts(20, 3, "cpu", 1)] == [(3, 5), (8, 12)]
    drawn = [scene for part in [*found, *parts(128, 64, "cuda", 64), whole] for scene in part.scenes]
    assert drawn == held_out_scenes(200)


def test_what_is_left_is_drawn_once() -> None:
    first, second, third = LAUNCHES["student"][:3]
    part = parts(64, 0, "cuda", 64)[1]
    known = {("cuda", "student", first.key, k) for k in range(40)}
    known |= {("cuda", "student", second.key, k) for k in range(8, 64)} | {("cpu", "student", third.key, 63)}
    left = plan([("student", one) for one in (first, second, third)], part, known)
    told = [(launch, mine.first, len(mine.scenes)) for _, launch, mine in left]
    assert told == [(first, 40, 24), (third, 8, 56)]
    assert left[0][2].scenes == held_out_scenes(200)[40:64]


def test_what_draws_one_by_one_or_on_more_ranks_than_gpus_is_drawn_on_cpus() -> None:
    flags = {"--warm_up_steps=3": "cuda", "--warm_up_steps=auto": "cpu", "--step_cache=fbcache:0.12": "cpu"}
    assert {flag: Launch("xdit", flag).device("cuda") for flag in flags} == flags
    assert Launch("xdit", "--warm_up_steps=3", 4).device("cuda") == "cpu"
    assert {one.device("cpu") for kind in LAUNCHES.values() for one in kind} == {"cpu"}
    assert shares(32, {"cpu"}) == {"cpu": 32} and shares(4, {"cpu", "cuda"}) == {"cpu": 2, "cuda": 2}
    assert shares(32, {"cpu", "cuda"}) == {"cpu": 22, "cuda": 10}


def test_all_draw_their_first_prompts_and_then_what_is_wanted_most_comes_first() -> None:
    kinds = [("student", one) for one in LAUNCHES["student"]]
    asked = parts(64, 0, "cpu", 1)
    turns = in_order(kinds, asked, set())
    wanted = {one.key for _, one in kinds if one.flags in WANTED["student"]}
    assert 0 < len(wanted) < len(kinds)
    drawn = [(part.first, {launch.key for _, launch, _ in todo}) for part, todo in turns]
    others = {one.key for _, one in kinds} - wanted
    later = (8, 24, 40, 56)
    assert drawn == [(0, wanted | others), *((k, some) for some in (wanted, others) for k in later)]
    known = {("cpu", "student", one.key, k) for _, one in kinds for k in range(8)}
    assert in_order(kinds, asked, known)[0] == (asked[0], [])


@pytest.mark.parametrize("kind", LAUNCHES)
def test_what_is_wanted_most_are_launches_and_has_the_points_of_the_pictures(kind: str) -> None:
    flags = {one.flags for one in LAUNCHES[kind]}
    settings = [named for table, named, _ in FAMILIES[kind].settings.values() if table]
    assert {named[1].strip("`") for named in settings} <= set(WANTED[kind]) < flags


def test_after_the_minutes_nothing_is_begun_and_what_is_left_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    only = ["student", "--only", "warm_up_steps=auto", "--prompts", "9", "--results", str(results)]
    with (
        mock.patch("sys.argv", ["tradeoff.py", *only, "--minutes", "0"]),
        mock.patch.object(RankPool, "start"),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert not ended.value.code and not results.exists()
    # Of two hosts and of plain diffusers, each in two parts.
    assert "6 parts are left after 0 minutes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("host", ["distrifuser", "asyncdiff"])
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


def test_pairs_of_ranks_see_the_gpus_in_turn_and_others_none() -> None:
    seen: list[tuple[int, str]] = []

    def start(self: RankPool, ranks: int) -> None:
        seen.append((ranks, os.environ["CUDA_VISIBLE_DEVICES"]))

    with mock.patch.object(RankPool, "start", start):
        for machine in (Machine(6, "cuda", gpus=4), Machine(3)):
            with machine.pool(1), machine.pool(1), machine.pool(1):
                assert not machine.cores and not machine.idle
            assert len(machine.idle) == 3
            with pytest.raises(RuntimeError), machine.pool(1):
                raise RuntimeError("this work failed")
            assert len(machine.idle) == 2
    assert seen == [(2, "0,1"), (2, "2,3"), (2, "0,1"), *[(1, "")] * 3]


@mock.patch.object(RankPool, "start", lambda self, ranks: None)
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
