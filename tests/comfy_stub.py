"""As much of ComfyUI as the node pack imports, with the keywords that ComfyUI documents and no others.

`install()` puts it in `sys.modules` and loads the pack; `ComfyUI.run` executes a prompt as ComfyUI does:
links, widgets, hidden inputs, a fingerprint for the cache, a class clone for each execution.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from PIL import Image

PACK = Path(__file__).resolve().parent.parent / "clients" / "comfyui"
_ANY = ("id", "display_name", "optional", "tooltip", "lazy")
_WIDGET = (*_ANY, "default", "socketless")
# What each input's constructor takes (docs.comfy.org, custom nodes in V3 form); the rest is a TypeError here.
INPUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Int": (
        "INT",
        (*_WIDGET, "min", "max", "step", "control_after_generate", "display_mode", "force_input"),
    ),
    "Float": ("FLOAT", (*_WIDGET, "min", "max", "step", "round", "display_mode", "force_input")),
    "String": ("STRING", (*_WIDGET, "multiline", "placeholder", "dynamic_prompts", "force_input")),
    "Boolean": ("BOOLEAN", (*_WIDGET, "label_on", "label_off", "force_input")),
    "Combo": (
        "COMBO",
        (*_WIDGET, "options", "control_after_generate", "upload", "image_folder", "remote"),
    ),
    "Image": ("IMAGE", _ANY),
    "Mask": ("MASK", _ANY),
    "Latent": ("LATENT", _ANY),
    "Conditioning": ("CONDITIONING", _ANY),
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SCHEMA = ("node_id", "display_name", "category", "inputs", "outputs", "hidden", "description")


class Input:
    keywords: tuple[str, ...] = _ANY
    io_type = ""

    def __init__(self, id: str, *positional: Any, **given: Any) -> None:
        named = dict(zip(self.keywords[1:], positional, strict=False)) | given
        unknown = set(named) - set(self.keywords)
        if unknown or len(positional) >= len(self.keywords):
            raise TypeError(f"{self.io_type}: {unknown or positional}")
        self.id, self.given, self.optional = id, named, bool(named.get("optional"))


class Output:
    io_type = ""

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        self.id, self.display_name = id, display_name


def Custom(io_type: str, keywords: tuple[str, ...] = _ANY) -> Any:
    return type(
        io_type,
        (),
        {
            "io_type": io_type,
            "Input": type("Input", (Input,), {"io_type": io_type, "keywords": keywords}),
            "Output": type("Output", (Output,), {"io_type": io_type}),
        },
    )


class Hidden(StrEnum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


class Schema:
    def __init__(self, **given: Any) -> None:
        if unknown := set(given) - set(SCHEMA):
            raise TypeError(f"Schema: {unknown}")
        self.node_id: str = given["node_id"]
        self.inputs: list[Input] = given.get("inputs", [])
        self.outputs: list[Output] = given.get("outputs", [])
        self.hidden: list[Hidden] = given.get("hidden", [])
        names = [one.id for one in self.inputs]
        assert len(names) == len(set(names)), f"{self.node_id}: an input twice"

    def ordered(self) -> list[Input]:
        """As the browser shows them: required inputs first."""
        return sorted(self.inputs, key=lambda one: one.optional)


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: Any = None) -> None:
        self.args = args


class ComfyNode:
    hidden: Any = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError


class ComfyExtension:
    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


class InterruptProcessingException(Exception):
    pass


class LoadImage(ComfyNode):
    """ComfyUI's own, as far as workflows need it."""

    @classmethod
    def define_schema(cls) -> Schema:
        upload = _IO["Combo"].Input("upload", options=["image"])
        return Schema(
            node_id="LoadImage",
            inputs=[_IO["Combo"].Input("image", options=["example.png"]), upload],
            outputs=[_IO["Image"].Output()],
        )

    @classmethod
    def execute(cls, image: str, upload: str) -> NodeOutput:
        return NodeOutput(torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0)))


class _Save(ComfyNode):
    @classmethod
    def execute(cls, images: torch.Tensor, **settings: Any) -> NodeOutput:
        assert images.ndim == 4 and images.shape[-1] == 3 and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        return NodeOutput(images)


class SaveImage(_Save):
    @classmethod
    def define_schema(cls) -> Schema:
        prefix = _IO["String"].Input("filename_prefix", default="ComfyUI")
        return Schema(node_id="SaveImage", inputs=[_IO["Image"].Input("images"), prefix])


class SaveAnimatedWEBP(_Save):
    @classmethod
    def define_schema(cls) -> Schema:
        inputs = [
            _IO["Image"].Input("images"),
            _IO["String"].Input("filename_prefix", default="ComfyUI"),
            _IO["Float"].Input("fps", default=6.0),
            _IO["Boolean"].Input("lossless", default=True),
            _IO["Int"].Input("quality", default=80),
            _IO["Combo"].Input("method", options=["default", "fastest", "slowest"]),
        ]
        return Schema(node_id="SaveAnimatedWEBP", inputs=inputs)


_IO = {name: Custom(io_type, keywords) for name, (io_type, keywords) in INPUTS.items()}


class ComfyUI:
    """The stand-in, and the pack loaded into it.

    Args:
        models: its models folder.
    """

    def __init__(self, models: Path) -> None:
        self.models = models
        self.kinds = {kind: [models / kind] for kind in ("checkpoints", "diffusers", "loras", "controlnet")}
        self.interrupted = False
        self.progress: list[int] = []
        self.previews: list[Image.Image] = []
        self.on_progress: Callable[[], None] = lambda: None  # after each
        self.nodes: dict[str, Any] = {
            cls.define_schema().node_id: cls for cls in (LoadImage, SaveImage, SaveAnimatedWEBP)
        }
        self._cache: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.executed: list[str] = []

    def modules(self) -> dict[str, types.ModuleType]:
        api = {"ComfyExtension": ComfyExtension, "io": self._io(), "ui": types.SimpleNamespace()}
        management = {
            "throw_exception_if_processing_interrupted": self._throw,
            "InterruptProcessingException": InterruptProcessingException,
        }
        folders = {
            "models_dir": str(self.models),
            "add_model_folder_path": lambda kind, path: self.kinds.setdefault(kind, []).append(Path(path)),
            "get_folder_paths": lambda kind: [str(path) for path in self.kinds[kind]],
            "get_filename_list": self._files,
            "get_full_path_or_raise": self._full_path,
        }
        outer = self

        class ProgressBar:
            def __init__(self, total: int, node_id: Any = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                assert 0 <= value <= (total or self.total)
                outer.progress.append(value)
                if preview is not None:
                    format, picture, side = preview
                    assert format in ("JPEG", "PNG") and isinstance(side, int)
                    assert isinstance(picture, Image.Image)
                    outer.previews.append(picture)
                outer.on_progress()

        contents: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": management,
            "comfy_api": {},
            "comfy_api.latest": api,
            "folder_paths": folders,
        }
        made = {}
        for name, content in contents.items():
            made[name] = types.ModuleType(name)
            made[name].__dict__.update(content)
        made["comfy"].__dict__.update({n: made[f"comfy.{n}"] for n in ("utils", "model_management")})
        return made

    def _io(self) -> types.SimpleNamespace:
        parts = {"Schema": Schema, "ComfyNode": ComfyNode, "NodeOutput": NodeOutput, "Hidden": Hidden}
        return types.SimpleNamespace(**parts, **_IO, Custom=Custom, Input=Input, Output=Output)

    def _throw(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException

    def _files(self, kind: str) -> list[str]:
        found = [
            os.path.relpath(os.path.join(folder, name), root)
            for root in self.kinds[kind]
            for folder, _, names in os.walk(root)
            for name in names
        ]
        return sorted(found)

    def _full_path(self, kind: str, name: str) -> str:
        return next(str(root / name) for root in self.kinds[kind] if (root / name).is_file())

    def load(self) -> None:
        """Load the pack as ComfyUI does: by its path, under a name made of it."""
        name = str(PACK).replace(".", "_x_")
        for earlier in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
            del sys.modules[earlier]  # it holds on to the stand-in that it was loaded into
        spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not hasattr(module, "NODE_CLASS_MAPPINGS")
        extension = asyncio.run(module.comfy_entrypoint())
        assert isinstance(extension, ComfyExtension)
        for cls in asyncio.run(extension.get_node_list()):
            self.nodes[cls.define_schema().node_id] = cls
        parts = ("host", "launched", "convert", "nodes", "samplers")
        self.pack = {part: sys.modules[f"{name}.{part}"] for part in parts}

    def prompt_of(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """A saved workflow as the prompt that the browser makes of it."""
        links = {link[0]: (str(link[1]), link[2], link[5]) for link in workflow["links"]}
        prompt = {}
        for node in workflow["nodes"]:
            schema = self.nodes[node["type"]].define_schema()
            sockets = {one["name"]: one for one in node["inputs"]}
            values = iter(node["widgets_values"])
            inputs: dict[str, Any] = {}
            for one in schema.ordered():
                if one.io_type in WIDGETS:
                    inputs[one.id] = next(values)
                    if one.given.get("control_after_generate"):
                        assert next(values) in ("fixed", "increment", "decrement", "randomize")
                elif (link := sockets.pop(one.id)["link"]) is not None:
                    source, slot, io_type = links[link]
                    assert io_type == one.io_type
                    inputs[one.id] = [source, slot]
            assert not sockets and not list(values), node["type"]
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return prompt

    def run(self, prompt: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Execute every node; the outputs by node. What has not changed is not executed again."""
        outputs: dict[str, tuple[Any, ...]] = {}
        signatures: dict[str, Any] = {}

        def output(key: str) -> tuple[Any, ...]:
            if key not in outputs:
                node = prompt[key]
                cls = self.nodes[node["class_type"]]
                links = {n: v for n, v in node["inputs"].items() if isinstance(v, list)}
                given = {n: output(v[0])[v[1]] if n in links else v for n, v in node["inputs"].items()}
                plain = {n: v for n, v in node["inputs"].items() if n not in links}
                self._validate(cls.define_schema(), plain, links)
                print_of = getattr(cls, "fingerprint_inputs", None)
                before = [signatures[v[0]] for v in links.values()]
                signature = json.dumps([node, print_of(**plain) if print_of else None, before])
                signatures[key] = signature
                if self._cache.get(key, ("", ()))[0] != signature:
                    self._cache[key] = (signature, self._execute(cls, key, prompt, given))
                outputs[key] = self._cache[key][1]
            return outputs[key]

        for key in prompt:
            output(key)
        return outputs

    def _validate(self, schema: Schema, values: dict[str, Any], links: dict[str, Any]) -> None:
        known = {one.id: one for one in schema.inputs}
        assert not (set(values) | set(links)) - set(known), schema.node_id
        for one in schema.inputs:
            assert one.optional or one.id in values or one.id in links, f"{schema.node_id}: no {one.id}"
        for name, value in values.items():
            given = known[name].given
            if "options" in given:
                assert value in given["options"], f"{schema.node_id}.{name}: {value!r} not in list"
            if "min" in given:
                assert given["min"] <= value <= given["max"], f"{schema.node_id}.{name}: {value}"

    def _execute(self, cls: Any, key: str, prompt: dict[str, Any], given: dict[str, Any]) -> tuple[Any, ...]:
        self.executed.append(prompt[key]["class_type"])
        holder = types.SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
        for hidden in cls.define_schema().hidden:
            setattr(holder, hidden.name, {"unique_id": key, "prompt": prompt}[hidden.name])
        clone: Any = type(cls.__name__, (cls,), {"hidden": holder})
        return clone.execute(**given).args


def install(monkey: Callable[[Any, str, Any], None], models: Path) -> ComfyUI:
    """The stand-in with the pack loaded; `monkey` is MonkeyPatch.setitem."""
    comfy = ComfyUI(models)
    for name, module in comfy.modules().items():
        monkey(sys.modules, name, module)
    comfy.load()
    return comfy
