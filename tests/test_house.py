"""The house's arrows: which folder may import which, and what never imports torch or speaks of flags."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW: dict[str, set[str]] = {
    "models": set(),
    "launch": {"models"},
    "api": {"models", "launch"},
    "parallel": {"models"},
    "ranks": {"models", "launch", "api"},
    "pipeline": {"models", "launch", "api", "parallel", "ranks"},
    "backends": {"models", "launch", "api", "parallel", "ranks", "pipeline"},
    "http": {"models", "launch", "api"},
    "host": {"models", "launch", "api", "parallel", "ranks", "pipeline", "backends", "http"},
    "scripts": {"host", "backends"},
}
"""Room -> the rooms that its modules may import, in functions and for types too."""
FILES = {
    **{path: path.relative_to(ROOT / "shared").parts[0].removesuffix(".py")
       for path in sorted((ROOT / "shared").glob("**/*.py")) if path != ROOT / "shared" / "__init__.py"},
    **dict.fromkeys(sorted(ROOT.glob("*_host.py")), "scripts"),
}  # fmt: skip
NO_TORCH = ("models", "launch", "api", "http", "backends", "host")


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that are imported anywhere below."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield from (f"{child.module}.{name.name}" for name in child.names)
        else:
            yield from imported(child)


def rooms(source: str) -> set[str]:
    found = [name.split(".") for name in imported(ast.parse(source)) if name.startswith("shared.")]
    return {parts[1] for parts in found}


def texts(source: str) -> Iterator[str]:
    """Every string of the source but the docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = FILES[path]
    wrong = rooms(path.read_text()) - BELOW[room] - {room}
    assert not wrong, f"{room} imports {', '.join(sorted(wrong))}"


def test_no_files_import_each_other_in_a_circle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}

    def needs(path: Path) -> set[str]:
        found = set(imported(ast.parse(path.read_text())))
        return {name for one in found for name in (one, one.rpartition(".")[0]) if name in names}

    order = TopologicalSorter({name: needs(path) for name, path in names.items()})
    assert {"shared.host", "shared.models.spec"} <= set(order.static_order())  # raises CycleError


def test_every_import_is_seen() -> None:
    source = """
import shared.http.server
from shared import host
if TYPE_CHECKING:
    from shared.pipeline.engine import Engine
def late():
    try:
        from shared.ranks.groups import World
    except ImportError:
        import torch
    if World:
        from shared.api import jobs
"""
    assert rooms(source) == {"http", "host", "pipeline", "ranks", "api"}
    assert set(texts('"""--a"""\ndef f():\n    """--b"""\n    return f"--{f}", "c"')) == {"--", "c"}


def imported_without_torch(names: list[str]) -> None:
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += "sys.exit(', '.join({'torch', 'diffusers', 'transformers'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("room", NO_TORCH)
def test_torch_waits_until_it_is_needed(room: str) -> None:
    imported_without_torch(
        [".".join(path.relative_to(ROOT).with_suffix("").parts) for path, own in FILES.items() if own == room]
    )


def test_the_process_that_starts_the_workers_imports_no_torch() -> None:
    imported_without_torch(["tests.conftest"])


@pytest.mark.parametrize(
    "path", [p for p, room in FILES.items() if room == "parallel"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_parallel_speaks_no_flags(path: Path) -> None:
    assert not [text for text in texts(path.read_text()) if "--" in text]


def test_test_files_have_names_of_their_own() -> None:
    """pytest cannot collect two modules of one name, and ranks find a test's functions by that name."""
    names = [path.name for path in sorted((ROOT / "tests").glob("**/test_*.py"))]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
