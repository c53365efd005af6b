"""Checkpoints that are one `.safetensors` file, offline: configurations from JSON, other parts beside it."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import safe_open

from shared.models import VAE_PREFIXES, ModelSpec
from shared.pipeline.processors import picture_processor
from shared.pipeline.single_file_schedule import has_guidance, schedule_of
from shared.pipeline.weights_file import (
    DENOISER,
    PREFIXES,
    ZERO_COND_T,
    Header,
    SingleFileError,
    input_channels,
    other_inputs,
    read_weights,
)

log = logging.getLogger("host")

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
PLAYGROUND_SCALING = 0.5  # of its VAE
CLIP_FLAT = ("cond_stage_model.transformer.embeddings.", "cond_stage_model.transformer.encoder.",
             "cond_stage_model.transformer.final_layer_norm.")  # fmt: skip
PROCESSOR = ("transformers", "Qwen2VLProcessor")  # where the shipped model_index.json is another type's
WEIGHTS = (".safetensors", ".bin")
BROKEN = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError,
    SingleFileComponentError,
)  # fmt: skip

Value = TypeVar("Value")
Keep = Callable[
    [str, Any, tuple[Path, Collection[str], Collection[Path]], torch.dtype, Callable[[], Any]], Any
]


def load_single_file(
    cls: Any,
    spec: ModelSpec,
    header: Header,
    index: dict[str, Any],
    parts: dict[str, Any],
    dtype: torch.dtype,
    keep: Keep,
) -> Any:
    """A pipeline of class `cls` from one file in its authors' layout.

    What the file lacks is taken from the folder of its name beside it, laid out as a diffusers folder.

    Args:
        index: model_index.json of that folder, or the one shipped for the type.
        parts: components that take the place of the file's.
        keep: gives the model that its last argument makes (shared.pipeline.converted.once_a_machine).

    Raises:
        SingleFileError: a broken file, one for another model, one that lacks components.
    """
    import diffusers
    import transformers
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    file = header.file
    _check_shape(spec, header)
    listed = {k: v for k, v in index.items() if isinstance(v, list) and v[0] and k != "safety_checker"}
    listed.pop(spec.picture_processor or "", None)
    found = dict(parts)
    missing = _missing(spec, header, listed, found)
    if spec.denoiser in parts:
        missing.pop(spec.denoiser, None)
    if missing:
        raise SingleFileError(
            f"--checkpoint {str(file)!r} has no {' and no '.join(missing)} "
            f"(keys {', '.join(missing.values())}*); put what is missing beside it, as in a diffusers "
            f"folder: config.json and weights in {str(file.with_suffix('') / next(iter(missing)))!r}"
        )
    names = _grouped(spec, {name: name for name in header.shapes})

    @functools.cache
    def weights() -> dict[str, dict[str, torch.Tensor]]:
        return _grouped(spec, read_weights(file, dtype))

    def own(name: str, library: str, class_name: str, folder: Path) -> Any:
        """A model of the file's own tensors."""
        if name == spec.denoiser:
            return _denoiser(getattr(diffusers, class_name), header, weights()[name], spec, folder, dtype)
        if name != "vae" and not class_name.startswith(("CLIP", "T5")):
            prefix = spec.single_file_encoders[name]
            return _language_model(class_name, weights()[name], prefix, folder / name, dtype)
        if name == "vae" and spec.single_file_vae == "wan":
            return wan_vae(getattr(diffusers, class_name), weights()[name], folder / name, dtype)
        # diffusers selects each text encoder's tensors from all of them.
        parts = [name] if name == "vae" else spec.single_file_encoders
        tensors = {k: t for part in parts for k, t in weights().get(part, {}).items()}
        return load_single_file_sub_model(
            library, class_name, name, tensors, pipelines, hasattr(pipelines, library),
            str(folder), local_files_only=True, torch_dtype=dtype,
        )  # fmt: skip

    for name, (library, class_name) in sorted(listed.items()):
        if name in found:
            continue
        folder = config_folder(spec, file, name)
        try:
            if name.startswith("tokenizer"):
                found[name] = _tokenizer(class_name, name, folder, file, spec.single_file_tokenizer)
            elif name == "scheduler":
                settings = schedule_of(header, spec, folder, folder == _shipped(spec))
                found[name] = getattr(diffusers, settings["_class_name"]).from_config(settings)
            elif name in names:
                cls_of = getattr({"transformers": transformers}.get(library, diffusers), class_name)
                files = (file, tuple(names[name].values()), tuple((folder / name).glob("*.json")))
                make = functools.partial(own, name, library, class_name, folder)
                found[name] = keep(name, cls_of, files, dtype, make)
            elif (folder / name).is_dir():
                found[name] = _from_folder(library, class_name, folder / name, dtype)
        except SingleFileError:
            raise
        except BROKEN as error:
            line = next((t.strip() for t in str(error).splitlines() if t.strip()), type(error).__name__)
            raise SingleFileError(
                f"--checkpoint {str(file)!r}: its {name} does not load as type {spec.name}: {line[:300]}"
            ) from error
    if spec.picture_processor is not None:
        part = spec.picture_processor
        folder = config_folder(spec, file, part) / part
        found[part] = picture_processor(folder, index.get(part, PROCESSOR)[1], found["tokenizer"])
    _check_complete(file, spec, found)
    _set_latents(header, found["vae"])
    accepted, optional = cls._get_signature_keys(cls)
    given = {name: found.get(name) for name in accepted}
    if "requires_safety_checker" in optional:
        given["requires_safety_checker"] = False
    return cls(**given)


def load_denoiser(header: Header, cls: Any, spec: ModelSpec, folder: Path, dtype: torch.dtype) -> Any:
    """The denoiser of a refiner's single file. Raises SingleFileError."""
    weights = _grouped(spec, read_weights(header.file, dtype, "--refiner"))
    model = _denoiser(cls, header, weights[spec.denoiser], spec, folder, dtype)
    _check_complete(header.file, spec, {spec.denoiser: model}, "--refiner")
    return model


def config_folder(spec: ModelSpec, file: Path, name: str) -> Path:
    """The folder that configures this component: the one beside the file, else the type's."""
    beside = file.with_suffix("")
    configured = any((beside / name).glob("*config.json"))
    return beside if configured else _shipped(spec)


def _shipped(spec: ModelSpec) -> Path:
    return CONFIGS / (spec.single_file_config or "")


def _missing(
    spec: ModelSpec, header: Header, listed: dict[str, Any], found: dict[str, Any]
) -> dict[str, str]:
    """The components that are neither in the file nor beside it, with the keys that they would have."""
    beside = header.file.with_suffix("")
    encoders = spec.single_file_encoders
    prefixes = {name: (prefix,) for name, prefix in encoders.items()} | {"vae": VAE_PREFIXES}
    missing = {}
    for name, wanted in prefixes.items():
        there = header.has(*wanted) or name in found or any((beside / name).glob("*.safetensors"))
        if there or name not in listed:
            continue
        if name in spec.optional_parts:
            found |= dict.fromkeys(spec.optional_parts)
            log.info("%s has no %s; the type runs without it", header.file, name)
        else:
            missing[name] = wanted[0]
    return missing


def _grouped(spec: ModelSpec, tensors: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """The tensors, or what is known of them, by component; "marks" belong to none."""
    encoders = spec.single_file_encoders
    groups: dict[str, dict[str, Value]] = {spec.denoiser: {}, "marks": {}}
    for name, tensor in tensors.items():
        owner = next((part for part, prefix in encoders.items() if name.startswith(prefix)), None)
        owner = owner or ("vae" if name.startswith(VAE_PREFIXES) else None)
        if owner is None:
            mark = ("." not in name and name != "pos_embed") or name.startswith(
                ("model_ema.", "conditioner.", "cond_stage_model.")
            )
            owner = "marks" if mark else spec.denoiser
        elif "clip" not in name and name.startswith(CLIP_FLAT):
            name = name.replace(".transformer.", ".transformer.text_model.", 1)
        groups.setdefault(owner, {})[name] = tensor
    return groups


def _denoiser(
    cls: Any,
    header: Header,
    tensors: dict[str, torch.Tensor],
    spec: ModelSpec,
    folder: Path,
    dtype: torch.dtype,
) -> Any:
    """The denoiser, in its authors' names or diffusers', with the usual prefix or without one."""
    overrides = _overrides(spec, header)
    own = _in_own_naming(cls, spec, header.file, tensors, folder, dtype, overrides)
    if own is not None:
        return own
    prefixed = {DENOISER + name.removeprefix(DENOISER): tensor for name, tensor in tensors.items()}
    return cls.from_single_file(
        prefixed, config=str(folder), subfolder=spec.denoiser, dtype=dtype, local_files_only=True, **overrides
    )


def _language_model(
    class_name: str, tensors: dict[str, torch.Tensor], prefix: str, folder: Path, dtype: torch.dtype
) -> Any:
    """A text encoder that diffusers does not read from single files; `folder` configures it."""
    import transformers
    from accelerate import init_empty_weights

    cls = getattr(transformers, class_name)
    with init_empty_weights(include_buffers=False):
        model = cls(cls.config_class.from_pretrained(folder))
    known, named = model.state_dict(), {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        inner = own.removeprefix("model.")
        # With eyes, what reads text has a name of its own, and so has what sees.
        for given in (own, inner, f"model.language_model.{inner}", f"model.{own}"):
            if given in known:
                named[given] = tensor.to(dtype)
                break
    head = "lm_head.weight"
    if head in known and head not in named:  # words are not written here
        model.lm_head = torch.nn.Identity()
    # Of a whole language model the last layer, and what ComfyUI notes, may be no part of it.
    model.load_state_dict(named, assign=True, strict=head not in known)
    return model.eval()


def wan_vae(cls: Any, tensors: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> Any:
    """A VAE of a class that diffusers does not read from single files, from Wan's layout or diffusers' own.

    Raises:
        ValueError: tensors that are not this VAE's.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with init_empty_weights(include_buffers=False):
        model = cls.from_config(cls.load_config(folder, local_files_only=True))
    known = set(model.state_dict())
    prefix = next((p for p in VAE_PREFIXES if any(name.startswith(p) for name in tensors)), "")
    named = {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in tensors.items()}
    if not known <= named.keys():
        named = convert_wan_vae_to_diffusers(named)
    if lacking := sorted(known - named.keys()):
        raise ValueError(f"it lacks {len(lacking)} tensors, such as {lacking[0]!r}")
    model.load_state_dict({name: named[name] for name in known}, assign=True)
    return model.eval()


def _overrides(spec: ModelSpec, header: Header) -> dict[str, Any]:
    """Settings of the denoiser that are read from its tensors."""
    match spec.single_file_settings:
        case "guidance_embeds":
            outputs = header.shape("final_layer.linear.weight") or header.shape("proj_out.weight")
            return {
                "guidance_embeds": has_guidance(header),
                "in_channels": input_channels(header, spec),
                "out_channels": outputs and outputs[0],
            }
        case "mmdit_blocks":
            return _mmdit_settings(header)
        case "zero_cond_t":
            return {"in_channels": input_channels(header, spec)} | _of_2511(header, spec)
    return {"in_channels": input_channels(header, spec)}


def _of_2511(header: Header, spec: ModelSpec) -> dict[str, Any]:
    """Qwen-Image-Edit-2511 has the same tensors as -2509; ComfyUI's files of it have a mark."""
    if header.has(*(prefix + ZERO_COND_T for prefix in PREFIXES)):
        return {"zero_cond_t": True}
    if spec.refers:
        log.info("no mark %r: %s is not -2511, unless a folder beside it says so", ZERO_COND_T, header.file)
    return {}


def _mmdit_settings(header: Header) -> dict[str, Any]:
    """The differences between Stable Diffusion 3, 3.5 medium and 3.5 large."""
    if header.shape("joint_blocks.0.x_block.adaLN_modulation.1.weight") is None:
        return {}
    numbers = {
        int(found[1]) for name in header.shapes if (found := re.search(r"joint_blocks\.(\d+)\.", name))
    }
    dual = [n for n in sorted(numbers) if header.shape(f"joint_blocks.{n}.x_block.attn2.qkv.weight")]
    normed = header.shape("joint_blocks.0.x_block.attn.ln_q.weight")
    width = (header.shape("x_embedder.proj.weight") or (0,))[0]
    settings: dict[str, Any] = {"num_layers": len(numbers), "dual_attention_layers": dual}
    settings["qk_norm"] = "rms_norm" if normed else None
    if normed:
        settings |= {"attention_head_dim": normed[0], "num_attention_heads": width // normed[0]}
        settings["caption_projection_dim"] = width
    if positions := header.shape("pos_embed"):
        settings["pos_embed_max_size"] = math.isqrt(positions[1])
    return settings


def _check_shape(spec: ModelSpec, header: Header) -> None:
    """Refuse a denoiser with other inputs, such as FLUX.1 Depth, but for inpainting."""
    folder = config_folder(spec, header.file, spec.denoiser) / spec.denoiser
    try:
        expected = json.loads((folder / "config.json").read_text())["in_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SingleFileError(f"{str(folder / 'config.json')!r} cannot be read: {error}") from None
    given = input_channels(header, spec)
    if given not in (None, expected, spec.fill_channels(expected)):
        assert given is not None
        raise SingleFileError(f"--checkpoint {str(header.file)!r} {other_inputs(spec, given, expected)}")


def _from_folder(library: str, class_name: str, folder: Path, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    if issubclass(cls, torch.nn.Module):
        return model_from_folder(cls, folder, dtype)
    return cls.from_pretrained(folder, local_files_only=True) if any(folder.glob("*.json")) else None


def model_from_folder(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of this class from a diffusers folder of its own: the plain weights, else any that it has."""
    variant = pick_variant([file.name for file in folder.iterdir()], None)
    return cls.from_pretrained(folder, variant=variant, dtype=dtype, local_files_only=True)


def _check_complete(file: Path, spec: ModelSpec, found: dict[str, Any], flag: str = "--checkpoint") -> None:
    for name, module in found.items():
        if isinstance(module, torch.nn.Module):
            missing = [key for key, p in module.named_parameters() if p.is_meta]
            if missing:
                raise SingleFileError(
                    f"{flag} {str(file)!r} lacks {len(missing)} tensors of {name}, such as "
                    f"{missing[0]!r}: is it of type {spec.name}?"
                )


def _set_latents(header: Header, vae: Any) -> None:
    """Playground v2.5's latents have a mean and a deviation for each channel."""
    if {"edm_mean", "edm_std"} <= set(header.shapes):
        with safe_open(header.file, framework="pt") as opened:
            mean, std = (opened.get_tensor(name).flatten().tolist() for name in ("edm_mean", "edm_std"))
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=PLAYGROUND_SCALING)


def pick_variant(files: Iterable[str], wanted: str | None) -> str | None:
    """The variant of weight files to ask diffusers for; None means the plain ones.

    The wanted one where any component has it, else plain files, else any that there is.
    """
    weights = [name for name in files if name.endswith(WEIGHTS)]
    variants = {name.split(".")[1].split("-")[0] for name in weights if name.count(".") > 1}
    plain = any(name.count(".") == 1 for name in weights)
    if wanted in variants:
        return wanted
    return None if plain or not variants else sorted(variants)[0]


def _tokenizer(class_name: str, name: str, config: Path, file: Path, source: str) -> Any:
    """From the configuration's folder, beside the file, CLIP's table here, or `source` in the cache."""
    import transformers

    cls = getattr(transformers, class_name)
    for folder in (config / name, file.with_suffix("") / name, file.parent / name):
        if (folder / "tokenizer_config.json").is_file() and len(list(folder.iterdir())) > 1:
            return cls.from_pretrained(folder, local_files_only=True)
    settings = json.loads((config / name / "tokenizer_config.json").read_text())
    if class_name == "CLIPTokenizer":
        return clip_tokenizer(settings["pad_token"])
    try:
        return cls.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        raise SingleFileError(
            f"--checkpoint {str(file)!r}: a single file holds no tokenizer; put that of {source} in "
            f"{str(file.with_suffix('') / name)!r}, or {source} in the Hugging Face cache"
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
    cls: Any,
    spec: ModelSpec,
    file: Path,
    tensors: dict[str, torch.Tensor],
    folder: Path,
    dtype: torch.dtype,
    overrides: dict[str, Any],
) -> Any:
    """The denoiser, where the file names its tensors as diffusers does; else None."""
    from accelerate import init_empty_weights

    config = cls.load_config(folder, subfolder=spec.denoiser, local_files_only=True)
    with init_empty_weights():
        model = cls.from_config({**config, **overrides})
    needed = set(model.state_dict())
    for prefix in PREFIXES:
        if needed <= {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}:
            state = {name: tensors[prefix + name].to(dtype) for name in needed}
            try:
                model.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise SingleFileError(
                    f"--checkpoint {str(file)!r}: {str(error).splitlines()[-1].strip()}"
                ) from None
            return model.eval()
    return None
