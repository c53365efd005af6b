"""Trains a student of the demo's UNet that needs 4 steps and no guidance, and so 4 passes instead of 60.

Progressive distillation (arXiv 2202.00512) in one round, of the guidance as well (arXiv 2210.03142): the
teacher draws trajectories of 40 guided DDIM steps from training captions, and the student learns to go to
where the teacher is ten steps later, from the teacher's states and, every other time, from its own.
It predicts v; text encoder and autoencoder are the teacher's. One GPU needs 7 minutes.
"""

from __future__ import annotations

import copy
import random
import time
from typing import Any

from training import arguments, check, fit, prepare, save, say  # first: its clock starts here

# isort: split
import torch
from checkpoints import CHECKPOINTS
from diffusers import DDIMScheduler, StableDiffusionPipeline
from draw import Scene, scenes
from torch import Tensor

TEACHER_STEPS = 40
DRAWING_SHARE = 0.3  # of the time after the start-up, for the trajectories
RATE, RESUMED_RATE = 6e-4, 2e-4  # peak learning rates of AdamW
OWN_STATES = 0.5  # share of batches that begin where the student itself would be


class Trajectories:
    """The teacher's ways from noise to a picture: its state before each step of the student, and the last."""

    @torch.no_grad()
    def __init__(
        self, pipe: Any, device: torch.device, *, until: float, most: int, batch: int, cfg: float
    ) -> None:
        steps = CHECKPOINTS["student"].steps
        captions = [s.caption for s in scenes(held_out=False)]
        # Half of them do not name the size, as in the teacher's training.
        captions += [Scene(s.shape, s.colour, s.background).caption for s in scenes(held_out=False) if s.size]
        tokens = pipe.tokenizer(["", *captions], padding="max_length", return_tensors="pt").input_ids
        self.states = torch.cat([pipe.text_encoder(part.to(device))[0] for part in tokens.split(256)])
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(TEACHER_STEPS)
        times, side = scheduler.timesteps.tolist(), pipe.unet.config.sample_size
        paths: list[Tensor] = []
        said: list[Tensor] = []
        while not paths or (time.monotonic() < until and len(paths) * batch < most):
            caption = torch.randint(1, len(self.states), (batch,), device=device)
            words = torch.cat([self.states[caption], self.states[:1].expand(batch, -1, -1)])
            latents = torch.randn(batch, pipe.unet.config.in_channels, side, side, device=device)
            path = [latents]
            for done, moment in enumerate(times, 1):
                with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                    both = pipe.unet(torch.cat([latents, latents]), moment, words).sample.float()
                positive, negative = both.chunk(2)
                noise = torch.lerp(negative, positive, cfg)
                latents = scheduler.step(noise, moment, latents).prev_sample
                if done % (TEACHER_STEPS // steps) == 0:
                    path.append(latents)
            paths.append(torch.stack(path, 1).half())
            said.append(caption)
        self.paths, self.captions = torch.cat(paths), torch.cat(said)  # [n, steps + 1, 4, h, w] and [n]
        if not self.paths.isfinite().all():
            raise FloatingPointError("the teacher's trajectories are not all finite")

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` random trajectories, float32, and the text states of their captions."""
        chosen = torch.randint(len(self.paths), (count,), device=self.paths.device)
        return self.paths[chosen].float(), self.states[self.captions[chosen]]


class Steps:
    """The student's steps: x to a x + b v by DDIM, with v predicted at a time step."""

    def __init__(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)
        self.times = scheduler.timesteps.tolist()
        products = [float(scheduler.alphas_cumprod[t]) for t in self.times]
        self.factors = []
        for here, there in zip(products, [*products[1:], float(scheduler.final_alpha_cumprod)], strict=True):
            a, s, to_a, to_s = here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5
            self.factors.append((to_a * a + to_s * s, to_s * a - to_a * s))

    def step(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        a, b = self.factors[k]
        return a * x + b * v

    def needed(self, k: int, x: Tensor, there: Tensor) -> Tensor:
        """The v that leads from x to `there` by step k."""
        a, b = self.factors[k]
        return (there - a * x) / b


def train(unet: Any, scheduler: Any, drawn: Trajectories, batch: int, **options: Any) -> None:
    steps = Steps(scheduler, drawn.paths.shape[1] - 1)
    count = len(steps.times)

    def loss_of_batch() -> Tensor:
        paths, words = drawn.draw(batch)
        own = random.random() < OWN_STATES
        if own:
            k = random.randrange(1, count)
            x = paths[:, 0]
            with torch.no_grad():
                for j in range(k):
                    x = steps.step(j, x, unet(x, steps.times[j], words).sample.float())
            moments: Any = steps.times[k]
            wanted = steps.needed(k, x, paths[:, k + 1])
        else:  # a quarter of the batch for each step
            parts = paths.chunk(count)
            x = torch.cat([part[:, k] for k, part in enumerate(parts)])
            wanted = torch.cat([steps.needed(k, p[:, k], p[:, k + 1]) for k, p in enumerate(parts)])
            moments = torch.cat(
                [torch.full((len(p),), steps.times[k], device=x.device) for k, p in enumerate(parts)]
            )
        return (unet(x, moments, words).sample.float() - wanted).square().mean()

    fit("student", list(unet.parameters()), loss_of_batch, **options)


def main() -> None:
    parser = arguments(__doc__, 7.0, 1024, "train this student further")
    parser.add_argument("--teacher", default=CHECKPOINTS["unet"].path, help="the teacher's folder")
    parser.add_argument("--drawn-batch", type=int, default=4096)
    args = parser.parse_args()
    device, end = prepare(args)
    random.seed(args.seed)
    teacher = StableDiffusionPipeline.from_pretrained(args.teacher, dtype=torch.float32).to(device)
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config, prediction_type="v_prediction")
    if args.resume:
        start = StableDiffusionPipeline.from_pretrained(args.resume, dtype=torch.float32).unet.to(device)
    else:
        start = copy.deepcopy(teacher.unet)
    pipe = StableDiffusionPipeline(
        **(teacher.components | {"unet": start, "scheduler": scheduler}), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (teacher.vae, teacher.text_encoder, teacher.unet):
        part.eval().requires_grad_(False)
    now = time.monotonic()
    drawn = Trajectories(
        teacher,
        device,
        until=now + DRAWING_SHARE * (end - now),
        most=args.pool,
        batch=args.drawn_batch,
        cfg=CHECKPOINTS["unet"].cfg,
    )
    say(
        f"{len(drawn.paths)} trajectories of {TEACHER_STEPS} steps drawn, "
        f"spread {float(drawn.paths[:, -1].float().std()):.2f}"
    )
    ways = CHECKPOINTS["student"]

    def save_and_check() -> None:
        save(pipe, args.out, args.tar)
        check(pipe, args.check, ways.steps, ways.cfg)

    rate = RESUMED_RATE if args.resume else RATE
    train(
        start.train(),
        DDIMScheduler.from_config(scheduler.config),
        drawn,
        args.batch,
        until=end,
        rate=rate,
        device=device,
        resumed=bool(args.resume),
        each_minute=save_and_check,
    )
    save_and_check()


if __name__ == "__main__":
    main()
