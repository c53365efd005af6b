"""The demo model before training: Stable Diffusion 1's three networks and its tokenizer, all small."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from draw import scenes
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def build_tokenizer() -> CLIPTokenizer:
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
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the tokenizer splits {word!r} into {tokenizer.tokenize(word)}")
    return tokenizer


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
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
