"""Tiny random FLUX.2: klein, its distilled form, and dev."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from tests.tiny import byte_letters, seeded
from tests.tiny_qwen import qwen3, tokenizer

LATENT = 4  # channels
MARKS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")
CHAT = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "{% if m.role == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}{% endfor %}"
)


def parts(guidance: bool) -> dict[str, Any]:
    # Hidden states of three layers of a text encoder of width 32 lie side by side.
    transformer = seeded(42, lambda: diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4 * LATENT, num_layers=2, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=3 * 32, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    ))  # fmt: skip
    for name, weight in transformer.named_parameters():
        if "transformer_blocks." in name and weight.ndim == 2:
            weight.data *= 2  # else what quantization changes drowns in the residual stream
    for block in transformer.transformer_blocks:
        block.attn.norm_added_k.weight.data *= 3  # else the long text would drown the prompt
    # Its group norms have 32 groups whatever is asked.
    vae = seeded(31, lambda: diffusers.AutoencoderKLFlux2(
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=LATENT, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ))  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 4 * LATENT))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 4 * LATENT))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5,
        max_shift=1.15,
    )  # fmt: skip
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def make_flux2(distilled: bool = False) -> Any:
    return diffusers.Flux2KleinPipeline(
        **parts(False),
        text_encoder=qwen3(layers=28, kind="Qwen3ForCausalLM"),
        tokenizer=tokenizer(),
        is_distilled=distilled,
    )


def make_dev() -> Any:
    """With a tokenizer in place of the processor around it, which needs torchvision."""
    tokens = [*byte_letters(), *MARKS]
    ids = {token: place for place, token in enumerate(tokens)}
    reads = transformers.Qwen2Tokenizer(
        vocab=ids, merges=[], unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens=list(MARKS[4:]), model_max_length=1024, padding_side="left", chat_template=CHAT,
    )  # fmt: skip
    text = {
        "model_type": "mistral", "vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "max_position_embeddings": 2048, "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=ids["[IMG]"], spatial_merge_size=2
    )
    encoder = seeded(28, lambda: transformers.Mistral3ForConditionalGeneration(config))
    return diffusers.Flux2Pipeline(**parts(True), text_encoder=encoder, tokenizer=reads)
