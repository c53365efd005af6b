"""Fixtures shared by all test modules."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.pool import RankPool
from tests.tables import RESULTS, results
from tests.test_host import DEMO_CHECKPOINT, DEMO_STEPS, Launch

if TYPE_CHECKING:
    from tests.comfy_stub import ComfyUI

LONGEST = (
    "test_matrix.py",
    "parallel/test_xdit.py",
    "launch/test_flags.py",
    "test_host.py",
    "parallel/test_distrifusion.py",
    "parallel/test_sharded.py",
    "test_end_to_end.py",
    "http/test_web.py",
    "parallel/test_asyncdiff.py",
    "pipeline/test_lora.py",
    "parallel/test_stage_buffers.py",
    "pipeline/test_arguments.py",
    "clients/test_comfyui_samplers.py",
    "http/test_web_jobs.py",
    "ranks/test_state_dir.py",
    "test_demo_training.py",
    "pipeline/test_adapters.py",
    "parallel/test_caches.py",
    "parallel/test_wan22.py",
    "pipeline/test_batches.py",
)
"""The files that take longest: run first, so that no worker is left with one of them at the end."""
WORKER = os.environ.get("PYTEST_XDIST_WORKER")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Several workers: a test marked `alone` runs while the others wait between two tests."""
    if WORKER is None:
        return (yield)
    assert item.config.cache is not None
    folder = item.config.cache.mkdir("alone")
    alone = item.get_closest_marker("alone") is not None
    with contextlib.ExitStack() as queued:
        # Who waits for the others to end lets none of them begin.
        queued.enter_context(locked(folder / "queue", fcntl.LOCK_EX))
        with locked(folder / "running", fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
            queued.close()
            return (yield)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A host that a test starts in this process takes the log over, and caplog would see no more of it."""
    loggers = [logging.getLogger(name) for name in ("py.warnings", "waitress", "host")]
    before = [(log.handlers[:], log.propagate, log.level) for log in loggers]
    yield
    for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to five rank processes that stay up for the session."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def demo_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """A real host on the demo checkpoint: two ranks under torchrun, 128x128, exact up to DEMO_STEPS steps.

    Shared by all tests that leave it as it was; a test that ends a host starts its own.
    """
    flags = [f"--checkpoint={DEMO_CHECKPOINT}", "--variant=fp32", "--width=128", "--height=128"]
    folder = tmp_path_factory.mktemp("demo_host")
    launch = Launch(
        folder, 2, *flags, f"--warm_up_steps={DEMO_STEPS}", "--allow_lora_paths", script="asyncdiff_host.py"
    )
    try:
        yield launch.ready()
    finally:
        launch.end()


@pytest.fixture(scope="module")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """The node pack in a stand-in for ComfyUI, with some model files."""
    from tests.comfy_stub import install

    models = tmp_path_factory.mktemp("models")
    (models / "diffusers").mkdir()
    (models / "diffusers" / "demo").symlink_to(DEMO_CHECKPOINT)
    folders = {
        "diffusers": ["sdxl", "sd15", "svd", "x4-upscaler"],
        "animatediff_models": ["animatediff-motion-adapter"],
    }
    for kind, names in folders.items():
        for name in names:
            (models / kind / name).mkdir(parents=True)
            marker = "model_index.json" if kind == "diffusers" else "config.json"
            (models / kind / name / marker).write_text("{}")
    (models / "loras").mkdir()
    for name in ("a", "b"):
        (models / "loras" / f"{name}.safetensors").write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        comfy = install(patch.setitem, models)
        yield comfy
        comfy.pack["launched"].HOSTS.stop_all()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what each cell of tests/test_matrix.py said, for `make matrix`."""
    if WORKER is not None:
        return  # the process that has started this one hears of it too
    found = re.search(r"test_matrix\.py::test_(asyncdiff|distrifuser|xdit)\[(\w+)-(\w+)\]$", report.nodeid)
    if found and (report.when == "call" or report.failed):
        RESULTS.parent.mkdir(exist_ok=True)
        noted = results() | {"/".join(found.groups()): report.outcome}
        RESULTS.write_text(json.dumps(noted, indent=1, sort_keys=True))
