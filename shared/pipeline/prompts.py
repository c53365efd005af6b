"""Prompts: plain, weighted and long (compel), or given as embeddings; and CLIP's skipped layers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, model_of
from shared.parallel.surgery import Surgery
from shared.pipeline.long_prompts import fit, is_long, named_arguments, needs_chunks, read_all, take_notation

KEPT_PROMPTS = 8
COMPEL_LENGTH, COMPEL_MARKS, COMPEL_DEPTH = 4000, 200, 16  # what compel reads in a second or two


class PromptError(ValueError):
    """A prompt that this type or launch does not support; the message says why."""


class EncodedPrompts:
    """Cached embeddings of the last prompts: the same words with another seed are not encoded again."""

    def __init__(self) -> None:
        self._remembered = functools.lru_cache(KEPT_PROMPTS)(_encode)

    @contextlib.contextmanager
    def of(
        self,
        pipe: Pipeline,
        state: Hashable,
        spec: ModelSpec | None = None,
        notation: str | None = None,
        negative: str | None = None,
    ) -> Iterator[None]:
        """Inside, the pipeline's `encode_prompt` is cached, and truncates nothing silently.

        Args:
            state: what else the embeddings depend on (scales of LoRAs).
            notation: "a1111" where the prompts are in that notation.
            negative: the request's negative prompt.
        """
        if spec is not None and not spec.text_encoders:
            yield
            return
        encode = pipe.encode_prompt

        @functools.wraps(encode)
        def remembering(*args: Any, **kwargs: Any) -> Any:
            call: Callable[..., Any] = encode
            before: tuple[Any, ...] = ()
            if spec is not None:
                values = named_arguments(encode, args, kwargs)
                sides = [values.get("prompt"), values.get("negative_prompt")]
                weighed = notation is not None and take_notation(values, spec.prompt_chunks)
                chunked = spec.prompt_chunks and (
                    any(is_long(pipe, spec, text) for text in sides) or needs_chunks(pipe, spec, values)
                )
                if weighed or chunked:
                    call, before, args, kwargs = read_all, (encode, pipe, spec.name, notation), (), values
                else:
                    if not spec.prompt_chunks:
                        fit(pipe, spec, values, negative)
                    args, kwargs = (), values
            args, kwargs = tuple(map(_by_content, args)), {k: _by_content(v) for k, v in kwargs.items()}
            given = (*args, *kwargs.values())
            if any(isinstance(value, torch.Tensor) or not isinstance(value, Hashable) for value in given):
                return _encode(call, None, *before, *args, **kwargs)
            return self._remembered(call, state, *before, *args, **kwargs)

        with Surgery() as surgery:
            surgery.replace(pipe, "encode_prompt", remembering)
            yield

    def forget(self) -> None:
        """The encoders have changed."""
        self._remembered.cache_clear()


@dataclass(frozen=True)
class _Seen:
    """Pictures that an encoder sees beside the words, equal to others of the same content."""

    content: bytes
    pictures: Any = field(compare=False)


def _by_content(value: Any) -> Any:
    pictures = value if isinstance(value, (list, tuple)) else [value]
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        return value
    content = hashlib.sha256(repr([(p.size, p.mode) for p in pictures]).encode())
    for picture in pictures:
        content.update(picture.tobytes())
    return _Seen(content.digest(), value)


def _encode(encode: Callable[..., Any], state: Hashable, /, *args: Any, **kwargs: Any) -> Any:
    given = [value.pictures if isinstance(value, _Seen) else value for value in (*args, *kwargs.values())]
    return encode(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))


def prompt_arguments(
    pipe: Pipeline,
    spec: ModelSpec,
    positive: str | None = None,
    negative: str | None = None,
    positive_embeds: Mapping[str, torch.Tensor] | None = None,
    negative_embeds: Mapping[str, torch.Tensor] | None = None,
    clip_skip: int | None = None,
    compel: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of the pipeline for a prompt.

    Args:
        positive_embeds, negative_embeds: `embeds` [1, tokens, width] and, for types with pooled embeddings,
            `pooled` [1, width]; instead of the prompt of the same side.
        clip_skip: layers of the CLIP encoders to leave out at the end; 0 and None take the usual output.
        compel: parse weights such as `(word)1.3` and let prompts be longer than 77 tokens.

    Raises:
        PromptError: embeddings without or with pooled ones where they (do not) belong, of a wrong shape;
            clip_skip with compel, without a prompt, or beyond the encoder's layers; a prompt that compel
            cannot parse.
    """
    if "positive" not in spec.fields:
        return {}
    arguments: dict[str, Any] = {}
    if spec.embeds_mask and negative_embeds is not None and positive_embeds is None:
        raise PromptError(f"negative_embeds: type {spec.name} supports it only together with positive_embeds")
    if clip_skip:
        if positive_embeds is not None and negative_embeds is not None:
            raise PromptError("clip_skip: no prompt is encoded, because both are given as embeddings")
        _check_clip_skip(pipe, clip_skip, compel)
        arguments["clip_skip"] = clip_skip
        _alias_text_model(pipe.text_encoder)
    if compel and positive_embeds is None and negative_embeds is None:
        return arguments | _compel(pipe, spec, positive or "", negative or "")
    arguments |= _side(pipe, spec, "", positive or "", positive_embeds)
    said = None if spec.negative_embeds_only else negative
    arguments |= _side(pipe, spec, "negative_", said, negative_embeds)
    lengths = [a.shape[1] for s in ("", "negative_") if (a := arguments.get(f"{s}prompt_embeds")) is not None]
    if spec.prompt_chunks and len(set(lengths)) > 1:
        raise PromptError(
            "negative_embeds: must have as many tokens as positive_embeds, {}; got {}".format(*lengths)
        )
    return arguments


def negative_arguments(
    pipe: Pipeline, spec: ModelSpec, negative: str | None, scale: float
) -> dict[str, torch.Tensor]:
    """The negative prompt, encoded, for a pipeline that takes it only so; nothing without guidance."""
    if not spec.negative_embeds_only or not negative or scale <= 1:
        return {}
    return {"negative_prompt_embeds": pipe.encode_prompt(prompt=negative)[0]}


def _side(
    pipe: Pipeline,
    spec: ModelSpec,
    prefix: str,
    prompt: str | None,
    embeds: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    if embeds is None:  # an absent negative prompt is left to the pipeline's default
        return {} if prompt is None else {f"{prefix}prompt": prompt}
    label = "negative_embeds" if prefix else "positive_embeds"
    tensor, pooled = embeds["embeds"], embeds.get("pooled")
    if tensor.ndim != 3 or tensor.shape[0] != 1:
        raise PromptError(f"{label}: 'embeds' must be [1, tokens, width], got {list(tensor.shape)}")
    denoiser = model_of(pipe, spec.denoiser)
    width = denoiser.config[spec.embeds_setting]  # of a UNet it may be one for each level
    if isinstance(width, int) and tensor.shape[2] != width:
        raise PromptError(
            f"{label}: 'embeds' must be {width} wide for this checkpoint, got {tensor.shape[2]}"
        )
    if spec.pooled_embeds != (pooled is not None):
        needs = "needs 'pooled' too" if spec.pooled_embeds else "takes no 'pooled'"
        raise PromptError(f"{label}: type {spec.name} {needs}")
    if pooled is not None:
        wanted = [1, _pooled_width(denoiser.config, spec)]
        if list(pooled.shape) != wanted:
            raise PromptError(f"{label}: 'pooled' must be {wanted}, got {list(pooled.shape)}")
    found: dict[str, Any] = {f"{prefix}prompt": None, f"{prefix}prompt_embeds": tensor.to(denoiser.dtype)}
    if pooled is not None:
        found[f"{prefix}pooled_prompt_embeds"] = pooled.to(denoiser.dtype)
    if spec.embeds_mask:
        found[f"{prefix}prompt_attention_mask"] = torch.ones(tensor.shape[:2], device=tensor.device)
    return found


def _pooled_width(config: Any, spec: ModelSpec) -> int:
    if spec.denoiser == "transformer":
        return config["pooled_projection_dim"]
    # The UNet also gets six numbers of the picture's size.
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]


def _check_clip_skip(pipe: Pipeline, clip_skip: int, compel: bool) -> None:
    if compel:
        raise PromptError("clip_skip: compel does not support it; leave one of the two out")
    layers = pipe.text_encoder.config.num_hidden_layers
    if clip_skip >= layers:
        raise PromptError(
            f"clip_skip: must be at most {layers - 1}, because the text encoder has {layers} layers; got "
            f"{clip_skip}"
        )


def _alias_text_model(encoder: Any) -> None:
    """Let `encoder.text_model` be the encoder itself, where transformers (since 5.6) has flattened the two.

    Diffusers 0.42 looks for the final norm there when layers are skipped. Not registered as a submodule.
    """
    if not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder


def _compel(pipe: Pipeline, spec: ModelSpec, positive: str, negative: str) -> dict[str, Any]:
    """Embeddings of both prompts, padded to one length."""
    import compel
    import pyparsing
    from compel.prompt_parser import PromptParser

    # Without it the time to parse brackets grows exponentially with their depth.
    pyparsing.ParserElement.enable_packrat()
    for side, text in (("positive", positive), ("negative", negative)):
        _check_compel(side, text)
    wrapper = getattr(compel, spec.compel_class or "")(pipe, device=str(pipe._execution_device))
    try:
        with torch.no_grad():
            made = wrapper(positive, negative_prompt=negative)
    except (PromptParser.ParsingException, pyparsing.ParseBaseException) as error:
        raise PromptError(f"positive: compel cannot parse the prompt: {error}") from None
    except RecursionError:
        raise PromptError("positive: too many nested brackets for compel") from None
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise PromptError(
            f"positive: compel cannot parse the prompt: {error or type(error).__name__}"
        ) from None
    if not torch.isfinite(made.embeds).all():
        raise PromptError("positive: compel's weights are too large")
    arguments = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative_embeds}
    zeros = not negative and pipe.config.get("force_zeros_for_empty_prompt", False)
    if spec.pooled_embeds:
        arguments |= {
            "pooled_prompt_embeds": made.pooled_embeds,
            "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
        }
    if zeros:  # what these pipelines do with an absent negative prompt
        arguments |= {k: torch.zeros_like(v) for k, v in arguments.items() if k.startswith("negative_")}
    return arguments


def _check_compel(field: str, text: str) -> None:
    """Bound the time that compel's parser takes. Raises PromptError."""
    depth = deepest = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        deepest = max(deepest, depth)
    marks = sum(text.count(mark) for mark in '()"+') + text.count("--")
    for found, most, of in (
        (len(text), COMPEL_LENGTH, "letters"),
        (marks, COMPEL_MARKS, "brackets, quotes, + and --"),
        (deepest, COMPEL_DEPTH, "brackets in each other"),
    ):
        if found > most:
            raise PromptError(f"{field}: must have at most {most} {of} with --compel; got {found}")
