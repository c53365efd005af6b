"""Text encoders of the published sizes, eager and captured as CUDA graphs: milliseconds a prompt, error.

python benchmarks/encoders.py sd3 flux hy pixa sdxl

Random weights. A prompt is what the type's pipeline encodes for one picture with guidance: with the negative
prompt where it has one. --tiny --device cpu shows that it runs; nothing is captured there.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import measure
from benchmarks.models import MAKERS, text_modules
from shared.models import MODELS
from shared.parallel.graphs import Captured
from tests import tiny

REPEATS = 8
WORDS = ("a red cat", "the moon over a very long river bank")


class ReachedError(Exception):
    """Ends a generation when its denoising is about to begin."""


class Prompts:
    """What a pipeline encodes for a prompt, without the rest of it."""

    def __init__(self, pipe: Any, name: str, tiny_size: bool) -> None:
        self.pipe = pipe
        self.arguments = tiny.call_args(name) if tiny_size else dict(MODELS[name].pipeline_defaults)
        self.found: list[torch.Tensor] = []
        self._encode = pipe.encode_prompt

    def encode(self, words: str) -> list[torch.Tensor]:
        """All embeddings of these words, and of the negative ones."""
        self.found = []
        self.pipe.encode_prompt = self._noting
        self.pipe.prepare_latents = self._stop
        try:
            self.pipe(**self.arguments | {"prompt": words})
        except ReachedError:
            return self.found
        finally:
            del self.pipe.encode_prompt, self.pipe.prepare_latents
        raise RuntimeError(f"{type(self.pipe).__name__} prepared no latents")

    def _noting(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._encode(*args, **kwargs)
        self.found += [x for x in answer if isinstance(x, torch.Tensor)]
        return answer

    def _stop(self, *args: Any, **kwargs: Any) -> Any:
        raise ReachedError


def measured(prompts: Prompts, device: torch.device) -> tuple[float, list[list[torch.Tensor]]]:
    """Median milliseconds of one prompt, other words each time, and the embeddings of each of WORDS."""
    numbers = itertools.count()

    def encode() -> list[torch.Tensor]:
        return prompts.encode(f"{WORDS[0]}, {next(numbers)}")

    encode()  # an encoder is captured at its second call, which `measure` leaves out
    seconds, _, _ = measure(encode, device, REPEATS)
    return 1000 * seconds, [prompts.encode(words) for words in WORDS]


def relative(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The greatest relative error among some tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(made, wanted, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("types", nargs="+", choices=("sd3", "flux", "hy", "pixa", "pixs", "sdxl"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--tiny", action="store_true", help="use the tests' small checkpoints, to see that it runs"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    columns = ("type", "eager ms", "captured ms", "error")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in options.types:
        if options.tiny:
            pipe = tiny.load(name).to(device, dtype)
        else:
            pipe = MAKERS[name](device, dtype)
            pipe.register_modules(**text_modules(name, device, dtype))
        prompts = Prompts(pipe, name, options.tiny)
        eager, plain = measured(prompts, device)
        with Captured(pipe, MODELS[name].text_encoders):
            captured, made = measured(prompts, device)
        if all(torch.equal(a, b) for a, b in zip(*made, strict=True)):
            raise RuntimeError(f"{name}: a captured encoder gives the same output for different prompts")
        error = max(relative(a, b) for a, b in zip(made, plain, strict=True))
        print(f"| {name} | {eager:.1f} | {captured:.1f} | {error:.4f} |", flush=True)
        del pipe, prompts
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
