"""The engine of a host without the host: pictures one after the other from its pipeline on its ranks.

torchrun --nproc_per_node=2 benchmarks/bare.py xdit --steps 20 --type=sd3 --checkpoint=/tmp/sd3 --variant=bf16

What benchmarks/host.py --bare puts beside the host. All other flags are the host's. No HTTP, queue, votes or
previews: the pipeline is called as its user would, and rank 0 encodes the PNG. --pause=0,0.05 measures again
with 50 ms between two pictures, as a host waits for its client.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.api.media import encode_image
from shared.api.requests import GenerateRequest
from shared.backends import BACKENDS
from shared.launch.parser import parse_or_exit
from shared.parallel.method import Unwatched
from shared.pipeline.arguments import call_arguments
from shared.pipeline.schedulers import scheduler_for_request
from shared.pipeline.turns import decodes_together
from shared.ranks.groups import init_world


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("backend", choices=list(BACKENDS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pause", default="0", help="seconds between two pictures, one row for each")
    parser.add_argument("--cfg", type=float, default=5.0)
    options, flags = parser.parse_known_args()
    backend = BACKENDS[options.backend]
    config = parse_or_exit(backend, BACKENDS, flags)
    world = init_world(config.device, config.collective_timeout)
    engine = backend.build_engine(config, world)
    engine.pipe.set_progress_bar_config(disable=True)
    inputs = {"positive": "a red cat", "steps": options.steps, "seed": 1, "cfg": options.cfg}
    request = GenerateRequest.model_construct(**inputs).filled(config)

    decodes = world.rank == 0 or decodes_together(config, engine.parallel, request)

    def once(output: str, pause: float) -> float:
        time.sleep(pause)
        dist.barrier(world.control)
        began = time.perf_counter()
        arguments = call_arguments(engine.pipe, config, request, world.device)
        engine.parallel.begin(arguments["num_inference_steps"])
        arguments |= {"output_type": output if decodes else "latent"}
        with scheduler_for_request(engine.pipe, engine.spec, request.scheduler):
            made = engine.parallel.run(arguments, Unwatched()).images
        if output == "pil" and world.rank == 0:
            encode_image(made[0], "png")
        elif world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for pause in map(float, options.pause.split(",")):
        times = {
            out: statistics.median([once(out, pause) for _ in range(8)][1:]) for out in ("latent", "pil")
        }
        peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
        if world.rank == 0:
            name = "the engine alone" + (f", {pause:g} s between two" if pause else "")
            pil, latent = f"{times['pil']:.3f}", f"{times['latent']:.3f}"
            row = [name, str(world.size), "-", pil, pil, "-", pil, latent, f"{peak:.1f}"]
            print(f"| {' | '.join(row)} |", flush=True)
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
