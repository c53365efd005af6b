"""Host memory and seconds of ranks that load a checkpoint: what each has of its own, and what they share.

python benchmarks/loading.py --ranks 1,2                                   (makes 2 GB of random SD 1 in fp16)
python benchmarks/loading.py --ranks 1,2 --stored fp32 -- --variant=bf16   (stored in another dtype)
python benchmarks/loading.py --ranks 1,2 -- --quantize_to=int8 --cache_dir=/tmp/kept
    [--type sd1 --backend asyncdiff --folder /tmp/loading_sd1_fp16]  (made where it is not there, and left)
    [--steps 0]  without a generation

Prints a row for each number of ranks: seconds to load and to draw one small picture, and the peak of all
ranks together, above what they had before, in MiB: of memory that is some rank's own (anonymous) and of pages
of files, each counted once however many ranks map it. Linux only (/proc/PID/smaps_rollup). Flags after -- are
the host's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIB = 2**20


def pss(pid: int) -> tuple[int, int]:
    """Bytes of a process: anonymous; of files and shared memory, divided by the processes that map them."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(Pss\w*):\s+(\d+) kB", text, re.M)}
    return found.get("Pss_Anon", 0), found.get("Pss", 0) - found.get("Pss_Anon", 0)


class Sampler(threading.Thread):
    """Samples some processes until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pids: list[int] = []
        self.before = self.peak = (0, 0)
        self.peak_sum = 0
        self._done = threading.Event()

    def now(self) -> tuple[int, int]:
        anonymous, files = zip(*[pss(pid) for pid in self.pids], strict=True)
        return sum(anonymous), sum(files)

    def run(self) -> None:
        self.before = self.now()
        while not self._done.wait(0.03):
            own, files = self.now()
            own, files = own - self.before[0], files - self.before[1]
            self.peak = max(self.peak[0], own), max(self.peak[1], files)
            self.peak_sum = max(self.peak_sum, own + files)

    def stop(self) -> None:
        self._done.set()
        self.join()


def rank(backend_name: str, steps: int, flags: list[str]) -> None:
    """What one rank does: load, tell, draw, tell."""
    import torch.distributed as dist

    from shared.backends import BACKENDS
    from shared.launch.parser import parse_or_exit
    from shared.ranks.groups import init_world

    backend = BACKENDS[backend_name]
    config = parse_or_exit(backend, BACKENDS, flags)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    world = init_world(config.device, config.collective_timeout)
    import diffusers.loaders  # noqa: F401  so that libraries are no part of what loading needs
    import transformers.modeling_utils  # noqa: F401

    from shared.pipeline import engine as _engine  # noqa: F401

    def tell(event: str, seconds: float = 0.0) -> None:
        print(json.dumps({"event": event, "pid": os.getpid(), "seconds": seconds}), flush=True)
        dist.barrier(world.control)  # no rank goes on before all are sampled
        time.sleep(1.0)  # for the samples of this state

    tell("begin")
    began = time.monotonic()
    engine = backend.build_engine(config, world)
    loaded = time.monotonic() - began
    tell("loaded", loaded)
    if steps:
        began = time.monotonic()
        engine.warm_up()
        tell("drawn", time.monotonic() - began)
    tell("end")
    engine.close()  # which gives every rank its whole weights back


def measure(options: argparse.Namespace, ranks: int) -> None:
    """Start the ranks, sample them, print a row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [__file__, "--backend", options.backend, "--steps", str(options.steps), "--rank", "--"]
    command += [f"--type={options.type}", f"--checkpoint={options.folder}", "--width=64", "--height=64"]
    process = subprocess.Popen([*command, *options.flags], stdout=subprocess.PIPE, text=True)
    sampler, seconds = Sampler(), dict[str, float]()
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith('{"event"'):
            continue
        told = json.loads(line)
        if told["event"] == "begin":
            sampler.pids.append(told["pid"])
            if len(sampler.pids) == ranks:
                sampler.start()
        if told["event"] == "end":
            sampler.stop()
        seconds[told["event"]] = max(told["seconds"], seconds.get(told["event"], 0.0))
    if process.wait():
        raise SystemExit(f"the ranks ended with {process.returncode}")
    own, files = sampler.peak
    row = [" ".join(options.flags) or "-", options.stored, ranks, f"{seconds['loaded']:.1f}"]
    row += [f"{seconds.get('drawn', 0):.1f}", own // MIB, files // MIB, sampler.peak_sum // MIB]
    print(f"| {' | '.join(map(str, row))} |", flush=True)


def make(name: str, folder: Path, stored: str) -> None:
    """A checkpoint of random weights in its published size."""
    import torch

    from benchmarks.host import save_checkpoint

    if not (folder / "model_index.json").is_file():
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[stored]
        save_checkpoint(name, folder, torch.device("cpu"), dtype)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--backend", default="asyncdiff")
    parser.add_argument("--type", default="sd1")
    parser.add_argument("--stored", default="fp16", choices=("fp16", "bf16", "fp32"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rank", action="store_true", help="what the ranks themselves are started with")
    parser.add_argument("flags", nargs="*", help="of the host, after --")
    options = parser.parse_args()
    if options.rank:
        rank(options.backend, options.steps, options.flags)
        return
    options.folder = options.folder or Path(f"/tmp/loading_{options.type}_{options.stored}")
    make(options.type, options.folder, options.stored)
    print("| flags | stored | ranks | load s | first picture s | own MiB | files MiB | together MiB |")
    for count in map(int, options.ranks.split(",")):
        measure(options, count)


if __name__ == "__main__":
    main()
