"""The scaling table: what 1, 2, 4 and 8 GPUs of one machine make of the same work, in ten minutes

python -m benchmarks.scaling [--gpus 1,2,4] [--limit 570] [--p2p on,off] [--only sdxl,flux] [--write]

Launches of benchmarks/asyncdiff.py, distrifusion.py and xdit.py run side by side where GPUs are free, in
order of importance; what the limit leaves no time for is listed as not run. --write puts the table into
docs/MEASURED.md. --tiny --device cpu shows that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tables import ROOT, put

SECTION = """\
`python -m benchmarks.scaling --write`: latents, random weights of full size, bf16. "x best one": against the
fastest system on one GPU; error: against one GPU of the same launch, captured; memory: of the rank that needs
most. P2P off: `NCCL_P2P_DISABLE=1`."""
HEAD = ["work", "GPUs", "P2P", "system", "seconds", "x best one", "error", "peak GiB"]


@dataclass(frozen=True)
class Work:
    """Some work of one benchmark, and the systems that are measured on so many GPUs.

    Args:
        bench: file in benchmarks/.
        work: type:size:steps, of one type.
        plain: GPUs -> systems; those of a number that is not here are those of the next smaller one.
        compiled: GPUs -> systems that are compiled first.
        flags: more of the benchmark's.
    """

    bench: str
    work: tuple[str, ...]
    plain: dict[int, str]
    compiled: dict[int, str]
    flags: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        return self.work[0].split(":")[0]


SEQUENCE = {2: "ulysses,ring", 4: "ulysses,ring,ulysses*ring"}
GUIDED = {2: "cfg,ulysses", 4: "cfg*ulysses,cfg*ring", 8: "cfg*ulysses,cfg*ulysses*ring"}
WORKS = (
    Work("xdit", ("flux:1024:28", "flux:1024:14"), {2: "ulysses"}, {1: "graph", 2: "ulysses", 4: "ulysses"}),
    Work("distrifusion", ("sdxl:3840:6", "sdxl:2048:10"), {2: "patch,cfg", 4: "patch,cfg,col"}, {}),
    Work(
        "asyncdiff",
        ("sdxl:1024:30",),
        {2: "cfg,hybrid-12-8", 4: "pairs-12-8,pairs"},
        {1: "graph", 2: "hybrid-12-8", 4: "pairs-12-8"},
        ("--channels-last",),
    ),
    Work("xdit", ("sd3:1024:28",), GUIDED, {}),
    Work("xdit", ("flux:2048:6",), SEQUENCE, {}),
    Work("distrifusion", ("sdxl:1024:30",), {2: "patch,cfg"}, {}),
    Work("asyncdiff", ("svd:576:25",), {2: "asyncdiff,cfg", 4: "pairs,asyncdiff", 8: "pairs"}, {}),
    Work("xdit", ("wan:480:4",), GUIDED, {}),
)
"""Most important first."""


@dataclass
class Launch:
    """One benchmark on some GPUs."""

    work: Work
    gpus: int
    p2p: bool
    state: str = "not run"
    rows: list[list[str]] | None = None
    process: subprocess.Popen[bytes] | None = None
    held: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return f"{' '.join(self.work.work)} on {self.gpus}, P2P {'on' if self.p2p else 'off'}"


def launches(counts: list[int], p2p: list[str], only: list[str]) -> Iterator[Launch]:
    """One GPU first, as all are compared with it; then the most GPUs; without P2P last."""
    works = [work for work in WORKS if not only or work.type in only]
    several = sorted((n for n in counts if n > 1), reverse=True)
    yield from (Launch(work, 1, True) for work in works if 1 in counts)
    for way in p2p:
        yield from (Launch(work, n, way == "on") for n in several for work in works)


def of(systems: dict[int, str], gpus: int) -> str:
    """The systems for so many GPUs."""
    return next((systems[n] for n in sorted(systems, reverse=True) if n <= gpus), "")


def command(one: Launch, options: argparse.Namespace) -> list[str]:
    work = one.work
    found = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={one.gpus}"]
    found += [f"benchmarks/{work.bench}.py"]
    if options.tiny:
        size = 320 if work.type in ("svd", "wan") else 256
        found += [f"{work.type}:{size}:4", "--tiny"]
    else:
        found += work.work
    found += [f"--repeats={options.repeats}", f"--device={options.device}", f"--dtype={options.dtype}"]
    found += [
        "--systems=" + ",".join(filter(None, ("graph", of(work.plain, one.gpus) if one.gpus > 1 else "")))
    ]
    # Without P2P only what is communicated changes, which uncompiled systems show.
    if one.p2p and not options.tiny and (systems := of(work.compiled, one.gpus)):
        found += [f"--compile={systems}", *work.flags]
    return found


def start(one: Launch, options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir()
    environment = {**os.environ, "OUT": str(folder), "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    if options.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, one.held))
    if not one.p2p:
        environment["NCCL_P2P_DISABLE"] = "1"
    with (folder / "log").open("wb") as log:
        one.process = subprocess.Popen(
            command(one, options), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    one.state = "running"


def end(one: Launch, folder: Path) -> None:
    """Read what an ended launch has measured."""
    assert one.process is not None
    found = list(folder.glob("*.json"))
    text = (folder / "log").read_text(errors="replace")
    one.rows = json.loads(found[0].read_text()) if found else printed(text)
    failed = one.process.returncode != 0 or "Traceback" in text
    one.state = "failed" if failed else "done"
    if failed:
        print(f"--- {one.label} ---\n{text[-3000:]}", flush=True)


def printed(text: str) -> list[list[str]]:
    """The rows that a launch which did not end has printed."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "steps" in line]
    return [[cell.strip() for cell in row] for row in rows]


def run(all_of: list[Launch], options: argparse.Namespace, root: Path) -> None:
    """Start each when enough GPUs are free, strictly in order; stop all at the limit."""
    deadline = time.monotonic() + options.limit
    free = set(range(max(one.gpus for one in all_of)))
    waiting, running = list(all_of), list[Launch]()
    folders = {id(one): root / str(number) for number, one in enumerate(all_of)}
    while waiting or running:
        late = time.monotonic() > deadline
        for one in [one for one in running if late or (one.process and one.process.poll() is not None)]:
            assert one.process is not None
            if one.process.poll() is None:
                os.killpg(one.process.pid, signal.SIGTERM)
                one.process.wait()
            running.remove(one)
            free |= set(one.held)
            end(one, folders[id(one)])
            if late and one.state == "failed":
                one.state = "cut"
            print(f"{one.label}: {one.state}", flush=True)
        if late:
            return
        while waiting and len(free) >= waiting[0].gpus:
            one = waiting.pop(0)
            one.held = tuple(sorted(free)[: one.gpus])
            free -= set(one.held)
            start(one, options, folders[id(one)])
            running.append(one)
        time.sleep(0.2)


def table(all_of: list[Launch]) -> str:
    """Of all rows; and what was not run to its end."""
    best: dict[str, float] = {}
    for one in all_of:
        for label, _, seconds, *_ in one.rows or () if one.gpus == 1 else ():
            best[label] = min(best.get(label, float("inf")), float(seconds))
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    rows = []
    for one in all_of:
        for label, system, seconds, _, error, peak, *_ in one.rows or ():
            if one.gpus > 1 and system.endswith("graph"):
                continue  # one GPU again, that the error is measured against
            ratio = f"{best[label] / float(seconds):.2f}" if label in best else "-"
            p2p = "-" if one.gpus == 1 else "on" if one.p2p else "off"
            rows.append((label, one.gpus, p2p, system, seconds, ratio, error, peak))
    order = {label: place for place, label in enumerate(dict.fromkeys(row[0] for row in rows))}
    rows.sort(key=lambda row: (order[row[0]], row[1], row[2] == "off"))
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    left = [f"{one.label} ({one.state})" for one in all_of if one.state != "done"]
    return "\n".join([*lines, "", f"Not run to the end: {'; '.join(left) or 'none'}."])


def write(content: str, options: argparse.Namespace) -> None:
    path = ROOT / "docs" / "MEASURED.md"
    text = path.read_text()
    if "<!-- scaling -->" not in text:
        text += f"\n## More GPUs\n\n{SECTION}\n\n<!-- scaling -->\n<!-- /scaling -->\n"
    path.write_text(put(text, "scaling", content))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", default="1,2,4", help="numbers of GPUs; the machine must have the largest")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for all of it")
    parser.add_argument("--p2p", default="on,off")
    parser.add_argument("--only", default="", help="types")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the tests' small checkpoints")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    counts = [int(n) for n in options.gpus.split(",")]
    wanted = list(launches(counts, options.p2p.split(","), [n for n in options.only.split(",") if n]))
    with tempfile.TemporaryDirectory() as folder:
        run(wanted, options, Path(folder))
    found = table(wanted)
    print(found, flush=True)
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "scaling.md").write_text(found)
    if options.write:
        write(found, options)
    sys.exit(any(one.state == "failed" for one in wanted))


if __name__ == "__main__":
    main()
