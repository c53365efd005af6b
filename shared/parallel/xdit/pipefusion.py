"""PipeFusion: stages of the transformer on different ranks, patches of the picture in flight between them.

Source: Fang et al., "PipeFusion: Patch-level Pipeline Parallelism for Diffusion Transformers Inference",
arXiv 2405.14430. xfuser's own pipeline classes run it; what they leave open is settled here: buffers of
the request before, the rank that has the result, arguments they ignore, progress, and ending early.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.models import StagePlan, Stream
from shared.parallel.chosen_steps import warm_up_of
from shared.parallel.distrifusion.decoder import PatchDecoder
from shared.parallel.exchange import Ranks
from shared.parallel.graphs import Graphs
from shared.parallel.method import Method, Unwatched, Watch, control_nets
from shared.parallel.pipeline import Model, Pipeline, model_of, statistics_of_squares
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.xdit.degrees import (
    Degrees,
    fitting_sizes,
    may_capture,
    patch_count,
    scheduler_problem,
    stages_problem,
)
from shared.parallel.xdit.exact import attention_backend, branches_of, capturable, check_model, plan
from shared.parallel.xdit.groups import XfuserGroups
from shared.parallel.xdit.sequence import blocks_of
from shared.parallel.xdit.stage_buffers import StageBuffers, place_of
from shared.parallel.xdit.stage_inputs import ADDED, StageInputs
from shared.parallel.xdit.stages import Snapshot, StepReporter, deal_rows, noise_of_whole_pictures

log = logging.getLogger("host")

UNSUPPORTED = (
    "sigmas", "timesteps", "true_cfg_scale", "guidance_rescale", "ip_adapter_image",
    "ip_adapter_image_embeds",
)  # fmt: skip
"""Arguments that xfuser's pipelines ignore, do not keep in step between the stages, or measure by patch."""
STREAMS: dict[Stream, str] = {"picture": "hidden_states", "text": "encoder_hidden_states"}
"""A block's first two arguments."""
FIXED_VALUES = {"max_sequence_length": 256, "guidance_rescale": 0.0}
"""Arguments that some of xfuser's pipelines do not take, with the value that they use instead."""


class XDiTPipeFusion(Method):
    """Runs a diffusers pipeline through xfuser's PipeFusion, with or without the other degrees.

    Generate with ``run`` instead of calling the pipeline, on all ranks alike, ``begin`` before it. The first
    ``warm_up_steps`` steps are exact; the steps after them use stale activations of the other patches.

    Args:
        pipeline: its transformer's token plan has stages; without ControlNet and IP-Adapter; LoRAs fused.
        degrees: how the ranks are divided; pipefusion is 2 or more.
        groups: the process groups of these degrees; None makes them, and ends them in ``close``.
        warm_up_steps: synchronous steps at the start of each generation, 1 or more; None for `warm_up_of`.
        patches: number of patches in flight at the same time; None: as many as stages.
        stages: transformer blocks of each stage; None: equal numbers.
        attention: name of xfuser's attention backend.
        parallel_vae: decode in patches, one on each rank.
        decode_from: pixels of a call of the VAE from which they do.
        free_other_stages: keep other stages' blocks in host memory until ``close``.
        cuda_graph: capture and replay this rank's stage on CUDA, once for each patch and for whole pictures.
            Not with offloaded weights, which move.

    Raises:
        ValueError: PipeFusion does not support this model or these degrees.
    """

    batches = ends_with_latents = False

    def __init__(
        self,
        pipeline: Pipeline,
        degrees: Degrees,
        groups: XfuserGroups | None = None,
        *,
        warm_up_steps: int | None = 1,
        patches: int | None = None,
        stages: tuple[int, ...] | None = None,
        attention: str | None = None,
        parallel_vae: bool = False,
        decode_from: int = 0,
        free_other_stages: bool = True,
        cuda_graph: bool = True,
    ) -> None:
        self.tokens = check_model(pipeline, degrees)
        super().__init__(pipeline)
        self.degrees, self.warm_up_steps = degrees, warm_up_steps
        self.patches = self._patches = patches or degrees.pipefusion
        self.transformer = model_of(pipeline, "transformer")
        self._branches = branches_of(pipeline, self.tokens)
        self._stages: Model | None = None
        """xfuser's form of it, with the blocks of this rank."""
        self.cut = self._check(stages)
        if groups is None:
            groups = XfuserGroups(degrees, pipeline._execution_device)
            self.held.callback(groups.close)
        self.groups = groups
        # xfuser's layers ask for the log-sum-exp under ring only, but the stages must agree.
        self.attention = attention or attention_backend(groups.device, self.transformer.dtype, degrees)
        self._watch: StepReporter | None = None
        self._ending = self._rehearsing = False
        captures = cuda_graph and groups.device.type == "cuda" and capturable(self.transformer)
        if captures and not may_capture(degrees.pipefusion, self.patches):
            log.info("PipeFusion is captured with fewer than %d patches only", 2 * degrees.pipefusion)
            captures = False
        self._graphs = Graphs(captures)
        self._freed: list[nn.Module] = []
        try:
            config = groups.engine_config(
                self.transformer.dtype, self.attention, warm_up_steps or 1, patches, stages
            )
            groups.start(pipeline, config)
            self._install(config, free_other_stages)
            if parallel_vae:
                decoder = PatchDecoder(pipeline.vae, groups.replica, decode_from)
                self.decoder = self.held.enter_context(decoder)
        except (ValueError, AssertionError):
            self.close()
            raise

    def _check(self, stages: tuple[int, ...] | None) -> StagePlan:
        d, cut, blocks = self.degrees, self.tokens.stages, blocks_of(self.transformer, self.tokens)
        if cut is None:
            raise ValueError(f"PipeFusion does not support {self.tokens.name}")
        if d.pipefusion < 2:
            raise ValueError(f"PipeFusion needs a degree of 2 or more; got {d.pipefusion}")
        if self.warm_up_steps is not None and self.warm_up_steps < 1:
            raise ValueError(
                "warm_up_steps must be 1 or more, because the first step fills the buffers; got "
                f"{self.warm_up_steps}"
            )
        if control_nets(self.pipeline):
            raise ValueError("PipeFusion does not support ControlNet")
        if d.tensor > 1:
            raise ValueError(f"PipeFusion does not support tensor parallelism; got tensor degree {d.tensor}")
        if problem := stages_problem(d.pipefusion, len(blocks), stages, cut.equal):
            raise ValueError(f"PipeFusion's stages: {problem}")
        if d.sequence > 1:
            for setting, problem in cut.unshared.items():
                if self.transformer.config[setting]:
                    raise ValueError(f"PipeFusion with {d}: {problem}")
            if cut.one_patch and self.patches == 1:
                raise ValueError(f"PipeFusion with {d}, 1 patch: {cut.one_patch}")
        return cut

    def _install(self, config: Any, free: bool) -> None:
        import xfuser.core.cache_manager.cache_manager as caches
        import xfuser.core.distributed.parallel_state as groups
        import xfuser.model_executor.layers.attention_processor as attentions
        import xfuser.model_executor.models.transformers.transformer_flux2 as flux2
        import xfuser.model_executor.pipelines as pipelines
        from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

        pipe, held = self.pipeline, self.held
        held.callback(self._graphs.close)
        held.callback(caches.get_cache_manager().cache.clear)
        held.callback(self._bring_back)
        held.callback(Snapshot(self.transformer).restore)
        surgery = held.enter_context(Surgery())
        plain, sequence = attentions.USP, self.degrees.sequence

        def usp(*args: Any, attn_layer: Any = None, **kwargs: Any) -> Any:
            # Without sequence parallelism SD3's and FLUX.2's layers have filled their caches already.
            return plain(*args, attn_layer=attn_layer if sequence > 1 else None, **kwargs)

        for module in (attentions, flux2):
            surgery.replace(module, "USP", usp)
        # FLUX.2's layers keep text apart where they find it, which was not there when they were imported.
        surgery.replace(flux2, "_SP", groups.get_sp_group())
        blocks = set(blocks_of(self.transformer, self.tokens))
        assert pipelines  # its import registers the pipelines
        wrapper = xFuserPipelineWrapperRegister.get_class(pipe)
        own = {"scheduler": pipe.scheduler, "transformer": self.transformer}
        try:
            self._wrapped = wrapper(pipe, config)
            self._stages = model_of(pipe, "transformer")
        finally:
            # The pipeline keeps its own parts; xfuser's take their place during a call.
            for name, part in own.items():
                setattr(pipe, name, part)
        mine = set(blocks_of(self._stages, self.tokens))
        self._blocks = mine
        for block in mine:
            surgery.override(block, self._pass_through)
        channels = self.tokens.channels(self.transformer.config)
        self._buffers = StageBuffers(self.transformer.dtype, self.groups.device, channels, self._graphs.close)
        self._buffers.install(self._stages, self.cut.kept_text, surgery)
        surgery.override(self._stages, self._counted)
        surgery.replace(self._state(), "_calc_patches_metadata", self._patched)
        if free and self.groups.device.type == "cuda":
            self._freed = list(blocks - mine)
            for block in self._freed:
                block.to("cpu")
            torch.cuda.empty_cache()

    @property
    def plan(self) -> dict[str, Any]:
        """JSON-able: the degrees, and what each rank does."""
        return plan(self.degrees, self.attention) | {
            "method": "xdit",
            "exact": False,
            "warm_up_steps": self.warm_up_steps,
            "patches": self._patches,
            "parallel_vae": self.decoder is not None,
            "decode_from": self.decoder and self.decoder.least,
            "previews": False,
            "blocks": len(self._blocks),
            "cuda_graph": self._graphs.enabled,
        }

    @property
    def warm_up_calls(self) -> int:
        """Two steps of each kind: what has run once is captured at its next call."""
        return 4 if self._graphs.enabled else 2

    def rehearse(self, on: bool) -> None:
        self._rehearsing = on

    def reset(self) -> None:
        """Forget captured graphs: scales of adapters are numbers inside them."""
        self._graphs.close()

    def take(self, pipeline: Pipeline) -> None:
        if pipeline is not self.pipeline:
            raise ValueError(
                "image: PipeFusion runs xfuser's own pipelines, and none starts from a picture; the other "
                "degrees support it"
            )

    def begin(self, steps: int, pictures: int = 1) -> None:
        """A new generation starts: xfuser's buffers of the last one are reset."""
        super().begin(steps, pictures)
        state = self._state()
        state.ready = False
        # xfuser lowers it for good where a request has fewer steps.
        exact = self.warm_up_calls // 2 if self._rehearsing else self.warm_up_steps or warm_up_of(steps)
        state.runtime_config.warmup_steps = min(exact, steps)

    def run(self, arguments: dict[str, Any], watch: Watch | None = None) -> Any:
        """What ``pipeline(**arguments)`` gives, on every rank; output_type is pil, np, pt or latent.

        Args:
            watch: is not entered, because xfuser's scheduler runs in patches. It is called with (None,
                steps) after each step that this rank has finished, in order, in a thread of its own; after
                the last one with the latents. What it raises ends the generation on this rank, which goes on
                passing messages without computing, and is raised here.

        Raises:
            ValueError: an argument that xfuser's pipeline ignores, or a size that does not divide.
        """
        wanted = arguments.get("output_type", "pil")
        arguments = self._supported(arguments) | {"output_type": "latent", "return_dict": True}
        pipe, inputs = self.pipeline, self._inputs(arguments) if self.cut.inputs else None
        on_step = (watch or Unwatched()).after_step
        reporter = self._watch = StepReporter(arguments["num_inference_steps"], on_step, self.groups.device)
        try:
            with Surgery() as during, noise_of_whole_pictures():
                during.replace(pipe, "scheduler", self._scheduler(pipe.scheduler))
                during.replace(pipe, "transformer", self._stages)
                if inputs is not None:
                    inputs.install(self._wrapped, self._state(), during)
                    arguments = {name: value for name, value in arguments.items() if name not in ADDED}
                output = self._wrapped(**arguments)
        finally:
            failed, self._watch = reporter.finish(), None
        if failed is not None:
            raise failed
        latents = None if output is None else output.images
        if latents is not None and inputs is not None:
            latents = inputs.picture(latents)
        latents = self._share(latents)
        on_step(latents, reporter.steps)
        return self._decoded(latents, arguments, wanted)

    def _inputs(self, arguments: dict[str, Any]) -> StageInputs:
        pair = Ranks.of(self.groups.branches) if self.degrees.cfg == 2 else None
        shared = Ranks.of(self.groups.sequence)
        return StageInputs(self.pipeline, arguments, self._branches == 2, pair, shared)

    def close(self) -> None:
        super().close()
        self._wrapped = self._stages = None

    def _bring_back(self) -> None:
        while self._freed:
            self._freed.pop().to(self.groups.device)

    def _supported(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments for xfuser's pipeline. Raises ValueError where one would have no effect."""
        names = {
            name
            for name, parameter in inspect.signature(type(self._wrapped).__call__).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        } - set(UNSUPPORTED)
        names = names | ADDED if self.cut.inputs else names
        empty = [name for name, value in arguments.items() if value is None or value == ""]
        if "negative_prompt" not in names and (arguments.get("true_cfg_scale") or 1.0) <= 1:
            # Without true guidance they have no effect, in diffusers either.
            empty += ["true_cfg_scale", *(name for name in arguments if name.startswith("negative_"))]
        empty += [name for name, value in FIXED_VALUES.items() if arguments.get(name) == value]
        lost = sorted(set(arguments) - names - set(empty))
        if lost:
            raise ValueError(f"PipeFusion does not support {', '.join(lost)}; the other degrees do")
        alone = self._branches == 1 or self.cut.inputs
        if not alone and arguments.get("guidance_scale", 2.0) <= 1:
            raise ValueError("PipeFusion needs guidance: cfg must be above 1; the other degrees support 1")
        if "set_timesteps" in vars(self.pipeline.scheduler):
            raise ValueError("PipeFusion does not support a part of a schedule; the other degrees do")
        unit = 16 * self.degrees.sequence
        height = arguments["height"]
        if height % unit:
            raise ValueError(
                f"the height must be a multiple of {unit} with {self.degrees}; got {height} (nearest: "
                f"{fitting_sizes(height, unit)})"
            )
        patches = patch_count(height, self.patches, self.degrees.sequence)
        if patches == 1 and self.cut.one_patch and self.degrees.sequence > 1:
            raise ValueError(
                f"the height must be {2 * unit} or more; {height} makes 1 patch: {self.cut.one_patch}"
            )
        self._patches = patches
        supported = {name: value for name, value in arguments.items() if name in names}
        if self.cut.sized_text and supported.get("prompt_embeds") is not None:
            # xfuser's stages send each other text of this length, not of the embeddings'.
            supported["max_sequence_length"] = supported["prompt_embeds"].shape[1]
        return supported

    def _state(self) -> Any:
        from xfuser.core.distributed import get_runtime_state

        return get_runtime_state()

    def _scheduler(self, scheduler: Any) -> Any:
        from xfuser.model_executor.schedulers.register import xFuserSchedulerWrappersRegister

        if problem := scheduler_problem(self.tokens.flow, type(scheduler).__name__, scheduler.config):
            raise ValueError(problem)
        return xFuserSchedulerWrappersRegister.get_wrapper(scheduler)(scheduler)

    def _patched(self) -> None:
        state, sequence = self._state(), Ranks.of(self.groups.sequence)
        type(state)._calc_patches_metadata(state)
        deal_rows(state, sequence.size, sequence.rank)

    def _counted(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        assert self._watch is not None
        state = self._state()
        self._watch.hold()
        # Asked once a call: a graph must not hold blocks that pass their input through.
        self._ending = self._watch.error is not None
        self._buffers.begin_call(state, len(args[0] if args else kwargs[STREAMS["picture"]]))
        if self._ending:
            answer = original(*args, **kwargs)
        else:
            answer = self._graphs.run(
                place_of(state), lambda args, kwargs: original(*args, **kwargs), args=args, kwargs=kwargs
            )
        self._watch.called(state.num_pipeline_patch if state.patch_mode else 1)
        return answer

    def _pass_through(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        """A block that returns its input once the generation is to end: messages keep their shapes."""
        if not self._ending:
            return original(*args, **kwargs)
        given: dict[Stream, Any] = dict(zip(("picture", "text"), args, strict=False))
        given |= {stream: kwargs[name] for stream, name in STREAMS.items() if name in kwargs}
        answer = tuple(given[stream] for stream in self.cut.returns if given.get(stream) is not None)
        return answer if len(answer) > 1 else answer[0]

    def _share(self, latents: torch.Tensor | None) -> torch.Tensor:
        """The latents of the rank that has them, on every rank of the replica."""
        replica, rank, size = Ranks.of(self.groups.replica)
        holders: list[Any] = [None] * size
        shape = None if latents is None else (tuple(latents.shape), latents.dtype)
        dist.all_gather_object(holders, shape, group=self.groups.replica_on_cpu)
        source = next(i for i, found in enumerate(holders) if found is not None)
        if rank != source or latents is None:
            shape, dtype = holders[source]
            latents = torch.empty(shape, dtype=dtype, device=self.groups.device)
        latents = latents.contiguous()
        dist.broadcast(latents, group=replica, group_src=source)
        return latents

    def _decoded(self, latents: torch.Tensor, arguments: dict[str, Any], wanted: str) -> Any:
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

        pipe, config = self.pipeline, self.pipeline.vae.config
        if wanted == "latent" and type(pipe).__name__ not in self.cut.unpacked:
            return ImagePipelineOutput(images=latents)
        size = arguments["height"], arguments["width"]
        if self.tokens.squares:
            mean, deviation = (x.to(latents) for x in statistics_of_squares(pipe.vae))
            sides = [side // (2 * pipe.vae_scale_factor) for side in size]
            squares = (latents * deviation + mean).transpose(1, 2).unflatten(2, sides)
            latents = pipe._unpatchify_latents(squares)
            if wanted == "latent":
                return ImagePipelineOutput(images=latents)
        else:
            if self.tokens.packed:
                latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        with torch.no_grad():
            decoded = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
        pipe.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pipe.image_processor.postprocess(decoded, output_type=wanted))
