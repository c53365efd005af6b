"""Generated parts of the documents: the compatibility tables, the list of files, the default degrees.

python -m tests.tables            print them
python -m tests.tables --write    put them between their markers (`make matrix` tests first)
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from shared.launch.backend import Backend
from shared.models import ModelSpec
from shared.models.spec import Kind

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "matrix.json"
COLUMNS = {
    "LoRA": ("lora",),
    "ControlNet": ("control_net",),
    "IP-Adapter": ("ip_adapter",),
    "quantization": ("quantize_to",),
    "compile": ("compile_unet",),
    "CPU offload": ("enable_model_cpu_offload", "enable_sequential_cpu_offload"),
    "from a picture": ("image",),
    "inpainting": ("mask",),
}
FROM_PICTURE: dict[str, Kind] = {"image": "image", "mask": "inpaint"}
"""Features that are fields of a request, not flags: what kind of pipeline each needs."""


def refusal(backend: Backend, spec: ModelSpec, feature: str) -> str | None:
    """Why a type on a host does not support a feature; None: it does."""
    if feature not in FROM_PICTURE:
        return backend.refusal(spec, feature)
    if spec.image == "needed":
        return "its picture is an input of the model, not a start"
    if spec.start(FROM_PICTURE[feature], control=False) is None:
        return "diffusers has no such pipeline for it, or (chroma's inpainting) one that fails"
    return None


def compatibility(results: dict[str, str]) -> str:
    """One table a backend. `results` maps "backend/type/feature" to passed or failed."""
    from shared.backends import BACKENDS
    from shared.models import MODELS

    parts = []
    for backend in BACKENDS.values():
        parts.append(f"**{backend.name}_host.py**, {backend.title}\n")
        notes: list[str] = []
        parts.append("| type | model | " + " | ".join(COLUMNS) + " |")
        parts.append("|---" * (len(COLUMNS) + 2) + "|")
        for name in backend.types:
            cells = []
            for flags in COLUMNS.values():
                reason = refusal(backend, MODELS[name], flags[0])
                if reason is not None:
                    if reason not in notes:
                        notes.append(reason)
                    cells.append(f"no ({notes.index(reason) + 1})")
                elif flags[0].endswith("offload"):
                    cells.append("GPU only")
                else:
                    outcome = results.get(f"{backend.name}/{name}/{flags[0]}", "untested")
                    cells.append("yes" if outcome == "passed" else outcome)
            parts.append(f"| {name} | {MODELS[name].title} | " + " | ".join(cells) + " |")
        parts.append("")
        parts += [f"({i}) {note}.  " for i, note in enumerate(notes, 1)]
        parts.append("")
    return "\n".join(parts).strip()


HEADS = {"sd3": 24, "flux": 24, "kontext": 24, "chroma": 24, "flux2": 48, "qwen": 24, "qwenedit": 24}
HEADS |= {"zimage": 30, "wan": 40, "wani2v": 40, "hv15": 16, "ltx2": 32, "hy": 16, "pixa": 16, "pixs": 16}
"""Attention heads of the published checkpoints: FLUX.2 dev, Wan 14B."""


def plan(backend: str, name: str, ranks: int) -> str:
    """How a host divides a type over so many ranks where no flag says so."""
    from shared.backends.asyncdiff import stages
    from shared.launch.errors import UsageError
    from shared.launch.flags import HostConfig
    from shared.models import MODELS
    from shared.parallel.xdit.degrees import choose_degrees

    config = HostConfig(backend=backend, type=name)
    if backend == "xdit":
        tokens = MODELS[name].tokens
        assert tokens is not None
        return str(choose_degrees(ranks, {}, 1 if tokens.unguided else tokens.branches, HEADS[name]))
    if backend == "distrifuser":
        assert config.parallelism == "patch"
        halved = ranks % 2 == 0 and not config.no_split_batch
        return f"cfg 2 x patches {ranks // 2}" if halved else f"patches {ranks}"
    try:
        return f"stages {stages(config, ranks)}"
    except UsageError:
        halves = stages(replace(config, use_cfg_parallel=True), ranks)
        return f"with `--use_cfg_parallel`: cfg 2 x stages {halves}"


def degrees() -> str:
    """One row for all types of a host that are divided alike."""
    from shared.backends import BACKENDS

    counts = (2, 4, 6, 8)
    rows: dict[tuple[str, ...], list[str]] = {}
    for backend, spec in BACKENDS.items():
        for name in spec.types:
            rows.setdefault((backend, *(plan(backend, name, n) for n in counts)), []).append(name)
    lines = ["| host | types | " + " | ".join(f"{n} GPUs" for n in counts) + " |", "|---" * 6 + "|"]
    lines += [
        f"| {host} | {', '.join(names)} | {' | '.join(plans)} |" for (host, *plans), names in rows.items()
    ]
    return "\n".join(lines)


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def file_tree() -> str:
    """Every Python file outside of tests, with what it says of itself."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    lines = ["| file | what it is |", "|---|---|"]
    for name in sorted(listed, key=lambda n: (n.count("/"), n)):
        if not name.startswith("tests/") and (line := first_line(ROOT / name)):
            lines.append(f"| `{name}` | {line} |")
    return "\n".join(lines)


def results() -> dict[str, str]:
    """What the last run of tests/test_matrix.py said, cell by cell."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def put(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers `name` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert pattern.search(text), f"there are no markers {name}"
    return pattern.sub(lambda found: f"{found.group(1)}{content}\n{found.group(2)}", text)


def main() -> None:
    generated = {"docs/DESIGN.md": {"files": file_tree()}, "docs/USING.md": {"degrees": degrees()}}
    if RESULTS.exists():  # a table of untested cells would replace what is known
        generated["README.md"] = {"compatibility": compatibility(results())}
    for document, parts in generated.items():
        text = (ROOT / document).read_text()
        for name, content in parts.items():
            if "--write" in sys.argv:
                text = put(text, name, content)
            else:
                print(content, end="\n\n")
        (ROOT / document).write_text(text)


if __name__ == "__main__":
    main()
