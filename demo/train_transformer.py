"""Trains a small transformer of Stable Diffusion 3's kind, in the latents of the Stable Diffusion 1 demo.

Rectified flow (arXiv 2209.03003) with joint attention and shifted times as in arXiv 2403.03206. Both text
encoders are trained with it; the autoencoder is the one that train.py made. One GPU needs 7 minutes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from training import arguments, check, fit, prepare, save, say  # first: its clock starts here

# isort: split
import torch
from architecture import FLOW_SHIFT, WORDS, build_flow_scheduler, build_tokenizer, build_transformer
from checkpoints import CHECKPOINTS
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from pictures import Latents, Pictures
from torch import Tensor
from torch.nn import functional as F

RATE, RESUMED_RATE = 1e-3, 3e-4  # peak learning rates of AdamW
T5_TOKENS = 256  # zeros that the pipeline puts in place of T5's tokens
T5_SHOWN = 8  # of them in training


class FewerZeros(JointAttnProcessor2_0):
    """Joint attention in which each of T5_SHOWN tokens stands for several that are equal to it.

    Tokens of text have no positions, so the zeros in place of T5's stay equal in all blocks, and T5_TOKENS of
    them are T5_SHOWN with the logarithm of their number added to the attention's logits.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        super().__init__()
        self.bias = torch.zeros(1, 1, 1, tokens, device=device)
        self.bias[..., -T5_SHOWN:] = math.log(T5_TOKENS / T5_SHOWN)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if hidden_states.shape[1] + encoder_hidden_states.shape[1] != self.bias.shape[-1]:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

        def split(x: Tensor, norm: Any = None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm else x

        picture, text = hidden_states, encoder_hidden_states
        query = [split(attn.to_q(picture), attn.norm_q), split(attn.add_q_proj(text), attn.norm_added_q)]
        key = [split(attn.to_k(picture), attn.norm_k), split(attn.add_k_proj(text), attn.norm_added_k)]
        value = torch.cat([split(attn.to_v(picture)), split(attn.add_v_proj(text))], 2)
        # Under autocast the norms compute in fp32.
        queries, keys = (torch.cat(parts, 2).to(value.dtype) for parts in (query, key))
        mixed = F.scaled_dot_product_attention(queries, keys, value, self.bias.to(value.dtype))
        mixed = mixed.transpose(1, 2).flatten(2)
        picture, text = mixed[:, : picture.shape[1]], mixed[:, picture.shape[1] :]
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


def encode(pipe: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Text states [n, WORDS + T5_SHOWN, width] and pooled [n, width], as the pipeline makes them."""
    found = [
        encoder(tokens, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)
    ]
    states = torch.cat([out.hidden_states[-2] for out in found], -1)
    return F.pad(states, (0, 0, 0, T5_SHOWN)), torch.cat([out.text_embeds for out in found], -1)


def train(pipe: Any, pool: Latents, batch: int, device: torch.device, **options: Any) -> None:
    transformer = pipe.transformer
    tokens = pipe.tokenizer(pool.captions, padding="max_length", return_tensors="pt").input_ids.to(device)
    patches = (pool.means.shape[-1] // transformer.config.patch_size) ** 2
    transformer.set_attn_processor(FewerZeros(patches + WORDS + T5_SHOWN, device))

    def loss_of_batch() -> Tensor:
        latents, caption = pool.draw(batch)
        even = torch.rand(batch, device=device)
        sigmas = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1))
        states, pooled = encode(pipe, tokens[caption])
        guess = transformer(noisy, states, pooled, 1000 * sigmas).sample.float()
        return F.mse_loss(guess, noise - latents)

    models = (transformer, pipe.text_encoder, pipe.text_encoder_2)
    # The last block and the last layer of each encoder leave some of their weights out.
    parameters = [p for model in models for p in model.parameters()]
    fit("transformer", parameters, loss_of_batch, device=device, **options)


def main() -> None:
    parser = arguments(__doc__, 7.0, 1024, "train the transformer of this checkpoint further")
    parser.add_argument("--vae", type=Path, default=Path(__file__).resolve().parent / "checkpoint" / "vae")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    args = parser.parse_args()
    device, end = prepare(args)
    if args.resume:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            args.resume, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
        )
    else:
        vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32)
        vae.register_to_config(shift_factor=0.0)
        tokenizer = build_tokenizer(WORDS)
        first, second, transformer = build_transformer(tokenizer, args.pixels)
        pipe = StableDiffusion3Pipeline(
            transformer, build_flow_scheduler(), vae, first, tokenizer, second, tokenizer, None, None
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(device).eval().requires_grad_(False)
    models = [m.to(device).train() for m in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)]
    say(f"parameters {[sum(p.numel() for p in m.parameters()) for m in models]} on {device}")
    pool = Latents(pipe.vae, Pictures(device, args.seed, args.pixels, args.masks), args.pool, 512)
    say(f"{len(pool.means)} pictures encoded, spread {float(pool.means.std()):.2f}")
    if args.compile:
        for block in pipe.transformer.transformer_blocks:  # compiled once for all but the last
            block.compile()
    ways = CHECKPOINTS["transformer"]

    def save_and_check() -> None:
        save(pipe, args.out, args.tar)
        check(pipe, args.check, ways.steps, ways.cfg)

    train(
        pipe,
        pool,
        args.batch,
        device,
        until=end,
        rate=RESUMED_RATE if args.resume else RATE,
        resumed=bool(args.resume),
        each_minute=save_and_check,
    )
    save_and_check()


if __name__ == "__main__":
    main()
