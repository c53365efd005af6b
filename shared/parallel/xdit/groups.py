"""xfuser's process groups and run-time state: globals of that package, set up and torn down for one plan."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shared.parallel.pipeline import Pipeline
from shared.parallel.surgery import Surgery
from shared.parallel.xdit.cpu import load_xfuser
from shared.parallel.xdit.degrees import Degrees

RESERVED = 4
"""Multiprocessors that are enough for NCCL on a slow link (24 GB/s through host memory on H200)."""

FEW = 32
"""A GPU must have so many times the multiprocessors that are reserved of it: it lacks them all the time."""


class XfuserGroups:
    """The groups of one plan over all ranks of the default process group. One object at a time.

    Args:
        degrees: how the ranks are divided; their product is the world size.
        device: this rank's.
        timeout: seconds that a collective waits for a rank.
        reserved: multiprocessors that NCCL's collectives take, to be left to them, on GPUs that have FEW
            times as many; None: as NCCL chooses, and they wait for each other with what is computed.

    Raises:
        ValueError: the degrees do not fit the world size.
    """

    def __init__(
        self,
        degrees: Degrees,
        device: torch.device,
        timeout: float = 300.0,
        reserved: int | None = None,
    ) -> None:
        self.degrees, self.device = degrees, device
        self.reserved = reserved if device.type == "cuda" and _spares(device, reserved or 0) else None
        world = dist.get_world_size()
        if degrees.world != world:
            raise ValueError(f"degrees {degrees} need {degrees.world} ranks; the world size is {world}")
        load_xfuser(device.type)
        import xfuser.core.distributed.parallel_state as state

        self._state = state
        self._forget()
        # xfuser leaves the transport of some groups to the default group, which is gloo here on GPUs too.
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._made: list[dist.ProcessGroup] = []
        with _new_groups(backend, timedelta(seconds=timeout), self._made, self.reserved):
            local_rank = device.index if device.type == "cuda" else int(os.environ.get("LOCAL_RANK", "0"))
            state.init_distributed_environment(
                world_size=world, rank=dist.get_rank(), local_rank=local_rank, backend=backend
            )
            state.initialize_model_parallel(
                data_parallel_degree=degrees.data,
                classifier_free_guidance_degree=degrees.cfg,
                sequence_parallel_degree=degrees.sequence,
                ulysses_degree=degrees.ulysses,
                ring_degree=degrees.ring,
                tensor_parallel_degree=degrees.tensor,
                pipeline_parallel_degree=degrees.pipefusion,
                backend=backend,
            )
            if degrees.tensor > 1 and degrees.sequence > 1:
                self._make_sequence_groups()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Matrix products inside leave the reserved multiprocessors alone.

        They would be laid out over all of them, so that one on a multiprocessor of NCCL's would begin when
        the message has arrived, and all would end so much later.
        """
        torch._C._set_sm_carveout_experimental(self.reserved)
        try:
            yield
        finally:
            torch._C._set_sm_carveout_experimental(None)

    @property
    def sequence(self) -> dist.ProcessGroup:
        """The ranks that share a sequence of tokens."""
        return self._state.get_sp_group().device_group

    @property
    def branches(self) -> dist.ProcessGroup:
        """The two ranks that compute the same part of both guidance branches, in branch order."""
        return self._state.get_cfg_group().device_group

    @property
    def tensor(self) -> dist.ProcessGroup:
        """The ranks that share the feed-forward layers."""
        return self._state.get_tp_group().device_group

    @property
    def replica(self) -> dist.ProcessGroup:
        """The ranks that make one picture together."""
        return self._state.get_model_replica_group().device_group

    @property
    def replica_on_cpu(self) -> dist.ProcessGroup:
        """The same ranks over gloo."""
        return self._state.get_model_replica_group().cpu_group

    @property
    def picture(self) -> int:
        """Which picture of a request this rank works on: 0 to data - 1."""
        return dist.get_rank() // (self.degrees.world // self.degrees.data)

    def start(self, pipeline: Pipeline, config: Any) -> None:
        """Make xfuser's run-time state for this diffusers pipeline; `config` is xfuser's EngineConfig."""
        import xfuser.core.distributed.runtime_state as runtime

        runtime._RUNTIME = None
        runtime.initialize_runtime_state(pipeline, config)

    def engine_config(
        self,
        dtype: torch.dtype,
        attention: str,
        warm_up_steps: int = 1,
        patches: int | None = None,
        stages: tuple[int, ...] | None = None,
    ) -> Any:
        """xfuser's EngineConfig of this plan.

        Args:
            dtype: of the computation; it sizes PipeFusion's buffers.
            attention: name of xfuser's attention backend.
            patches: of PipeFusion; None: as many as stages.
            stages: blocks of each stage of PipeFusion; None: equal numbers.
        """
        import xfuser.config.config as c

        d = self.degrees
        parallel = c.ParallelConfig(
            dp_config=c.DataParallelConfig(d.data, d.cfg == 2, d.world),
            sp_config=c.SequenceParallelConfig(d.ulysses, d.ring, dit_parallel_size=d.world),
            tp_config=c.TensorParallelConfig(d.tensor, "row", d.world),
            pp_config=c.PipeFusionParallelConfig(d.pipefusion, patches, stages and list(stages), d.world),
            fs_config=c.FullyShardConfig(1, d.tensor, d.world),
            vae_config=c.VaeParallelConfig(False),
            world_size=d.world,
            dit_parallel_size=d.world,
            vae_parallel_size=0,
        )
        settings = c.RuntimeConfig(warmup_steps=warm_up_steps, dtype=dtype, attention_backend=attention)
        return c.EngineConfig(c.ModelConfig("local"), settings, parallel, c.FastAttnConfig())

    def close(self) -> None:
        """Forget xfuser's globals and end its groups. May be called any number of times."""
        self._forget()
        while self._made:
            with contextlib.suppress(ValueError):  # ended already, with the default group
                dist.destroy_process_group(self._made.pop())

    def _forget(self) -> None:
        import xfuser.core.distributed.runtime_state as runtime
        from yunchang.globals import PROCESS_GROUP

        runtime._RUNTIME = None
        PROCESS_GROUP.ULYSSES_PG = PROCESS_GROUP.RING_PG = None
        names = ("_MODEL_REPLICA", "_DP", "_CFG", "_SP", "_TP", "_PP", "_FS", "_VAE", "_DIT", "_WORLD")
        for name in names:
            setattr(self._state, name, None)

    def _make_sequence_groups(self) -> None:
        """Ulysses and ring groups inside xfuser's sequence groups.

        yunchang takes neighbouring ranks for them, which share tensors here, not the sequence.
        """
        from yunchang.globals import PROCESS_GROUP

        d, rank = self.degrees, dist.get_rank()
        found: dict[str, dist.ProcessGroup] = {}
        outer, tensor = d.world // (d.sequence * d.tensor), d.tensor
        for block in range(outer):
            for lane in range(tensor):
                ranks = [(block * d.sequence + i) * tensor + lane for i in range(d.sequence)]
                groups = [("ulysses", ranks[i : i + d.ulysses]) for i in range(0, d.sequence, d.ulysses)]
                groups += [("ring", ranks[i :: d.ulysses]) for i in range(d.ulysses)]
                for name, members in groups:
                    group = dist.new_group(members)
                    if rank in members:
                        found[name] = group
        coordinator = self._state.get_sp_group()
        for name, group in found.items():
            setattr(PROCESS_GROUP, f"{name.upper()}_PG", group)
            setattr(coordinator, f"{name}_group", group)
            setattr(coordinator, f"{name}_world_size", dist.get_world_size(group))
            setattr(coordinator, f"{name}_rank", dist.get_rank(group))


def _spares(device: torch.device, reserved: int) -> bool:
    """Whether so many multiprocessors are few of a GPU's."""
    return torch.cuda.get_device_properties(device).multi_processor_count >= FEW * reserved


@contextlib.contextmanager
def _new_groups(backend: str, timeout: timedelta, made: list[Any], reserved: int | None) -> Iterator[None]:
    """Inside, torch.distributed.new_group uses these defaults, and records the groups that it makes."""
    new_group = dist.new_group

    def noting(ranks: Any = None, **settings: Any) -> Any:
        settings = {"backend": backend} | settings | {"timeout": timeout}
        if reserved and settings["backend"] == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            options.config.min_ctas = options.config.max_ctas = reserved
            settings["pg_options"] = options
        group = new_group(ranks, **settings)
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            made.append(group)
        return group

    with Surgery() as during:
        during.replace(dist, "new_group", noting)
        yield
