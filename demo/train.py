"""Trains the demo checkpoint: a small text-to-image model of Stable Diffusion 1's architecture, from nothing.

First the autoencoder, then text encoder and UNet together (DDPM, epsilon prediction, arXiv 2006.11239, in the
autoencoder's latents, arXiv 2112.10752; captions dropped for classifier-free guidance, arXiv 2207.12598).
The pictures are those of draw.py, its held-out scenes left out of both. One GPU needs about 7 minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before the imports: --minutes is the wall clock of the whole run

import numpy as np  # noqa: E402
import torch  # noqa: E402
from architecture import build_models, build_scheduler, build_tokenizer  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionPipeline  # noqa: E402
from draw import COLOURS, PIXELS, SHAPES, SIZES, Scene, draw, draw_mask, held_out_scenes, judge, scenes  # noqa: E402
from evaluate import count_right, paint  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

VAE_SHARE = 0.28  # of the time after the start-up
RESERVE = 12.0  # seconds kept for the last check and for saving
WARM_UP = 200  # optimizer steps
VAE_RATE, UNET_RATE = 1e-3, 8e-4  # peak learning rates of AdamW
KL_WEIGHT = 1e-4  # against an L1 of about 0.01; keeps the latents smooth and the decoder tolerant
EDGE_WEIGHT = 0.5
CAPTION_DROP = 0.1
SNR_CAP = 5.0  # min-SNR weighting, arXiv 2303.09556, section 3.4
EMA_DECAY = 0.999


def say(message: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {message}", flush=True)


class Pictures:
    """Draws training pictures on the device: masks by Pillow, once; colours put in as they are asked for."""

    def __init__(self, device: torch.device, seed: int, pixels: int, masks_each: int) -> None:
        rng = random.Random(seed)
        self.scenes = [scene for scene in scenes(held_out=False) if scene.size]
        self.device, self.masks_each = device, masks_each
        masks = [
            np.asarray(draw_mask(shape, size, rng, pixels))
            for shape in SHAPES
            for size in SIZES
            for _ in range(masks_each)
        ]
        self.masks = torch.from_numpy(np.stack(masks)).to(device)  # uint8 [shapes * sizes * masks_each, H, W]
        self.palette = torch.tensor(list(COLOURS.values()), device=device).float() / 127.5 - 1  # [colours, 3]
        names = list(COLOURS)
        rows = [
            (
                SHAPES.index(s.shape) * len(SIZES) + SIZES.index(s.size or ""),
                names.index(s.colour),
                names.index(s.background),
            )
            for s in self.scenes
        ]
        self.rows = torch.tensor(rows, device=device)  # int64 [scenes, 3]: kind of mask, colour, background

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` random pictures, float32 [count, 3, H, W] from -1 to 1, and the indices of their scenes."""
        index = torch.randint(len(self.scenes), (count,), device=self.device)
        kind, colour, background = self.rows[index].unbind(1)
        masks = self.masks[kind * self.masks_each + torch.randint_like(kind, self.masks_each)]
        weight = masks.float().div_(255)[:, None]
        front, back = self.palette[colour][..., None, None], self.palette[background][..., None, None]
        return torch.lerp(back.expand(-1, -1, *weight.shape[2:]), front, weight), index


class Average:
    """An exponential moving average of parameters, used in place of them within `swapped`."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.averages = [p.detach().clone() for p in parameters]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        decay = min(EMA_DECAY, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)
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
    half_time: Callable[[], None] | None = None,
) -> Average:
    """Trains until the clock says `until`: AdamW, a short warm-up, then a cosine over the time that there is.

    Returns the moving average. Raises FloatingPointError when the loss is no number.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = Average(parameters)
    begun = said = time.monotonic()
    total, steps, since = torch.zeros((), device=device), 0, 0
    while (now := time.monotonic()) < until:
        progress = (now - begun) / (until - begun)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
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
        if half_time and progress > 0.5:
            with average.swapped():
                half_time()
            half_time = None
    say(f"{name}: {steps} steps")
    return average


def train_vae(vae: AutoencoderKL, pictures: Pictures, *, until: float, batch: int) -> None:
    """L1, L1 of the differences of neighbours (crisp edges), and a little Kullback-Leibler divergence."""

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    def loss_of_batch() -> Tensor:
        images, _ = pictures.draw(batch)
        latents = vae.encode(images).latent_dist
        decoded = vae.decode(latents.sample()).sample.float()
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
        mean, logvar = latents.mean.float(), latents.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded, images) + EDGE_WEIGHT * edge + KL_WEIGHT * divergence

    average = fit(
        "vae", list(vae.parameters()), loss_of_batch, until=until, rate=VAE_RATE, device=pictures.device
    )
    torch._foreach_copy_([p.detach() for p in vae.parameters()], average.averages)


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, pictures: Pictures, count: int, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of `count` pictures: mean and standard deviation, [count, 4, h, w], and scene indices.

    Sets the autoencoder's scaling_factor, so that scaled latents have a standard deviation of 1.
    """
    parts = []
    for first in range(0, count, batch):
        images, index = pictures.draw(min(batch, count - first))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            latents = vae.encode(images).latent_dist
        parts.append((latents.mean.float(), latents.std.float(), index))
    means, stds, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    # The UNet sees samples, so the spread of the posterior counts as well.
    scale = float((means.var() + stds.square().mean()).rsqrt())
    vae.register_to_config(scaling_factor=round(scale, 5))
    mean_of_channels = [round(float(m), 2) for m in (means * scale).mean((0, 2, 3))]
    say(
        f"latents: scaling_factor {scale:.4f}, means {mean_of_channels}, "
        f"noise {float(stds.mean()) * scale:.3f}"
    )
    return means, stds, indices


@torch.no_grad()
def check_vae(vae: AutoencoderKL, pixels: int, device: torch.device) -> None:
    """Says how many held-out scenes the rule still recognises after the autoencoder."""
    asked = held_out_scenes(64)
    images = np.stack([np.asarray(draw(scene, k, pixels)) for k, scene in enumerate(asked)])
    batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample
    error = 10 * math.log10(4 / float(F.mse_loss(decoded, batch)))
    arrays = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    right, wrong = count_right(asked, [judge(Image.fromarray(a)) for a in arrays])
    say(
        f"vae: {right} of {len(asked)} held-out pictures right after encoding and decoding, "
        f"{error:.1f} dB, wrong in {dict(wrong)}"
    )


def train_unet(
    pipe: Any,
    pictures: Pictures,
    pool: tuple[Tensor, Tensor, Tensor],
    *,
    until: float,
    batch: int,
    half_time: Callable,
) -> None:
    """UNet and text encoder together, by the denoising loss with min-SNR weights."""
    unet, text_encoder, device = pipe.unet, pipe.text_encoder, pictures.device
    scale = pipe.vae.config.scaling_factor
    means, stds, indices = pool[0] * scale, pool[1] * scale, pool[2]
    sizeless = [Scene(s.shape, s.colour, s.background) for s in pictures.scenes]
    captions = ["", *(s.caption for s in pictures.scenes), *(s.caption for s in sizeless)]
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids.to(
        device
    )
    products = pipe.scheduler.alphas_cumprod.to(device)

    def loss_of_batch() -> Tensor:
        chosen = torch.randint(len(indices), (batch,), device=device)
        latents = torch.addcmul(means[chosen], stds[chosen], torch.randn_like(means[chosen]))
        # Half of the captions do not tell the size.
        caption = 1 + indices[chosen] + torch.randint_like(chosen, 2) * len(sizeless)
        caption = caption * (torch.rand(batch, device=device) >= CAPTION_DROP)
        time_steps = torch.randint(len(products), (batch,), device=device)
        product = products[time_steps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = product.sqrt() * latents + (1 - product).sqrt() * noise
        states = text_encoder(tokens[caption])[0]
        guess = unet(noisy, time_steps, states).sample.float()
        ratio = product.flatten() / (1 - product.flatten())
        weights = ratio.clamp(max=SNR_CAP) / ratio
        return ((guess - noise).square().mean((1, 2, 3)) * weights).mean()

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    average = fit(
        "unet", parameters, loss_of_batch, until=until, rate=UNET_RATE, device=device, half_time=half_time
    )
    torch._foreach_copy_([p.detach() for p in parameters], average.averages)


def check(pipe: Any, count: int) -> None:
    """Says how many of `count` held-out prompts the model obeys as it is."""
    asked = held_out_scenes(count)
    right, wrong = count_right(asked, [judge(picture) for picture in paint(pipe, asked)])
    say(f"check: {right} of {count} held-out prompts right, wrong in {dict(wrong)}")


def save(pipe: Any, out: Path, tar: Path | None) -> None:
    """Writes the pipeline in fp16 safetensors; the models stay as they are."""
    halves = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("vae", "text_encoder", "unet")}
    StableDiffusionPipeline(
        **halves,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
    # Without a dtype asked for, transformers loads in the dtype noted here but diffusers in fp32: agree.
    config = out / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if tar:
        with tarfile.open(tar, "w") as archive:
            archive.add(out, arcname=out.name)
    say(f"saved {out}: {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tar", type=Path, help="also write the folder as one uncompressed tar")
    parser.add_argument("--minutes", type=float, default=7.0, help="wall clock of the whole run (default 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=PIXELS, help="side of the pictures (default 128)")
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--masks", type=int, default=400, help="drawings of each shape and size")
    parser.add_argument("--pool", type=int, default=131072, help="pictures encoded for the UNet's training")
    parser.add_argument(
        "--check", type=int, default=50, help="prompts of the checks at half time and at the end"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    end = STARTED + 60 * args.minutes - RESERVE

    tokenizer = build_tokenizer()
    vae, text_encoder, unet = (model.to(device).train() for model in build_models(tokenizer, args.pixels))
    sizes = {m.__class__.__name__: sum(p.numel() for p in m.parameters()) for m in (vae, text_encoder, unet)}
    say(f"parameters {sizes}, {len(tokenizer)} tokens, on {device}")
    pictures = Pictures(device, args.seed, args.pixels, args.masks)
    say(f"{len(pictures.masks)} masks of {len(pictures.scenes)} scenes drawn")

    now = time.monotonic()
    train_vae(vae, pictures, until=now + VAE_SHARE * (end - now), batch=args.vae_batch)
    vae.eval().requires_grad_(False)
    check_vae(vae, args.pixels, device)
    pool = encode_pool(vae, pictures, args.pool, 4 * args.vae_batch)

    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, build_scheduler(), None, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def half_time() -> None:
        save(pipe, args.out, args.tar)
        check(pipe, args.check)

    train_unet(pipe, pictures, pool, until=end, batch=args.batch, half_time=half_time)
    save(pipe, args.out, args.tar)
    check(pipe, args.check)


if __name__ == "__main__":
    main()
