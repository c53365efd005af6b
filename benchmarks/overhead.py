"""What a host adds to a request: HTTP, queue, control messages between the ranks, and the way back.

python benchmarks/overhead.py [--requests 200] [--ranks 2]

The host is the real one, under torchrun, with an engine that does one all-reduce a step, one step a request,
and answers with a plain 64 x 64 PNG. Prints a Markdown table; exit code 1 when the median of the last row is
above --at-most.
"""

from __future__ import annotations

import argparse
import contextlib
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
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120
BODY = {"positive": json.dumps({}), "steps": 1, "width": 64, "height": 64, "seed": 1}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def host(ranks: int, store: bool = False) -> Iterator[str]:
    """A ready host with the engine of tests/fake_host.py, and its URL; it is ended on leaving.

    Args:
        store: whether it keeps its jobs on the disk, in a folder of the system's for temporary files.

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
                    *("tests/fake_host.py", "--type=sd1", f"--checkpoint={folder}", f"--port={port}"),
                    *([f"--state_dir={folder}/state"] if store else []),
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


def timed(ask: Callable[[], requests.Response], count: int) -> list[float]:
    """Milliseconds of each of `count` answers after some to warm up. Raises HTTPError unless all are 200."""
    taken = []
    for _ in range(count // 10 + 1 + count):
        began = time.perf_counter()
        answer = ask()
        answer.content  # noqa: B018  read it whole
        taken.append(1000 * (time.perf_counter() - began))
        answer.raise_for_status()
    return taken[-count:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--at-most", type=float, default=10.0, help="milliseconds the median may take")
    options = parser.parse_args()

    png = {"Accept": "image/png"}
    rows: dict[str, list[float]] = {}

    def measure(url: str, ranks: int, store: bool = False) -> None:
        session = requests.Session()

        def generate(**more: Any) -> Callable[[], requests.Response]:
            return lambda: session.post(f"{url}/generate", json=BODY, timeout=60, **more)

        picture = session.post(f"{url}/generate", json=BODY, headers=png, timeout=60)
        assert picture.content[1:4] == b"PNG" and picture.headers["X-Size"] == "64x64", picture.headers
        count, who = options.requests, "1 rank" if ranks == 1 else f"{ranks} ranks"
        if store:
            rows[f"POST /generate, {who}, --state_dir"] = timed(generate(), count)
            return
        if ranks == 1:
            rows["GET /progress: HTTP alone"] = timed(
                lambda: session.get(f"{url}/progress", timeout=60), count
            )
        else:
            rows[f"POST /generate, {who}, a connection each"] = timed(
                lambda: requests.post(f"{url}/generate", json=BODY, timeout=60), count
            )
            rows[f"POST /generate, {who}, raw PNG"] = timed(generate(headers=png), count)
        rows[f"POST /generate, {who}"] = timed(generate(), count)

    with host(options.ranks, store=True) as url:
        measure(url, options.ranks, store=True)
    for ranks in dict.fromkeys((1, options.ranks)):
        with host(ranks) as url:
            measure(url, ranks)
    print("| request | median ms | p95 ms | fastest ms |")
    print("|---|---:|---:|---:|")
    for name, taken in rows.items():
        p95 = statistics.quantiles(taken, n=20)[-1]
        print(f"| {name} | {statistics.median(taken):.2f} | {p95:.2f} | {min(taken):.2f} |")
    median = statistics.median(list(rows.values())[-1])
    if median > options.at_most:
        print(f"above the allowed {options.at_most:g} ms", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
