"""The launches that benchmarks/tradeoff.py compares, by the demo's checkpoints. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

PIPEFUSION = "--pipefusion_parallel_degree=2"
SHARED = "--use_cfg_parallel"
PATCHES = "--no_split_batch"  # both guidance branches on each rank, else two ranks take one each

GPUS = 2
"""That the ranks of a launch on GPUs see; several launches share them."""


@dataclass(frozen=True)
class Launch:
    host: str
    flags: str
    ranks: int = 2
    pictured: bool = False
    """Whether its pictures go into the strip."""

    @property
    def scheduler(self) -> str | None:
        """That of --scheduler; None: the checkpoint's."""
        return next((flag[12:] for flag in self.flags.split() if flag.startswith("--scheduler=")), None)

    @property
    def alone(self) -> bool:
        """Whether it draws its prompts one by one: what it measures decides for all pictures of a call, or
        its method takes one."""
        return any(word in self.flags for word in ("auto", "fbcache", "pipefusion"))

    def device(self, asked: str) -> str:
        """Where it draws in a run with this --device."""
        return "cpu" if self.alone or self.ranks > GPUS else asked

    @property
    def key(self) -> tuple[str, str, int]:
        return self.host, self.flags, self.ranks


def shares(cores: int, devices: set[str]) -> dict[str, int]:
    """How many ranks draw at the same time, by device: on GPUs pairs of them, a third of both."""
    if len(devices) == 1:
        return dict.fromkeys(devices, cores)
    pairs = max(1, cores // 3 // GPUS)
    return {"cpu": cores - pairs * GPUS, "cuda": pairs * GPUS}


def quantized(host: str) -> list[Launch]:
    kept = ("float8_weight", "int8_weight", "int4", "int2")  # computing in 8 bits is for GPUs
    return [Launch(host, f"--quantize_to={bits}", 1, bits == "int2") for bits in kept]


LAUNCHES: dict[str, list[Launch]] = {
    "unet": [
        Launch("asyncdiff", "--use_cfg_parallel"),
        *(
            Launch("asyncdiff", f"{SHARED} --warm_up_steps={w} --async_steps={n}")
            for w, n in ((10, 15), (12, 8), (15, 8), (15, 4))
        ),
        *(Launch("asyncdiff", f"--warm_up_steps={w}", 2, w == 3) for w in (1, 3, 5, 10)),
        Launch("distrifuser", ""),
        Launch("distrifuser", "--no_split_batch --sync_mode=full_sync"),
        *(Launch("distrifuser", f"{PATCHES} --warm_up_steps={w}", 2, w == 3) for w in (1, 3, 5, 10, "auto")),
        *(Launch("distrifuser", f"--warm_up_steps={w}", 4) for w in (3, 10, "auto")),
        *quantized("asyncdiff"),
        *(Launch("asyncdiff", f"--step_cache=deepcache:{n}", 1, n == 3) for n in (2, 3, 5)),
        Launch("asyncdiff", "--use_cfg_parallel --step_cache=deepcache:3"),
        Launch("asyncdiff", "--warm_up_steps=5 --quantize_to=int8_weight"),
        Launch("asyncdiff", f"{SHARED} --async_steps=auto", 2, True),
        Launch("asyncdiff", "--warm_up_steps=auto"),
        *(
            Launch("asyncdiff", f"--scheduler={scheduler} {flags}")
            for scheduler in ("euler", "dpmpp_2m", "k_dpmpp_2m", "unipc")
            for flags in ("--warm_up_steps=3", "--warm_up_steps=auto", f"{SHARED} --async_steps=auto")
        ),
    ],
    "transformer": [
        Launch("xdit", "--ulysses_degree=2"),
        Launch("xdit", "--ring_degree=2"),
        Launch("xdit", "--use_cfg_parallel"),
        Launch("xdit", "--ulysses_degree=2 --ring_degree=2", 4),
        *(Launch("xdit", f"--ring_degree=2 --exchange_dtype={bits}") for bits in ("float8", "int8")),
        *(
            Launch("xdit", f"{PIPEFUSION} --num_pipeline_patch={n} --warm_up_steps={w}", 2, w == 3)
            for n in (2, 4)
            for w in (1, 3, 5, 10)
        ),
        Launch("xdit", "--pipefusion_parallel_degree=4 --num_pipeline_patch=4 --warm_up_steps=5", 4),
        *(Launch("asyncdiff", f"--warm_up_steps={w}", 2, w == 5) for w in (1, 3, 5, 10)),
        Launch("asyncdiff", "--warm_up_steps=auto"),
        Launch("asyncdiff", f"{SHARED} --async_steps=auto", 2, True),
        Launch("asyncdiff", f"--scheduler=flow_heun {SHARED} --async_steps=auto"),
        *(
            Launch("asyncdiff", f"{SHARED} --warm_up_steps={w} --async_steps={n}")
            for w, n in ((10, 15), (12, 8), (15, 4))
        ),
        *quantized("xdit"),
        *(Launch("xdit", f"--step_cache=fbcache:{most}", 1, most == 0.12) for most in (0.05, 0.12, 0.2)),
        *(Launch("xdit", f"--step_cache={cache}", 1) for cache in ("taylorseer:3", "taylorseer:5")),
        Launch("xdit", "--ring_degree=2 --quantize_to=int8_weight --step_cache=fbcache:0.12"),
        Launch("xdit", "--ring_degree=2 --exchange_dtype=int8 --quantize_to=int8_weight"),
    ],
    "student": [
        *(Launch("asyncdiff", f"--warm_up_steps={w}", 2, w == 1) for w in (1, 2, 3)),
        *(Launch("distrifuser", f"--warm_up_steps={w}", 2, w == 1) for w in (1, 2, 3)),
        *(Launch("distrifuser", f"--warm_up_steps={w}", 4, w == 1) for w in (1, 2)),
        *quantized("asyncdiff"),
        Launch("distrifuser", "--warm_up_steps=2 --quantize_to=int8_weight"),
        *(Launch(host, "--warm_up_steps=auto") for host in ("asyncdiff", "distrifuser")),
    ],
}  # fmt: skip

WANTED: dict[str, tuple[str, ...]] = {
    "unet": (
        "--use_cfg_parallel",
        *(f"{SHARED} --warm_up_steps={w} --async_steps={n}" for w, n in ((10, 15), (12, 8), (15, 4))),
        f"{SHARED} --async_steps=auto",
        *(f"--warm_up_steps={w}" for w in (3, 10, "auto")),
        *(f"{PATCHES} --warm_up_steps={w}" for w in (3, 10, "auto")),
        *(f"--quantize_to={bits}" for bits in ("float8_weight", "int8_weight", "int4")),
        "--step_cache=deepcache:3",
    ),
    "transformer": (
        "--ulysses_degree=2",
        "--ring_degree=2",
        "--use_cfg_parallel",
        "--ring_degree=2 --exchange_dtype=int8",
        *(f"{PIPEFUSION} --num_pipeline_patch={n} --warm_up_steps={w}" for n in (2, 4) for w in (1, 3)),
        *(f"--warm_up_steps={w}" for w in (3, 10)),
        *(f"{SHARED} --warm_up_steps={w} --async_steps={n}" for w, n in ((10, 15), (12, 8), (15, 4))),
        f"{SHARED} --async_steps=auto",
        *(f"--quantize_to={bits}" for bits in ("float8_weight", "int8_weight", "int4")),
        *(f"--step_cache={cache}" for cache in ("fbcache:0.12", "taylorseer:3")),
    ),
    "student": (
        *(f"--warm_up_steps={w}" for w in (1, 2, 3, "auto")),
        *(f"--quantize_to={bits}" for bits in ("float8_weight", "int8_weight", "int4")),
    ),
}
"""Flags of the launches that draw more prompts first: what --preset sets, the points of benchmarks/pareto.py,
and one of each method."""
