"""Faults: kills and stops ranks and launchers of real hosts in every state, and writes a table of results.

    python benchmarks/faults.py                     every row: a quarter of an hour on two cores
    python benchmarks/faults.py --only "idle/.*"    some of them, by state/victim/signal/restarts
    python benchmarks/faults.py --write             also into docs/MEASURED.md, in place of these rows

The hosts are asyncdiff_host.py on the demo checkpoint, two CPU ranks. With --max-restarts one host takes many
faults one after the other; each time it must be back and make the first picture again, byte for byte.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "MEASURED.md"
CHECKPOINT = ROOT / "demo" / "checkpoint"
TIMEOUT = 8  # --collective_timeout, seconds
LAUNCHER_GRACE = 30  # torchrun's, from SIGTERM to SIGKILL
START = 90  # seconds that a host may take to start
BAD = re.compile("HANGS|NOT BACK|ANOTHER|LATE|SAYS NOTHING|LOST")
COLUMNS = (
    "state",
    "victim",
    "signal",
    "restarts",
    "running request",
    "ranks gone",
    "launcher",
    "back",
    "left",
)
REQUEST: dict[str, Any] = {"positive": "a red circle on a blue background", "steps": 10, "seed": 7}


@dataclass(frozen=True)
class Fault:
    """`signal` to `victim` while the host is in `state`; `restarts`: under --max-restarts."""

    state: str
    victim: str
    signal: str
    restarts: bool

    @property
    def key(self) -> str:
        return "/".join((self.state, self.victim, self.signal, "restarts" if self.restarts else "none"))


def all_faults() -> list[Fault]:
    """Every row of the table. A launcher that is hit does not restart anything."""
    states = ("loading", "idle", "warm-up", "steady", "decoding", "LoRA")
    ranks = ("rank 0", "rank 1")
    again = [Fault(s, v, "KILL", True) for s, v in itertools.product(states, ranks)]
    again += [Fault(s, v, "TERM", True) for s, v in itertools.product(states, ranks)]
    again += [Fault(s, "rank 1", "STOP", True) for s in states]
    again += [Fault(s, "rank 0", "STOP", True) for s in ("idle", "steady")]
    once = [Fault(s, "launcher", "KILL", False) for s in states]
    once += [
        Fault(s, "launcher", n, False)
        for n, s in itertools.product(("TERM", "STOP"), ("loading", "idle", "steady"))
    ]
    once += [
        Fault(s, "rank 1", n, False)
        for n, s in itertools.product(("KILL", "STOP"), ("loading", "idle", "steady"))
    ]
    return again + once


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition was met in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@dataclass
class Answer:
    """What a request got, and when; `thread` waits for it."""

    text: str = ""
    at: float = 0.0
    thread: threading.Thread = field(default_factory=threading.Thread)


class Host:
    """Two ranks under torchrun, with more flags, their output in a file."""

    def __init__(self, folder: Path, restarts: bool, *flags: str) -> None:
        with socket.socket() as free, socket.socket() as other:
            free.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self.master = free.getsockname()[1], other.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / f"{self.port}.log"
        self.folder, self.restarts, self.flags = folder, restarts, flags
        self.lora = folder / "lora.safetensors"
        self.seen: set[int] = set()
        self.start()

    def start(self) -> None:
        """Start the launcher."""
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={self.master}",
        ]
        command += ["--max-restarts=80"] if self.restarts else []
        command += ["asyncdiff_host.py", "--type=sd1", f"--checkpoint={CHECKPOINT}", f"--port={self.port}"]
        command += ["--width=128", "--height=128", "--warm_up_steps=40", f"--collective_timeout={TIMEOUT}"]
        if "lora_dir" in (ROOT / "shared" / "launch" / "flags.py").read_text():
            command.append(f"--lora_dir={self.folder}")
        command += self.flags
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """The process of each rank, in order."""
        found: dict[int, int] = {}
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                items = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(i[5:]): pid for i in items if i.startswith(b"RANK=") and alive(pid)}
        self.seen |= set(found.values())
        return [found[rank] for rank in sorted(found)]

    def state(self) -> str:
        try:
            return str(requests.get(f"{self.url}/health", timeout=3).json()["state"])
        except (requests.RequestException, ValueError):
            return ""

    def started(self, old: list[int]) -> bool:
        """Whether two ranks run, none of them of `old`."""
        return len(pids := self.ranks()) == 2 and not set(pids) & set(old)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def ready(self, old: list[int]) -> bool:
        """Whether a generation other than `old` serves; at once when the launcher has ended."""
        until(lambda: self.ended() or (self.started(old) and self.state() == "ready"), START)
        return not self.ended() and self.state() == "ready"

    def ask(self, route: str = "/generate", **body: Any) -> requests.Response:
        return requests.post(self.url + route, json=body, timeout=4 * START)

    def ask_later(self, route: str = "/generate", **body: Any) -> Answer:
        answer = Answer()

        def run() -> None:
            try:
                got = self.ask(route, **body)
                answer.text = str(got.status_code)
            except requests.Timeout:
                answer.text = "HANGS"
            except requests.ConnectionError:
                answer.text = "connection closed"
            answer.at = time.monotonic()

        answer.thread = threading.Thread(target=run, daemon=True)
        answer.thread.start()
        return answer

    def progress(self, least: float) -> bool:
        def reached() -> bool:
            with contextlib.suppress(requests.RequestException, ValueError):
                return float(requests.get(f"{self.url}/progress", timeout=3).text) >= least
            return False

        return until(lambda: self.state() == "busy" and reached(), 2 * START)

    def end(self) -> None:
        self.ranks()
        for pid in (self.process.pid, *self.seen):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def reach(host: Host, fault: Fault) -> Answer | None:
    """Bring the host into the fault's state; the answer to the request that runs then."""
    answer = None
    if fault.state == "loading":
        if fault.restarts:
            old = host.ranks()
            os.kill(old[1], signal.SIGKILL)
            until(lambda: host.started(old), START)
        until(lambda: host.state() == "loading", START)
        time.sleep(3)  # in the midst of the weights
    elif fault.state in ("warm-up", "steady"):
        answer = host.ask_later(**{**REQUEST, "steps": 120})
        host.progress(3 if fault.state == "warm-up" else 40)
    elif fault.state == "decoding":
        answer = host.ask_later(**{**REQUEST, "steps": 2, "width": 768, "height": 768})
        host.progress(99)
    elif fault.state == "LoRA":
        answer = host.ask_later("/lora", path=str(host.lora), scale=1.0)
        until(lambda: host.state() == "busy" or answer.text, 5)
    return answer


def suffer(host: Host, fault: Fault, first: bytes) -> dict[str, str]:
    """One row: cause the fault and record what follows."""
    answer = reach(host, fault)
    old = host.ranks()
    victim = host.process.pid if fault.victim == "launcher" else old[int(fault.victim[-1])]
    began = time.monotonic()
    os.kill(victim, getattr(signal, f"SIG{fault.signal}"))
    if answer is None and fault.state == "idle":
        answer = host.ask_later(**{**REQUEST, "steps": 60})
    limit = TIMEOUT + LAUNCHER_GRACE + 10
    gone = until(lambda: not any(map(alive, old)), limit)
    row = {
        "ranks gone": f"{time.monotonic() - began:.1f} s" if gone else "HANGS",
        "back": "",
        "launcher": "restarts",
    }
    if fault.victim == "launcher" and fault.signal == "STOP":
        os.kill(victim, signal.SIGCONT)
    if fault.restarts and host.ready(old):
        row["back"] = f"{time.monotonic() - began:.1f} s"
        same = base64.b64decode(host.ask(**REQUEST).json()["output"]) == first
        row["back"] += ", same picture" if same else ", ANOTHER PICTURE"
    elif fault.restarts:
        stopped = fault.signal == "TERM" and host.process.poll() == 0
        row |= {"back": "told to stop", "launcher": "exit 0"} if stopped else {"back": "NOT BACK"}
    else:
        row["launcher"] = f"exit {host.process.returncode}" if until(host.ended, limit) else "HANGS"
    row["running request"] = ""
    if answer is not None:
        answer.thread.join(limit)
        row["running request"] = f"{answer.text or 'HANGS'}, {max(answer.at - began, 0):.1f} s"
    row["left"] = str(sum(map(alive, old)))
    return row


def chain(faults: list[Fault], folder: Path) -> Iterator[tuple[Fault, dict[str, str]]]:
    """Rows of one host after the other; a host that has ended is followed by a new one."""
    host = None
    try:
        for fault in faults:
            if host is None or host.ended():
                host, first = Host(folder, fault.restarts), b""
                if fault.restarts or fault.state != "loading":
                    if not host.ready([]):
                        raise SystemExit(f"the host does not start:\n{host.log.read_text()[-3000:]}")
                    first = base64.b64decode(host.ask(**REQUEST).json()["output"])
                else:
                    until(functools.partial(host.started, []), START)
            yield fault, suffer(host, fault, first)
            if not fault.restarts:
                host.end()
    finally:
        if host is not None:
            host.end()


def make_lora(path: Path) -> None:
    """A LoRA for all of the demo's attention, large enough to take a moment."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    with safe_open(CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if re.search(r"to_[qkv]\.weight$", name):
                out, into = weights.get_slice(name).get_shape()
                layer = name.removesuffix(".weight")
                tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(4, into)
                tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(out, 4)
    save_file(tensors, path)


def table(rows: list[tuple[Fault, dict[str, str]]], before: str = "") -> str:
    """The rows as Markdown; those of the table `before` that were not made again stay."""
    head = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines = {tuple(line.split(" | ")[:4]): line for line in before.splitlines() if line.startswith("| ")}
    lines.pop(tuple(head[0].split(" | ")[:4]), None)
    for fault, row in rows:
        names = {"state": fault.state, "victim": fault.victim, "signal": fault.signal}
        names |= {"restarts": "yes" if fault.restarts else "no", **row}
        line = "| " + " | ".join(names[column] for column in COLUMNS) + " |"
        lines[tuple(line.split(" | ")[:4])] = line
    return "\n".join(head + list(lines.values()))


def run(faults: list[Fault], jobs: int = 1) -> list[tuple[Fault, dict[str, str]]]:
    """The rows of these faults, in their order; `jobs` hosts at a time."""
    again, once = ([f for f in faults if f.restarts is wanted] for wanted in (True, False))
    chains = [kind[n::jobs] for kind in (again, once) for n in range(jobs)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as threads:
        make_lora(Path(name) / "lora.safetensors")

        def of(chosen: list[Fault]) -> list[tuple[Fault, dict[str, str]]]:
            rows = []
            for fault, row in chain(chosen, Path(name)):
                print(f"{fault.key}: {row}", flush=True)
                rows.append((fault, row))
            return rows

        rows = list(itertools.chain(*threads.map(of, filter(None, chains))))
    return sorted(rows, key=lambda row: faults.index(row[0]))


def write(name: str, text: str) -> None:
    """Put a table into docs/MEASURED.md."""
    from tests.tables import put

    MEASURED.write_text(put(MEASURED.read_text(), name, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=".*", help="regular expression of state/victim/signal/restarts")
    parser.add_argument("--jobs", type=int, default=1, help="hosts at a time")
    parser.add_argument("--write", action="store_true", help="also into docs/MEASURED.md")
    options = parser.parse_args()
    faults = [f for f in all_faults() if re.fullmatch(options.only, f.key)]
    rows = run(faults, options.jobs)
    text = table(rows)
    print(text)
    if options.write:
        write("faults", table(rows, MEASURED.read_text() if len(faults) < len(all_faults()) else ""))
    bad = [f.key for f, row in rows if any(map(BAD.search, row.values()))]
    if bad or len(rows) < len(faults):
        raise SystemExit(f"{len(rows)} of {len(faults)} rows; wrong: {', '.join(bad) or 'none'}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
