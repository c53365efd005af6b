"""README.md: its generated parts are what the registry and the files say."""

from __future__ import annotations

import re

from shared.models import BACKENDS, MODELS, refusal
from tests.tables import COLUMNS, ROOT, file_tree, put


def test_the_file_tree_is_current():
    text = (ROOT / "README.md").read_text()
    assert put(text, "files", file_tree()) == text, "run `make matrix`, or python -m tests.tables --write"


def test_the_compatibility_tables_are_the_registrys():
    text = (ROOT / "README.md").read_text()
    for backend, spec in BACKENDS.items():
        for name in spec.types:
            row = re.search(rf"^\| {name} \| .*$", text.split(f"**{backend}_host.py**")[1], re.MULTILINE)
            assert row is not None, name
            cells = [cell.strip() for cell in row.group().strip("|").split("|")][2:]
            for cell, flags in zip(cells, COLUMNS.values(), strict=True):
                expected = "no" if refusal(spec, MODELS[name], flags[0]) else "yes|GPU only"
                assert re.match(expected, cell), f"{name} {flags[0]}: README says {cell!r}"


def test_the_readme_names_no_path_of_a_machine():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"/work/|/root/|\.\./shared", text)
