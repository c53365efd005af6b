"""What the trainings of the demo have in common: flags, the loop and its averages, saving, checking."""

from __future__ import annotations

import argparse
import copy
import json
import math
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before the imports: --minutes is the wall clock of the whole run

import torch  # noqa: E402
from draw import PIXELS, held_out_scenes, judge  # noqa: E402
from evaluate import count_right, paint  # noqa: E402
from torch import Tensor, nn  # noqa: E402

RESERVE = 12.0  # seconds kept for the last check and for saving
WARM_UP = 200  # optimizer steps
EMA_DECAY = 0.999

# For --resume: weights that are good already want smaller steps, and a shorter run a shorter memory.
RESUMED_WARM_UP = 100
RESUMED_EMA_DECAY = 0.995


def say(message: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {message}", flush=True)


class Average:
    """An exponential moving average of parameters, used in place of them within `swapped`.

    With `ramp` the first, untrained weights are forgotten fast.
    """

    def __init__(self, parameters: list[Tensor], decay: float, ramp: bool) -> None:
        self.parameters, self.decay, self.ramp = parameters, decay, ramp
        self.averages = [p.detach().clone() for p in parameters]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        decay = self.decay
        if self.ramp:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the averages into the parameters."""
        torch._foreach_copy_(self.parameters, self.averages)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            self.apply()
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, kept)


def fit(
    name: str,
    parameters: list[Tensor],
    loss_of_batch: Callable[[], Tensor],
    *,
    until: float,
    rate: float,
    device: torch.device,
    resumed: bool = False,
    each_minute: Callable[[], None] | None = None,
) -> None:
    """Trains until the clock says `until`: AdamW, a short warm-up, then a cosine over the time that there is.

    Calls `each_minute` with the moving average in the parameters, so that a run cut short leaves something.
    Leaves the moving average in the parameters. Raises FloatingPointError when the loss is no number.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = Average(parameters, RESUMED_EMA_DECAY if resumed else EMA_DECAY, ramp=not resumed)
    warm_up = RESUMED_WARM_UP if resumed else WARM_UP
    begun = said = kept = time.monotonic()
    total, steps, since = torch.zeros((), device=device), 0, 0
    while (now := time.monotonic()) < until:
        progress = (now - begun) / (until - begun)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        total += loss.detach()
        steps, since = steps + 1, since + 1
        if now - said > 15 or steps == 20:
            mean = float(total) / since
            say(
                f"{name}: step {steps}, {100 * progress:.0f} %, loss {mean:.5f}, "
                f"{since / (now - said):.1f} steps/s"
            )
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name}: the loss is {mean} at step {steps}")
            total, since, said = torch.zeros_like(total), 0, now
        if each_minute and now - kept > 60:
            with average.swapped():
                each_minute()
            kept = time.monotonic()
    average.apply()
    say(f"{name}: {steps} steps")


def check(pipe: Any, count: int, steps: int, cfg: float) -> None:
    """Says how many of `count` held-out prompts the model obeys as it is."""
    asked = held_out_scenes(count)
    # What is compiled for training is compiled for its sizes only.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        pictures = paint(pipe, asked, steps=steps, cfg=cfg)
    right, wrong = count_right(asked, [judge(picture) for picture in pictures])
    say(f"check: {right} of {count} held-out prompts right, wrong in {dict(wrong)}")


def save(pipe: Any, out: Path, tar: Path | None) -> None:
    """Writes the pipeline in fp16 safetensors; the models stay as they are."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    try:
        pipe.register_modules(**{name: copy.deepcopy(model).half() for name, model in models.items()})
        pipe.save_pretrained(out)
    finally:
        pipe.register_modules(**models)
    for name, model in models.items():
        config = out / name / "config.json"
        settings = json.loads(config.read_text())
        if hasattr(model, "register_to_config"):  # diffusers notes where it loaded a model from: of no use
            settings.pop("_name_or_path", None)
        else:  # Without a dtype asked for, transformers loads in the dtype noted here but diffusers in fp32.
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if tar:
        with tarfile.open(tar, "w") as archive:
            archive.add(out, arcname=out.name)
    say(f"saved {out}: {size / 1e6:.2f} MB")


def arguments(description: str | None, minutes: float, batch: int, resume: str) -> argparse.ArgumentParser:
    """The flags that all trainings take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, each minute and at the end")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help=resume)
    parser.add_argument("--tar", type=Path, help="also write the folder as one uncompressed tar")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help=f"wall clock of the whole run (default {minutes:g})"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=PIXELS, help="side of the pictures (default 128)")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--masks", type=int, default=400, help="drawings of each shape and size")
    parser.add_argument("--pool", type=int, default=131072, help="pictures encoded, or trajectories drawn")
    parser.add_argument("--check", type=int, default=50, help="held-out prompts of each check")
    return parser


def prepare(args: argparse.Namespace) -> tuple[torch.device, float]:
    """Seeds, fast arithmetic; the device, and the clock's time at which training ends."""
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 3  # trying all algorithms costs half a minute
    return torch.device(args.device), STARTED + 60 * args.minutes - RESERVE
