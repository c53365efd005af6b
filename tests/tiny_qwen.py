"""Tiny random Qwen text encoders, their tokenizer, and pipelines that read prompts with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from shared.pipeline.processors import picture_processor
from tests.tiny import byte_letters, cached, checkpoint, seeded, vae, video_vae

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IDS = {mark: 256 + place for place, mark in enumerate(SPECIAL)}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
VOCABULARY = 1536  # bytes, special tokens, and the words of a pipeline's template


def tokenizer(template: str = "") -> Any:
    """One token a byte, a special mark, and a word of the template, whose first tokens pipelines cut off."""
    tokens, merges = [*byte_letters(), *SPECIAL], []
    for mark in (*SPECIAL, "{}"):
        template = template.replace(mark, "")
    for word in sorted(_words(template), key=lambda word: (word[0] != "Ġ", word)):
        for end in range(1, len(word)):
            if word[: end + 1] not in tokens:
                tokens.append(word[: end + 1])
                merges.append((word[:end], word[end]))
    return _tokenizer(tokens, merges)


def _words(text: str) -> Iterable[str]:
    splits = _tokenizer([*byte_letters(), *SPECIAL], []).backend_tokenizer.pre_tokenizer
    return {word for word, _ in splits.pre_tokenize_str(text)} if text else ()


def _tokenizer(tokens: list[str], merges: list[tuple[str, str]]) -> Any:
    return transformers.Qwen2Tokenizer(
        vocab={token: place for place, token in enumerate(tokens)},
        merges=merges,
        model_max_length=1024,
        unk_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        extra_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT,
    )


def text_config(width: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 4096, "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"], "pad_token_id": IDS["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip


def qwen25_text(width: int = 32) -> Any:
    """The language model alone."""
    of = transformers.models.qwen2_5_vl
    config = of.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(**text_config(width))
    return seeded(23, lambda: of.modeling_qwen2_5_vl.Qwen2_5_VLTextModel(config))


def qwen25_vl(width: int = 32) -> Any:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": width,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_config(width),
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    return seeded(22, lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))


def _denoiser(seed: int, **settings: Any) -> Any:
    model = seeded(seed, lambda: diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **settings,
    ))  # fmt: skip
    for weight in model.transformer_blocks.parameters():
        weight.data *= 2  # else what quantization changes drowns in the residual stream
    return model


def _with_parts(cls: Any, denoiser: Any, words: str = "", **parts: Any) -> Any:
    """A Qwen-Image pipeline; its tokenizer has the words of its template as tokens."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=8192, base_shift=0.5,
        max_shift=0.9, shift=1.0, shift_terminal=0.02,
    )  # fmt: skip
    pipe = cls(
        scheduler=scheduler,
        vae=video_vae("AutoencoderKLQwenImage", 32),
        text_encoder=qwen25_vl(),
        tokenizer=tokenizer(),
        transformer=denoiser,
        **parts,
    )
    pipe.register_modules(tokenizer=tokenizer(pipe.prompt_template_encode + words))
    return pipe


def make_qwen() -> Any:
    return _with_parts(diffusers.QwenImagePipeline, _denoiser(44))


def make_qwenedit(plus: bool = True, **settings: bool) -> Any:
    """As -2511; without `zero_cond_t` as -2509, without `plus` as the first one, of one picture."""
    cls = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    settings = {"zero_cond_t": plus} | settings
    pipe = _with_parts(cls, _denoiser(45, **settings), "Picture 1: ", processor=None)
    with tempfile.TemporaryDirectory() as folder:
        pipe.register_modules(processor=_processor(Path(folder), pipe.tokenizer))
    return pipe


EDITS: dict[str, dict[str, bool]] = {"2511": {}, "2509": {"zero_cond_t": False}, "first": {"plus": False}}


def edit(kind: str) -> Path:
    """The folder of a Qwen-Image-Edit checkpoint, of one of EDITS."""
    if kind == "2511":
        return checkpoint("qwenedit")
    return cached(f"qwenedit-{kind}", lambda path: make_qwenedit(**EDITS[kind]).save_pretrained(path))


def _processor(folder: Path, words: Any) -> Any:
    processor_files(folder, words)
    return picture_processor(folder, "Qwen2VLProcessor")


def processor_files(folder: Path, words: Any, form: str = "Qwen2VLImageProcessorFast") -> None:
    """A processor's files as the released checkpoints have them; `form` is the class that they name."""
    words.save_pretrained(folder)
    settings = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2, "patch_size": 14, "resample": 3,
        "temporal_patch_size": 2, "rescale_factor": 1 / 255, "min_pixels": 56**2, "max_pixels": 112**2,
        "image_processor_type": form, "processor_class": "Qwen2VLProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def qwen3(width: int = 32, layers: int = 3, kind: str = "Qwen3Model") -> Any:
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048,
        bos_token_id=IDS["<|endoftext|>"], eos_token_id=IDS["<|im_end|>"],
        pad_token_id=IDS["<|endoftext|>"], tie_word_embeddings=True,
    )  # fmt: skip
    return seeded(21, lambda: getattr(transformers, kind)(config))


def make_zimage() -> Any:
    def transformer() -> Any:
        # A width that is a multiple of 3 and 32 makes feed-forward layers that GGUF can pack.
        model = diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=96, n_layers=3, n_refiner_layers=1, n_heads=6, n_kv_heads=6, cap_feat_dim=32,
            axes_dims=[4, 6, 6], axes_lens=[1536, 64, 64],
        )  # fmt: skip
        for pad in (model.x_pad_token, model.cap_pad_token):
            torch.nn.init.normal_(pad, std=0.02)
        return model

    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, scaling=0.3611, shift=0.1159),
        text_encoder=qwen3(),
        tokenizer=tokenizer(),
        transformer=seeded(46, transformer),
    )
