"""Checkpoints that are one `.safetensors` file, offline: configurations from JSON, other parts beside it."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import safe_open

from shared.launch import file_header
from shared.launch.file_header import (
    PREFIXES,
    WEIGHTS,
    Header,
    SingleFileError,
    config_folder,
    form_of,
    has_weights,
    input_channels,
    other_inputs,
    read_header,
    second_file,
    table_in,
)
from shared.models import VAE_PREFIXES, ModelSpec
from shared.pipeline.processors import picture_processor
from shared.pipeline.single_file_models import class_of, denoiser_of, further_part, language_model, wan_vae
from shared.pipeline.single_file_schedule import has_guidance, schedule_of
from shared.pipeline.weights_file import ZERO_COND_T, read_weights

log = logging.getLogger("host")

PLAYGROUND_SCALING = 0.5  # of its VAE
CLIP_FLAT = ("cond_stage_model.transformer.embeddings.", "cond_stage_model.transformer.encoder.",
             "cond_stage_model.transformer.final_layer_norm.")  # fmt: skip
PROCESSOR = ("transformers", "Qwen2VLProcessor")  # where the shipped model_index.json is another type's
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
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model

    file = header.file
    if form := form_of(header):
        log.info("%s: recognised %s", file.name, form.title)
    _check_shape(spec, header)
    listed = listed_parts(index)
    listed.pop(spec.picture_processor or "", None)
    found = dict(parts)
    missing = missing_parts(spec, header, listed, found)
    if missing:
        wanted = [f"keys {keys}*" for keys in missing.values() if keys]
        other = second_file(header)
        if other is not None and set(missing) & set(spec.denoisers):
            wanted.append(f"the file {other.name!r} beside it")
        wanted_as = f" ({', '.join(wanted)})" if wanted else ""
        raise SingleFileError(
            f"--checkpoint {str(file)!r} has no {' and no '.join(missing)}{wanted_as}; put what is missing "
            f"beside it, as in a diffusers folder: config.json and weights in "
            f"{str(file.with_suffix('') / next(iter(missing)))!r}"
        )
    names = _grouped(spec, header, {name: name for name in header.shapes})

    @functools.cache
    def weights() -> dict[str, dict[str, torch.Tensor]]:
        return _grouped(spec, header, read_weights(file, dtype))

    def own(name: str, library: str, class_name: str, folder: Path) -> Any:
        """A model of the file's own tensors."""
        cls = class_of(library, class_name)
        if name == spec.denoiser:
            return denoiser_of(cls, spec, file, weights()[name], folder, dtype, overrides(spec, header))
        if name in spec.single_file_parts:
            return further_part(cls, spec.single_file_parts[name], weights()[name], folder / name, dtype)
        if name in spec.single_file_encoders and not class_name.startswith(("CLIP", "T5")):
            prefix = spec.single_file_encoders[name]
            return language_model(class_name, weights()[name], prefix, folder / name, dtype)
        if name == "vae" and spec.single_file_vae == "wan":
            return wan_vae(cls, weights()[name], folder / name, dtype)
        # diffusers selects each text encoder's tensors from all of them.
        parts = spec.single_file_encoders if name in spec.single_file_encoders else [name]
        tensors = {k: t for part in parts for k, t in weights().get(part, {}).items()}
        return load_single_file_sub_model(
            library, class_name, name, tensors, pipelines, hasattr(pipelines, library),
            str(folder), local_files_only=True, torch_dtype=dtype,
        )  # fmt: skip

    for name, (library, class_name) in sorted(listed.items()):
        if name in found:
            continue
        folder = config_folder(spec, file, name)
        cls_of = class_of(library, class_name)
        try:
            if name.startswith("tokenizer"):
                reader = "AutoTokenizer" if name in spec.text_only else class_name
                found[name] = _tokenizer(reader, name, folder, file, spec.single_file_tokenizer)
            elif name == "scheduler":
                settings = schedule_of(header, spec, folder, file_header.CONFIGS in folder.parents)
                found[name] = class_of("diffusers", settings["_class_name"]).from_config(settings)
            elif name in names:
                files = (file, tuple(names[name].values()), tuple((folder / name).glob("*.json")))
                make = functools.partial(own, name, library, class_name, folder)
                found[name] = keep(name, cls_of, files, dtype, make)
            elif name in spec.denoisers and not has_weights(file.with_suffix("") / name):
                found[name] = _second(cls_of, spec, header, folder, name, dtype, keep)
            elif (folder / name).is_dir():
                found[name] = _from_folder(cls_of, folder / name, dtype)
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
    given |= {name: index[name] for name in optional if name in index}
    if "requires_safety_checker" in optional:
        given["requires_safety_checker"] = False
    return cls(**given)


def _second(
    cls: Any, spec: ModelSpec, header: Header, folder: Path, name: str, dtype: torch.dtype, keep: Keep
) -> Any:
    """The second denoiser of a checkpoint of two, from the single file that has it."""
    file = second_file(header)
    assert file is not None  # else it would be missing
    second = read_header(file)
    if second.inputs != header.inputs:
        raise SingleFileError(
            f"--checkpoint {str(header.file)!r}: its first weight has the shape {list(header.inputs or ())}, "
            f"that of {file.name!r}, the second transformer, {list(second.inputs or ())}"
        )
    names = _grouped(spec, second, {key: key for key in second.shapes})[spec.denoiser]

    def make() -> Any:
        tensors = _grouped(spec, second, read_weights(file, dtype))[spec.denoiser]
        # Both have the same configuration.
        return denoiser_of(cls, spec, file, tensors, folder, dtype, overrides(spec, second), name)

    return keep(name, cls, (file, tuple(names), tuple((folder / name).glob("*.json"))), dtype, make)


def load_denoiser(header: Header, cls: Any, spec: ModelSpec, folder: Path, dtype: torch.dtype) -> Any:
    """The denoiser of a refiner's single file. Raises SingleFileError."""
    tensors = _grouped(spec, header, read_weights(header.file, dtype, "--refiner"))[spec.denoiser]
    model = denoiser_of(cls, spec, header.file, tensors, folder, dtype, overrides(spec, header))
    _check_complete(header.file, spec, {spec.denoiser: model}, "--refiner")
    return model


def listed_parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that model_index.json lists: library and class."""
    return {k: tuple(v) for k, v in index.items() if isinstance(v, list) and v[0] and k != "safety_checker"}


def missing_parts(
    spec: ModelSpec, header: Header, listed: Mapping[str, tuple[str, str]], found: dict[str, Any]
) -> dict[str, str]:
    """The models that are neither in the file nor beside it, with the beginning of the keys they would have.

    Args:
        found: components that come from elsewhere; those that the type runs without are put there.
    """
    prefixes = _prefixes(spec)
    missing = {}
    for name, (library, class_name) in listed.items():
        if name == spec.denoiser or name in found or not _is_model(class_of(library, class_name)):
            continue
        wanted = prefixes.get(name, ())
        other = second_file(header) if name in spec.denoisers else None
        there = (wanted and header.has(*wanted)) or (other is not None and other.is_file())
        if there or has_weights(header.file.with_suffix("") / name):
            continue
        if name in spec.optional_parts:
            found |= dict.fromkeys(spec.optional_parts)
            log.info("%s has no %s; the type runs without it", header.file, name)
        else:
            missing[name] = wanted[0] if wanted else ""
    return missing


def _prefixes(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """What shows that a component is in a file: its tensors' names begin with one of these."""
    encoders = {name: (prefix,) for name, prefix in spec.single_file_encoders.items()}
    parts = {name: part.prefixes[:1] for name, part in spec.single_file_parts.items()}
    own = {} if spec.single_file_vae == "beside" else {"vae": VAE_PREFIXES}
    return encoders | parts | own


def _is_model(cls: Any) -> bool:
    return torch.nn.Module in getattr(cls, "__mro__", ())


def _grouped(spec: ModelSpec, header: Header, tensors: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """The tensors, or what is known of them, by component; "marks" are of none, or of one beside the file."""
    owners = {prefix: name for name, prefix in spec.single_file_encoders.items()}
    owners |= {prefix: name for name, part in spec.single_file_parts.items() for prefix in part.prefixes}
    owners |= dict.fromkeys(VAE_PREFIXES, "vae")
    here = {name for name, wanted in _prefixes(spec).items() if header.has(*wanted)}
    groups: dict[str, dict[str, Value]] = {spec.denoiser: {}, "marks": {}}
    for name, tensor in tensors.items():
        owner = next((part for prefix, part in owners.items() if name.startswith(prefix)), None)
        if owner is None:
            # Transformers have tensors without a dot in their names.
            mark = spec.denoiser == "unet" and "." not in name
            mark = mark or name.startswith(("model_ema.", "conditioner.", "cond_stage_model."))
            owner = "marks" if mark else spec.denoiser
        elif owner not in here:
            owner = "marks"
        elif "clip" not in name and name.startswith(CLIP_FLAT):
            name = name.replace(".transformer.", ".transformer.text_model.", 1)
        groups.setdefault(owner, {})[name] = tensor
    return groups


def overrides(spec: ModelSpec, header: Header) -> dict[str, Any]:
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
    if (side := table_in(header)) is not None:
        settings["pos_embed_max_size"] = side
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


def _from_folder(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    if _is_model(cls):
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
    lines = gzip.decompress((file_header.CONFIGS / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)
