"""What the pool's server imports before it forks ranks, which would each import it again (tests/pool.py)."""

from __future__ import annotations

import gc
import importlib

gc.disable()  # a sixth of the time of what follows: all of it stays
diffusers, conversion_mapping, models, xdit, *_ = map(
    importlib.import_module,
    (
        "diffusers",
        "transformers.conversion_mapping",
        "shared.models",
        "shared.parallel.xdit.cpu",
        "functorch.compile",  # of the first graph that is compiled, with all of networkx
        "optimum.quanto",
        "peft",
        "pytest",
        "torch._dynamo",
        "torch.utils.cpp_extension",
        "torch.utils.flop_counter",
        "shared.backends.asyncdiff",
        "shared.pipeline.engine",
        "shared.pipeline.loading",
        "tests.tiny",
    ),
)
xdit.load_xfuser("cpu")
# Of the module and of a load: transformers makes it when the first model is loaded, from a thousand patterns.
conversion_mapping.get_checkpoint_conversion_mapping("clip")
for spec in models.MODELS.values():
    getattr(diffusers, spec.pipeline)
gc.enable()
