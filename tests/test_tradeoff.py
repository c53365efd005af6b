"""The benchmark of closeness by flags: its launches are possible, its figures those of the pictures."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from PIL import Image

from benchmarks.tradeoff import CHECKPOINTS, LAUNCHES, Launch, obeyed, row, ssim
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
    assert row(launch, SCENES, wanted, wanted) == f"{start}equal | equal | 1.0000 | 2 of 2 (100 ± 0 %) |"
    darker = [Image.fromarray(np.asarray(wanted[0]) // 2), wanted[1]]
    cells = [cell.strip() for cell in row(launch, SCENES, darker, wanted).strip("|").split("|")]
    error = np.mean((np.asarray(wanted[0], float) - np.asarray(wanted[0]) // 2) ** 2)
    least = 10 * np.log10(255**2 / error)
    # The equal one counts as 100 dB; of two values the standard error is half of their distance.
    assert cells[3:5] == [f"{(100 + least) / 2:.1f} ± {(100 - least) / 2:.1f}", f"{least:.1f}"]
    assert obeyed(SCENES, [wanted[1], wanted[1]]) == "1 of 2 (50 ± 35 %)"


def test_ssim_is_that_of_its_authors_on_flat_pictures() -> None:
    light, dark = (Image.new("RGB", (32, 32), (level,) * 3) for level in (200, 100))
    small = (0.01 * 255) ** 2
    assert abs(ssim(light, dark) - (2 * 200 * 100 + small) / (200**2 + 100**2 + small)) < 1e-9
    assert ssim(light, light) == pytest.approx(1.0)
