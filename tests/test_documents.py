"""README.md and docs/: generated parts are what the registry and the files say, links and lengths hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.backends import BACKENDS
from shared.models import MODELS
from tests.pool import RankPool
from tests.tables import COLUMNS, ROOT, degrees, file_tree, put, refusal

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_list_of_files_is_current() -> None:
    text = (ROOT / "docs" / "DESIGN.md").read_text()
    assert put(text, "files", file_tree()) == text, "run python -m tests.tables --write"


def test_the_default_degrees_are_those_that_hosts_choose() -> None:
    text = (ROOT / "docs" / "USING.md").read_text()
    assert put(text, "degrees", degrees()) == text, "run python -m tests.tables --write"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(\s*([^)\s]+)\)", document.read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, link


def test_the_example_of_the_library_makes_the_plain_picture(pool: RankPool) -> None:
    steps = 6
    example = (ROOT / "demo" / "library.py").read_text()
    shown = re.search(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert all(line.strip() in example for line in shown.group(1).splitlines())
    pictures = pool.run(drawn, 2, steps)
    plain = np.asarray(plain_picture(steps), dtype=np.float64)
    for picture in pictures:
        error = float(np.mean((picture - plain) ** 2))
        assert 0 < error < 255**2 / 10**2.2, "asynchronous, and within 22 dB of the plain picture"


CHECKPOINT, PROMPT = str(ROOT / "demo" / "checkpoint"), "a red circle on a blue background"


def drawn(steps: int) -> np.ndarray:
    """On one rank: what demo/library.py draws."""
    from demo.library import draw

    return np.asarray(draw(CHECKPOINT, PROMPT, steps), dtype=np.float64)


def plain_picture(steps: int) -> Image.Image:
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(CHECKPOINT)
    generator = torch.Generator("cpu").manual_seed(7)
    return pipe(PROMPT, num_inference_steps=steps, generator=generator).images[0]


def test_the_compatibility_tables_are_the_registrys() -> None:
    text = (ROOT / "README.md").read_text()
    for backend, spec in BACKENDS.items():
        for name in spec.types:
            row = re.search(rf"^\| {name} \| .*$", text.split(f"**{backend}_host.py**")[1], re.MULTILINE)
            assert row is not None, name
            cells = [cell.strip() for cell in row.group().strip("|").split("|")][2:]
            for cell, flags in zip(cells, COLUMNS.values(), strict=True):
                expected = "no" if refusal(spec, MODELS[name], flags[0]) else "yes|GPU only"
                assert re.match(expected, cell), f"{name} {flags[0]}: README says {cell!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_path_of_a_machine_is_named(document: Path) -> None:
    assert not re.search(r"/work/|/root/|\.\./shared", document.read_text())
