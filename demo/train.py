"""Trains the demo checkpoint: a small text-to-image model of Stable Diffusion 1's architecture, from scratch.

First the autoencoder, then text encoder and UNet together (DDPM, epsilon prediction, arXiv 2006.11239, in the
autoencoder's latents, arXiv 2112.10752; captions dropped for classifier-free guidance, arXiv 2207.12598).
The pictures are those of draw.py, its held-out scenes left out of both. One GPU needs about 7 minutes, and
3 more for --resume, which trains only the decoder further, for small shapes, which are learned last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from training import arguments, check, fit, prepare, save, say  # first: its clock starts here

# isort: split
import numpy as np
import torch
from architecture import build_models, build_scheduler, build_tokenizer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from draw import draw, held_out_scenes, judge
from evaluate import CFG, STEPS, count_right
from pictures import Latents, Pictures
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

VAE_SHARE = 0.28  # of the time after the start-up
VAE_RATE, UNET_RATE = 1e-3, 8e-4  # peak learning rates of AdamW
KL_WEIGHT = 1e-4  # against an L1 of about 0.01; keeps the latents smooth and the decoder tolerant
EDGE_WEIGHT = 0.5
SNR_CAP = 5.0  # min-SNR weighting, arXiv 2303.09556, section 3.4
RESUMED_EDGE_WEIGHT = 1.0
RESUMED_RATE = 5e-4
SMALL_TIMES = 4  # small shapes for each large one


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
    pool: Latents,
    *,
    until: float,
    batch: int,
    each_minute: Callable[[], None],
) -> None:
    """UNet and text encoder together, by the denoising loss with min-SNR weights."""
    unet, text_encoder, device = pipe.unet, pipe.text_encoder, pictures.device
    tokens = pipe.tokenizer(pool.captions, padding="max_length", max_length=77, return_tensors="pt")
    tokens = tokens.input_ids.to(device)
    products = pipe.scheduler.alphas_cumprod.to(device)

    def loss_of_batch() -> Tensor:
        latents, caption = pool.draw(batch)
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
    fit(
        "unet", parameters, loss_of_batch, until=until, rate=UNET_RATE, device=device, each_minute=each_minute
    )


def main() -> None:
    parser = arguments(__doc__, 7.0, 768, "sharpen the decoder of this checkpoint")
    parser.add_argument("--vae-batch", type=int, default=128)
    args = parser.parse_args()
    device, end = prepare(args)

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
        check(pipe, args.check, STEPS, CFG)

    now = time.monotonic()
    if args.resume:
        train_decoder(pipe.vae, pictures, until=end, batch=args.vae_batch)
    else:
        train_vae(pipe.vae, pictures, until=now + VAE_SHARE * (end - now), batch=args.vae_batch)
    pipe.vae.eval().requires_grad_(False)
    check_vae(pipe.vae, args.pixels, device)
    if not args.resume:
        pool = Latents(pipe.vae, pictures, args.pool, 4 * args.vae_batch, rescale=True)
        train_unet(pipe, pictures, pool, until=end, batch=args.batch, each_minute=save_and_check)
    save_and_check()


if __name__ == "__main__":
    main()
