"""Textual inversion: the embeddings of --embeddings_dir, added to CLIP's tokenizers and text encoders.

Each vector is a token of its own, a private character of Unicode; in a prompt an embedding's word is replaced
by its characters before anything else reads it. So weights, chunks and compel treat them as other tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import AddedToken

from shared.api.lora_dir import files_in
from shared.api.requests import GenerateRequest
from shared.api.warned import warn
from shared.launch.errors import LoadError
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, part_of, parts_of
from shared.pipeline.adapters import AdapterError, read_tensors
from shared.ranks.groups import World

log = logging.getLogger("host")

SUFFIXES = (".safetensors", ".pt", ".bin")  # the first is taken where a word has several
FIRST = 0xF0000  # the first private character: Unicode's plane 15
MOST_VECTORS = 60_000  # in all; the plane has 65,534 characters
MOST_OF_ONE = 75  # that a chunk of a prompt holds
KEYS = ("clip_l", "clip_g")  # of files for two text encoders, in their order
LEGACY_EOS = 2  # transformers then reads the pooled embedding at the highest token, which an added one is


class EmbeddingError(ValueError):
    """A file that cannot be used with this model; the message says why."""


@dataclass
class Embedding:
    """One file: its word, and its vectors for each text encoder [vectors, width]; or why it is left out."""

    name: str
    vectors: list[torch.Tensor] = field(default_factory=list)
    trained: dict[str, Any] = field(default_factory=dict)  # step, checkpoint, as A1111 keeps them
    left_out: str = ""
    text: str = ""  # what stands for it in prompts

    def told(self) -> dict[str, Any]:
        """What /embeddings tells of it."""
        told = {"name": self.name, **self.trained, "left_out": self.left_out or None}
        if self.vectors:
            told |= {"vectors": len(self.vectors[0]), "shape": sum(part.shape[1] for part in self.vectors)}
        return {key: value for key, value in told.items() if value is not None}


class Embeddings:
    """The embeddings of a loaded pipeline."""

    def __init__(self, found: list[Embedding] | None = None) -> None:
        self.found = found or []
        self._by_word = {_word(one.name): one for one in self.found}
        self.further = frozenset("".join(one.text[1:] for one in self.found))
        """Characters of all vectors but the first of each: no chunk of a prompt begins with one."""
        names = sorted((one.name for one in self.found), key=len, reverse=True)
        self._pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(_pattern, names)) + r")(?!\w)", re.IGNORECASE)

    def of(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the words of embeddings in its prompts replaced; warns of those left out."""
        if not self.found:
            return request
        texts = {
            name: self._pattern.sub(self._replace, text)
            for name in ("positive", "negative")
            if (text := getattr(request, name)) is not None
        }
        return request.model_copy(update=texts)

    def _replace(self, match: re.Match[str]) -> str:
        one = self._by_word.get(_word(match[0]))
        if one is None:  # a dotless i is an i in a pattern without case, and not in a word
            return match[0]
        if one.left_out:
            warn(f"embedding {one.name!r} is left out, its word is plain text: {one.left_out}")
            return match[0]
        return one.text

    def digest(self) -> str:
        """Of the words and vectors in use."""
        made = hashlib.sha256()
        for one in self.found:
            if not one.left_out:
                made.update(one.name.encode())
                for part in one.vectors:
                    made.update(part.float().numpy().tobytes())
        return made.hexdigest()


def _word(text: str) -> str:
    """A name as words are compared: without case, escapes, and differences of white space."""
    return " ".join(re.sub(r"\\([()\[\]])", r"\1", text).casefold().split())


def _pattern(name: str) -> str:
    """A name in a prompt, whose brackets may be escaped."""
    words = [re.sub(r"\\([()\[\]])", r"\\\\?\\\1", re.escape(word)) for word in name.split()]
    return r"\s+".join(words)


def embeddings_of(pipe: Pipeline) -> Embeddings:
    """The embeddings of a pipeline; none where none were loaded."""
    found = part_of(pipe, "embeddings")
    return found if isinstance(found, Embeddings) else Embeddings()


def load_embeddings(pipe: Pipeline, spec: ModelSpec, folders: tuple[str, ...]) -> None:
    """Add every embedding of the folders that fits; what does not is logged, and told by `Embeddings.of`.

    Raises:
        LoadError: more vectors than there are characters for.
    """
    encoders = parts_of(pipe, spec.text_encoders)
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in encoders.values()]
    found: dict[str, Embedding] = {}
    for path in sorted(
        (path for folder in folders for path in files_in(folder, SUFFIXES)),
        key=lambda path: SUFFIXES.index(os.path.splitext(path)[1]),
    ):
        one = Embedding(Path(path).stem)
        if _word(one.name) in found:
            log.warning("--embeddings_dir: %s is left out: another file has its word", path)
            continue
        found[_word(one.name)] = one
        try:
            state = read_tensors(path, "embedding")
            one.trained = _trained(state)
            one.vectors = _vectors(state)
            _check_widths(one.vectors, widths)
        except (AdapterError, EmbeddingError) as error:
            one.left_out = str(error)
            log.warning("--embeddings_dir: %s is left out: %s", path, error)
    used = [one for one in found.values() if not one.left_out]
    count = sum(len(one.vectors[0]) for one in used)
    if count > MOST_VECTORS:
        raise LoadError(f"--embeddings_dir: must hold at most {MOST_VECTORS} vectors; got {count}")
    start = FIRST
    for one in used:
        end = start + len(one.vectors[0])
        one.text, start = "".join(map(chr, range(start, end))), end
    if used:
        for number, (encoder, tokenizer) in enumerate(
            zip(encoders.values(), parts_of(pipe, spec.tokenizers).values(), strict=True)
        ):
            _add(encoder, tokenizer, {one.text: one.vectors[number] for one in used})
    log.info("%d embeddings with %d vectors, %d left out", len(used), count, len(found) - len(used))
    pipe.embeddings = Embeddings(sorted(found.values(), key=lambda one: one.name))


def _trained(state: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"step": int, "sd_checkpoint": str, "sd_checkpoint_name": str}
    return {key: state[key] for key, kind in kinds.items() if isinstance(state.get(key), kind)}


def _vectors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """A file's vectors, fp32 [vectors, width], for each text encoder. Raises EmbeddingError."""
    inner = state.get("string_to_param", state)
    tensors = {key: value for key, value in inner.items() if isinstance(value, torch.Tensor)}
    parts = [tensors[key] for key in KEYS if key in tensors] or list(tensors.values())
    if len(tensors) != 1 and set(tensors) != set(KEYS):
        raise EmbeddingError(f"it must hold one tensor, or {' and '.join(KEYS)}; got {len(tensors)}")
    parts = [part.detach()[None] if part.ndim == 1 else part.detach() for part in parts]
    counts = {part.shape[0] for part in parts if part.ndim == 2}
    if any(part.ndim != 2 for part in parts) or len(counts) > 1 or not 1 <= max(counts) <= MOST_OF_ONE:
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise EmbeddingError(
            f"it must hold 1 to {MOST_OF_ONE} vectors, as many for each encoder; got {shapes}"
        )
    if not all(part.is_floating_point() and bool(torch.isfinite(part).all()) for part in parts):
        raise EmbeddingError("it must hold finite numbers")
    return [part.float() for part in parts]


def _check_widths(vectors: list[torch.Tensor], widths: list[int]) -> None:
    given = [part.shape[1] for part in vectors]
    if given != widths:
        ours = " and ".join(map(str, widths))
        raise EmbeddingError(
            f"it is {' and '.join(map(str, given))} wide, this model's text encoders are {ours}"
        )


def _add(encoder: Any, tokenizer: Any, added: Mapping[str, torch.Tensor]) -> None:
    """Add tokens and their rows: each character of a text is one row of its tensor."""
    tokens = "".join(added)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    rows = encoder.get_input_embeddings().weight.shape[0]
    # Means of the rows that there are, as it makes by default, take seconds and are overwritten.
    encoder.resize_token_embeddings(max(rows, max(ids) + 1), mean_resizing=False)
    weight = encoder.get_input_embeddings().weight.requires_grad_(False)
    weight[ids] = torch.cat(list(added.values())).to(weight)
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == LEGACY_EOS:
            module.eos_token_id = tokenizer.eos_token_id


def check_alike(pipe: Pipeline, world: World) -> None:
    """Raise LoadError on all ranks where they have not all loaded the same embeddings."""
    digests: list[Any] = [embeddings_of(pipe).digest()] * world.size
    if world.size > 1:
        dist.all_gather_object(digests, digests[0], group=world.voting)
    if len(set(digests)) > 1:
        raise LoadError("--embeddings_dir: the ranks found different files in their folders")
