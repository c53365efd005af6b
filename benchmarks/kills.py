"""Kills with clients at work: what 8 clients were promised, while ranks and launchers are killed and stopped.

    python -m benchmarks.kills --write              54 kills, each into docs/MEASURED.md when it is done
    python -m benchmarks.kills --write --missing    those that have no row there, or no compared pictures
    python -m benchmarks.kills --only "steady/.*"   some of them, by state/victim/signal

The host is asyncdiff_host.py with --state_dir on the demo checkpoint, two CPU ranks under torchrun with
--max-restarts; a torchrun that has ended is started again after a second, as systemd does. The clients have
an X-Request-Id of their own and ask again with it, or leave and ask /jobs, in every API. A job is lost that
was seen in /jobs and is not there after the restart, has another seed or fails. After each kill its pictures
are made again, each alone, and compared byte for byte. A host is late that is not back --collective_timeout
(at TERM --stop_grace, if that is longer) and RESTART after the kill, and the time that this start took to
load, for on a busy machine no two take the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.faults import CHECKPOINT, MEASURED, ROOT, Host, alive, make_lora, until, write
from benchmarks.patient import WAYS, Asked, ask

RESTART = 1.0  # seconds from a launcher's end to its next start
PATIENCE = 400.0  # seconds in which a host must be back and interrupted jobs be done, on a busy machine
LOOK = 2.0  # seconds between two looks at a host, at most, on a busy machine
STEPS, WARM_UP = 10, 3
STOP_GRACE = 20.0  # --stop_grace, seconds
SIZES = ((128, 128), (64, 128))  # what is new is traced anew after each restart
BAIT = 384  # pixels: large enough to be seen while it is decoded
STATES = ("loading", "idle", "warm-up", "steady", "decoding", "LoRA")
VICTIMS = ("rank 0", "rank 1", "launcher")
SIGNALS = ("KILL", "TERM", "STOP")
Kill = tuple[str, str, str]  # state, victim, signal
CLIENTS = (*WAYS, "async", "async", "generate")  # 8 of them
NONE = "not compared"
COLUMNS = (
    *("state", "victim", "signal", "jobs at work", "gone", "back"),
    *("done", "lost", "other bytes", "orphans"),
)


class Supervised(Host):
    """A host on a state folder; its launcher is started again whenever it has ended."""

    def __init__(self, folder: Path, *flags: str, timeout: float = 20.0) -> None:
        self.timeout = timeout  # --collective_timeout, seconds; a step of the largest picture must take less
        self.mark = f"KILLS_MARK={uuid.uuid4()}"
        self.wanted = True
        super().__init__(folder, True, *flags)
        threading.Thread(target=self._supervise, daemon=True).start()

    def start(self) -> None:
        """Start the launcher."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=200"]
        command += [f"--master_port={self.master}", "asyncdiff_host.py"]
        command += ["--type=sd1", f"--checkpoint={CHECKPOINT}", f"--port={self.port}", "--width=128"]
        command += ["--height=128", f"--warm_up_steps={WARM_UP}", f"--collective_timeout={self.timeout:g}"]
        command += [f"--lora_dir={self.folder}", f"--state_dir={self.folder / 'state'}"]
        command += [f"--stop_grace={STOP_GRACE:g}"]
        command += self.flags
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", name: value}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _supervise(self) -> None:
        while self.wanted:
            self.process.wait()
            time.sleep(RESTART)
            if self.wanted:
                self.start()

    def age(self, old: list[int]) -> float:
        """Seconds since this generation's start: the launcher's, where that is new, else the last rank's."""
        launcher = psutil.Process(self.process.pid).create_time()
        ranks = [psutil.Process(pid).create_time() for pid in self.ranks()]
        return time.time() - (launcher if self.process.pid not in old else max(ranks, default=launcher))

    def marked(self) -> set[int]:
        """All processes that came from this host's launchers."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in entry.read_bytes() and alive(int(entry.parent.name)):
                    found.add(int(entry.parent.name))
            except OSError:
                continue
        return found

    def strays(self) -> set[int]:
        """Processes that belong to no launcher that runs."""
        try:
            launcher = psutil.Process(self.process.pid)
            own = {launcher.pid, *(child.pid for child in launcher.children(recursive=True))}
        except psutil.NoSuchProcess:
            own = set()
        return self.marked() - own

    def end(self) -> None:
        self.wanted = False
        for pid in self.marked():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Crowd:
    """The clients. Each has one job at a time, and the next one at once unless they are `held`."""

    url: str
    jobs: list[Asked] = field(default_factory=list)
    seen: dict[str, int | None] = field(
        default_factory=dict
    )  # accepted ids, as /jobs tells them: their seeds
    going: threading.Event = field(default_factory=threading.Event)
    over: bool = False
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self) -> None:
        """Start the clients, and the one that watches /jobs."""
        runs = [lambda way=way, n=n: self._client(way, n) for n, way in enumerate(CLIENTS)]
        for run in (self._watch, *runs):
            self.threads.append(threading.Thread(target=run, daemon=True))
            self.threads[-1].start()
        self.going.set()

    def at_work(self) -> list[Asked]:
        return [job for job in list(self.jobs) if not job.over]

    def idle(self) -> bool:
        """Hold the clients; whether all of their jobs were done in time."""
        self.going.clear()
        return until(lambda: not self.at_work(), PATIENCE)

    def end(self) -> None:
        self.idle()
        self.over = True
        self.going.set()

    def make(self, way: str, body: dict[str, Any]) -> Asked:
        job = Asked(way, body)
        self.jobs.append(job)
        return job

    def _client(self, way: str, number: int) -> None:
        draw = random.Random(number)
        while self.going.wait() and not self.over:
            sizes = draw.choice(SIZES)
            body: dict[str, Any] = {"positive": "a red circle on a blue background", "steps": STEPS}
            body |= dict(zip(("width", "height"), sizes, strict=True))
            if draw.random() < 0.6:
                body["seed"] = draw.randrange(4)
            ask(self.url, self.make(way, body), self.seen, PATIENCE)

    def _watch(self) -> None:
        while not self.over:
            try:
                listed = requests.get(f"{self.url}/jobs", timeout=5).json()["jobs"]
                for job in listed:
                    self.seen.setdefault(job["id"], job["seed"])
            except (requests.RequestException, ValueError, KeyError):
                pass
            time.sleep(0.2)


def running(host: Host) -> tuple[str, float]:
    """The id and the progress of the job that runs; "" and -1 where none does."""
    try:
        [job] = requests.get(f"{host.url}/jobs?state=running", timeout=5).json()["jobs"]
        return str(job["id"]), float(job["progress"])
    except (requests.RequestException, ValueError, KeyError):
        return "", -1.0


def reach(host: Supervised, crowd: Crowd, state: str) -> bool:
    """Bring the host into a state; whether it is in it."""
    inside: Callable[[], bool]
    match state:
        case "loading":
            old = host.ranks()
            os.kill(old[1], signal.SIGKILL)
            inside = lambda: host.started(old) and host.state() == "loading"  # noqa: E731
        case "idle":
            crowd.idle()
            inside = lambda: host.state() == "ready"  # noqa: E731
        case "warm-up":
            inside = lambda: 0 < running(host)[1] < 99 * WARM_UP / STEPS  # noqa: E731
        case "steady":
            inside = lambda: 99 * (WARM_UP + 1) / STEPS < running(host)[1] < 90  # noqa: E731
        case "decoding":
            body = {"positive": "a red circle", "steps": 2, "width": BAIT, "height": BAIT, "seed": 1}
            bait = crowd.make("async", body)
            threading.Thread(target=ask, args=(host.url, bait, crowd.seen, PATIENCE), daemon=True).start()
            inside = lambda: (now := running(host))[0] == bait.id and now[1] >= 99  # noqa: E731
        case _:
            crowd.idle()
            host.ask_later("/lora", path=str(host.lora), scale=0.0)
            inside = lambda: host.state() == "busy"  # noqa: E731
    reached = until(inside, PATIENCE)
    if state == "loading":
        time.sleep(random.uniform(0.0, 4.0))
    crowd.going.set()
    if state == "LoRA":
        time.sleep(0.05)  # the clients' requests come in meanwhile
    return reached


def suffer(host: Supervised, crowd: Crowd, state: str, victim: str, number: str) -> dict[str, Any]:
    """One kill, and what followed until all that it interrupted was done."""
    before = len(crowd.jobs)
    reached = reach(host, crowd, state)
    launcher, old, hit = host.process.pid, host.ranks(), crowd.at_work()
    target = host.process.pid if victim == "launcher" else old[int(victim[-1])]
    began = time.monotonic()
    os.kill(target, getattr(signal, f"SIG{number}"))
    gone = until(lambda: not any(map(alive, old)), PATIENCE)
    ended = time.monotonic() - began
    if victim == "launcher" and number == "STOP":
        os.kill(target, signal.SIGCONT)  # by whoever stopped it
    back = until(lambda: host.started(old) and host.state() in ("ready", "busy"), PATIENCE)
    served, load = time.monotonic() - began, host.age([launcher]) if back else math.inf
    allowed = max(host.timeout, STOP_GRACE) if number == "TERM" else host.timeout
    late = served > load + allowed + RESTART + LOOK
    until(lambda: all(job.over for job in hit), PATIENCE)
    until(lambda: not host.strays(), 10)
    for job in hit:
        job.hit = True
    jobs = {job.id: job for job in (*crowd.jobs[before:], *hit)}
    return {
        "state": state if reached else f"{state} (not reached)",
        "victim": victim,
        "signal": number,
        "jobs at work": len(hit),
        "gone": f"{ended:.1f} s" if gone else "NOT GONE",
        "back": f"{served:.1f} s, {load:.1f} of them loading{', LATE' * late}" if back else "NOT BACK",
        "jobs": list(jobs.values()),
        "orphans": len(host.strays()),
    }


def compare(host: Supervised, jobs: list[Asked], known: dict[str, bytes]) -> None:
    """Make pictures again, each alone, and note where the bytes differ. Pictures of drawn seeds that no kill
    interrupted are left out: there are many, and no two alike.

    Args:
        known: pictures that were made alone; gets more.
    """
    for job in jobs:
        if job.picture is None or not (job.hit or "seed" in job.body):
            continue
        again = Asked(job.way, {**job.body, "seed": job.seed})
        if again.key not in known:
            ask(host.url, again, {}, PATIENCE)
            known[again.key] = again.picture or b""
        job.other = known[again.key] != job.picture


def line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(str(row[column]) for column in COLUMNS) + " |"


def table(rows: list[dict[str, Any]], before: str = "") -> str:
    """The rows as Markdown; those of the table `before` that were not made again stay. Then their sums."""
    lines = [text for text in before.splitlines() if re.match(r"\| (?!state|all)", text)]
    kept = {tuple(text.split(" | ")[:3]): text for text in lines}
    for row in rows:
        done = row["jobs"]
        row |= {"done": sum(job.picture is not None for job in done)}
        compared = [job.other for job in done if job.other is not None]
        row |= {
            "lost": sum(bool(job.lost) for job in done),
            "other bytes": sum(compared) if compared else NONE,
        }
        kept[tuple(line(row).split(" | ")[:3])] = line(row)
    cells = [text.strip("| ").split(" | ") for text in kept.values()]
    columns = {name: [of[COLUMNS.index(name)] for of in cells] for name in (COLUMNS[3], *COLUMNS[6:])}
    sums = {
        name: sum(int(cell) for cell in found if cell != NONE) if {*found} != {NONE} else NONE
        for name, found in columns.items()
    }
    worst = {
        name: f"at most {max((float(of[COLUMNS.index(name)].split()[0]) for of in cells), default=0)} s"
        for name in ("gone", "back")
    }
    last = line({"state": "all", "victim": f"{len(cells)} kills", "signal": "", **sums, **worst})
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *kept.values(), last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=".*", help="regular expression of state/victim/signal")
    parser.add_argument(
        "--missing", action="store_true", help="those that docs/MEASURED.md does not have whole"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no kill is begun")
    parser.add_argument(
        "--collective_timeout", type=float, default=20.0, help="seconds; more on a busy machine"
    )
    parser.add_argument("--write", action="store_true", help="also into docs/MEASURED.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # and the host with it
    every = itertools.product(STATES, VICTIMS, SIGNALS)
    chosen = [kill for kill in every if re.fullmatch(options.only, "/".join(kill))]
    random.Random(0).shuffle(chosen)  # so that some minutes of them are of every kind
    if options.missing:
        chosen = missing(chosen, between(MEASURED.read_text(), "kills"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for row in run(chosen, Path(name), options.collective_timeout, 60 * options.minutes):
            rows.append(row)
            if options.write:
                write("kills", table([row], between(MEASURED.read_text(), "kills")))
    print(table(rows))
    if faults := list(itertools.chain.from_iterable(map(wrong, rows))):
        raise SystemExit("\n".join([f"{len(rows)} of {len(chosen)} kills", *faults]))


def missing(kills: list[Kill], text: str) -> list[Kill]:
    """Those that a table has no row of, then those of a row without compared pictures or with lost jobs."""
    rows = {kill: line for line in text.splitlines() for kill in kills if line.startswith(_beginning(kill))}
    again = [kill for kill, line in rows.items() if NONE in line or line.split(" | ")[7] != "0"]
    return [kill for kill in kills if kill not in rows] + [kill for kill in kills if kill in again]


def _beginning(kill: Kill) -> str:
    return f"| {' | '.join(kill)} |"


def wrong(row: dict[str, Any]) -> list[str]:
    """What a kill has shown that must not be."""
    found = [f"{job.id}: {job.lost or 'other bytes'}" for job in row["jobs"] if job.wrong]
    found += [f"{job.id}: no picture" for job in row["jobs"] if not job.over]
    if row["orphans"]:
        found.append(f"{row['orphans']} processes are left")
    if not (row["gone"].endswith(" s") and row["back"].endswith("loading")):
        found.append(f"gone {row['gone']}, back {row['back']}")
    return [f"{row['state']}/{row['victim']}/{row['signal']}: {text}" for text in found]


def between(text: str, name: str) -> str:
    """The part of a document between its markers."""
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]


def run(
    chosen: list[Kill], folder: Path, timeout: float = 20.0, seconds: float = math.inf
) -> Iterator[dict[str, Any]]:
    """The rows of these kills, all of one host; none is begun after `seconds`."""
    make_lora(folder / "lora.safetensors")
    known: dict[str, bytes] = {}
    began = time.monotonic()
    host = Supervised(folder, timeout=timeout)
    crowd = Crowd(host.url)
    try:
        if not until(lambda: host.state() == "ready", PATIENCE):
            raise SystemExit(f"the host does not start:\n{host.log.read_text()[-3000:]}")
        print(
            f"the first start took {time.monotonic() - began:.1f} s, load {os.getloadavg()[0]:.0f}",
            flush=True,
        )
        crowd.begin()
        for kill in chosen:
            if time.monotonic() - began > seconds:
                break
            row = suffer(host, crowd, *kill)
            crowd.idle()
            compare(host, row["jobs"], known)
            crowd.going.set()
            print({k: v for k, v in row.items() if k != "jobs"}, wrong(row), flush=True)
            yield row
            if "NOT BACK" in row["back"]:
                raise SystemExit(host.log.read_text()[-5000:])
        crowd.end()
    finally:
        host.end()


if __name__ == "__main__":
    main()
