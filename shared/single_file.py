"""Checkpoints that are one `.safetensors` file, offline: configurations from JSON, tokenizers near by."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from shared.models import ModelSpec

log = logging.getLogger("host")

CONFIGS = Path(__file__).parent / "configs"
T5_TOKENIZER = "google/t5-v1_1-xxl"  # in the Hugging Face cache, where someone put it there
T5_KEY = "text_encoders.t5xxl.transformer.shared.weight"
BROKEN = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError,
    SingleFileComponentError,
)  # fmt: skip


class SingleFileError(ValueError):
    """A single file that cannot be loaded; the sentence says why."""


def tensor_names(file: Path) -> list[str]:
    """Names of a file's tensors, without reading them. Raises SingleFileError."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise SingleFileError(f"--checkpoint {str(file)!r} cannot be read: {error}") from None


def load_single_file(
    cls: Any, spec: ModelSpec, file: Path, config: Path, parts: dict[str, Any], dtype: torch.dtype
) -> Any:
    """A pipeline of class `cls` from one file in its authors' layout.

    Args:
        config: folder with model_index.json and the components' configurations; weights in it are used for
            components that the file lacks.
        parts: components that take the place of the file's.

    Raises:
        SingleFileError: a broken file, one for another model, one that lacks components.
    """
    import diffusers

    names = tensor_names(file)
    index = json.loads((config / "model_index.json").read_text())
    given = dict(parts)
    base = getattr(diffusers, index["_class_name"])
    for name, value in index.items():
        if name.startswith("tokenizer") and isinstance(value, list) and value[0] and name not in given:
            if _optional_t5(spec, name, names, config):
                given |= {name: None, name.replace("tokenizer", "text_encoder"): None}
                log.info("%s has no T5 encoder: the type runs without it", file)
            else:
                given[name] = _tokenizer(value[1], name, config, file)
    if spec.denoiser not in given:
        own = _in_own_naming(spec, index, file, names, config, dtype)
        if own is not None:
            given[spec.denoiser] = own
    fitting = {k: v for k, v in given.items() if k in base._get_signature_keys(base)[0]}
    try:
        pipe = base.from_single_file(
            str(file), config=str(config), dtype=dtype, local_files_only=True, **fitting
        )
        if cls is not base:
            components = {k: v for k, v in pipe.components.items() if k in cls._get_signature_keys(cls)[0]}
            pipe = cls(**{**components, **parts})
    except BROKEN as error:
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise SingleFileError(
            f"--checkpoint {str(file)!r} does not load as type {spec.name}: {line[:300]} (what a file "
            f"lacks can lie, as in a diffusers folder, in {str(file.with_suffix(''))!r})"
        ) from error
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            missing = [key for key, p in module.named_parameters() if p.is_meta]
            if missing:
                raise SingleFileError(
                    f"--checkpoint {str(file)!r} lacks {len(missing)} tensors of {name}, such as "
                    f"{missing[0]!r}: is it of type {spec.name}?"
                )
    return pipe


def _optional_t5(spec: ModelSpec, name: str, names: list[str], config: Path) -> bool:
    """Whether this tokenizer belongs to a third text encoder that the file has not."""
    encoder = name.replace("tokenizer", "text_encoder")
    return name == "tokenizer_3" and T5_KEY not in names and not any((config / encoder).glob("*.safetensors"))


def _tokenizer(class_name: str, name: str, config: Path, file: Path) -> Any:
    """From the configuration's folder, a folder beside the file, CLIP's table here, or the cache (T5)."""
    import transformers

    cls = getattr(transformers, class_name)
    for folder in (config / name, file.with_suffix("") / name, file.parent / name):
        if (folder / "tokenizer_config.json").is_file() and len(list(folder.iterdir())) > 1:
            return cls.from_pretrained(folder, local_files_only=True)
    settings = json.loads((config / name / "tokenizer_config.json").read_text())
    if class_name == "CLIPTokenizer":
        return clip_tokenizer(settings["pad_token"])
    try:
        return cls.from_pretrained(T5_TOKENIZER, local_files_only=True)
    except (OSError, ValueError):
        raise SingleFileError(
            f"--checkpoint {str(file)!r}: a single file holds no tokenizer; put T5's in "
            f"{str(file.with_suffix('') / name)!r}, or {T5_TOKENIZER} in the Hugging Face cache"
        ) from None


def clip_tokenizer(pad_token: str) -> Any:
    """CLIP's tokenizer: bytes, bytes that end a word, the merges in order, two marks; 49408 entries.

    Source: Radford et al., arXiv 2103.00020, section 2.4; the merges are OpenAI's (configs/NOTICE).
    """
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    lines = gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def _in_own_naming(
    spec: ModelSpec, index: dict[str, Any], file: Path, names: list[str], config: Path, dtype: torch.dtype
) -> Any:
    """The denoiser, where the file names its tensors as diffusers does; else None."""
    import diffusers
    from accelerate import init_empty_weights

    cls = getattr(diffusers, index[spec.denoiser][1])
    with init_empty_weights():
        model = cls.from_config(cls.load_config(config, subfolder=spec.denoiser, local_files_only=True))
    needed = set(model.state_dict())
    for prefix in ("model.diffusion_model.", f"{spec.denoiser}.", ""):
        if needed <= {name.removeprefix(prefix) for name in names if name.startswith(prefix)}:
            with safe_open(file, framework="pt") as opened:
                state = {name: opened.get_tensor(prefix + name).to(dtype) for name in needed}
            try:
                model.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise SingleFileError(
                    f"--checkpoint {str(file)!r}: {str(error).splitlines()[-1].strip()}"
                ) from None
            return model.eval()
    return None
