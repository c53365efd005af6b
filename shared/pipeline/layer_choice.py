"""Which layers compute in 8 bits on this GPU: those that are not slower so, measured once and kept

A layer gains by its number of rows, inputs and outputs. Rows are those that a rank sees of one picture at the
launch's size; the times are kept in --cache_dir, so that only the first start of a launch measures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shared.api.hashes import cache_folder
from shared.launch.backend import Needs
from shared.launch.errors import first_line
from shared.launch.flags import COMPUTED, HostConfig
from shared.launch.phases import PHASES
from shared.models import ModelSpec
from shared.pipeline.compile import denoiser_settings
from shared.pipeline.eight_bits import computing_layers
from shared.pipeline.layer_timing import Shape, both
from shared.pipeline.work import Work
from shared.ranks.channel import Channel

log = logging.getLogger("host")

BUDGET = 10.0
"""Seconds after which no further shape is measured; its layers compute in 8 bits until the next start."""
PROMPT = 512
"""Tokens of a prompt, where the type does not say how many."""
TOLD = 4
"""Shapes that the log names."""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Times = dict[Shape, tuple[float, float]]
"""Microseconds in 16 bits and in 8."""


@dataclass(frozen=True)
class Chosen:
    """What was measured for a launch, and which layers stay in 16 bits by it."""

    layers: Mapping[str, Shape]
    """All that could compute in 8 bits, by component and name."""
    times: Times
    dtype: torch.dtype
    seconds: float = 0.0
    """That measuring took."""
    memory_asks: bool = False
    """Whether all compute in 8 bits, as they would not fit otherwise."""

    @property
    def slower(self) -> dict[Shape, float]:
        """By how much 8 bits are slower where they are, the slowest first."""
        found = {shape: eight / sixteen for shape, (sixteen, eight) in self.times.items() if eight > sixteen}
        return dict(sorted(found.items(), key=lambda one: -one[1]))

    @property
    def in_16_bits(self) -> frozenset[str]:
        """The layers that stay as they are."""
        slower = {} if self.memory_asks else self.slower
        return frozenset(name for name, shape in self.layers.items() if shape in slower)

    def line(self) -> str:
        """For the log."""
        total, stay = len(self.layers), len(self.in_16_bits)
        parts = [f"8 bits: {total - stay} of {total} layers"]
        why = "needs 8 bits by memory" if self.memory_asks else f"stays {NAMES[self.dtype]}"
        slower = list(self.slower.items())
        parts += [f"{shape} of {shape.rows} rows {why}, {by:.2g} x slower" for shape, by in slower[:TOLD]]
        if len(slower) > TOLD:
            parts.append(f"{len(slower) - TOLD} more shapes too")
        if self._unmeasured:
            parts.append(f"{len(self._unmeasured)} shapes are not measured yet")
        if self.seconds:
            parts.append(f"measured in {self.seconds:.1f} s")
        return "; ".join(parts)

    def told(self) -> dict[str, Any]:
        """For /health: counts of layers; by rows x inputs x outputs the microseconds in 16 bits and in 8."""
        return {
            "layers": len(self.layers),
            "in_16_bits": len(self.in_16_bits),
            "memory_asks": self.memory_asks,
            "microseconds": {_key(shape): [round(t, 1) for t in both] for shape, both in self.times.items()},
        }

    @property
    def _unmeasured(self) -> set[Shape]:
        return set(self.layers.values()) - set(self.times)


def measures(config: HostConfig, device: torch.device) -> bool:
    """Whether there is something to choose: CPUs do not compute in 8 bits for speed."""
    return config.quantize_to in COMPUTED and config.compile_unet and device.type == "cuda"


def chosen(config: HostConfig, needs: Needs, work: Work, channel: Channel) -> Chosen | None:
    """What rank 0 measures of a launch, on every rank; None where there is nothing to choose.

    All ranks must call it.

    Args:
        work: has the launch's denoisers, without their weights.
    """
    if not measures(config, channel.world.device):
        return None
    layers = shapes(config, needs, work)
    times, began = Times(), time.monotonic()
    if channel.world.rank == 0:
        PHASES.begin("timing layers")
        times = kept_times(config, work.dtype, channel.world.device, Counter(layers.values()))
        PHASES.begin("memory plan")
    seconds = time.monotonic() - began
    # Ranks that would choose by times of their own could differ.
    first = channel.gather_infos({"times": times, "seconds": seconds})[0]
    return Chosen(layers, first["times"], work.dtype, first["seconds"])


def shapes(config: HostConfig, needs: Needs, work: Work) -> dict[str, Shape]:
    """The shapes of the layers that could compute in 8 bits, by component and name."""
    spec, found = config.spec, dict[str, Shape]()
    places = work.places(config)
    for component in (*spec.denoisers, "refiner"):
        for module in work.models[component].modules if component in work.models else ():
            exact, levels = [*spec.kept, *spec.few_rows], work.levels(module)
            for name, layer in computing_layers(module, exact, not needs.inside_blocks).items():
                rows = rows_of(name, spec, levels, places, needs.row_parts)
                found[f"{component}.{name}"] = Shape(rows, layer.in_features, layer.out_features)
    return found


def rows_of(
    name: str, spec: ModelSpec, levels: int, places: int, parts: int = 1, prompt: int | None = None
) -> int:
    """How many rows a layer of a denoiser sees in one call.

    Args:
        name: the layer's.
        levels: of a UNet.
        places: the picture's tokens, or latents.
        parts: calls that divide a step's tokens.
        prompt: its tokens; by default the type's.
    """

    def of(patterns: Iterable[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    plan = spec.tokens
    if plan is None:
        batch = 2 if spec.cfg > 1 else 1
    else:
        batch = 2 if plan.guidance == "batch" and not plan.unguided else 1
    prompt = prompt or spec.text_tokens or (77 if plan is None else PROMPT)
    if of(spec.one_row):
        return batch
    if of(spec.prompt_rows):
        shared = plan is not None and (plan.text or plan.sections)
        return max(batch * prompt // (parts if shared else 1), 1)
    joined = prompt if of(spec.joined_rows) else 0
    return max(batch * (places // 4 ** _level(name, levels) + joined) // parts, 1)


def _level(name: str, levels: int) -> int:
    """The level of a UNet that a block is on; 0 of a transformer's."""
    side, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    if side == "mid_block":
        return levels - 1
    if side == "up_blocks":
        return levels - 1 - int(number)
    return int(number) if side == "down_blocks" else 0


def kept_times(config: HostConfig, dtype: torch.dtype, device: torch.device, layers: Counter[Shape]) -> Times:
    """The times of all shapes, the kept ones and those that are measured now.

    Args:
        layers: how many layers each shape has.
    """
    key = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {package: version(package) for package in ("torch", "torchao")},
        "kind": config.quantize_to,
        "dtype": str(dtype),
        "compiled": denoiser_settings(config),
    }
    text = json.dumps(key, sort_keys=True, default=str)
    file = cache_folder(config) / "layers" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    known = _read(file)
    missing = Counter({shape: count for shape, count in layers.items() if shape not in known})
    if missing:
        log.info("8 bits: timing %d shapes of layers, in %.0f s or little more", len(missing), BUDGET)
        known |= measured(config, dtype, device, missing)
        _write(file, key, known)
    return {shape: known[shape] for shape in layers if shape in known}


def measured(config: HostConfig, dtype: torch.dtype, device: torch.device, layers: Counter[Shape]) -> Times:
    """The times of as many shapes as the budget allows, those that compute the most first."""
    kind, settings = str(config.quantize_to), denoiser_settings(config)
    found, began = Times(), time.monotonic()
    for shape in sorted(layers, key=lambda one: -layers[one] * one.rows * one.inputs * one.outputs):
        if time.monotonic() - began > BUDGET:
            break
        try:
            found[shape] = both(shape, kind, dtype, device, settings)
        except RuntimeError as error:
            why = first_line(error)
            log.warning("8 bits: layers %s of %d rows are not measured: %s", shape, shape.rows, why)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _key(shape: Shape) -> str:
    return f"{shape.rows}x{shape.inputs}x{shape.outputs}"


def _read(file: Path) -> Times:
    """The kept times; none where the file is not there or broken."""
    try:
        times = json.loads(file.read_text())["times"]
        return dict(_entries(times))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is broken and made anew: %s", file, first_line(error))
        return {}


def _entries(times: Mapping[str, Any]) -> Iterator[tuple[Shape, tuple[float, float]]]:
    for key, (sixteen, eight) in times.items():
        rows, inputs, outputs = map(int, key.split("x"))
        yield Shape(rows, inputs, outputs), (float(sixteen), float(eight))


def _write(file: Path, key: Mapping[str, Any], times: Times) -> None:
    """Whole or not at all, as several hosts may do it."""
    data = {"key": key, "times": {_key(shape): list(both) for shape, both in times.items()}}
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(data, indent=1, default=str))
        unfinished.replace(file)
    except OSError as error:
        log.warning("the times of layers are not kept in %s: %s", file, first_line(error))
