"""What a host adds to a request: HTTP, queue, store, control messages between the ranks, and the way back.

    python benchmarks/overhead.py [--requests 200] [--ranks 2]

The host is the real one, under torchrun, with an engine that does one all-reduce a step, one step a request,
and answers with a plain 64 x 64 PNG. Hosts without a store, with jobs in memory and with --state_dir run side
by side and are asked in turns, so that other work on the machine is the same for each. Prints Markdown; exit
code 1 when the median of the last row is above --at-most, or what --state_dir adds above --store-at-most.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.api.jobs import JobError
from shared.api.replies import Reply
from shared.api.store import JobRecord, JobStore

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120
Ask = Callable[[], requests.Response]
WARM_UP = 20  # requests that do not count
WITHOUT, IN_MEMORY, ON_DISK = STORES = ("no store", "in memory", "--state_dir")
PNG = {"Accept": "image/png"}
BODY = {"positive": json.dumps({}), "steps": 1, "width": 64, "height": 64, "seed": 1}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class NoStore(JobStore):
    """Keeps nothing: what a request would cost if no job could be asked for again."""

    def add(self, record: JobRecord) -> None:
        """Accept it."""

    def finish(self, record: JobRecord, error: JobError | None, made: list[Reply]) -> None:
        """Hand the answer to who waits."""
        record.error, record.made, record.finished = error, made, time.time()


def serve_without_store() -> None:
    """Be a rank of such a host."""
    import shared.api.store
    from shared.backends import BACKENDS
    from shared.host import serve
    from tests.fake_host import build_engine

    shared.api.store.open_store = lambda config: NoStore()
    serve(replace(BACKENDS["asyncdiff"], build_engine=build_engine))


@contextlib.contextmanager
def host(ranks: int, store: str) -> Iterator[str]:
    """A ready host with the engine of tests/fake_host.py, and its URL; it is ended on leaving.

    Args:
        store: one of STORES.

    Raises:
        RuntimeError: it ended or was not ready in time; the message has its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model_index.json").write_text("{}")
        log = Path(folder, "log")
        url = f"http://127.0.0.1:{(port := free_port())}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"),
                    *("--master_port", str(free_port())),
                    __file__ if store == WITHOUT else "tests/fake_host.py",
                    *("--type=sd1", f"--checkpoint={folder}", f"--port={port}"),
                    *([f"--state_dir={folder}/state"] if store == ON_DISK else []),
                ],
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the host is not ready:\n{log.read_text()}")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/initialize", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def timed(ask: Ask, count: int) -> list[float]:
    """Milliseconds of each of `count` answers. Raises HTTPError unless all are 200."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        answer = ask()
        answer.content  # noqa: B018  read it whole
        taken.append(1000 * (time.perf_counter() - began))
        answer.raise_for_status()
    return taken


def asks(url: str, ranks: int, store: str) -> dict[str, Ask]:
    """What is asked of a host, by the name of its row."""
    session = requests.Session()

    def generate(**more: Any) -> requests.Response:
        return session.post(f"{url}/generate", json=BODY, timeout=60, **more)

    picture = generate(headers=PNG)
    assert picture.content[1:4] == b"PNG" and picture.headers["X-Size"] == "64x64", picture.headers
    who = "1 rank" if ranks == 1 else f"{ranks} ranks"
    rows: dict[str, Ask] = {}
    if store == IN_MEMORY and ranks == 1:
        rows["GET /progress: HTTP alone"] = lambda: session.get(f"{url}/progress", timeout=60)
    elif store == IN_MEMORY:
        rows[f"POST /generate, {who}, a connection each"] = lambda: requests.post(
            f"{url}/generate", json=BODY, timeout=60
        )
        rows[f"POST /generate, {who}, raw PNG"] = lambda: generate(headers=PNG)
    rows[f"POST /generate, {who}, {store}"] = generate
    return rows


def measure(ranks: int, count: int) -> dict[str, list[float]]:
    """Milliseconds of `count` requests a row, from hosts with so many ranks, in turns."""
    with contextlib.ExitStack() as hosts:
        rows: dict[str, Ask] = {}
        for store in STORES:
            rows |= asks(hosts.enter_context(host(ranks, store)), ranks, store)
        taken: dict[str, list[float]] = {name: [] for name in rows}
        for ask in rows.values():
            timed(ask, WARM_UP)
        for _ in range(count):
            for name, ask in rows.items():
                taken[name] += timed(ask, 1)
    return taken


def added(taken: dict[str, list[float]], store: str) -> tuple[float, float]:
    """Milliseconds that a store adds: the median of pairs of neighbouring requests, and of the fastest."""
    [having] = [times for name, times in taken.items() if name.endswith(store)]
    [lacking] = [times for name, times in taken.items() if name.endswith(WITHOUT)]
    pairs = [one - other for one, other in zip(having, lacking, strict=True)]
    return statistics.median(pairs), min(having) - min(lacking)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--at-most", type=float, default=10.0, help="milliseconds the median may take")
    parser.add_argument("--store-at-most", type=float, default=2.0, help="milliseconds --state_dir may add")
    options = parser.parse_args()
    print(f"The load before: {os.getloadavg()[0]:.1f}, on {os.cpu_count()} cores.\n")
    found = {ranks: measure(ranks, options.requests) for ranks in dict.fromkeys((1, options.ranks))}
    print("| request | median ms | p95 ms | fastest ms |")
    print("|---|---:|---:|---:|")
    for name, taken in itertools.chain.from_iterable(rows.items() for rows in found.values()):
        p95 = statistics.quantiles(taken, n=20)[-1]
        print(f"| {name} | {statistics.median(taken):.2f} | {p95:.2f} | {min(taken):.2f} |")
    print("\n| what a store adds, ms | median of pairs | of the fastest |\n|---|---:|---:|")
    worst = 0.0
    for ranks, store in itertools.product(found, (IN_MEMORY, ON_DISK)):
        median, fastest = added(found[ranks], store)
        worst = max(worst, median)
        print(f"| {ranks} rank{'s' * (ranks > 1)}, {store} | {median:.2f} | {fastest:.2f} |")
    print(f"\nThe load after: {os.getloadavg()[0]:.1f}.")
    median = statistics.median(list(found[options.ranks].values())[-1])
    if median > options.at_most or worst > options.store_at_most:
        print(f"above {options.at_most:g} ms, or the store above {options.store_at_most:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        serve_without_store()
    else:
        sys.exit(main())
