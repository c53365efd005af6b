"""A soak: minutes of good, faulty, cancelled and cut off requests over all ways in, and what each rank holds.

    python -m benchmarks.soak --minutes 30 --write

The host is asyncdiff_host.py with --state_dir on the demo checkpoint, two CPU ranks. Memory (resident),
threads and open files of every rank are taken all the time; the first figures once every kind of request was
made. A rank grows if its memory in the end is above that in the middle by --allowed, or its threads or files
are more.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.faults import make_lora, until, write
from benchmarks.fuzz import PIXEL
from benchmarks.kills import Supervised
from benchmarks.patient import WAYS, Asked, ask

CLIENTS = 6
WARM = 0.15  # of the time, after which the first figures are taken
SPAN = 0.1  # of the time: of the figures that a median is taken of
START = 400.0  # seconds
SIZES = [(64, 64), (128, 128), (192, 128), (128, 256), (256, 256)]
ALLOWED = 3.0  # percent


@dataclass(frozen=True)
class Held:
    """What a rank holds at one time."""

    at: float  # seconds since the beginning
    memory: float  # MiB
    threads: int
    files: int


class Soak:
    """Requests of every kind, from some threads, until `over`."""

    def __init__(self, url: str, lora: Path) -> None:
        self.url, self.lora, self.over = url, lora, False
        self.made: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []
        self.kinds: dict[str, Callable[[random.Random], str]] = {
            **{way: partial(self._good, way) for way in WAYS},
            "from a picture": self._from_a_picture,
            "faulty field": lambda draw: self._told("/generate", {"steps": 0, "x": 1}, 400),
            "faulty JSON": lambda draw: self._told("/generate", b"{", 400),
            "faulty picture": lambda draw: self._told(
                "/sdapi/v1/img2img", {"init_images": ["AAAA"]}, 400, 422
            ),
            "cancelled": self._cancelled,
            "deleted": self._deleted,
            "cut off while it waits": self._cut_off,
            "half a body": self._half,
            "events": self._events,
            "LoRA": self._lora,
        }

    def begin(self) -> None:
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self.over = True
        for thread in self._threads:
            thread.join(START)

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        kinds = list(self.kinds)
        for kind in kinds[number::CLIENTS]:  # each once at first, so that what they need is loaded
            self._one(kind, draw)
        while not self.over:
            self._one(draw.choice(kinds), draw)

    def _one(self, kind: str, draw: random.Random) -> None:
        try:
            wrong = self.kinds[kind](draw)
        except (requests.RequestException, OSError, KeyError, ValueError) as error:
            wrong = f"{type(error).__name__}: {error}"
        self.made[kind] += 1
        if wrong:
            self.wrong[f"{kind}: {wrong[:300]}"] += 1

    @staticmethod
    def _body(draw: random.Random, steps: int = 4) -> dict[str, Any]:
        width, height = draw.choice(SIZES)
        body = {"positive": f"a circle {draw.randrange(30)}", "steps": draw.randint(2, steps)}
        return body | {"width": width, "height": height}

    def _post(self, path: str, body: Any, **headers: str) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"Content-Type": "application/json", **headers}
        return requests.post(self.url + path, data=data, headers=told, timeout=300)

    def _good(self, way: str, draw: random.Random) -> str:
        job = Asked(way, self._body(draw))
        ask(self.url, job, {}, 300)
        return job.lost

    def _from_a_picture(self, draw: random.Random) -> str:
        answer = self._post("/generate", self._body(draw) | {"image": PIXEL, "strength": 0.6})
        return "" if answer.status_code == 200 else answer.text

    def _told(self, path: str, body: Any, *statuses: int) -> str:
        answer = self._post(path, body)
        return "" if answer.status_code in statuses else f"{answer.status_code}, {answer.text}"

    def _cancelled(self, draw: random.Random) -> str:
        id = f"soak-{uuid.uuid4().hex}"
        timer = threading.Timer(draw.uniform(0, 2), lambda: self._post(f"/cancel?id={id}", b""))
        timer.start()
        answer = self._post("/generate", self._body(draw, 30), **{"X-Request-Id": id})
        timer.join()
        return "" if answer.status_code in (200, 499) else answer.text

    def _deleted(self, draw: random.Random) -> str:
        headers = {"Prefer": "respond-async", "X-Request-Id": f"soak-{uuid.uuid4().hex}"}
        answer = self._post("/generate", self._body(draw, 30), **headers)
        if answer.status_code != 202:
            return answer.text
        time.sleep(draw.uniform(0, 2))
        path = f"{self.url}/jobs/{answer.json()['id']}"
        deleted = requests.delete(path, timeout=60).status_code
        return "" if deleted == 200 else f"DELETE was answered {deleted}"

    def _raw(self, data: bytes, seconds: float) -> None:
        port = int(self.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(data)
            time.sleep(seconds)

    def _request(self, body: bytes, length: int) -> bytes:
        head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        return f"{head}Content-Type: application/json\r\n\r\n".encode() + body

    def _cut_off(self, draw: random.Random) -> str:
        body = json.dumps(self._body(draw, 30)).encode()
        self._raw(self._request(body, len(body)), draw.uniform(0, 2))
        return ""

    def _half(self, draw: random.Random) -> str:
        body = json.dumps({"image": base64.b64encode(draw.randbytes(100_000)).decode()}).encode()
        self._raw(self._request(body[: len(body) // 2], len(body)), draw.uniform(0, 1))
        return ""

    def _events(self, draw: random.Random) -> str:
        with requests.get(f"{self.url}/events", stream=True, timeout=60) as answer:
            next(answer.iter_content(16))
            time.sleep(draw.uniform(0, 2))
            return "" if answer.status_code == 200 else f"{answer.status_code}"

    def _lora(self, draw: random.Random) -> str:
        """Two clients may do this at the same time, and then one of them is refused."""
        added = self._post("/lora", {"path": str(self.lora), "scale": 0.5})
        body = json.dumps({"path": str(self.lora)})
        headers = {"Content-Type": "application/json"}
        removed = requests.delete(f"{self.url}/lora", data=body, headers=headers, timeout=300)
        both = added.status_code, removed.status_code
        return "" if set(both) <= {200, 409, 422, 503} else f"{added.text} {removed.text}"


def holds(pid: int, began: float) -> Held:
    process = psutil.Process(pid)
    with process.oneshot():
        memory = process.memory_info().rss / 2**20
        return Held(time.monotonic() - began, memory, process.num_threads(), process.num_fds())


def medians(samples: list[Held], begin: float, end: float) -> Held:
    """Of the samples in a span, by seconds; of threads and files the fewest, for requests take some."""
    of = [sample for sample in samples if begin <= sample.at <= end]
    memory = statistics.median(sample.memory for sample in of)
    return Held(begin, memory, min(s.threads for s in of), min(s.files for s in of))


def table(samples: dict[int, list[Held]], seconds: float, allowed: float) -> tuple[str, list[str]]:
    """The ranks as Markdown, and what grew."""
    lines = ["| rank | what | after the first requests | middle | end |", "|---|---|---:|---:|---:|"]
    grew = []
    span = SPAN * seconds
    for rank, of in samples.items():
        ends = (WARM * seconds, (0.5 - SPAN / 2) * seconds, seconds - span)
        first, middle, last = (medians(of, at, at + span) for at in ends)
        for name in ("memory", "threads", "files"):
            values = [getattr(held, name) for held in (first, middle, last)]
            unit = " MiB" if name == "memory" else ""
            lines.append(f"| {rank} | {name} | {' | '.join(f'{value:.0f}{unit}' for value in values)} |")
            room = middle.memory * allowed / 100 if name == "memory" else 0
            if values[2] > values[1] + room:
                grew.append(f"rank {rank}: {name} from {values[1]:.0f} to {values[2]:.0f}")
    return "\n".join(lines), grew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--allowed", type=float, default=ALLOWED, help="percent that memory may grow by")
    parser.add_argument("--write", action="store_true", help="also into docs/MEASURED.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # and the host with it
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_lora(folder / "lora.safetensors")
        host = Supervised(folder, f"--keep_jobs={max(60, WARM * seconds):.0f}")
        try:
            if not until(lambda: host.state() == "ready", START):
                raise SystemExit(f"the host does not start:\n{host.log.read_text()[-3000:]}")
            soak, ranks = Soak(host.url, host.lora), host.ranks()
            soak.begin()
            began, samples = time.monotonic(), {rank: list[Held]() for rank in range(len(ranks))}
            while (at := time.monotonic() - began) < seconds:
                for rank, pid in enumerate(ranks):
                    samples[rank].append(holds(pid, began))
                if int(at) % 60 < 2:
                    print(f"{at:.0f} s", [of[-1] for of in samples.values()], dict(soak.wrong), flush=True)
                time.sleep(2)
            soak.end()
            if host.ranks() != ranks:
                soak.wrong["a rank was replaced"] += 1
        finally:
            host.end()
    text, grew = table(samples, seconds, options.allowed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in soak.made.items())
    text += f"\n\n{soak.made.total()} requests in {options.minutes:g} minutes: {kinds}. "
    text += f"Not answered as they should be: {soak.wrong.total()}. Growth: {'; '.join(grew) or 'none'}."
    print(text)
    if options.write:
        write("soak", text)
    if grew or soak.wrong:
        raise SystemExit("\n".join([*grew, *(f"{n} x {what}" for what, n in soak.wrong.items())]))


if __name__ == "__main__":
    main()
