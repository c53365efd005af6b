"""The nodes around a host: launching it, attaching to it, and what it is launched with."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from . import choices, progress
from .host import Host
from .launched import HOSTS, LAUNCHES, Handle, Launch

CATEGORY = "multigpu diffusion"
HOST = io.Custom("MULTIGPU_HOST")
PLAN = io.Custom("MULTIGPU_PLAN")
FEATURES = io.Custom("MULTIGPU_FEATURES")
SCHEDULER = io.Custom("MULTIGPU_SCHEDULER")

AUTO = "automatic"


class LaunchHost(io.ComfyNode):
    """Keeps one host running for this node, from prompt to prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=LAUNCHES,
            display_name="Launch Host (multi-GPU)",
            category=CATEGORY,
            description="Starts a host under torchrun and keeps it between prompts. Another one is started "
            "only when something changes that needs it; scales, LoRAs, scheduler and size do not.",
            inputs=[
                io.Combo.Input("backend", options=choices.BACKENDS, tooltip="how the GPUs share the work"),
                io.Combo.Input("type", options=choices.TYPES, tooltip="the model's type"),
                io.Combo.Input(
                    "checkpoint",
                    options=list(choices.checkpoints()),
                    tooltip="a folder of models/diffusers, or a .safetensors of models/checkpoints",
                ),
                io.Int.Input("ranks", default=2, min=1, max=8, tooltip="one GPU each"),
                io.Combo.Input("variant", options=choices.VARIANTS, tooltip="precision"),
                io.Int.Input(
                    "warm_up_steps",
                    default=3,
                    min=0,
                    max=1000,
                    tooltip="exact steps at the start; with as many as steps, plain diffusers' picture",
                ),
                io.String.Input(
                    "project",
                    default=choices.project(),
                    tooltip="folder of multigpu diffusion, where the host scripts are",
                ),
                io.String.Input(
                    "flags",
                    default="",
                    multiline=True,
                    tooltip="further flags, as on a command line: --enable_vae_tiling --vae=/models/v",
                ),
                PLAN.Input(
                    "plan",
                    optional=True,
                    tooltip="how the GPUs share the work, from a plan node of the same backend",
                ),
                FEATURES.Input(
                    "features",
                    optional=True,
                    tooltip="LoRAs, ControlNets and other features: the last node of the chain",
                ),
            ],
            outputs=[HOST.Output(display_name="host")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """The same while launched hosts live, so that nothing runs again; another when one has ended."""
        return HOSTS.deaths()

    @classmethod
    def execute(
        cls,
        backend: str,
        type: str,
        checkpoint: str,
        ranks: int,
        variant: str,
        warm_up_steps: int,
        project: str,
        flags: str,
        plan: dict[str, Any] | None = None,
        features: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        own = [f"--warm_up_steps={warm_up_steps}"]
        if variant != choices.VARIANTS[0]:
            own.append(f"--variant={variant}")
        if plan is not None:
            if plan["backend"] != backend:
                raise ValueError(f"plan: is for {plan['backend']}; the host's backend is {backend}")
            own += plan["flags"]
        launch = Launch(
            project=project or choices.project(),
            backend=backend,
            type=type,
            checkpoint=choices.chosen(choices.checkpoints(), checkpoint, "checkpoint"),
            ranks=ranks,
            flags=(*own, *shlex.split(flags)),
            features=features or {},
        )
        prompt = cls.hidden.prompt or {}
        node = str(cls.hidden.unique_id)
        return io.NodeOutput(HOSTS.launch(node, launch, prompt, progress.check, progress.Loading().show))


class AttachHost(io.ComfyNode):
    """A running host that this ComfyUI did not launch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionAttachHost",
            display_name="Attach to Host (multi-GPU)",
            category=CATEGORY,
            description="Uses a running host, on this machine or another; waits while it loads.",
            inputs=[
                io.String.Input("url", default="http://127.0.0.1:6000", tooltip="the host's address"),
                io.String.Input(
                    "api_key", default="", tooltip="needed if the host was started with --api_key"
                ),
            ],
            outputs=[HOST.Output(display_name="host")],
        )

    @classmethod
    def execute(cls, url: str, api_key: str) -> io.NodeOutput:
        host = Host(url, api_key)
        return io.NodeOutput(Handle(host, str(progress.loaded(host)["type"])))


def _with(features: Mapping[str, Any] | None, name: str, value: Any) -> io.NodeOutput:
    """Features with one more: another path for kinds that are given by path; of other kinds only one."""
    made = dict(features or {})
    if isinstance(value, dict):
        value = {**made.get(name, {}), **value}
    elif name in made:
        raise ValueError(f"{name}: chosen twice, {made[name]!r} and {value!r}")
    return io.NodeOutput(made | {name: value})


def _strength(least: float) -> Any:
    return io.Float.Input(
        "strength", default=1.0, min=least, max=10.0, step=0.05, tooltip="how much it changes"
    )


def _earlier() -> Any:
    return FEATURES.Input(
        "features", optional=True, tooltip="the earlier features of the chain, which are kept"
    )


class Lora(io.ComfyNode):
    """A LoRA; several in a row."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionLora",
            display_name="LoRA (multi-GPU)",
            category=CATEGORY,
            inputs=[
                io.Combo.Input("lora", options=list(choices.loras()), tooltip="a file of models/loras"),
                _strength(-10.0),
                _earlier(),
            ],
            outputs=[FEATURES.Output(display_name="features")],
        )

    @classmethod
    def execute(cls, lora: str, strength: float, features: dict[str, Any] | None = None) -> io.NodeOutput:
        return _with(features, "lora", {choices.chosen(choices.loras(), lora, "lora"): strength})


class ControlNet(io.ComfyNode):
    """A ControlNet; the sampler gets its picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionControlNet",
            display_name="ControlNet (multi-GPU)",
            category=CATEGORY,
            description="A diffusers folder of models/controlnet. The sampler then needs a control image.",
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=list(choices.control_nets()),
                    tooltip="a diffusers folder of models/controlnet",
                ),
                _strength(0.0),
                _earlier(),
            ],
            outputs=[FEATURES.Output(display_name="features")],
        )

    @classmethod
    def execute(
        cls, control_net: str, strength: float, features: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        path = choices.chosen(choices.control_nets(), control_net, "control_net")
        return _with(features, "control_net", {path: strength})


class IPAdapter(io.ComfyNode):
    """An IP-Adapter; the sampler gets its picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionIPAdapter",
            display_name="IP-Adapter (multi-GPU)",
            category=CATEGORY,
            description="A file of models/ipadapter, with its image encoder next to it.",
            inputs=[
                io.Combo.Input(
                    "ip_adapter", options=list(choices.ip_adapters()), tooltip="a file of models/ipadapter"
                ),
                _strength(0.0),
                _earlier(),
            ],
            outputs=[FEATURES.Output(display_name="features")],
        )

    @classmethod
    def execute(
        cls, ip_adapter: str, strength: float, features: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        path = choices.chosen(choices.ip_adapters(), ip_adapter, "ip_adapter")
        return _with(features, "ip_adapter", {path: strength})


class MotionModule(io.ComfyNode):
    """AnimateDiff's motion module."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionMotionModule",
            display_name="Motion Module (multi-GPU)",
            category=CATEGORY,
            description="A file or a diffusers folder of models/animatediff_models; type ad needs one.",
            inputs=[
                io.Combo.Input(
                    "motion_module",
                    options=list(choices.motion_modules()),
                    tooltip="of models/animatediff_models",
                ),
                _earlier(),
            ],
            outputs=[FEATURES.Output(display_name="features")],
        )

    @classmethod
    def execute(cls, motion_module: str, features: dict[str, Any] | None = None) -> io.NodeOutput:
        path = choices.chosen(choices.motion_modules(), motion_module, "motion_module")
        flag = "motion_adapter" if motion_module.endswith("/") else "motion_module"
        return _with(features, flag, path)


class Quantization(io.ComfyNode):
    """How the weights are quantized."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionQuantization",
            display_name="Quantization (multi-GPU)",
            category=CATEGORY,
            description="Weights of the denoiser and the text encoders.",
            inputs=[
                io.Combo.Input(
                    "quantize_to", options=choices.QUANTIZATIONS, default="int8", tooltip="bits of a weight"
                ),
                _earlier(),
            ],
            outputs=[FEATURES.Output(display_name="features")],
        )

    @classmethod
    def execute(cls, quantize_to: str, features: dict[str, Any] | None = None) -> io.NodeOutput:
        return _with(features, "quantize_to", quantize_to)


class Scheduler(io.ComfyNode):
    """The scheduler of a request."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionScheduler",
            display_name="Scheduler (multi-GPU)",
            category=CATEGORY,
            description="For one sampler; the host is not changed. Default: the checkpoint's.",
            inputs=[
                io.Combo.Input(
                    "scheduler", options=choices.SCHEDULERS, default="ddim", tooltip="k_: Karras sigmas"
                ),
                io.String.Input("settings", default="", tooltip='JSON, {"timestep_spacing": "trailing"}'),
            ],
            outputs=[SCHEDULER.Output(display_name="scheduler")],
        )

    @classmethod
    def execute(cls, scheduler: str, settings: str) -> io.NodeOutput:
        if not settings.strip():
            return io.NodeOutput(scheduler)
        try:
            given = json.loads(settings)
        except ValueError as error:
            raise ValueError(f"settings: not valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"settings: a JSON object, got {settings!r}")
        return io.NodeOutput({"scheduler": scheduler, **given})


_DEGREES = [AUTO, "1", "2", "4", "8"]
SWITCH, TEXT = "switch", "text"
# A plan's widgets by backend, each with its tooltip: a dropdown whose first entry leaves the flag out, a
# switch, or a text whose emptiness does. New ones go last: saved workflows name widgets by their place.
PLANS: dict[str, tuple[str, dict[str, tuple[list[str] | str, str]]]] = {
    "asyncdiff": (
        "AsyncDiff Plan (multi-GPU)",
        {
            "model_n": ([AUTO, "1", "2", "3", "4"], "stages of the denoiser"),
            "stride": ([AUTO, "1", "2"], "steps served by one parallel batch"),
            "use_cfg_parallel": (SWITCH, "run the two guidance branches on two halves of the ranks"),
            "auto_balance": (SWITCH, "balance the stages by measured time"),
            "time_shift": (SWITCH, "use the time embedding of the previous step"),
            "async_steps": (
                [AUTO, "auto", "2", "4", "8", "12", "16"],
                "asynchronous steps, then exact ones; auto: those in which little changes",
            ),
            "stage_weights": (TEXT, "relative speed of each stage's GPU, such as 1,1,0.5"),
            "step_cache": (
                TEXT,
                "deepcache:3 computes the deep layers in one of 3 steps; not with stages (1 GPU, or 2 with "
                "use_cfg_parallel)",
            ),
            "no_cuda_graph": (SWITCH, "do not capture steps as CUDA graphs"),
        },
    ),
    "distrifuser": (
        "DistriFusion Plan (multi-GPU)",
        {
            "parallelism": ([AUTO, "patch", "tensor", "naive_patch"], "how the work is divided"),
            "split_scheme": ([AUTO, "row", "col", "alternate"], "how pictures are cut into patches"),
            "sync_mode": (
                [
                    *(AUTO, "corrected_async_gn", "stale_gn", "sync_gn"),
                    *("separate_gn", "full_sync", "no_sync"),
                ],
                "what is exchanged after the warm-up",
            ),
            "no_split_batch": (SWITCH, "do not put the guidance branches on different ranks"),
            "no_cuda_graph": (SWITCH, "do not capture steps as CUDA graphs"),
        },
    ),
    "xdit": (
        "xDiT Plan (multi-GPU)",
        {
            "ulysses_degree": (_DEGREES, "Ulysses: parts of the sequence, exchanged for attention heads"),
            "ring_degree": (_DEGREES, "ring attention: parts of the sequence, keys and values passed around"),
            "pipefusion_parallel_degree": (_DEGREES, "PipeFusion stages"),
            "tensor_parallel_degree": (
                _DEGREES,
                "tensor parallelism: parts of the feed-forward layers, type flux only",
            ),
            "use_cfg_parallel": (SWITCH, "run the two guidance branches on two halves of the ranks"),
            "use_parallel_vae": (SWITCH, "decode on all ranks"),
            "data_parallel_degree": (
                _DEGREES,
                "pictures of one request made at the same time; the sampler asks for several",
            ),
            "num_pipeline_patch": ([AUTO, "1", "2", "4", "8", "16"], "patches of PipeFusion"),
            "attn_layer_num_for_pp": (TEXT, "transformer blocks of each PipeFusion stage, such as 10,9"),
            "step_cache": (
                TEXT,
                "leave out the blocks of steps in which little changes: fbcache:0.12, taylorseer:5, magcache",
            ),
            "use_teacache": (SWITCH, "short for step_cache teacache (flux, kontext)"),
            "use_fbcache": (SWITCH, "short for step_cache fbcache"),
            "no_cuda_graph": (SWITCH, "do not capture steps as CUDA graphs"),
        },
    ),
}


def _widget(name: str, kind: list[str] | str, tooltip: str) -> Any:
    if kind == SWITCH:
        return io.Boolean.Input(name, default=False, tooltip=tooltip)
    if kind == TEXT:
        return io.String.Input(name, default="", tooltip=f"{tooltip}; empty: {AUTO}")
    return io.Combo.Input(name, options=kind, default=kind[0], tooltip=tooltip)


class _Plan(io.ComfyNode):
    """How one backend divides the work; `backend` is a key of PLANS."""

    backend = ""

    @classmethod
    def define_schema(cls) -> io.Schema:
        title, widgets = PLANS[cls.backend]
        return io.Schema(
            node_id=f"MultiGPUDiffusion{title.split()[0]}Plan",
            display_name=title,
            category=CATEGORY,
            inputs=[_widget(name, *widget) for name, widget in widgets.items()],
            outputs=[PLAN.Output(display_name="plan")],
        )

    @classmethod
    def execute(cls, **chosen: Any) -> io.NodeOutput:
        flags = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in chosen.items()
            if value not in (False, "", AUTO)
        ]
        return io.NodeOutput({"backend": cls.backend, "flags": flags})


class AsyncDiffPlan(_Plan):
    backend = "asyncdiff"


class DistriFusionPlan(_Plan):
    backend = "distrifuser"


class XDiTPlan(_Plan):
    backend = "xdit"


NODES: list[type[io.ComfyNode]] = [
    *(LaunchHost, AttachHost, AsyncDiffPlan, DistriFusionPlan, XDiTPlan),
    *(Lora, ControlNet, IPAdapter, MotionModule, Quantization, Scheduler),
]
