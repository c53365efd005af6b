"""What a start leaves for the next: bytecode and compiled code, found again; a bound of what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.pipeline import kept
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]

STARTS = """
import json, sys
from shared.launch.flags import HostConfig
from shared.pipeline.kept import keep_compiled
flags = {"compile_unet": True, "cache_dir": sys.argv[1], "quantize_to": sys.argv[2] or None}
keep_compiled(HostConfig(type="pixa", **flags), trims=True)
import torch
from tests import tiny
tiny.run(tiny.host("pixa", **flags), "pixa")
print(json.dumps(torch._dynamo.utils.counters["inductor"]))
"""


def start(folder: Path, quantize_to: str) -> dict[str, int]:
    """Inductor's counters of a process that compiles and draws."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    command = [sys.executable, "-c", STARTS, str(folder), quantize_to]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("quantize_to", ["", "int8"])
def test_a_second_start_compiles_nothing(tmp_path: Path, quantize_to: str) -> None:
    first, second = (start(tmp_path, quantize_to) for _ in range(2))
    assert first["fxgraph_cache_miss"] > 0
    assert second.get("fxgraph_cache_miss", 0) == second.get("fxgraph_cache_bypass", 0) == 0
    assert second["fxgraph_cache_hit"] + second.get("autograd_cache_hit", 0) > 0
    assert [folder.name.split("-")[0] for folder in (tmp_path / "compiled").iterdir()] == ["pixa"]


def compiled_folder(monkeypatch: pytest.MonkeyPatch, **flags: Any) -> str | None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    kept.keep_compiled(tiny.config("pixa", **flags), trims=True)
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def test_compiled_code_has_a_folder_a_type_and_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept, "COMPILED_BYTES", 1500)
    assert compiled_folder(monkeypatch, cache_dir=str(tmp_path)) is None, "nothing is compiled"
    for age, name in enumerate(("newest", "older", "oldest")):
        old = tmp_path / "compiled" / name
        (old / "fx").mkdir(parents=True)
        (old / "fx" / "code").write_bytes(bytes(600))
        os.utime(old, (1e9 - age, 1e9 - age))
    with caplog.at_level("INFO", "host"):
        mine = compiled_folder(monkeypatch, cache_dir=str(tmp_path), compile_vae=True)
    assert mine and Path(mine).is_dir()
    left = {entry.name for entry in (tmp_path / "compiled").iterdir()}
    assert left == {"newest", "older", Path(mine).name}
    assert "oldest" in caplog.text


def test_a_folder_that_cannot_be_written_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "compiled").write_text("a file")
    assert compiled_folder(monkeypatch, cache_dir=str(tmp_path), compile_vae=True) is None
    assert len(caplog.records) == 1 and "compiled code is not kept in" in caplog.text
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/own")
    kept.keep_compiled(tiny.config("pixa", compile_vae=True), trims=True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/own"


IMPORTS = """
import importlib.machinery, json, os, sys
from shared.launch.flags import HostConfig
from shared.pipeline import kept
kept.LARGE = ("odd_large",)
kept.keep_bytecode(HostConfig(type="pixa", cache_dir=sys.argv[1]))
compiled = []
original = importlib.machinery.SourceFileLoader.source_to_code
def noting(self, data, path, **more):
    compiled.append(self.name)
    return original(self, data, path, **more)
importlib.machinery.SourceFileLoader.source_to_code = noting
import odd_large
print(json.dumps([compiled, sys.pycache_prefix, os.environ.get("PYTHONPYCACHEPREFIX")]))
"""


def imported(folder: Path, cache: Path, **environment: str) -> tuple[list[str], Path | None]:
    """The modules of a package of that folder that a process compiles; where it keeps their bytecode."""
    (folder / "odd_large").mkdir(parents=True, exist_ok=True)
    for file, text in (("__init__.py", "import odd_large.inner"), ("inner.py", "")):
        (folder / "odd_large" / file).write_text(text)
        os.utime(folder / "odd_large" / file, (1e9, 1e9))
    kept_out = ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")
    own = {k: v for k, v in os.environ.items() if k not in kept_out}
    own |= {"PYTHONPATH": f"{ROOT}:{folder}"} | environment
    command = [sys.executable, "-c", IMPORTS, str(cache)]
    ran = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    compiled, prefix, told = json.loads(ran.stdout.splitlines()[-1])
    assert prefix == told, "child processes keep theirs there too"
    return compiled, None if prefix is None else Path(prefix)


def test_a_second_start_compiles_no_bytecode(tmp_path: Path) -> None:
    """Where none is beside the packages and Python is told to write none."""
    packages, cache, both = tmp_path / "packages", tmp_path / "cache", ["odd_large", "odd_large.inner"]
    starts = [imported(packages, cache, PYTHONDONTWRITEBYTECODE="1") for _ in range(2)]
    assert starts == [(both, cache / "bytecode"), ([], cache / "bytecode")]
    assert not list(packages.rglob("*.pyc")) and len(list(cache.rglob("inner.*.pyc"))) == 1


def test_bytecode_beside_packages_is_used(tmp_path: Path) -> None:
    packages, cache, both = tmp_path / "packages", tmp_path / "cache", ["odd_large", "odd_large.inner"]
    assert [imported(packages, cache) for _ in range(2)] == [(both, None), ([], None)]
    assert imported(packages, cache, PYTHONDONTWRITEBYTECODE="1") == ([], None)
    assert not cache.exists()


def test_a_prefix_of_the_users_own_wins(tmp_path: Path) -> None:
    own = {"PYTHONPYCACHEPREFIX": str(tmp_path / "own"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert imported(tmp_path / "packages", tmp_path / "cache", **own)[1] == tmp_path / "own"
    assert not (tmp_path / "cache").exists()


def test_bytecode_that_cannot_be_kept_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bytecode").write_text("a file")
    monkeypatch.setattr(kept, "_bytecode_is_kept", lambda _: False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    kept.keep_bytecode(tiny.config("pixa", cache_dir=str(tmp_path)))
    assert sys.pycache_prefix is None
    assert len(caplog.records) == 1 and "bytecode is not kept in" in caplog.text
