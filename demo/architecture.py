"""The demo models before training, all small: Stable Diffusion 1's networks, SD3's, and their tokenizer."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from draw import scenes
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = 24  # tokens of a caption for the transformer; the longest has ten
FLOW_SHIFT = 3.0  # Stable Diffusion 3's, arXiv 2403.03206, section 5.3.2


def build_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token; any other text is split into bytes.

    Plain byte-pair encoding (arXiv 1508.07909) on the captions' words until each is whole.
    """
    words = sorted(
        {word for held in (False, True) for s in scenes(held_out=held) for word in s.caption.split()}
    )
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for p in pieces.values() for pair in pairwise(p)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, old in pieces.items():
            new: list[str] = []
            for piece in old:
                if new and (new[-1], piece) == best:
                    new[-1] += piece
                else:
                    new.append(piece)
            pieces[word] = new
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: k for k, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the tokenizer splits {word!r} into {tokenizer.tokenize(word)}")
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_models(
    tokenizer: CLIPTokenizer, pixels: int
) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """Untrained models, 5.6 million parameters together; latents are [4, pixels / 8, pixels / 8]."""
    vae = AutoencoderKL(
        block_out_channels=(32, 48, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=pixels,
        force_upcast=False,
    )
    text_encoder = CLIPTextModel(text_config(tokenizer, 128, 4))
    unet = UNet2DConditionModel(
        sample_size=pixels // 8,
        block_out_channels=(64, 64, 80),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers means the number of heads here, as in Stable Diffusion 1
        norm_num_groups=16,
    )
    return vae, text_encoder, unet


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # sampling starts from pure noise, where training ends
    )


def build_transformer(
    tokenizer: CLIPTokenizer, pixels: int
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, SD3Transformer2DModel]:
    """Untrained text encoders and transformer of Stable Diffusion 3's kind, 5.5 million parameters together.

    The latents are those of the Stable Diffusion 1 demo's autoencoder; there is no T5.
    """
    widths = (128, 64)
    transformer = SD3Transformer2DModel(
        sample_size=pixels // 8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=sum(widths),
        caption_projection_dim=128,
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=32,
        qk_norm="rms_norm",  # as in Stable Diffusion 3.5
    )
    # Each block begins as the identity (adaLN-zero, arXiv 2212.09748, section 3.2).
    blocks = transformer.transformer_blocks
    zeroed = [part.linear for block in blocks for part in (block.norm1, block.norm1_context)]
    for linear in (*zeroed, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    first, second = (
        CLIPTextModelWithProjection(text_config(tokenizer, width, layers))
        for width, layers in zip(widths, (4, 2), strict=True)
    )
    return first, second, transformer


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
