"""Cut links: two network namespaces as machines, a host over both of them, and the link between them cut.

    python -m benchmarks.netns                      every row
    python -m benchmarks.netns --only "idle/.*"     some of them, by state/restarts
    python -m benchmarks.netns --write              also into docs/MEASURED.md

Needs root and iproute2. torchrun finds its peer by c10d; the first machine keeps the store. A torchrun that
has ended is started again, as a supervisor would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import BAD, CHECKPOINT, REQUEST, ROOT, START, TIMEOUT, alive, children, until, write

LONG = 60  # steps of a job that the cut finds running
MARGIN = 4  # seconds beyond --collective_timeout, for the launcher's checks and a busy machine
PORT = 6000
COLUMNS = ("state", "restarts", "running request", "machine 0", "machine 1", "launchers", "back", "jobs")
REASON = re.compile(r"^[\d:]{8} ERROR (?:\[rank \d\] )?(.*?)(?:, ending)?$", re.MULTILINE)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Machine:
    """A namespace with one end of the cable, and the launcher in it."""

    number: int
    folder: Path
    restarts: bool
    script: str
    request: dict[str, Any]
    process: subprocess.Popen[bytes] = field(init=False)
    ended: list[int] = field(default_factory=list)  # exit codes of its launchers so far
    heard: int = 0  # bytes of the log that belong to the past

    @property
    def name(self) -> str:
        return f"faults{self.number}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        address = f"10.99.0.{self.number + 1}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = str(ROOT)
        environment |= {"GLOO_SOCKET_IFNAME": self.name, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=faults"]
        command += ["--rdzv-endpoint=10.99.0.1:29400", f"--local-addr={address}"]
        # By default torchrun itself waits a minute for a store that does not answer.
        command += [f"--rdzv-conf=is_host={int(self.number == 0)},read_timeout=10"]
        command += [f"--max-restarts={3 * self.restarts}"]
        command += [self.script, "--type=sd1", f"--checkpoint={CHECKPOINT}", f"--port={PORT}"]
        command += ["--width=128", "--height=128", f"--collective_timeout={TIMEOUT}"]
        command += [f"--state_dir={self.folder / 'state'}"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def supervise(self) -> None:
        """Note a launcher that has ended, and start it again."""
        if (code := self.process.poll()) is not None:
            self.ended.append(code)
            self.start()

    def ranks(self) -> list[int]:
        return [pid for pid in children(self.process.pid) if alive(pid)]

    def said(self) -> str:
        """Why its rank ended, from its log."""
        text = self.log.read_bytes()[self.heard :].decode(errors="replace")
        found = REASON.search(text)
        return found[1][:120] if found else "SAYS NOTHING"

    def call(
        self, route: str, body: dict[str, Any] | None = None, seconds: float = 3, *headers: str
    ) -> tuple[str, str]:
        """(status, body) of a request from inside the machine; ("000", "") without an answer."""
        command = ["ip", "netns", "exec", self.name, "curl", "-s", "-m", str(seconds), "-w", "\n%{http_code}"]
        for header in headers:
            command += ["-H", header]
        if body is not None:
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        url = f"http://127.0.0.1:{PORT}{route}"
        told = subprocess.run([*command, url], capture_output=True, text=True).stdout
        text, _, status = told.rpartition("\n")
        return status, text

    def state(self) -> str:
        with contextlib.suppress(ValueError, KeyError):
            return str(json.loads(self.call("/health")[1])["state"])
        return ""

    def accept(self, id: str, steps: int) -> str:
        """Have a job accepted, which nobody waits for; the status."""
        headers = (f"X-Request-Id: {id}", "Prefer: respond-async")
        return self.call("/generate", {**self.request, "steps": steps}, 10, *headers)[0]

    def made(self, id: str, seconds: float) -> str:
        """What a job has made, as base64, once it is done; else nothing."""
        found: dict[str, Any] = {}

        def over() -> bool:
            with contextlib.suppress(ValueError):
                found.update(json.loads(self.call(f"/jobs/{id}?wait=2", None, 5)[1]))
            return found.get("state") in ("done", "failed", "cancelled")

        until(over, seconds)
        return str((found.get("answer") or {}).get("output", ""))

    def end(self) -> None:
        for pid in [*children(self.process.pid), self.process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Pair:
    """Two machines and the cable between them, and a host over both that serves `request`."""

    def __init__(
        self,
        folder: Path,
        restarts: bool,
        script: str = "asyncdiff_host.py",
        request: dict[str, Any] = REQUEST,
    ) -> None:
        self.machines = [Machine(number, folder, restarts, script, request) for number in (0, 1)]
        for machine in self.machines:
            ip("netns", "add", machine.name)
            ip("-n", machine.name, "link", "set", "lo", "up")
        ends = [("name", m.name, "netns", m.name) for m in self.machines]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for machine in self.machines:
            address = f"10.99.0.{machine.number + 1}/24"
            ip("-n", machine.name, "addr", "add", address, "dev", machine.name)
        self.link("up")
        for machine in self.machines:
            machine.start()

    def link(self, state: str) -> None:
        for machine in self.machines:
            ip("-n", machine.name, "link", "set", machine.name, state)

    def serving(self, states: tuple[str, ...] = ("ready",), seconds: float = 2 * START) -> Machine | None:
        """The machine that serves, once its host is in one of these states."""
        found: list[Machine] = []

        def look() -> bool:
            found[:] = [m for m in self.machines if m.state() in states]
            return bool(found) or all(m.process.poll() is not None for m in self.machines)

        until(look, seconds)
        return found[0] if found else None

    def end(self) -> None:
        for machine in self.machines:
            with contextlib.suppress(AttributeError):  # it was not started
                machine.end()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)


def cut(pair: Pair, state: str, restarts: bool) -> dict[str, str]:
    """One row: the cable is pulled in `state`, and put back once all ranks have ended."""
    server = pair.serving(("loading",) if state == "loading" else ("ready",))
    if server is None:
        raise SystemExit("the host does not start:\n" + pair.machines[0].log.read_text()[-3000:])
    if state == "loading":
        until(lambda: "computing on the CPU" in server.log.read_text(), START)  # the ranks have met
    jobs = before(server, state) if restarts and state != "loading" else {}
    got: list[str] = []
    began = time.monotonic()

    def ask(steps: int) -> None:
        status = server.call("/generate", {**server.request, "steps": steps}, 3 * TIMEOUT)[0]
        got.append(f"{'closed' if status == '000' else status}, {time.monotonic() - began:.1f} s")

    asked = threading.Thread(target=ask, args=(400 if state == "busy" else 4,))
    if jobs and state == "busy":  # the running request is a job
        pair.serving(("busy",), 20)
        time.sleep(1)
    elif state == "busy":
        asked.start()
        pair.serving(("busy",), 20)
        time.sleep(2)
    old = {m.number: m.ranks() for m in pair.machines}
    for machine in pair.machines:
        machine.heard = machine.log.stat().st_size
    began = time.monotonic()
    pair.link("down")
    if state == "idle" and jobs:
        server.accept("after-the-cut", 10)
    elif state == "idle":
        asked.start()
    row = {"state": state, "restarts": "yes" if restarts else "no"}
    gone: dict[int, float] = {}

    def all_gone() -> bool:
        for number, pids in old.items():
            if number not in gone and not any(map(alive, pids)):
                gone[number] = time.monotonic() - began
        return len(gone) == 2

    until(all_gone, TIMEOUT + 30)
    for machine in pair.machines:
        late = gone.get(machine.number, 1e9) > TIMEOUT + MARGIN
        seconds = "HANGS" if machine.number not in gone else f"{gone[machine.number]:.1f} s"
        row[f"machine {machine.number}"] = f"{seconds}{' LATE' * late}: {machine.said()}"
    if asked.ident is not None:
        asked.join(4 * TIMEOUT)
    row["running request"] = got[0] if got else "HANGS" if asked.ident is not None else ""
    row |= after(pair, restarts)
    row["jobs"] = kept(pair, jobs) if jobs else ""
    return row


def before(server: Machine, state: str) -> dict[str, str]:
    """Jobs that are accepted before the cable is pulled, and after it where the host is idle: their pictures.

    Where it is busy one runs and one waits; where it is idle the first one is done.
    """
    pictures = {}
    for id, steps in ("alone-short", 10), ("alone-long", LONG):
        server.accept(id, steps)
        pictures[steps] = server.made(id, START)
    if state == "idle":
        return {"alone-short": pictures[10], "alone-long": pictures[LONG], "after-the-cut": pictures[10]}
    server.accept("job-running", LONG)
    server.accept("job-waiting", 10)
    return {"alone-short": pictures[10], "job-running": pictures[LONG], "job-waiting": pictures[10]}


def kept(pair: Pair, jobs: dict[str, str]) -> str:
    """How many of the jobs are done in the end, with the picture that they make alone."""
    server = pair.serving()
    made = {id: server.made(id, START) if server is not None else "" for id in jobs}
    if lost := [id for id, picture in made.items() if not picture]:
        return f"LOST: {', '.join(lost)}"
    if other := [id for id, picture in made.items() if picture != jobs[id]]:
        return f"ANOTHER PICTURE: {', '.join(other)}"
    return f"{len(jobs)} of {len(jobs)}, same pictures"


def after(pair: Pair, restarts: bool) -> dict[str, str]:
    """What the launchers do: without restarts they end; with restarts the link and the host return."""
    began = time.monotonic()
    if not restarts:
        ended: dict[int, str] = {}

        def all_ended() -> bool:
            for machine in pair.machines:
                if machine.number not in ended and (code := machine.process.poll()) is not None:
                    ended[machine.number] = f"exit {code} after {time.monotonic() - began:.0f} s more"
            return len(ended) == 2

        until(all_ended, 60)
        return {"launchers": ", ".join(ended.get(n, "waits on") for n in (0, 1)), "back": ""}
    pair.link("up")

    def back() -> bool:
        for machine in pair.machines:
            machine.supervise()
        if not (server := pair.serving(("ready",), 0.1)):
            return False
        return server.call("/generate", server.request, 30)[0] == "200"

    came = until(back, 4 * START)
    codes = [m.ended for m in pair.machines]
    told = ", ".join(f"exit {c[0]}, started again" if c else "restarts" for c in codes)
    return {
        "launchers": told,
        "back": f"{time.monotonic() - began:.0f} s after the link" if came else "NOT BACK",
    }


def run(folder: Path, only: str = ".*") -> list[dict[str, str]]:
    """The rows; `only` is a regular expression of state/restarts."""
    rows = []
    for restarts in (False, True):
        for state in ("idle", "busy", "loading"):
            if not re.fullmatch(only, f"{state}/{'restarts' if restarts else 'none'}"):
                continue
            place = folder / f"{state}{restarts}"
            place.mkdir()
            pair = None
            try:
                pair = Pair(place, restarts)
                rows.append(cut(pair, state, restarts))
                print(rows[-1], flush=True)
            finally:
                if pair is not None:
                    pair.end()
    return rows


def table(rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row[c] for c in COLUMNS) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=".*", help="regular expression of state/restarts")
    parser.add_argument("--write", action="store_true", help="also into docs/MEASURED.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = run(Path(name), options.only)
    text = table(rows)
    print(text)
    if options.write:
        write("links", text)
    if bad := [row["state"] for row in rows if any(map(BAD.search, row.values()))]:
        raise SystemExit(f"wrong: {', '.join(bad)}")


if __name__ == "__main__":
    main()
