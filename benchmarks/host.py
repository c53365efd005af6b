"""A whole host with a full-size checkpoint of random weights, over HTTP, compared with plain diffusers.

python benchmarks/host.py --ranks 1,2 --size 1024 --steps 30 --folder /tmp/sdxl [-- --compile_unet ...]
python benchmarks/host.py --backend distrifuser --ranks 2 --size 3840 --steps 6
python benchmarks/host.py --backend xdit --type sd3 --folder /tmp/sd3 --ranks 2 --steps 20
python benchmarks/host.py --features int8,int4,model_cpu_offload --ranks 2 --steps 6    (or: all)
    [--at-once]    all these hosts side by side on the same GPUs: what they need of memory, no times
    [--bare]       also each host's engine without the host (benchmarks/bare.py [--pause=0,0.05])

--tiny --device cpu takes the tests' checkpoint of the type, to see that it runs.

    [--forty]      then forty requests of forty sizes, none larger than --size: memory must level off
    [--requests 2] instead of eight of each way    [--plain no] without plain diffusers

Prints, for each number of ranks, start to ready, the median of seven requests by the client's clock (from its
question to the answer's last byte, as JSON and as image/png), the time for each of eight with the next always
waiting, what of a request the host says was its engine (to the encoded picture) and the denoising alone, and
peak memory a rank; and plain diffusers.
"""

from __future__ import annotations

import argparse
import base64
import gc
import io
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import MAKERS, on, sdxl_unet, text_modules
from demo.ask import free_port, get, wait_until_ready
from shared.launch.flags import COMPUTED
from shared.models import MODELS
from shared.parallel.lanes import copy, side_by_side
from shared.parallel.surgery import Surgery
from shared.pipeline.store import new_file
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
FEATURES: dict[str, list[str]] = {
    "none": [],
    **{to: [f"--quantize_to={to}"] for to in (*COMPUTED, *COMPUTED.values(), "int4", "int2")},
    **{f"{how}_offload": [f"--enable_{how}_offload"] for how in ("model_cpu", "sequential_cpu", "group")},
    # With a LoRA and a ControlNet next to the checkpoint.
    "together": ["--quantize_to=int8", "--compile_unet"],
}


def save_checkpoint(
    name: str, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> None:
    """A diffusers folder of this type in its published size."""
    import safetensors.torch
    import transformers.modeling_utils

    pipe = MAKERS[name](device, dtype)
    pipe.register_modules(**text_modules(name, device, dtype))

    def save(tensors: dict[str, torch.Tensor], file: str, metadata: dict[str, str] | None = None) -> None:
        places = new_file(Path(file), tensors, metadata or {})
        side_by_side(lambda name: copy(places[name], tensors[name].detach()), tensors, device)

    # A file of 10 GB takes the libraries' own 15 s.
    with Surgery() as surgery:
        surgery.replace(safetensors.torch, "save_file", save)
        surgery.replace(transformers.modeling_utils, "safe_save_file", save)
        pipe.save_pretrained(folder)


def save_adapters(folder: Path, device: torch.device) -> list[str]:
    """A random LoRA (rank 16, all attention layers) and ControlNet next to the checkpoint; their flags."""
    from diffusers import ControlNetModel
    from safetensors.torch import save_file

    dtype = torch.bfloat16
    lora, control = folder.parent / "sdxl_lora.safetensors", folder.parent / "sdxl_control"
    unet = on(device, dtype, sdxl_unet)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(16, module.in_features, dtype=dtype) * 0.01
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 16, dtype=dtype) * 0.01
    save_file(tensors, lora)
    ControlNetModel.from_unet(unet).to(dtype).save_pretrained(control)
    return [f"--lora={json.dumps({str(lora): 1.0})}", f"--control_net={control}"]


def plain_diffusers(name: str, folder: Path, device: torch.device, size: int, steps: int) -> None:
    """Plain diffusers from the same folder in this process, eager."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)

    def once() -> float:
        began = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(1)
        arguments = {"height": size, "width": size, "num_inference_steps": steps, "generator": generator}
        pipe("a red cat", **arguments, **MODELS[name].pipeline_defaults)
        return time.perf_counter() - began

    times = [once() for _ in range(4)][1:]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    seconds = f"{statistics.median(times):.3f}"
    row = ["plain diffusers, eager", "1", "-", seconds, "-", "-", "-", "-", f"{peak:.1f}"]
    print(f"| {' | '.join(row)} |", flush=True)


def png(size: int) -> bytes:
    """A picture to steer a ControlNet with."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def ask(url: str, body: dict[str, Any], accept: str = "application/json") -> tuple[float, bytes]:
    """Wall-clock seconds of one request, and its answer."""
    headers = {"Content-Type": "application/json", "Accept": accept}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as reply:
        answer = reply.read()
    return time.perf_counter() - began, answer


def host(options: argparse.Namespace, ranks: int, flags: list[str], name: str = "") -> None:
    """Launch a host, send eight requests in each way and eight at once, print one row, end it."""
    size, script = options.size, f"{options.backend}_host.py"
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--master_port", str(free_port())]
    launch = [f"--type={options.type}", f"--checkpoint={options.folder}"]
    launch += [f"--width={size}", f"--height={size}", f"--variant={'fp32' if options.tiny else 'bf16'}"]
    launch += flags
    if options.bare:
        bare = [str(ROOT / "benchmarks" / "bare.py"), options.backend]
        bare += [f"--steps={options.steps}", f"--pause={options.pause}"]
        subprocess.run([*command, *bare, *launch], check=False)
    process = subprocess.Popen([*command, str(ROOT / script), f"--port={port}", *launch])
    url = f"http://127.0.0.1:{port}"
    try:
        ready = wait_until_ready(url, process)
        body = {"steps": options.steps, "seed": 1, "cfg": 5.0}
        if any(flag.startswith("--control_net") for flag in flags):
            body["control_image"] = base64.b64encode(png(size)).decode()
        # Another prompt each time: a host caches the embeddings of the last ones.
        count = options.requests
        bodies = [body | {"positive": f"a red cat, {number}"} for number in range(3 * count)]
        runs = [ask(url, each) for each in bodies[:count]][1:]
        raw = [ask(url, each, "image/png") for each in bodies[count : 2 * count]][1:]
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as clients:
            list(clients.map(ask, itertools.repeat(url), bodies[2 * count :]))
        queued = (time.perf_counter() - began) / count
        health = json.loads(get(f"{url}/health")[1])
        print(f"start: {health['plan'].get('start')}", flush=True)
        if options.forty:
            forty(url, body, size)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    walls = [statistics.median(seconds for seconds, _ in each) for each in (runs, raw)]
    told = [json.loads(answer)["seconds"] for _, answer in runs]
    parts = [statistics.median(seconds[part] for seconds in told) for part in ("total", "denoise")]
    peak = max(rank.get("memory_peak_mib", 0) for rank in health["ranks"]) / 1024
    times = [f"{ready:.0f}", *(f"{seconds:.3f}" for seconds in (*walls, queued, *parts))]
    if options.at_once:
        times = ["-"] * len(times)
    row = [f"{script} {name or ' '.join(flags)}", str(ranks), *times, f"{peak:.1f}"]
    print(f"| {' | '.join(row)} |", flush=True)


def forty(url: str, body: dict[str, Any], size: int) -> None:
    """Ask for forty pictures of forty sizes; print how many fail, and what a rank's device then holds."""
    sides = range(size // 2, 2 * size + 1, max(size // 16, 16))
    sizes = [(w, h) for w in sides for h in sides if size * size / 3 <= w * h <= size * size]
    sizes = sizes[:: max(len(sizes) // 40, 1)][:40]
    failed, used = [], list[int]()
    for number, (width, height) in enumerate(sizes):
        try:
            ask(url, body | {"positive": f"a red cat, {number}", "width": width, "height": height})
        except OSError as error:
            failed.append(f"{width}x{height}: {error}")
        ranks = json.loads(get(f"{url}/health")[1])["ranks"]
        used.append(max(rank["memory_used_mib"] for rank in ranks))
    print(f"{len(sizes)} sizes, {len(failed)} failed {failed[:3]}; MiB in use after each: {used}", flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sdxl"))
    parser.add_argument("--backend", default="asyncdiff", choices=("asyncdiff", "distrifuser", "xdit"))
    parser.add_argument("--type", default="sdxl", choices=("sdxl", "sd3", "flux", "pixa", "pixs", "hy"))
    parser.add_argument(
        "--tiny", action="store_true", help="use the tests' small checkpoint, to see that it runs"
    )
    parser.add_argument("--features", help=f"one launch for each of {', '.join(FEATURES)}; or all")
    parser.add_argument(
        "--at-once", action="store_true", help="all features at the same time: measures only memory"
    )
    parser.add_argument("--bare", action="store_true", help="also each host's engine without the host")
    parser.add_argument(
        "--pause", default="0", help="of --bare: seconds between two pictures, a row for each"
    )
    parser.add_argument("--plain", choices=("yes", "no"), default="yes", help="plain diffusers too")
    parser.add_argument("--requests", type=int, default=8, help="of each way; fewer are quicker")
    parser.add_argument("--forty", action="store_true", help="then forty requests of forty sizes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("flags", nargs="*", help="after --: more flags of the host")
    options = parser.parse_args()
    features = list(FEATURES) if options.features == "all" else (options.features or "").split(",")
    if wrong := [name for name in features if name and name not in FEATURES]:
        parser.error(f"--features: must be of {', '.join(FEATURES)}; got {wrong[0]}")
    device = torch.device(options.device)
    if "together" in features and options.type != "sdxl":
        parser.error(f"--features together: its LoRA and ControlNet are for sdxl; got --type {options.type}")
    if options.tiny:
        options.folder = tiny.checkpoint(options.type)
    elif not (options.folder / "model_index.json").exists():
        save_checkpoint(options.type, options.folder, device)
    adapters = save_adapters(options.folder, device) if "together" in features else []
    columns = (
        "system",
        "ranks",
        "s to ready",
        "s a request",
        "s as image/png",
        "s each, all waiting",
        "s in the engine",
        "s denoising",
        "peak GiB",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    if not options.features and options.plain == "yes":
        plain_diffusers(options.type, options.folder, device, options.size, options.steps)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def measure(case: tuple[int, str]) -> None:
        ranks, name = case
        more = [*(adapters if name == "together" else []), *FEATURES.get(name, []), *options.flags]
        try:
            host(options, ranks, more, name)
        except (SystemExit, OSError) as error:
            print(f"| {options.backend}_host.py {name} | {ranks} | failed: {error} |", flush=True)

    # Told to end, by a time limit too, it ends its hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cases = list(itertools.product(map(int, options.ranks.split(",")), features))
    with ThreadPoolExecutor(len(cases) if options.at_once else 1) as pool:
        list(pool.map(measure, cases))


if __name__ == "__main__":
    main()
