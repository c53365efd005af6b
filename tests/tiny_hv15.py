"""A tiny random HunyuanVideo 1.5: its transformer, VAE of videos, and the two text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.guiders import ClassifierFreeGuidance

from tests.tiny import cached, seeded
from tests.tiny_qwen import qwen25_text, tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def from_picture() -> Path:
    """The checkpoint of picture to video."""
    return cached("hv15-i2v", lambda path: make_hv15(pictures=True).save_pretrained(path))


def make_hv15(pictures: bool = False) -> Any:
    # One layer of its transformer is 2048 x 2048 whatever the configuration says.
    denoiser = seeded(55, lambda: diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=4,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=32,
        rope_axes_dim=(4, 6, 6), target_size=64, task_type="i2v" if pictures else "t2v",
    ))  # fmt: skip
    letters = transformers.T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    more: dict[str, Any] = {}
    if pictures:
        seen = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8,
        )  # fmt: skip
        more["image_encoder"] = seeded(26, lambda: transformers.SiglipVisionModel(seen))
        more["feature_extractor"] = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    cls = diffusers.HunyuanVideo15ImageToVideoPipeline if pictures else diffusers.HunyuanVideo15Pipeline
    pipe = cls(
        **more,
        text_encoder=qwen25_text(),
        tokenizer=tokenizer(),
        transformer=denoiser,
        vae=seeded(35, lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 16, 16, 32, 32), layers_per_block=1
        )),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=seeded(25, lambda: transformers.T5EncoderModel(letters)),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    words = tokenizer(f"{pipe.system_message}\nsystem\nuser\nassistant\n")
    words.chat_template = CHAT
    pipe.register_modules(tokenizer=words)
    return pipe
