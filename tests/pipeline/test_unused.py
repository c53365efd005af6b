"""What a start leaves out: modules that no launch needs come only where they are asked for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.utils import import_utils

from shared.launch.flags import HostConfig
from shared.pipeline import unused
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("torchao", "scipy.stats._stats_py", "scipy.optimize", "scipy.integrate._bvp")

LOADS = f"""
import json, sys, torch
from shared.backends import BACKENDS
from shared.launch.parser import parse_config
backend = BACKENDS["xdit"]
config = parse_config(backend, BACKENDS, sys.argv[1:])
import importlib.metadata
from shared.pipeline import unused
lists, listed = [], importlib.metadata.packages_distributions
importlib.metadata.packages_distributions = lambda: lists.append(1) or listed()
texts, exported = [], unused._exported
unused._exported = lambda fetch, text: texts.append(text) or exported(fetch, text)
unused.import_libraries(config)
from transformers.utils import import_utils
assert len(lists) == 1, "of all installed packages"
assert len(texts) > 1000 and import_utils.fetch__all__.__module__ == import_utils.__name__
from shared.pipeline.loading import load_pipeline
pipe = load_pipeline(config.spec, config, torch.device("cpu"), backend.needs(config, 1), quiet=True)
found = [name for name in {LEFT_OUT!r} if name in sys.modules]
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
Euler(use_beta_sigmas=True).set_timesteps(4, mu=1.0)
print(json.dumps([found, "scipy.optimize" in sys.modules]))
"""


def loaded(*flags: str) -> tuple[list[str], bool]:
    """Which of LEFT_OUT a process has imported once a pipeline is loaded; whether scipy came afterwards."""
    launch = ["--type=flux", f"--checkpoint={tiny.checkpoint('flux')}", *flags]
    ran = subprocess.run(
        [sys.executable, "-c", LOADS, *launch], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found, scipy = json.loads(ran.stdout.splitlines()[-1])
    return found, scipy


def test_a_launch_imports_neither_torchao_nor_scipy() -> None:
    """Of a launch that quantizes nothing; a scheduler's beta sigmas still find scipy."""
    assert loaded() == ([], True)


@pytest.mark.slow
def test_a_launch_that_quantizes_imports_torchao() -> None:
    """As its files may need it."""
    assert "torchao" in loaded("--quantize_to=int8_weight")[0]


def test_a_stand_in_becomes_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first look inside, and then its kin too; tools that look at every module find nothing."""
    (tmp_path / "odd_outer").mkdir()
    (tmp_path / "odd_outer" / "__init__.py").touch()
    (tmp_path / "odd_outer" / "inner.py").write_text("from odd_outer import other\nvalue = other.value + 1")
    (tmp_path / "odd_outer" / "other.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("odd_outer.inner", "odd_outer.other")
    assert all(unused._stand_in(name) for name in names)
    made = sys.modules["odd_outer.inner"]
    import odd_outer.inner

    assert sys.modules["odd_outer.inner"] is made and not hasattr(made, "__file__")
    assert made.value == 2
    assert sys.modules["odd_outer.inner"] is odd_outer.inner is not made
    assert odd_outer.inner.value == 2
    for name in (*names, "odd_outer.missing", "odd_missing.inner"):
        assert not unused._stand_in(name)


def test_transformers_models_are_listed_as_transformers_lists_them() -> None:
    """From its other list, without reading a file; other folders are read."""
    models = Path(transformers.__file__).parent / "models"
    define = import_utils.define_import_structure
    read: list[str] = []

    def seen(path: Path | str, prefix: str | None = None) -> Any:
        read.append(str(path))
        return define(path, prefix=prefix)

    for file in (models / "__init__.py", models / "t5" / "__init__.py"):
        found = unused._defined(seen, str(file))
        whole = define.__wrapped__(str(file))
        assert {needs: kind for needs, kind in found.items() if kind} == whole
    assert read == [str(models), str(models / "t5" / "__init__.py")]


def test_what_transformers_exports_is_found_in_the_end_of_a_file() -> None:
    fetch, models = import_utils.fetch__all__, Path(transformers.__file__).parent / "models"
    texts = [file.read_text() for file in models.glob("[a-c]*/*.py")]
    odd = ["", "no", "__all__ = ['a']", "x\n__all__ = ['a']\n__all__ = ['b', 'c']", " __all__ = ['a']"]
    found = [unused._exported(fetch, text) for text in (*texts, *odd)]
    assert found == [fetch(text) for text in (*texts, *odd)]
    assert sum(map(bool, found)) > 100 and found[-3:] == [["a"], ["b", "c"], []]


@pytest.mark.slow
def test_compilers_are_imported_before_the_first_region() -> None:
    code = "import sys, torch, shared.host; shared.host.import_compilers(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = {"torch._inductor.lowering", "torch._inductor.select_algorithm", "torch._functorch.aot_autograd"}
    assert needed <= set(ran.stdout.split())


def test_files_of_torchao_are_noticed(tmp_path: Path) -> None:
    """Such a checkpoint needs it, though the launch asks for nothing; a single file has none."""
    (tmp_path / "transformer").mkdir()
    launch = HostConfig(type="flux", checkpoint=str(tmp_path), vae=str(tmp_path / "vae.safetensors"))
    assert not unused._stored_by_torchao(launch)
    settings = {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(settings))
    assert unused._stored_by_torchao(launch)
