"""What libraries import only for features that a launch does not use, left out of its start."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.launch.flags import HostConfig
from shared.parallel.surgery import Closing, Surgery


def import_libraries(config: HostConfig) -> None:
    """Import what every pipeline needs of diffusers and transformers, before anything else imports them.

    Left out are torchao, where neither the launch nor its files are quantized; scipy, which is for losses of
    trainings and for a few schedulers, until one of those asks for it; scikit-learn, which is for guesses of
    language models; and most of what transformers does to list what its models export. The list of all
    installed packages, which both libraries read, is read once.
    """
    for name in ("scipy.integrate", "scipy.stats"):
        _stand_in(name)
    with Surgery() as surgery, _After("transformers.utils.import_utils", partial(_read_less, surgery)):
        listed = cache(importlib.metadata.packages_distributions)
        surgery.replace(importlib.metadata, "packages_distributions", listed)
        import diffusers.utils.import_utils
        import transformers.utils

        if not (config.quantize_to or config.fit or _stored_by_torchao(config)):
            surgery.replace(diffusers.utils.import_utils, "_torchao_available", False)
            surgery.replace(transformers.utils, "is_torchao_available", lambda *_: False)
        # For the losses of trainings.
        surgery.replace(transformers.utils, "is_scipy_available", lambda: False)
        surgery.replace(transformers.utils, "is_sklearn_available", lambda: False)
        define = transformers.utils.import_utils.define_import_structure
        surgery.replace(transformers.utils.import_utils, "define_import_structure", partial(_defined, define))
        import diffusers.quantizers
        import transformers.generation.candidate_generator  # by PEFT, else
        import transformers.modeling_utils


def _read_less(surgery: Surgery, import_utils: ModuleType) -> None:
    """transformers looks at each line of each of its files for the last that begins with `__all__`."""
    surgery.replace(import_utils, "fetch__all__", partial(_exported, import_utils.fetch__all__))


def _exported(fetch: Callable[[str], list[str]], text: str) -> list[str]:
    """What transformers finds in a file's text to be exported, of which it gets the end that says it."""
    return fetch(text[text.rfind("\n__all__") + 1 :])


def _defined(define: Callable[..., dict[Any, dict[str, Any]]], path: Any, prefix: str | None = None) -> Any:
    """transformers' list of its modules by what they need, made from their text: not twice of all its models.

    It has made the list of `transformers` by now, with `models.` before each name.
    """
    models = Path(sys.modules["transformers"].__file__ or "").parent / "models"
    if prefix is not None or Path(path) != models / "__init__.py":
        return define(path, prefix)
    dot = "models."
    return {
        needs: {name.removeprefix(dot): found for name, found in modules.items() if name.startswith(dot)}
        for needs, modules in define(models, prefix="models").items()
    }


class _After(MetaPathFinder, Closing):
    """Calls `act` with a module once its code has run, if that is within the `with` block around it."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self._name, self._act = name, act
        sys.meta_path.insert(0, self)

    def close(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        self.close()
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            self._act(module)

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


class _Later(ModuleType):
    """A module that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # tools look at every module
            raise AttributeError(name)
        parent, _, own = self.__name__.rpartition(".")
        # With its kin, of which it may need parts.
        for other, module in list(sys.modules.items()):
            if isinstance(module, _Later) and other.startswith(f"{parent}."):
                del sys.modules[other]
        found = importlib.import_module(self.__name__)
        setattr(sys.modules[parent], own, found)
        return getattr(found, name)


def _stand_in(name: str) -> bool:
    """Put a stand-in in the place of a module inside a package, unless it is imported or not installed."""
    if name in sys.modules or importlib.util.find_spec(name.partition(".")[0]) is None:
        return False
    if importlib.util.find_spec(name) is None:
        return False
    sys.modules[name] = _Later(name)
    return True


def _stored_by_torchao(config: HostConfig) -> bool:
    """Whether a folder of the launch holds weights that diffusers reads with torchao."""
    given = [
        config.checkpoint,
        config.vae,
        config.refiner,
        config.motion_adapter,
        *(config.control_net or ()),
    ]
    for folder in (Path(place) for place in given if place):
        for file in [*folder.glob("config.json"), *folder.glob("*/config.json")]:
            if '"torchao"' in file.read_text(errors="replace"):
                return True
    return False
