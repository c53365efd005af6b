"""--preset: every one fits its type and ranks, sets what it says, and yields to what is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.backends import BACKENDS
from shared.launch.checks import preset_line
from tests.launch.test_config import folder, parse, refused

__all__ = ["folder"]  # the fixture

NAMES = ("fast", "balanced", "exact")
LAUNCHES = [(b, t) for b, spec in BACKENDS.items() for t in spec.types]


@pytest.mark.parametrize(("backend", "type"), LAUNCHES)
def test_each_preset_is_a_launch_that_says_its_flags(folder: Path, backend: str, type: str) -> None:
    for ranks in (1, 2, 3, 4):
        for name in NAMES:
            options: dict[str, Any] = {"backend": backend, "type": type, "world": ranks}
            config = parse(folder, f"--preset={name}", **options)
            line = preset_line(config, BACKENDS[backend], ranks)
            assert line is not None and line.startswith(f"preset {name}: ")
            flags = [word for word in line.split()[2:] if word.startswith("--")]
            again = parse(folder, *flags, **options)
            own = BACKENDS[backend].config_flags
            differ = [f.name for f in own if getattr(config, f.name) != getattr(again, f.name)]
            assert differ == ["preset"], (line, differ)
            if ranks == 1 and backend != "xdit":
                assert line.endswith("no flags")


def test_what_they_set(folder: Path) -> None:
    def found(backend: str, ranks: int, name: str, *flags: str, type: str = "sd3") -> str | None:
        config = parse(folder, f"--preset={name}", *flags, backend=backend, type=type, world=ranks)
        return preset_line(config, BACKENDS[backend], ranks)

    assert found("asyncdiff", 2, "fast") == "preset fast: --use_cfg_parallel --async_steps=auto"
    window = "--use_cfg_parallel --warm_up_steps=15 --async_steps=4"
    assert found("asyncdiff", 2, "balanced") == f"preset balanced: {window}"
    assert found("asyncdiff", 2, "exact") == "preset exact: --use_cfg_parallel"
    assert found("asyncdiff", 2, "fast", "--model_n=2") == "preset fast: --warm_up_steps=3"
    assert found("asyncdiff", 3, "exact") == "preset exact: --warm_up_steps=1000"
    assert found("distrifuser", 2, "exact", type="sd1") == "preset exact: --sync_mode=full_sync"
    assert found("xdit", 2, "exact") == "preset exact: no flags"
    assert found("xdit", 2, "fast", type="flux") == "preset fast: --exchange_dtype=auto --use_fbcache"
    fused = found("xdit", 2, "balanced", "--pipefusion_parallel_degree=2")
    assert fused == "preset balanced: --warm_up_steps=3"


def test_a_flag_that_is_given_wins(folder: Path) -> None:
    config = parse(folder, "--preset=balanced", "--warm_up_steps=12", world=2)
    assert (config.use_cfg_parallel, config.warm_up_steps, config.async_steps) == (True, 12, 4)
    (folder / "host.yaml").write_text("preset: balanced\nasync_steps: 6\n")
    assert parse(folder, f"--config={folder}/host.yaml", world=2).async_steps == 6


def test_an_unknown_preset_is_refused_with_the_choices(folder: Path) -> None:
    assert "--preset: must be one of fast, balanced, exact; got 'slow'" in refused(folder, "--preset=slow")
