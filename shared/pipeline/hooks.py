"""diffusers' hooks in a pipeline's models: searched for once, not several times in each generation.

For a model's device and dtype diffusers looks for hooks in each of its modules, about 2,000 of SDXL's UNet,
while the GPU waits for the first step.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from diffusers.hooks import group_offloading
from diffusers.models import modeling_utils
from torch import nn

from shared.parallel.surgery import Surgery

OFFLOADING, CASTING = "group_offloading", "layerwise_casting"
"""diffusers' names of the hooks that its searches are for."""


class KnownHooks:
    """Remembers which hooks were found. They must be put on before the first search, as loading does."""

    def __init__(self) -> None:
        self._found: defaultdict[str, WeakKeyDictionary[nn.Module, Any]] = defaultdict(WeakKeyDictionary)

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """Inside, no model is searched twice for hooks of one kind."""
        inner = modeling_utils.get_parameter_dtype

        def dtype(model: Any) -> Any:
            searched = isinstance(model, nn.Module) and self._first(CASTING, model) is None
            return inner(_Unsearched(model) if searched else model)

        with Surgery() as surgery:
            # Functions that the others import where they are called.
            surgery.replace(
                group_offloading,
                "_get_top_level_group_offload_hook",
                lambda model: self._first(OFFLOADING, model),
            )
            surgery.replace(modeling_utils, "get_parameter_dtype", dtype)
            yield

    def _first(self, kind: str, model: nn.Module) -> Any:
        """The first hook of a kind in a model; None where there is none."""
        found = self._found[kind]
        if model not in found:
            registries = (vars(module).get("_diffusers_hook") for module in model.modules())
            hooks = (registry.get_hook(kind) for registry in registries if registry is not None)
            found[model] = next((hook for hook in hooks if hook is not None), None)
        return found[model]


class _Unsearched:
    """A model with all that it has but its type, by which diffusers knows what to search."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
