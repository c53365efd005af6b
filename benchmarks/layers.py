"""Single layers of the shapes that models have: linear ones in 8 bits, attention, convolutions

python benchmarks/layers.py linear [--models sdxl,sd3,flux] [--kinds float8,int8,int8-tuned]
python benchmarks/layers.py attention convolutions

Microseconds a call. Shapes are those of a picture of 1024 x 1024 pixels, with both guidance branches on one
GPU and with one of them. A linear layer is compiled between elementwise ones, into which quantizing its
inputs and scaling its results are compiled, as in a block; behind "-tuned" torch.compile may make Triton
kernels that scale results. Convolutions are channels last, by cuDNN's first choice and by its measured one.
All calls are captured.
--device cpu --tiny shows that it runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.pipeline import eight_bits
from shared.pipeline.layer_timing import DEFAULT, LAYERS, Call, Shape, calls_of, layers_of, microseconds
from shared.pipeline.loading import channels_last

LINEAR: dict[str, list[tuple[int, int, int]]] = {
    "sdxl": [
        (2048, 1280, 10240),
        (2048, 5120, 1280),
        (8192, 640, 5120),
        (154, 2048, 1280),
        (2048, 1280, 1280),
        (8192, 2560, 640),
        (8192, 640, 640),
        (1024, 1280, 10240),
        (1024, 5120, 1280),
    ],
    "sd3": [
        (8192, 1536, 1536),
        (8192, 1536, 6144),
        (8192, 6144, 1536),
        (4096, 1536, 1536),
        (4096, 1536, 4608),
        (4096, 1536, 6144),
        (333, 1536, 6144),
        (333, 1536, 1536),
        (1, 1536, 9216),
    ],
    "flux": [
        (4096, 3072, 12288),
        (2304, 3072, 3072),
        (2304, 3072, 9216),
        (2304, 3072, 12288),
        (2304, 15360, 3072),
        (256, 3072, 12288),
        (256, 3072, 3072),
        (1, 3072, 18432),
    ],
}
"""Rows, inputs, outputs."""
ATTENTION = [
    ("sdxl", 2, 10, 4096, 4096, 64),
    ("sdxl", 2, 20, 1024, 1024, 64),
    ("sdxl", 2, 10, 4096, 77, 64),
    ("sdxl", 2, 20, 1024, 77, 64),
    ("sdxl", 1, 10, 4096, 4096, 64),
    ("sdxl", 1, 20, 1024, 1024, 64),
    ("sd3", 1, 24, 4429, 4429, 64),
    ("flux", 1, 24, 4608, 4608, 128),
    ("flux", 1, 24, 2304, 2304, 128),
]
"""Batch, heads, queries, keys, values of a head."""
CONVOLUTIONS = [
    ("sdxl", 4, 320, 128, 3),
    ("sdxl", 320, 320, 128, 3),
    ("sdxl", 640, 320, 128, 3),
    ("sdxl", 960, 320, 128, 3),
    ("sdxl", 960, 320, 128, 1),
    ("sdxl", 320, 640, 64, 3),
    ("sdxl", 640, 640, 64, 3),
    ("sdxl", 1280, 640, 64, 3),
    ("sdxl", 1920, 640, 64, 3),
    ("sdxl", 640, 1280, 32, 3),
    ("sdxl", 1280, 1280, 32, 3),
    ("sdxl", 2560, 1280, 32, 3),
]
"""Inputs, outputs, height and width, kernel."""


def tried(calls: Sequence[Call]) -> str:
    """The time as a cell; what fails leaves the others to be measured."""
    try:
        return f"{microseconds(calls):.1f}"
    except Exception as error:
        return str(error).splitlines()[0][:40]


def row(cells: Sequence[Any]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(cells: Sequence[str]) -> None:
    print()
    row(cells)
    row(["---"] * len(cells))


def linear(options: argparse.Namespace, device: torch.device) -> None:
    kinds = options.kinds.split(",")
    head(["model", "rows", "inputs", "outputs", "bf16", *kinds])
    for model in options.models.split(","):
        for shape in LINEAR[model][: 1 if options.tiny else None]:
            rows, inputs, outputs = (max(n // 16, 1) for n in shape) if options.tiny else shape
            x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
            plain = layers_of(Shape(rows, inputs, outputs), torch.bfloat16, device)
            cells = [tried(calls_of(plain, x, DEFAULT))]
            for kind in kinds:
                kind, _, tuned = kind.partition("-")
                layers = copy.deepcopy(plain)
                for layer in layers:
                    eight_bits.quantize_layer(layer, kind)
                with inductor.patch(max_autotune_gemm=bool(tuned)):
                    cells.append(tried(calls_of(layers, x, DEFAULT)))
            row([model, rows, inputs, outputs, *cells])


def attention(options: argparse.Namespace, device: torch.device) -> None:
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    head(["model", "batch", "heads", "queries", "keys", "size", "as it is", *backends])
    for model, *shape in ATTENTION[: 1 if options.tiny else None]:
        batch, heads, queries, keys, size = (max(n // 16, 1) for n in shape) if options.tiny else shape
        q, k, v = (
            torch.randn(batch, tokens, heads, size, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for tokens in (queries, keys, keys)
        )
        calls: list[Call] = [partial(F.scaled_dot_product_attention, q, k, v)] * LAYERS
        cells = [tried(calls)]
        for backend in backends.values():
            with sdpa_kernel(backend):
                cells.append(tried(calls))
        row([model, batch, heads, queries, keys, size, *cells])


def convolutions(options: argparse.Namespace, device: torch.device) -> None:
    named = ["model", "batch", "inputs", "outputs", "side", "kernel"]
    head([*named, "first choice", "measured", "% of 900 TFLOPS"])
    shapes = CONVOLUTIONS[: 1 if options.tiny else None]
    for batch, (model, inputs, outputs, side, kernel) in itertools.product((2, 1), shapes):
        side //= 16 if options.tiny else 1
        x = torch.randn(batch, inputs, side, side, device=device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last)
        nets = [
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2).to(device, torch.bfloat16)
            for _ in range(LAYERS)
        ]
        for net in nets:
            channels_last(net)
        cells = []
        for measured in (False, True):
            with torch.backends.cudnn.flags(enabled=True, benchmark=measured):
                cells.append(tried([partial(net, x) for net in nets]))
        flop = 2 * batch * side**2 * inputs * outputs * kernel**2
        least = flop / 900e12 * 1e6
        row([model, batch, inputs, outputs, side, kernel, *cells, f"{100 * least / float(cells[1]):.0f}"])


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("layers", nargs="+", choices=("linear", "attention", "convolutions"))
    parser.add_argument("--kinds", default="float8,int8")
    parser.add_argument("--models", default=",".join(LINEAR))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="one shape of each, 16 times smaller")
    options = parser.parse_args()
    measures = {"linear": linear, "attention": attention, "convolutions": convolutions}
    with torch.inference_mode():
        for kind in options.layers:
            measures[kind](options, torch.device(options.device))


if __name__ == "__main__":
    main()
