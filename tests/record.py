"""What every cell of the matrix gives on CPU ranks, as hashes of the latents' bytes: before and after a change.

python -m tests.record before.json     then, with the code changed:     python -m tests.record after.json before.json
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
from tests.ranks import RankPool

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
    found = []
    for backend in BACKENDS:
        for cell in test_matrix.cells(backend):
            name, feature = getattr(cell, "values", cell)
            if feature != "compile_unet" or name in test_matrix.COMPILED[backend]:
                found.append((backend, name, 2, feature, {}))
    return [*found, *PLANS]


def digest(array: np.ndarray | None) -> str | None:
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def record(path: Path) -> dict[str, Any]:
    """Run the cells; what the rank with the picture has made, by cell."""
    pool, found = RankPool(), {}
    for backend, name, ranks, feature, flags in cells():
        key = f"{backend}:{name}:{feature}:{json.dumps(flags, sort_keys=True) if flags else ''}"
        began = time.monotonic()
        try:
            made = pool.run(
                test_matrix.run_cell,
                ranks,
                backend,
                name,
                test_matrix.flags_of(backend, name, feature),
                dict(flags),
                False,
                timeout=400,
            )
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
