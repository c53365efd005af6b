"""Fixtures shared by all test modules."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.pool import RankPool
from tests.tables import RESULTS, ROOT, results

if TYPE_CHECKING:
    # Imported by whom they serve: the process that starts the workers needs no torch.
    from tests.comfy_stub import ComfyUI
    from tests.test_host import Launch

WITH_DEMO_HOST = (
    "test_end_to_end.py",
    "http/test_web.py",
    "clients/test_comfyui_samplers.py",
    "http/test_hires.py",
    "http/test_a1111_img2img.py",
    "clients/test_localai.py",
    "test_readme_commands.py",
)
"""The files whose tests share `demo_host`: one worker runs them all, so that one host is started."""
LONGEST = (
    *WITH_DEMO_HOST,
    "parallel/test_xdit.py",
    "parallel/test_distrifusion.py",
    "test_host.py",
    "test_matrix.py",
    "pipeline/test_memory_plan.py",
    "launch/test_flags.py",
    "parallel/test_asyncdiff.py",
    "pipeline/test_single_file_forms.py",
    "pipeline/test_lora.py",
    "pipeline/test_refiner.py",
    "pipeline/test_single_file.py",
    "parallel/test_sharded.py",
    "pipeline/test_arguments.py",
    "http/test_web_jobs.py",
    "http/test_web_tools.py",
    "clients/test_comfyui.py",
    "pipeline/test_kept_weights.py",
    "pipeline/test_from_picture.py",
    "pipeline/test_batches.py",
    "parallel/test_chosen_steps.py",
    "pipeline/test_compile.py",
)
"""The files that take longest: run first, so that no worker is left with one of them at the end."""
TESTS = Path(__file__).parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
HELD = pytest.StashKey[contextlib.ExitStack]()
"""The lock under which a worker's test runs."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: to look through it for garbage takes a sixth of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    shared = {TESTS / name for name in WITH_DEMO_HOST}
    for item in items:
        if "demo_host" in getattr(item, "fixturenames", ()) and item.path not in shared:
            raise pytest.UsageError(f"{item.nodeid} takes demo_host: WITH_DEMO_HOST must name its file")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Of `--dist loadfile`: files that share the demo host are as one file."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "with demo_host" if file.removeprefix("tests/") in WITH_DEMO_HOST else file

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, how)
        yield


def is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Several workers: a test marked `alone` runs while the others wait between two tests.

    Of such tests in a row only the first waits for what the others run.
    """
    if WORKER is None:
        return (yield)
    assert item.config.cache is not None
    folder, stash = item.config.cache.mkdir("alone"), item.config.stash
    if HELD not in stash:
        stash[HELD] = contextlib.ExitStack()
        how = fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH
        with locked(folder / "queue", fcntl.LOCK_EX):  # who waits for the others to end lets none begin
            stash[HELD].enter_context(locked(folder / "running", how))
    try:
        return (yield)
    finally:
        if not (is_alone(item) and is_alone(nextitem)):
            stash[HELD].close()
            del stash[HELD]


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
    from tests.test_host import DEMO_CHECKPOINT, DEMO_STEPS, Launch

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
    (models / "diffusers" / "demo").symlink_to(ROOT / "demo" / "checkpoint")
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
