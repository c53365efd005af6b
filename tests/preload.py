"""What the pool's server imports before it forks ranks, which would each import it again (tests/pool.py)."""

from __future__ import annotations

import importlib

import diffusers
from transformers import conversion_mapping

from shared.models import MODELS
from shared.parallel.xdit.cpu import load_xfuser

for module in (
    "peft",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "shared.backends.asyncdiff",
    "shared.pipeline.engine",
    "shared.pipeline.loading",
):
    importlib.import_module(module)
load_xfuser("cpu")
# Of the module and of a load: transformers makes it when the first model is loaded, from a thousand patterns.
conversion_mapping.get_checkpoint_conversion_mapping("clip")
for spec in MODELS.values():
    getattr(diffusers, spec.pipeline)
