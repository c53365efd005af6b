"""The benchmark of closeness by flags: its launches are possible, its figures those of the pictures."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from benchmarks.tradeoff import (
    CHECKPOINTS,
    PLAIN,
    Drawn,
    Machine,
    compared,
    obeyed,
    read,
    row,
    ssim,
    table,
)
from benchmarks.tradeoff_launches import LAUNCHES, Launch
from shared.backends import BACKENDS
from shared.launch.parser import parse_config
from tests.test_demo import Scene, draw

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
    same = compared("unet", launch, 0, SCENES, wanted, [None, None], wanted)
    assert row(same) == f"{start} | equal | equal | 1.0000 | 2 of 2 (100 ± 0 %) |"
    darker = [Image.fromarray(np.asarray(wanted[0]) // 2), wanted[1]]
    found = compared("unet", launch, 0, SCENES, darker, [3, 4], wanted)
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
