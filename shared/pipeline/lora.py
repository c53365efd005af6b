"""LoRAs on a pipeline of any type: added through PEFT, scaled, fused, removed.

One path for all types and formats, because half of the pipelines have no loader of their own and the others
load what fits and silently ignore the rest. Files are read in lora_file, their names in lora_names, and what
they add is in lora_layers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from shared.api.lora_dir import is_named
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, part_of, parts_of
from shared.pipeline.lora_file import LoraError, read_lora
from shared.pipeline.lora_layers import fuse, inject, lora_layers, ordered, unwrap
from shared.pipeline.lora_names import Matched, match_layers, sample

log = logging.getLogger("host")


@dataclass(frozen=True)
class Loaded:
    """One LoRA on a pipeline. `matched` and `unmatched` count layers of the file."""

    path: str
    adapter: str
    scale: float
    matched: int
    unmatched: int


@dataclass
class LoraSet:
    """The LoRAs of one pipeline, in the order in which they were added."""

    pipe: Pipeline
    spec: ModelSpec
    frozen: str | None = None  # why none can be added, removed or scaled
    fixed: str | None = None  # why none can be added or removed; scales still work
    unread: str | None = None  # why a DoRA, which needs the layers' own weights, cannot be added
    loaded: dict[str, Loaded] = field(default_factory=dict)
    _count: int = 0
    _in_place: dict[str, float] | None = None
    """The scales that the layers have, by adapter; None where that is not known."""

    def add(self, path: str, scale: float = 1.0) -> Loaded:
        """Load a LoRA and make it active with the others.

        Raises:
            LoraError: fused, compiled or offloaded weights, an unreadable file, or a LoRA that fits nowhere.
        """
        self._check_open(self.fixed)
        if path in self.loaded:
            raise LoraError(f"LoRA {path!r} is loaded already")
        tensors = read_lora(path)
        try:
            parts, unmatched = match_layers(self.pipe, self.spec, tensors)
        except LoraError as error:
            raise LoraError(f"LoRA {path!r}: {error}") from None
        parts = self._shared(path, parts)
        matched = sum(map(len, parts.values()))
        if not matched:
            raise LoraError(f"LoRA {path!r} fits no layer of type {self.spec.name}: {sample(unmatched)}")
        if self.unread and any(update.is_dora for layers in parts.values() for update in layers.values()):
            raise LoraError(f"LoRA {path!r} is a DoRA: {self.unread}")
        adapter = f"lora{self._count}"
        self._count += 1
        try:
            for part, found in parts.items():
                inject(getattr(self.pipe, part), found, adapter)
        except Exception:
            self._take_off(adapter)
            raise
        entry = Loaded(path, adapter, scale, matched, len(unmatched))
        self.loaded[path] = entry
        self.set_scales({})
        if unmatched:
            log.warning(
                "LoRA %s: %d of %d layers fit; the others are ignored (%s)",
                path, matched, matched + len(unmatched), sample(unmatched),
            )  # fmt: skip
        else:
            log.info("LoRA %s: %d layers, scale %g", path, matched, scale)
        return entry

    def _shared(self, path: str, parts: Matched) -> Matched:
        """Where several denoisers have a file's layers: for those that its name tells, else for all."""
        mine = parts.get(self.spec.denoiser)
        have = parts_of(self.pipe, self.spec.denoisers)
        if mine is None or len(have) == 1 or len(parts.keys() & have.keys()) > 1:
            return parts
        words = re.split(r"[^a-z]+|noise", Path(path).stem.lower())
        told = {part for word, part in self.spec.lora_parts.items() if word in words} or set(have)
        log.info("LoRA %s: for %s", path, " and ".join(sorted(told)))
        return {part: layers for part, layers in parts.items() if part not in have} | dict.fromkeys(
            (part for part in have if part in told), mine
        )

    def remove(self, path: str) -> None:
        """Remove a LoRA; after the last one the layers are the original objects. Raises LoraError."""
        self._check_open(self.fixed)
        self._take_off(self.loaded.pop(self.name_of(path)).adapter)
        self.set_scales({})

    def rescale(self, path: str, scale: float) -> Loaded:
        """Give a loaded LoRA another scale of its own, the one without `set_scales`. Raises LoraError."""
        self._check_open()
        self.loaded[path] = replace(self.loaded[path], scale=scale)
        return self.loaded[path]

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give LoRAs other scales, keyed by path, file name or file name without suffix; {} is the launch's.

        Raises:
            LoraError: a name that is not loaded, or weights that were fused.
        """
        if scales:
            self._check_open()
        wanted = {entry.path: entry.scale for entry in self.loaded.values()}
        wanted |= {self.name_of(name): scale for name, scale in scales.items()}
        by_adapter = {self.loaded[path].adapter: scale for path, scale in wanted.items()}
        if by_adapter == self._in_place:
            return  # without a search of all modules in every request
        for module in self._models():
            for _, layer in lora_layers(module):
                names = ordered(layer, list(by_adapter))
                layer.set_adapter(names)
                for name in names:
                    layer.set_scale(name, by_adapter[name])
                layer.requires_grad_(False)
        self._in_place = by_adapter

    def name_of(self, name: str) -> str:
        """The path of the loaded LoRA that `name` means. Raises LoraError."""
        found = [name] if name in self.loaded else [path for path in self.loaded if is_named(path, name)]
        if len(found) != 1:
            known = ", ".join(self.loaded) or "none"
            problem = "means several LoRAs" if found else "is not loaded"
            raise LoraError(f"LoRA {name!r} {problem}; loaded: {known}")
        return found[0]

    def fuse(self, why: str) -> None:
        """Add the LoRAs at their scales to the weights and remove the adapter layers."""
        for module in self._models():
            fuse(module)
        if self.loaded:
            self.frozen = f"LoRAs are fused into the weights because of {why}"

    def freeze(self, why: str) -> None:
        """From now on none can be added, removed or scaled, for this reason."""
        self.frozen = why

    def _take_off(self, adapter: str) -> None:
        self._in_place = None
        for module in self._models():
            for _, layer in lora_layers(module):
                if adapter in layer.lora_A:
                    layer.delete_adapter(adapter)
            getattr(module, "peft_config", {}).pop(adapter, None)
            if not self.loaded:
                unwrap(module)

    def _models(self) -> Iterable[nn.Module]:
        return parts_of(self.pipe, (*self.spec.denoisers, *self.spec.text_encoders)).values()

    def _check_open(self, fixed: str | None = None) -> None:
        if reason := self.frozen or fixed:
            raise LoraError(reason)


def loras_of(pipe: Pipeline, spec: ModelSpec) -> LoraSet:
    """The pipeline's LoraSet; an empty one at first."""
    if not isinstance(part_of(pipe, "lora_set"), LoraSet):
        pipe.lora_set = LoraSet(pipe, spec)
    return pipe.lora_set
