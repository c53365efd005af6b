"""Trains the demo checkpoint: a small text-to-image model of Stable Diffusion 1's architecture, from scratch.

First the autoencoder, then text encoder and UNet together (DDPM, epsilon prediction, arXiv 2006.11239, in the
autoencoder's latents, arXiv 2112.10752; captions dropped for classifier-free guidance, arXiv 2207.12598).
The pictures are those of draw.py, its held-out scenes left out of both. One GPU needs about 7 minutes, and
3 more for --resume, which trains only the decoder further, for small shapes, which are learned last.
"""

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

import numpy as np  # noqa: E402
import torch  # noqa: E402
from architecture import build_models, build_scheduler, build_tokenizer  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionPipeline  # noqa: E402
from draw import PIXELS, Scene, draw, held_out_scenes, judge  # noqa: E402
from evaluate import count_right, paint  # noqa: E402
from pictures import Pictures  # noqa: E402
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

# For --resume: weights that are good already want smaller steps, and a shorter run a shorter memory.
RESUMED_RATE = 5e-4
RESUMED_WARM_UP = 100
RESUMED_EDGE_WEIGHT = 1.0
RESUMED_EMA_DECAY = 0.995
SMALL_TIMES = 4  # small shapes for each large one


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
    half_time: Callable[[], None] | None = None,
) -> None:
    """Trains until the clock says `until`: AdamW, a short warm-up, then a cosine over the time that there is.

    Leaves the moving average in the parameters. Raises FloatingPointError when the loss is no number.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = Average(parameters, RESUMED_EMA_DECAY if resumed else EMA_DECAY, ramp=not resumed)
    warm_up = RESUMED_WARM_UP if resumed else WARM_UP
    begun = said = time.monotonic()
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
        if half_time and progress > 0.5:
            with average.swapped():
                half_time()
            half_time = None
    average.apply()
    say(f"{name}: {steps} steps")


def reconstruction_loss(decoded: Tensor, images: Tensor, edge_weight: float) -> Tensor:
    """L1, and L1 of the differences of neighbours, which makes edges crisp."""

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
    return F.l1_loss(decoded, images) + edge_weight * edge


def train_vae(vae: AutoencoderKL, pictures: Pictures, *, until: float, batch: int) -> None:
    """Reconstruction and a little Kullback-Leibler divergence."""

    def loss_of_batch() -> Tensor:
        images, _ = pictures.draw(batch)
        latents = vae.encode(images).latent_dist
        decoded = vae.decode(latents.sample()).sample.float()
        mean, logvar = latents.mean.float(), latents.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(decoded, images, EDGE_WEIGHT) + KL_WEIGHT * divergence

    fit("vae", list(vae.parameters()), loss_of_batch, until=until, rate=VAE_RATE, device=pictures.device)


def train_decoder(vae: AutoencoderKL, pictures: Pictures, *, until: float, batch: int) -> None:
    """Training of only the decoder: latents, and so a UNet trained on them, stay valid."""

    def loss_of_batch() -> Tensor:
        images, _ = pictures.draw(batch)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
        return reconstruction_loss(vae.decode(latents).sample.float(), images, RESUMED_EDGE_WEIGHT)

    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    device = pictures.device
    fit("decoder", parameters, loss_of_batch, until=until, rate=RESUMED_RATE, device=device, resumed=True)


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
    half_time: Callable[[], None],
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
        # Half of the captions do not name the size.
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
    fit("unet", parameters, loss_of_batch, until=until, rate=UNET_RATE, device=device, half_time=half_time)


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
    for part in ("vae", "unet"):  # diffusers notes where it loaded a model from: of no use elsewhere
        config = out / part / "config.json"
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
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
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="sharpen the decoder of this checkpoint"
    )
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
    torch.backends.cudnn.benchmark_limit = 3  # trying all algorithms costs half a minute
    end = STARTED + 60 * args.minutes - RESERVE

    tokenizer = build_tokenizer()
    if args.resume:
        pipe = StableDiffusionPipeline.from_pretrained(args.resume, tokenizer=tokenizer, dtype=torch.float32)
    else:
        vae, text_encoder, unet = build_models(tokenizer, args.pixels)
        pipe = StableDiffusionPipeline(
            vae,
            text_encoder,
            tokenizer,
            unet,
            build_scheduler(),
            None,
            None,
            None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    models = [model.to(device).train() for model in (pipe.vae, pipe.text_encoder, pipe.unet)]
    sizes = {m.__class__.__name__: sum(p.numel() for p in m.parameters()) for m in models}
    say(f"parameters {sizes}, {len(pipe.tokenizer)} tokens, on {device}")
    pictures = Pictures(device, args.seed, args.pixels, args.masks, SMALL_TIMES if args.resume else 1)
    say(f"{len(pictures.masks)} masks of {len(pictures.scenes)} scenes drawn")

    def save_and_check() -> None:
        save(pipe, args.out, args.tar)
        check(pipe, args.check)

    now = time.monotonic()
    if args.resume:
        train_decoder(pipe.vae, pictures, until=end, batch=args.vae_batch)
    else:
        train_vae(pipe.vae, pictures, until=now + VAE_SHARE * (end - now), batch=args.vae_batch)
    pipe.vae.eval().requires_grad_(False)
    check_vae(pipe.vae, args.pixels, device)
    if not args.resume:
        pool = encode_pool(pipe.vae, pictures, args.pool, 4 * args.vae_batch)
        train_unet(pipe, pictures, pool, until=end, batch=args.batch, half_time=save_and_check)
    save_and_check()


if __name__ == "__main__":
    main()
