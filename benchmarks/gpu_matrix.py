"""Every cell of the compatibility tables on two GPUs, with consecutive requests; `make matrix` is for CPUs.

    python -m benchmarks.gpu_matrix                          # two GPUs, NCCL, CUDA graphs: about four minutes
    python -m benchmarks.gpu_matrix --device cpu sd1:lora    # cells whose name matches, on CPU ranks
    python -m benchmarks.gpu_matrix --ranks 1                # graphs and features, no parallel plans

On one GPU the two ranks share it: the numbers are as good, the seconds mean nothing.

A cell is a type and a feature, or a type and a plan, of one backend. It asks for a picture, for other words,
another size and other scales, each twice, then for the first again, and compares latents:

- exact: at full warm-up against the plain pipeline, over all requests; at least 45 dB (30 in 8 bits)
- graphs: in steady state with CUDA graphs against without; at least 40 dB
- again: the first request, asked last, against itself; at least 60 dB
- stale: in steady state against the plain pipeline; that it is a picture at all: 8 dB
- scales: the changed scales against the first request, plain; they must change something: below 60 dB

Tiny random checkpoints in fp32 (tests/tiny.py). Several pairs of ranks run side by side on the two GPUs; a
cell that crashes its ranks is reported and the others continue. Exit code 1 when a cell falls short.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.launch.values import as_step_cache

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
# Feature -> the flag that a type must take for it.
FEATURES = {
    "nothing": "",
    "lora": "lora",
    "control_net": "control_net",
    "ip_adapter": "ip_adapter",
    "int8": "quantize_to",
    "float8": "quantize_to",
    "int4": "quantize_to",
    "adapters together": "lora",
    "lora added and removed": "lora",
    **{flag: flag for flag in OFFLOADS},
}
PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "asyncdiff": {
        "cfg": {"use_cfg_parallel": True},
        "hybrid": {"use_cfg_parallel": True, "async_steps": 2},
        "balance": {"auto_balance": True},
        "shard": {"shard_weights": True},
        "deepcache": {"use_cfg_parallel": True, "step_cache": as_step_cache("deepcache:2")},
    },
    "distrifuser": {
        "rows": {"no_split_batch": True},
        "columns": {"no_split_batch": True, "split_scheme": "col"},
        "full_sync": {"no_split_batch": True, "sync_mode": "full_sync"},
        "tensor": {"parallelism": "tensor"},
        "naive": {"parallelism": "naive_patch"},
        "shard": {"shard_weights": True},
    },
    "xdit": {
        "ulysses": {"ulysses_degree": 2},
        "ring": {"ring_degree": 2},
        "pipefusion": {"pipefusion_parallel_degree": 2},
        "tensor": {"tensor_parallel_degree": 2},
        "parallel_vae": {"use_parallel_vae": True},
        "shard": {"shard_weights": True},
    },
}
INEXACT = {"naive", "deepcache"}  # plans that never promise the plain picture
MEASURED = {"balance"}  # plans that cut by measured time, so two launches need not be alike
AT_ONCE = 5  # cells that one pair of ranks does, one after the other
LIMIT = 240.0  # seconds for them


@dataclass
class Result:
    """What one cell gave: dB, or the error of a rank."""

    cell: str
    decibels: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> str:
        values = "  ".join(f"{name} {value:.1f}" for name, value in self.decibels.items())
        verdict = "FAIL" if self.faults else "pass"
        return f"{verdict}  {self.cell:45}  {self.seconds:5.1f} s  {values}  {'; '.join(self.faults)}"


def cells(ranks: int) -> list[str]:
    """`backend:type:feature:plan` of all that a launch on so many ranks does not refuse."""
    from shared.backends import BACKENDS
    from shared.launch.checks import check_config
    from shared.launch.errors import UsageError
    from shared.launch.flags import HostConfig
    from shared.models import MODELS
    from tests import tiny

    found = []
    for backend in BACKENDS.values():
        for name in backend.types:
            for feature, flag in FEATURES.items():
                if not flag or backend.refusal(MODELS[name], flag) is None:
                    found.append(f"{backend.name}:{name}:{feature}:")
            for plan, flags in PLANS[backend.name].items() if ranks > 1 else ():
                if any(backend.refusal(MODELS[name], flag) for flag in flags):
                    continue
                config = HostConfig(
                    backend=backend.name, type=name, checkpoint=str(tiny.checkpoint(name)), **flags
                )
                try:
                    check_config(config, backend, ranks)
                except UsageError:
                    continue
                found.append(f"{backend.name}:{name}:nothing:{plan}")
    return found


# ---------------------------------------------------------------- one pair of ranks


def flags_of(backend: str, name: str, feature: str) -> dict[str, Any]:
    """The launch flags of a feature."""
    from shared.backends import BACKENDS
    from shared.models import MODELS
    from tests import tiny_extras

    if feature in OFFLOADS:
        return {feature: True}
    if FEATURES.get(feature) == "quantize_to":
        # No layer of a tiny checkpoint gains from computing in 8 bits.
        return {"quantize_to": feature if feature == "int4" else f"{feature}_weight"}
    makers: dict[str, Any] = {
        "lora": tiny_extras.lora,
        "control_net": tiny_extras.control_net,
        "ip_adapter": tiny_extras.ip_adapter,
    }
    wanted = list(makers) if feature == "adapters together" else [feature]
    return {
        flag: {str(make(name)): 1.0}
        for flag, make in makers.items()
        if flag in wanted and BACKENDS[backend].refusal(MODELS[name], flag) is None
    }


def picture(seed: int, size: int) -> str:
    from tests import tiny

    out = io.BytesIO()
    tiny.picture(size, seed).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def bodies(name: str, flags: dict[str, Any], starts: bool) -> dict[str, dict[str, Any]]:
    """Requests by what is different in them; with `starts` some that start from a picture."""
    from shared.models import MODELS
    from tests.tables import FROM_PICTURE

    spec = MODELS[name]
    first: dict[str, Any] = {"steps": STEPS, "seed": 11, "output_format": "latent"}
    if "positive" in spec.fields:
        first |= {"positive": "a small red cat", "cfg": 5.0}
        if spec.guidance_branches == 2:
            first["negative"] = "blur"
    size = 64 if spec.size_scale == 1 else 16
    if spec.image == "needed":
        first["image"] = picture(1, size)
    if flags.get("control_net"):
        first["control_image"] = picture(2, size)
    if flags.get("ip_adapter"):
        first["ip_image"] = picture(3, 32)
    if spec.output == "video":
        first |= {"frames": 4 if spec.frames_factor == 1 else spec.frames_factor + 1}
        if "decode_chunk_size" in spec.fields:
            first["decode_chunk_size"] = 2
    words = first | {"seed": 12}
    if "positive" in spec.fields:
        words |= {"positive": "two large blue dogs in the snow", "cfg": 3.0}
    other_size = {"width": 96, "height": 64} if spec.size_scale == 1 else {"image": picture(4, 24)}
    scales: dict[str, Any] = {}
    if flags.get("lora"):
        scales["lora_scales"] = dict.fromkeys(flags["lora"], 0.3)
    if flags.get("control_net"):
        scales["controlnet_scale"] = 0.4
    if flags.get("ip_adapter"):
        scales["ip_adapter_scale"] = 0.3
    asked = {"first": first, "words": words, "size": first | {"seed": 13} | other_size}
    if spec.image == "start" and starts:
        control, adapter = bool(flags.get("control_net")), bool(flags.get("ip_adapter"))
        late = {"image": picture(5, 64)}
        for field, kind in FROM_PICTURE.items():
            start = spec.start(kind, control)
            if start is not None and start.control_extra is not None:
                continue  # for ControlNets that paint masks and nothing else
            if start is not None and (start.ip_adapter or not adapter):
                asked[field] = first | late | ({"mask": picture(6, 64)} if field == "mask" else {})
                if start.strength is not None:
                    asked[field] |= {"steps": 2 * STEPS, "strength": 0.5}
                if start.frames:
                    asked[field]["image"] = [picture(seed, 64) for seed in range(5, 9)]
    return asked | ({"scales": first | scales} if scales else {})


def order(asked: dict[str, Any], once: bool) -> list[str]:
    """The order of the requests: each is captured within the first call and replayed by the second."""
    times = 1 if once else 2
    return [name for name in asked for _ in range(times)] + ["first"]


def decibels(a: Any, b: Any) -> float:
    """PSNR of two arrays, with the range of `b` as the peak; -1 for other shapes, NaN stays NaN."""
    import numpy as np

    if a.shape != b.shape:
        return -1.0
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(float(np.ptp(b)) ** 2 / error))


def try_cell(cell: str, world: Any) -> Result:
    """One cell on this rank; only rank 0 compares."""
    import safetensors.torch

    from shared.api.parsing import check_request
    from shared.backends import BACKENDS
    from shared.launch.backend import Needs
    from shared.launch.checks import check_config
    from shared.launch.flags import HostConfig
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_pipeline
    from tests import tiny, tiny_extras

    backend, name, feature, plan = cell.split(":")
    flags = flags_of(backend, name, feature) if feature != "lora added and removed" else {}
    config = HostConfig(
        backend=backend,
        type=name,
        width=64,
        height=64,
        checkpoint=str(tiny.checkpoint(name)),
        variant="fp32",
        device=world.device.type,
        warm_up_steps=STEPS,
        **flags,
        **(PLANS[backend][plan] if plan else {}),
    )
    check_config(config, BACKENDS[backend], world.size)
    starts = (config.pipefusion_parallel_degree or 1) == 1
    asked = {key: check_request(body, config) for key, body in bodies(name, flags, starts).items()}
    names = order(asked, feature in OFFLOADS)
    host = importlib.import_module(f"shared.backends.{backend}")

    def run(engine: Any) -> list[Any]:
        made = []
        for key in names:
            reply = engine.generate(asked[key], lambda step, steps: None)
            latent = None if reply is None else safetensors.torch.load(reply.latent)["latent"]
            made.append(None if latent is None else latent.float().cpu().numpy())
        return made

    engine = host.build_engine(config, world)
    exact = run(engine)
    swapped = []
    if feature == "lora added and removed":
        path = str(tiny_extras.lora(name))
        engine.add_lora(path, 1.0)
        swapped.append(run(engine)[0])
        engine.remove_lora(path)
        swapped.append(run(engine)[0])
    engine.close()
    kept: dict[str, Any] = dict.fromkeys(OFFLOADS, False)
    without = replace(config, **kept)
    pipe = load_pipeline(config.spec, without, world.device, Needs()) if feature in OFFLOADS else engine.pipe
    plain = run(PipelineEngine(pipe, without, world))
    del engine, pipe

    def steady(**changes: Any) -> list[Any]:
        engine = host.build_engine(replace(config, warm_up_steps=2, **changes), world)
        made = run(engine)
        engine.close()
        return made

    stale, eager = steady(), steady(no_cuda_graph=True)
    result = Result(cell)
    if world.rank:
        return result

    def least(one: list[Any], other: list[Any]) -> float:
        return min(decibels(a, b) for a, b in zip(one, other, strict=True))

    def note(what: str, value: float, fine: bool) -> None:
        result.decibels[what] = value
        if not fine:
            result.faults.append(what)

    value = least(exact, plain)
    note("exact", value, plan in INEXACT or value >= (30 if FEATURES.get(feature) == "quantize_to" else 45))
    value = least(stale, eager)
    note("graphs", value, plan in MEASURED or value >= 40)
    value = decibels(stale[-1], stale[0])
    note("again", value, value >= 60)
    value = least(stale, plain)
    note("stale", value, value > 8)
    if "scales" in asked:
        value = decibels(plain[names.index("scales")], plain[0])
        note("scales", value, value < 60)
    if swapped:
        value = decibels(swapped[0], exact[0])
        note("added", value, value < 60)
        value = decibels(swapped[1], exact[0])
        note("removed", value, value >= 60)
    return result


def work(device: str, out: Path, todo: list[str]) -> None:
    """One rank: run the cells, write results as JSON lines; ends the process even if something hangs."""
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    from shared.ranks.groups import World, make_groups

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
        if torch.cuda.device_count() < size:
            # NCCL refuses two ranks of one host on one GPU: they stand for two hosts, over sockets.
            os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    dist.init_process_group("gloo")
    world = World(rank, size, rank, where, *make_groups(60, "nccl" if device == "cuda" else "gloo"))
    for cell in todo:
        began = time.monotonic()
        try:
            result = try_cell(cell, world)
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().split("\n")[0][:200]
            result = Result(cell, faults=[f"rank {rank}: {type(error).__name__}: {text}"])
        result.seconds = time.monotonic() - began
        every: list[Any] = [None] * size
        dist.all_gather_object(every, result)
        broken = [r for r in every if any(f.startswith("rank ") for f in r.faults)]
        if rank == 0:
            with out.open("a") as file:
                file.write(json.dumps(vars((broken or every)[0])) + "\n")
        if broken:
            os._exit(3)
    os._exit(0)


# ---------------------------------------------------------------- all of them


class Matrix:
    """Gives chunks of cells to launches of `ranks` ranks and prints the results."""

    def __init__(self, device: str, todo: list[str], jobs: int, ranks: int) -> None:
        self.device, self.jobs, self.ranks = device, jobs, ranks
        self.results: list[Result] = []
        self.launches: set[subprocess.Popen[bytes]] = set()
        self.chunks: queue.Queue[list[str]] = queue.Queue()
        slow = [cell for cell in todo if "sequential" in cell or "group" in cell]
        quick = [cell for cell in todo if cell not in slow]
        for cell in slow:  # first, as each takes as long as a chunk of the others
            self.chunks.put([cell])
        for i in range(0, len(quick), AT_ONCE):
            self.chunks.put(quick[i : i + AT_ONCE])

    def run(self) -> None:
        threads = [threading.Thread(target=self._serve, args=(n,)) for n in range(self.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self, *_: Any) -> None:
        """End all launches and this process, as at the end of a lease: they are in sessions of their own."""
        for process in list(self.launches):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(143)

    def _serve(self, number: int) -> None:
        while True:
            try:
                chunk = self.chunks.get_nowait()
            except queue.Empty:
                return
            with tempfile.TemporaryDirectory() as folder:
                self._try(chunk, 29600 + number, Path(folder))

    def _try(self, chunk: list[str], port: int, folder: Path) -> None:
        out, log = folder / "results", folder / "log"
        own = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}"]
        own += [f"--master-port={port}", __file__, "--device", self.device, "--worker", str(out), *chunk]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": _python_path()}
        with log.open("w") as file:
            process = subprocess.Popen(
                own, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env, cwd=ROOT
            )
            self.launches.add(process)
            try:
                why = f"the ranks ended with {process.wait(LIMIT)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                why = f"no end after {LIMIT:g} s"
            self.launches.discard(process)
        lines = out.read_text().splitlines() if out.exists() else []
        found = [Result(**json.loads(line)) for line in lines]
        missing = [cell for cell in chunk if cell not in {r.cell for r in found}]
        crashed = missing[:1] if not found or not found[-1].faults else []
        for cell in crashed:
            told = [line for line in log.read_text().splitlines() if re.search("Error|error", line)]
            found.append(Result(cell, faults=[why, *(line[:160] for line in told[-2:])]))
            missing.remove(cell)
        for result in found:
            self.results.append(result)
            print(result.row(), flush=True)
        if missing:
            self.chunks.put(missing)


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("only", nargs="*", help="regular expressions; a cell is run if one of them matches")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, default=16, help="launches side by side")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="of a launch")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.device, options.worker, options.only)
    todo = [c for c in cells(options.ranks) if not options.only or any(re.search(p, c) for p in options.only)]
    if options.device == "cpu":
        todo = [c for c in todo if "offload" not in c]
    began = time.monotonic()
    matrix = Matrix(options.device, todo, options.jobs, options.ranks)
    signal.signal(signal.SIGTERM, matrix.stop)
    signal.signal(signal.SIGINT, matrix.stop)
    matrix.run()
    short = [r for r in matrix.results if r.faults]
    print(f"\n{len(todo)} cells in {time.monotonic() - began:.0f} s; {len(short)} fall short")
    for result in short:
        print(result.row())
    sys.exit(bool(short) or not todo)


if __name__ == "__main__":
    main()
