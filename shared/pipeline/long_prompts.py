"""Prompts of any length and weight for CLIP's text encoders: in chunks of 75 tokens, as A1111 does.

What the other encoders truncate is reported, never truncated silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from shared.api.a1111_prompts import Chunk, parse, plain
from shared.api.warned import warn
from shared.models import MODELS, Chat, ModelSpec
from shared.parallel.pipeline import Pipeline, part_of, parts_of
from shared.pipeline.embeddings import embeddings_of

CHUNK = 77  # tokens, with those at the ends
SHOWN = 160  # characters of the truncated part


def _quoted(text: str) -> str:
    """The words in quotation marks, as HunyuanVideo 1.5 reads them; its module takes 0.6 s to import."""
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    return extract_glyph_texts(text) or ""


def words_of(pipe: Pipeline, prompt: str, tokenizer: Any) -> str:
    """The prompt with its textual inversions as their tokens."""
    takes_them = isinstance(pipe, TextualInversionLoaderMixin)
    return pipe.maybe_convert_prompt(prompt, tokenizer) if takes_them else prompt


def tokens_of(pipe: Pipeline, prompt: str, tokenizer: Any, marks: bool = True) -> list[int]:
    """All its tokens, by default with those that the tokenizer adds at the ends."""
    words = words_of(pipe, prompt, tokenizer)
    return tokenizer(words, truncation=False, verbose=False, add_special_tokens=marks).input_ids


def named_arguments(encode: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an `encode_prompt`, by name, with defaults."""
    call = inspect.signature(encode).bind(*args, **kwargs)
    call.apply_defaults()
    values = dict(call.arguments)
    return values | values.pop("kwargs", {})


def fit(pipe: Pipeline, spec: ModelSpec, values: dict[str, Any], negative: str | None) -> None:
    """Let an `encode_prompt` read as much as its models can, and warn of what they truncate.

    Args:
        values: its arguments by name; changed.
        negative: the request's negative prompt, to name the right field.

    Raises:
        ValueError: a prompt that is too long for a model that would truncate nothing.
    """
    for key in ("prompt", "negative_prompt"):
        text = values.get(key)
        if not isinstance(text, str):
            continue
        field = "negative" if key == "negative_prompt" or text == negative else "positive"
        index = values.get("text_encoder_index")
        pairs = list(zip(spec.tokenizers, spec.text_encoders, strict=True))
        for name, encoder in pairs if index is None else [pairs[index]]:
            parts = parts_of(pipe, (name, encoder))
            if len(parts) < 2:
                continue
            tokenizer = parts[name]
            read = _quoted(text) if name in spec.quoted_tokenizers else text
            tokens = tokens_of(pipe, read, tokenizer, marks=spec.chat is None)
            around = 0 if spec.chat is None else len(_chat(pipe, tokenizer, spec.chat))
            if spec.whole_prompts:
                if len(tokens) > spec.most_tokens:
                    most = spec.most_tokens
                    raise ValueError(f"{field}: must have at most {most} tokens, got {len(tokens)}")
                continue
            limit = min(tokenizer.model_max_length, spec.read_tokens.get(name, tokenizer.model_max_length))
            if name in spec.sized_tokenizers and values.get("max_sequence_length") is not None:
                limit = _limit(spec, values, len(tokens) + around) - around
            if len(tokens) > limit:
                cut = tokenizer.decode(tokens[limit - 1 : -1] if spec.chat is None else tokens[limit:])
                shown = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}..."
                warn(f"{field}: {name} reads {limit} of {len(tokens)} tokens; not read: {shown!r}")


def _chat(pipe: Pipeline, tokenizer: Any, chat: Chat) -> list[int]:
    """The tokens that a conversation has around a prompt."""
    said: list[dict[str, Any]] = [{"role": "user", "content": ""}]
    if chat.system is not None:
        contents = {"system": part_of(pipe, chat.system), "user": ""}
        said = [{"role": r, "content": [{"type": "text", "text": text}]} for r, text in contents.items()]
    text = tokenizer.apply_chat_template(said, tokenize=False, **chat.settings)
    return tokens_of(pipe, text, tokenizer, marks=False)


def _limit(spec: ModelSpec, values: dict[str, Any], count: int) -> int:
    """How many tokens are read; raised where the model supports more and the prompt has more."""
    usual = values["max_sequence_length"]
    if count > usual and spec.most_tokens > usual:
        values["max_sequence_length"] = spec.most_tokens
    return values["max_sequence_length"]


def is_long(pipe: Pipeline, spec: ModelSpec, text: str | None) -> bool:
    """Whether some of its encoders would truncate it."""
    tokenizers = parts_of(pipe, spec.tokenizers).values()
    return bool(text) and any(len(tokens_of(pipe, text or "", t)) > t.model_max_length for t in tokenizers)


def needs_chunks(pipe: Pipeline, spec: ModelSpec, values: Mapping[str, Any]) -> bool:
    """Whether embeddings of one side have a length that `encode_prompt` does not give the other one's prompt.

    Args:
        values: its arguments by name. Beside positive ones it cuts the negative prompt to their length.
    """
    given = {s: values.get(f"{s}prompt_embeds") for s in ("", "negative_")}
    if not values.get("do_classifier_free_guidance", True) or sum(e is None for e in given.values()) != 1:
        return False
    if (positive := given[""]) is None:
        return given["negative_"].shape[1] != CHUNK  # type: ignore[union-attr]
    text = values.get("negative_prompt")
    if text is None and pipe.config.get("force_zeros_for_empty_prompt", False):
        return False
    tokenizers = parts_of(pipe, spec.tokenizers).values()
    longest = max(len(tokens_of(pipe, text or "", tokenizer)) for tokenizer in tokenizers)
    return positive.shape[1] > CHUNK or longest > positive.shape[1]


def chunks_of(text: str, notation: str | None) -> list[Chunk]:
    """A prompt's parts; without a notation all of it has weight 1."""
    return parse(text) if notation == "a1111" else [[(text, 1.0)]]


def encode_chunks(pipe: Pipeline, spec: ModelSpec, values: dict[str, Any], notation: str | None) -> None:
    """Replace both prompts of an `encode_prompt` by embeddings, padded to one length.

    Args:
        values: its arguments by name; changed.
    """
    guided = values.get("do_classifier_free_guidance", True)
    zeros = values.get("negative_prompt") is None and pipe.config.get("force_zeros_for_empty_prompt", False)
    given = {s: t for s in ("", "negative_") if (t := values.get(f"{s}prompt_embeds")) is not None}
    sides = [s for s in ("", "negative_") if s not in given and (not s or (guided and not zeros))]
    texts = [values.get(f"{side}prompt") or "" for side in sides]
    tokenizers = parts_of(pipe, spec.tokenizers).values()
    tokenized = [[_token_chunks(pipe, t, chunks_of(text, notation)) for t in tokenizers] for text in texts]
    least = [-(-tensor.shape[1] // CHUNK) for tensor in given.values()]
    length = max(*least, *(len(chunks) for side in tokenized for chunks in side), 1)
    for side, encoders in zip(sides, tokenized, strict=True):
        # As diffusers does, skipped layers are only those of the positive prompt.
        skip = None if side else values.get("clip_skip")
        embeds, pooled = _encode(pipe, spec, encoders, length, skip)
        values[f"{side}prompt_embeds"] = embeds
        if spec.pooled_embeds:
            values[f"{side}pooled_prompt_embeds"] = pooled
    for side, tensor in given.items():
        if tensor.shape[1] != length * CHUNK:
            name = "negative_embeds" if side else "positive_embeds"
            raise ValueError(
                f"{name}: must hold {length * CHUNK} tokens to match this prompt, got {tensor.shape[1]}"
            )


def _token_chunks(pipe: Pipeline, tokenizer: Any, parts: list[Chunk]) -> list[list[tuple[int, float]]]:
    """Tokens with weights, in chunks of as many as fit between the two at the ends."""
    size = tokenizer.model_max_length - 2
    further = embeddings_of(pipe).further
    chunks = []
    for part in parts:
        tokens: list[tuple[int, float]] = []
        for words, weight in part:
            ids = tokens_of(pipe, words, tokenizer)[1:-1]
            tokens += [(token, weight) for token in ids]
        while len(tokens) > size:
            end = size
            while tokenizer.convert_ids_to_tokens(tokens[end][0]) in further:  # an embedding stays whole
                end -= 1
            chunks.append(tokens[:end])
            tokens = tokens[end:]
        chunks.append(tokens)
    return chunks


@torch.no_grad()
def _encode(
    pipe: Pipeline,
    spec: ModelSpec,
    tokenized: list[list[list[tuple[int, float]]]],
    length: int,
    skip: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of all chunks one after the other, and the pooled one of the first."""
    found, pooled = [], None
    encoders, tokenizers = parts_of(pipe, spec.text_encoders), parts_of(pipe, spec.tokenizers)
    for encoder, tokenizer, chunks in zip(encoders.values(), tokenizers.values(), tokenized, strict=True):
        rows = []
        for number in range(length):
            chunk = chunks[number] if number < len(chunks) else []
            made, of_chunk = _encode_chunk(pipe, spec, encoder, tokenizer, chunk, skip)
            rows.append(made)
            if number == 0 and of_chunk.ndim == 2:
                pooled = of_chunk
        found.append(torch.cat(rows, dim=1))
    return torch.cat(found, dim=-1), pooled


def _encode_chunk(
    pipe: Pipeline,
    spec: ModelSpec,
    encoder: Any,
    tokenizer: Any,
    chunk: list[tuple[int, float]],
    skip: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk, called as the pipeline calls the encoder, so that a captured one is replayed."""
    size = tokenizer.model_max_length
    ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * (size - len(ids))], device=pipe._execution_device)
    if spec.pooled_embeds:
        output = encoder(padded, output_hidden_states=True)
        made = output.hidden_states[-2 - (skip or 0)]
    else:
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = (torch.arange(size, device=padded.device) < len(ids)).long()[None]
        more = {"output_hidden_states": True} if skip else {}
        output = encoder(padded, attention_mask=mask, **more)
        made = output[0]
        if skip:
            made = encoder.text_model.final_layer_norm(output[-1][-(skip + 1)])
    weights = [1.0, *(weight for _, weight in chunk)]
    if any(weight != 1 for weight in weights):
        factors = torch.tensor(weights + [1.0] * (size - len(weights)), dtype=made.dtype, device=made.device)
        before = made.float().mean()
        made = made * factors[None, :, None]
        # As A1111 does; but the ratio of two means near zero says nothing.
        ratio = float(before / made.float().mean())
        made = made * ratio if 0.5 < ratio < 2 else made
    return made, output[0]


def take_notation(values: dict[str, Any], weighs: bool) -> bool:
    """Prompts in A1111's notation as plain words, with a warning where the encoders support no weights.

    Returns:
        Whether there is something to weigh or to break, and `weighs`; the prompts are left as they are then.
    """
    texts = {key: text for key in ("prompt", "negative_prompt") if isinstance(text := values.get(key), str)}
    words = {key: plain(text) for key, text in texts.items()}
    noted = [key for key, (_, left_out) in words.items() if left_out]
    if noted and weighs:
        return True
    values |= {key: text for key, (text, _) in words.items()}
    if noted:
        warn("prompt: this type's text encoders carry no weights and no BREAK; they were left out")
    return False


def read_all(
    encode: Callable[..., Any], pipe: Pipeline, type: str, notation: str | None, /, **values: Any
) -> Any:
    """An `encode_prompt` that reads all of its prompts, in chunks."""
    encode_chunks(pipe, MODELS[type], values, notation)
    return encode(**values)
