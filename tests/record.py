"""Hashes of what every cell of the matrix gives on CPU ranks, to compare two states of the code.

python -m tests.record before.json, then, with the code changed: python -m tests.record after.json before.json
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests import test_matrix
from tests.pool import RankPool

MADE = ("exact", "plain", "asynchronous")
BACKENDS = ("asyncdiff", "distrifuser", "xdit")
# Plans that the cells do not use, each with one type: (backend, type, ranks, features, flags).
PLANS: list[tuple[str, str, int, str, dict[str, Any]]] = [
    ("asyncdiff", "sd1", 2, "control_net", {"use_cfg_parallel": True}),
    ("asyncdiff", "sd1", 3, "control_net", {"stride": 2}),
    ("asyncdiff", "sd3", 2, "nothing", {"use_cfg_parallel": True, "async_steps": 2}),
    ("distrifuser", "sdxl", 2, "control_net", {"no_split_batch": True}),
    ("distrifuser", "sd1", 2, "nothing", {"no_split_batch": True, "split_scheme": "col"}),
    ("distrifuser", "sd1", 2, "nothing", {"parallelism": "tensor"}),
    ("xdit", "flux", 2, "ip_adapter", {"ulysses_degree": 2}),
    ("xdit", "sd3", 2, "ip_adapter", {"ulysses_degree": 2}),
    ("xdit", "hy", 2, "control_net", {"ulysses_degree": 2}),
    ("xdit", "pixs", 2, "nothing", {"ring_degree": 2}),
    ("xdit", "flux", 2, "nothing", {"tensor_parallel_degree": 2}),
    ("xdit", "flux", 2, "nothing", {"ulysses_degree": 2, "use_fbcache": True}),
    ("xdit", "flux", 2, "nothing", {"ulysses_degree": 2, "use_teacache": True}),
]  # fmt: skip


def cells() -> list[tuple[str, str, int, str, dict[str, Any]]]:
    """Every cell, but compiled ones that only `make matrix` runs, and the plans."""
    found: list[tuple[str, str, int, str, dict[str, Any]]] = []
    for backend in BACKENDS:
        for cell in test_matrix.cells(backend):
            name, feature = getattr(cell, "values", cell)
            if feature != "compile_unet" or name in test_matrix.COMPILED[backend]:
                found.append((backend, name, 2, feature, {}))
    return [*found, *PLANS]


def run_plan(backend: str, name: str, flags: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """On one rank: the latents of a plan at full warm-up and, then after one step."""
    made: dict[str, Any] = {"plain": None}
    for what, more in (("exact", {}), ("asynchronous", {"warm_up_steps": 1})):
        config, world, host, latents = test_matrix.launch(backend, name, flags, plan | more)
        engine = host.build_engine(config, world)
        made[what] = latents(engine)
        engine.close()
    return made


def digest(array: np.ndarray | None) -> str | None:
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def record(path: Path) -> dict[str, Any]:
    """Run the cells; what the rank with the picture has made, by cell."""
    pool = RankPool()
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for backend, name, ranks, feature, plan in cells():
        key = f"{backend}:{name}:{feature}:{json.dumps(plan, sort_keys=True) if plan else ''}"
        if "error" not in found.get(key, {"error": ""}):
            continue  # of a run that was cut short
        began = time.monotonic()
        flags = test_matrix.flags_of(backend, name, feature)
        try:
            if plan:
                made = pool.run(run_plan, ranks, backend, name, flags, plan, timeout=400)
            else:
                made = pool.run(test_matrix.run_cell, ranks, backend, name, flags, {}, False, timeout=400)
            holder = next(r for r in made if r["exact"] is not None)
            found[key] = {what: digest(holder[what]) for what in MADE}
        except Exception as error:
            found[key] = {"error": str(error).strip().splitlines()[-1][:200]}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{key}  {time.monotonic() - began:.1f} s  {found[key]}", flush=True)
    pool.close()
    return found


def main() -> None:
    """Record, and tell what differs from an earlier record."""
    now = record(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        before = json.loads(Path(sys.argv[2]).read_text())
        other = [key for key in before | now if before.get(key) != now.get(key)]
        print(f"{len(now)} cells, {len(other)} differ: {', '.join(other) or 'none'}")
        sys.exit(bool(other))


if __name__ == "__main__":
    main()
