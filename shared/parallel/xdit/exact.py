"""xDiT: a diffusers transformer on all ranks through the package xfuser, one degree a dimension.

Source: Fang et al., "xDiT: an Inference Engine for Diffusion Transformers with Massive Parallelism", arXiv
2411.01738. Guidance branches, Ulysses, ring, tensor and data parallelism are exact: the plain pipeline runs
on every rank, and only the transformer's inside is shared, so that every argument of the pipeline keeps its
meaning and every rank ends with the picture. PipeFusion is in shared.parallel.xdit.pipefusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from shared.models import CacheSettings, TokenPlan, token_plan
from shared.parallel.cfg_split import CallsSplit, CfgSplit
from shared.parallel.exchange import Ranks
from shared.parallel.graphs import Graphs
from shared.parallel.joined import JoinedProjections, of_transformer
from shared.parallel.method import Method, Watch, control_nets
from shared.parallel.peers import PeerGather
from shared.parallel.pipeline import Pipeline, model_of, part_of, parts_of
from shared.parallel.rounding import DIFFERENCES, Bits
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.tensor_parallel import TensorParallel
from shared.parallel.video_decoder import shared_decoder
from shared.parallel.xdit.caches import StepCache
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.groups import XfuserGroups
from shared.parallel.xdit.sequence import SequenceParallel, SharedBy


class XDiT(Method):
    """Makes a diffusers pipeline with a transformer run on all ranks, exactly.

    Every rank holds the whole pipeline and makes the same calls with the same arguments; with data
    parallelism each replica its own. ``begin`` must be called before each generation. Pictures of any size
    may follow each other.

    Args:
        pipeline: its transformer and ControlNets have token plans; loaded with adapters, quantized and
            compiled as wanted.
        degrees: how the ranks are divided, without PipeFusion.
        groups: the process groups of these degrees; None makes them, and ends them in ``close``.
        attention: name of xfuser's attention backend; None: cuDNN's on GPUs in half precision, else torch's.
        cache: leave the blocks out in steps in which little changes: an approximation.
        parallel_vae: each rank decodes a part (shared.parallel.video_decoder); all ranks of a replica must
            then decode.
        decode_from: pixels of a call of the VAE from which they do.
        cuda_graph: capture and replay the transformer on CUDA. Not with offloaded weights, which move.
        overlap: compute more while messages are on their way, in more and smaller parts: for slow links.
        bits: send what attention exchanges as int8 or float8: an approximation. Not with Ulysses and ring
            together.
        join: queries, keys and values of self-attention are one product; with ring without the values, which
            leave early. Weights must then stay where they are.
        copies: ring's keys and values are copied by copy engines where GPUs read each other's memory.

    Raises:
        ValueError: a model without a token plan, or degrees or a cache that it does not support.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        degrees: Degrees,
        groups: XfuserGroups | None = None,
        *,
        attention: str | None = None,
        cache: CacheSettings | None = None,
        parallel_vae: bool = False,
        decode_from: int = 0,
        cuda_graph: bool = True,
        overlap: bool = False,
        bits: Bits | None = None,
        join: bool = False,
        copies: bool = True,
    ) -> None:
        self.tokens = check_model(pipeline, degrees, cache)
        if bits == DIFFERENCES:
            raise ValueError(f"{bits} exchange: too coarse for keys and values; use int8 or float8")
        if bits and degrees.ring > 1 and degrees.ulysses > 1:
            raise ValueError(f"{bits} exchange: supported with Ulysses or with ring, not both; got {degrees}")
        self.overlap, self.bits = overlap and (degrees.ring > 1) != (degrees.ulysses > 1), bits
        super().__init__(pipeline)
        self.degrees = degrees
        self.transformer = model_of(pipeline, "transformer")
        if degrees.pipefusion > 1:
            raise ValueError("XDiT does not support PipeFusion; use XDiTPipeFusion")
        if groups is None:
            groups = XfuserGroups(degrees, pipeline._execution_device)
            self.held.callback(groups.close)
        self.groups = groups
        self.attention = attention or attention_backend(groups.device, self.transformer.dtype, degrees)
        self._graphs = Graphs(cuda_graph and capturable(self.transformer))
        self.cache: StepCache | None = None
        self._calls: list[CallsSplit] = []
        self._split: CfgSplit | None = None
        self._joins, self.joined = join, 0
        self._gather: PeerGather | None = None
        self.batches = cache is None or not cache.measures
        try:
            self._install(cache, copies)
            if parallel_vae and degrees.world > degrees.data:
                decoder = shared_decoder(pipeline.vae, groups.replica, decode_from)
                self.decoder = self.held.enter_context(decoder)
        except ValueError:
            self.close()
            raise

    def _install(self, cache: CacheSettings | None, copies: bool) -> None:
        degrees, groups, held = self.degrees, self.groups, self.held
        nets = control_nets(self.pipeline)
        transformers = transformers_of(self.pipeline, self.tokens)
        models = [*transformers, *nets]
        groups.start(self.pipeline, groups.engine_config(self.transformer.dtype, self.attention))
        if degrees.tensor > 1:
            held.enter_context(FeedForwardParallel(models, self.tokens, groups.tensor))
        if cache is not None:
            self.cache = held.enter_context(StepCache(transformers, self.tokens, cache, self._deciding()))
        by: SharedBy = "ulysses" if degrees.ring == 1 else "ring" if degrees.ulysses == 1 else "both"
        if self._joins:
            apart = ("to_v",) if degrees.sequence > 1 and by == "ring" else ()
            attentions = [one for model in models for one in of_transformer(model)]
            self.joined = held.enter_context(JoinedProjections(attentions, apart)).layers
        if copies and by == "ring":
            self._gather = PeerGather.between(groups.sequence, groups.device)
        if self._gather is not None:
            held.callback(self._gather.close)
            self.overlap = False  # they hold two messages, and everything else runs meanwhile
        surgery = held.enter_context(Surgery())
        if degrees.sequence > 1:
            for model in models:
                SequenceParallel(model, groups.sequence, self.attention, surgery, by, self.overlap, self.bits)
        if groups.reserved and self._gather is None:
            for model in models:
                surgery.override(model, self._leaving)
        if self._graphs.enabled:
            held.callback(self._graphs.close)
            for index, model in enumerate(models):
                if capturable(model) and (self.cache is None or model in nets):
                    surgery.override(model, self._graphs.around(index))
        if self.cache is not None:
            off = Graphs(enabled=False)
            graphs = [self._graphs if capturable(one) else off for one in transformers]
            held.enter_context(self.cache.watch(graphs))
        if degrees.cfg == 2:
            pair = Ranks.of(groups.branches)
            if self.tokens.guidance == "calls":
                self._calls = [held.enter_context(CallsSplit(one, pair.group)) for one in transformers]
            else:
                self._split = held.enter_context(CfgSplit(transformers, pair.group, pair.rank, local=nets))

    def _leaving(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        with self.groups.leaving():
            return original(*args, **kwargs)

    def _deciding(self) -> torch.distributed.ProcessGroup | None:
        """The ranks whose measurements a step cache joins: those that compute the same call."""
        degrees = self.degrees
        if degrees.cfg == 2 and self.tokens.guidance == "calls":  # each branch for itself
            return self.groups.sequence if degrees.sequence > 1 else None
        return self.groups.replica if degrees.world > degrees.data else None

    @property
    def computed_blocks(self) -> int:
        """Transformer blocks that this rank has computed since ``begin``; counted under a cache only."""
        return 0 if self.cache is None else self.cache.computed_blocks

    @property
    def plan(self) -> dict[str, Any]:
        """JSON-able: the degrees, and what each rank does."""
        return plan(self.degrees, self.attention) | {
            "method": "xdit",
            "exact": self.cache is None and not (self.bits and self.degrees.sequence > 1),
            "overlap": self.overlap,
            "copy_engines": self._gather is not None,
            "exchange": self.bits,
            "cache": self.cache and self.cache.settings.as_dict(),
            "parallel_vae": self.decoder is not None,
            "decode_from": self.decoder and self.decoder.least,
            "cuda_graph": self._graphs.enabled,
            "joined": self.joined,
        }

    @property
    def warm_up_calls(self) -> int:
        """Steps after which the transformer has been captured."""
        if not self._graphs.enabled:
            return 1
        return 2 if self.cache is None else self.cache.warm_up_calls

    @property
    def notes(self) -> list[str]:
        return [] if self.cache is None else self.cache.notes

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        if self._gather is not None:
            self._gather.begin()
        for part in (self.cache, self._split, *self._calls):
            if part is not None:
                part.begin(steps, pictures)

    def begin_late(self, steps: int, first: int) -> None:
        super().begin_late(steps, first)
        if self.cache is not None:
            self.cache.begin_late(steps, first)

    def run(self, arguments: dict[str, Any], watch: Watch) -> Any:
        if self.tokens.guider is not None:
            guided = part_of(self.running, self.tokens.guider).num_conditions > 1
        else:
            guided = arguments.get(self.tokens.scale, 0.0) > 1
        for calls in self._calls:
            calls.guided = guided
        try:
            return super().run(arguments, watch)
        finally:
            for calls in self._calls:
                calls.guided = False

    def reset(self) -> None:
        """Forget captured graphs: scales of adapters are numbers inside them."""
        self._graphs.close()


class FeedForwardParallel(TensorParallel):
    """Tensor parallelism of feed-forward layers only, which is what xDiT divides.

    Args:
        models: a transformer and its ControlNets.
        plan: the transformer's.
        group: the ranks that share them.
    """

    def __init__(
        self, models: Sequence[nn.Module], plan: TokenPlan, group: torch.distributed.ProcessGroup
    ) -> None:
        self._layers = plan.tensor
        super().__init__(models, group)

    def _divide(self, name: str, module: nn.Module) -> None:
        if name.rpartition(".")[2] in self._layers:
            self._feed_forward(name, module)


def check_model(pipeline: Pipeline, degrees: Degrees, cache: CacheSettings | None = None) -> TokenPlan:
    """The token plan of a pipeline's transformer, which supports these degrees and this cache.

    Raises:
        ValueError: there is no transformer, it or a ControlNet has no plan, or they do not support this.
    """
    transformer = model_of(pipeline, "transformer")
    tokens, nets = token_plan(type(transformer).__name__), control_nets(pipeline)
    for model in (*transformers_of(pipeline, tokens), *nets):
        heads = model.config[token_plan(type(model).__name__).heads]
        if heads % degrees.ulysses:
            raise ValueError(
                f"ulysses degree {degrees.ulysses} must divide the {heads} attention heads of "
                f"{type(model).__name__}"
            )
    if degrees.tensor > 1 and not tokens.tensor:
        raise ValueError(f"tensor degree {degrees.tensor}: xDiT does not shard the layers of {tokens.name}")
    if degrees.cfg == 2 and branches_of(pipeline, tokens) == 1:
        raise ValueError(f"cfg degree 2: this {tokens.name} has only one guidance branch")
    if cache is not None and (problem := tokens.cache_problem(cache)):
        raise ValueError(f"{cache.cache} {problem}")
    return tokens


def branches_of(pipeline: Pipeline, tokens: TokenPlan) -> int:
    """Guidance branches of one step, as the checkpoint has them: 1 or 2."""
    settings = {**pipeline.config, **model_of(pipeline, "transformer").config}
    return 1 if any(settings.get(name) for name in tokens.one_branch) else tokens.branches


def capturable(model: Any) -> bool:
    """Whether a CUDA graph can hold this transformer or ControlNet, as its plan says."""
    plan = token_plan(type(model).__name__)
    return plan.capturable and not any(model.config.get(setting) for setting in plan.uncapturable)


def transformers_of(pipeline: Pipeline, plan: TokenPlan) -> list[Any]:
    """The transformers of a pipeline, in the order in which they take parts of the schedule."""
    return list(parts_of(pipeline, ("transformer", *plan.further)).values())


def attention_backend(device: torch.device, dtype: torch.dtype, degrees: Degrees) -> str:
    """The name of the fastest of xfuser's attention backends that torch brings with it.

    Ring needs one that gives the log-sum-exp of each row as well. xfuser calls cuDNN's and flash attention
    without a way out, and GPUs before Ampere have neither.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0):
        return "CUDNN" if torch.backends.cudnn.is_available() else "SDPA_FLASH"
    if device.type == "cuda":
        return "SDPA_EFFICIENT"
    return "SDPA_FLASH" if degrees.ring > 1 else "SDPA"


def plan(degrees: Degrees, attention: str) -> dict[str, Any]:
    """JSON-able: the degrees, and each rank's part of every one above 1."""
    sizes = degrees.as_dict()
    ranks = []
    for rank in range(degrees.world):
        parts, rest = [], rank
        for name in reversed(sizes):
            rest, place = divmod(rest, sizes[name])
            if sizes[name] > 1:
                parts.append(f"{name} {place + 1} of {sizes[name]}")
        ranks.append(", ".join(reversed(parts)) or "all")
    return {"divided": str(degrees), "degrees": sizes, "attention": attention.lower(), "ranks": ranks}
