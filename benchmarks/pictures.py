"""Pictures a minute of one host: one, two and four pictures a request, together and one by one.

python benchmarks/pictures.py --type sd1 --size 512 --steps 30 --folder /tmp/sd1 --ranks 1,2
python benchmarks/pictures.py --type sdxl --folder /tmp/sdxl [--backend distrifuser] [-- --flag ...]
python benchmarks/pictures.py --demo --device cpu --ranks 1,2 --steps 30

--tiny --device cpu takes the tests' checkpoint of the type, to see that it runs; --demo the demo's.

"alone" are so many requests for one picture each, one after the other; "one request" asks for all of them.
Medians of --repeats, by the client's clock, from the question to the last byte of the answer, JSON with PNGs.
"least dB" compares each picture of one request with the one of the same seed that was made alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.host import ROOT, ask, save_checkpoint
from demo.ask import free_port, get, wait_until_ready
from tests import tiny

COUNTS = (1, 2, 4)
COLUMNS = ("host", "ranks", "pictures", "a minute, alone", "a minute, one request", "gain", "least dB", "GiB")


def answers(url: str, body: dict[str, Any]) -> tuple[float, list[np.ndarray]]:
    """Seconds of one request, and its pictures."""
    seconds, answer = ask(url, body)
    output = json.loads(answer)["output"]
    files = output if isinstance(output, list) else [output]
    return seconds, [np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))) for file in files]


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def measure(url: str, body: dict[str, Any], count: int, repeats: int) -> tuple[float, float, float]:
    """Pictures a minute alone and in one request, and how close the two are at least."""
    alone, together, close = [], [], math.inf
    for number in range(repeats + 1):  # the first of each captures, or warms caches
        singles = []
        began = time.perf_counter()
        for place in range(count):
            singles += answers(url, body | {"seed": 100 * number + place})[1]
        alone.append(time.perf_counter() - began)
        seconds, several = answers(url, body | {"seed": 100 * number, "pictures": count})
        together.append(seconds)
        close = min(close, *(decibels(a, b) for a, b in zip(singles, several, strict=True)))
    minute = [60 * count / statistics.median(times[1:]) for times in (alone, together)]
    return minute[0], minute[1], close


def host(options: argparse.Namespace, ranks: int) -> None:
    """Launch a host, print a row for each number of pictures, end it."""
    port, script = free_port(), f"{options.backend}_host.py"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--master_port", str(free_port()), str(ROOT / script), f"--port={port}"]
    command += [f"--type={options.type}", f"--checkpoint={options.folder}", f"--device={options.device}"]
    command += [f"--width={options.size}", f"--height={options.size}"]
    command += [f"--variant={'fp32' if options.device == 'cpu' else 'bf16'}", *options.flags]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        body = {"positive": "a red circle on a blue background", "steps": options.steps, "cfg": 5.0}
        for count in COUNTS:
            alone, together, close = measure(url, body, count, options.repeats)
            health = json.loads(get(f"{url}/health")[1])
            peak = max(rank.get("memory_peak_mib", 0) for rank in health["ranks"]) / 1024
            row = [f"{script} {' '.join(options.flags)}".strip(), ranks, count, f"{alone:.1f}"]
            row += [f"{together:.1f}", f"{together / alone:.2f}x", f"{close:.1f}", f"{peak:.1f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--ranks", default="1")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sd1"))
    parser.add_argument("--backend", default="asyncdiff", choices=("asyncdiff", "distrifuser", "xdit"))
    parser.add_argument("--type", default="sd1", choices=("sd1", "sdxl", "sd3", "pixa", "pixs", "hy"))
    parser.add_argument("--tiny", action="store_true", help="use the tests' small checkpoint")
    parser.add_argument("--demo", action="store_true", help="use the demo's checkpoint, of type sd1")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("flags", nargs="*", help="after --: more flags of the host")
    options = parser.parse_args()
    if options.demo:
        options.type, options.size, options.folder = "sd1", 128, ROOT / "demo" / "checkpoint"
    elif options.tiny:
        options.size, options.folder = 64, tiny.checkpoint(options.type)
    elif not (options.folder / "model_index.json").exists():
        save_checkpoint(options.type, options.folder, torch.device(options.device))
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for ranks in map(int, options.ranks.split(",")):
        host(options, ranks)


if __name__ == "__main__":
    main()
