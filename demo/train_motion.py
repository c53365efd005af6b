"""Trains AnimateDiff's motion modules (arXiv 2307.04725) on the demo's UNet, for shapes that move as told.

Text encoder, autoencoder and UNet stay what they are; only a diffusers MotionAdapter is trained, by the
denoising loss on the videos of moving.py without the held-out ones. --resume trains one further.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, cast

from training import arguments, fit, prepare, say  # first: its clock starts here

# isort: split
import torch
from checkpoints import CHECKPOINTS
from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from evaluate import count_right, paint
from moving import FRAMES, held_out_clips, judge_clip
from pictures import Clips
from torch import Tensor
from torch.func import functional_call

RATE = 1e-3  # peak learning rate of AdamW
# Where the shape is in which frame is decided at once, in the first tenth of the way from noise to video, and
# only there the words count: half of the noise levels are of it, and errors weigh as those of the video do.
EARLY, EARLY_SHARE = 0.15, 0.5
SNR_CAP = 5.0  # min-SNR weighting, as in the UNet's training, is added for the rest
KIND = CHECKPOINTS["unet"]
PART = "motion_modules"


def build_adapter(unet: Any) -> MotionAdapter:
    """An untrained adapter for a UNet: it changes nothing, since each module's last layer is zero."""
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=2,
        motion_norm_num_groups=unet.config.norm_num_groups,
        motion_max_seq_length=16,  # what a host draws unless told, and at its start
    )
    for name, parameter in adapter.named_parameters():
        if "proj_out" in name:
            torch.nn.init.zeros_(parameter)
    return adapter


def save_adapter(pipe: Any, out: Path) -> None:
    """Writes the UNet's motion modules as a MotionAdapter in fp16."""
    adapter = MotionAdapter.from_config(pipe.motion_adapter.config)
    adapter.load_state_dict({n: t for n, t in pipe.unet.state_dict().items() if PART in n})
    adapter.half().save_pretrained(out)
    say(f"saved {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB")


def train(pipe: Any, drawn: Clips, batch: int, device: torch.device, graph: bool, **options: Any) -> None:
    """The motion modules of the pipeline's UNet, in full precision; all is computed in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unet = copy.deepcopy(pipe.unet).to(dtype)
    trained = {name: p for name, p in pipe.unet.named_parameters() if PART in name}
    sizes = [p.numel() for p in trained.values()]
    # All in one tensor, of which the pipeline's are views: one cast and one update, not 400.
    flat = torch.cat([p.flatten() for p in trained.values()]).requires_grad_()
    for p, part in zip(trained.values(), flat.detach().split(sizes), strict=True):
        p.data = part.view_as(p)
    products = pipe.scheduler.alphas_cumprod.to(device)
    tokens = pipe.tokenizer(drawn.captions, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        parts = tokens.input_ids.to(device).split(256)
        states = torch.cat([pipe.text_encoder(part)[0] for part in parts]).to(dtype)

    def denoise(noisy: Tensor, moments: Tensor, words: Tensor, weights: Tensor) -> Tensor:
        parts = weights.to(dtype).split(sizes)
        parameters = {name: part.view_as(trained[name]) for name, part in zip(trained, parts, strict=True)}
        return functional_call(unet, parameters, (noisy, moments, words)).sample

    if graph:  # else the CPU launches kernels more slowly than they run
        latents, caption = drawn.draw(batch)
        words = states[caption].repeat_interleave(FRAMES, 0)
        example = (latents.to(dtype), torch.zeros_like(caption), words, flat)
        denoise = cast(Any, torch.cuda.make_graphed_callables(denoise, example))

    def loss_of_batch() -> Tensor:
        latents, caption = drawn.draw(batch)
        early = EARLY * (torch.rand(batch, device=device) < EARLY_SHARE)
        share = torch.rand(batch, device=device)
        time_steps = (len(products) * torch.where(early > 0, 1 - early * share, share)).long()
        time_steps.clamp_(max=len(products) - 1)
        product = products[time_steps].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = (product.sqrt() * latents + (1 - product).sqrt() * noise).to(dtype)
        words = states[caption].repeat_interleave(FRAMES, 0)
        with torch.autocast(device.type, enabled=False):
            guess = denoise(noisy, time_steps, words, flat).float()
        ratio = product.flatten() / (1 - product.flatten())
        weight = (1 + ratio.clamp(max=SNR_CAP)) / ratio
        return ((guess - noise).square().mean((1, 2, 3, 4)) * weight).mean()

    fit("motion", [flat], loss_of_batch, device=device, **options)


def main() -> None:
    parser = arguments(__doc__, 7.0, 64, "train this motion adapter further")
    parser.add_argument("--graph", action="store_true", help="capture forward and backward as a CUDA graph")
    parser.set_defaults(masks=32)
    args = parser.parse_args()
    device, end = prepare(args)
    torch.backends.cudnn.benchmark = False  # a run of minutes does not get the time for it back
    plain = UNet2DConditionModel.from_pretrained(KIND.path / "unet")
    adapter = MotionAdapter.from_pretrained(args.resume) if args.resume else build_adapter(plain)
    unet = UNetMotionModel.from_unet2d(plain, adapter)
    pipe = AnimateDiffPipeline.from_pretrained(
        KIND.path, unet=unet, motion_adapter=adapter, dtype=torch.float32
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.eval().requires_grad_(False)
    say(f"{sum(p.numel() for p in adapter.parameters())} parameters, on {device}")
    drawn = Clips(device, args.seed, args.pixels, args.masks)
    drawn.encode(pipe.vae, args.pool // FRAMES)
    say(f"{len(drawn.means)} videos encoded, spread {float(drawn.means.std()):.2f}")

    def save_and_check(count: int = args.check // 12) -> None:
        save_adapter(pipe, args.out)
        asked = held_out_clips(count)
        with torch.no_grad():
            made = paint(pipe, asked, steps=KIND.steps, cfg=KIND.cfg)
        verdicts = [judge_clip(frames) for frames in made]
        right, wrong = count_right(asked, verdicts)
        moved = Counter(s.motion for s, v in zip(asked, verdicts, strict=True) if v.motion == s.motion)
        say(
            f"check: {right} of {count} held-out prompts right, wrong in {dict(wrong)}; "
            f"right motions {dict(moved)} of {dict(Counter(s.motion for s in asked))}"
        )

    train(
        pipe,
        drawn,
        args.batch,
        device,
        args.graph,
        until=end,
        rate=RATE,
        resumed=bool(args.resume),
        each_minute=save_and_check,
    )
    save_and_check(args.check)


if __name__ == "__main__":
    main()
