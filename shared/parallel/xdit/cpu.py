"""Imports xfuser: nearly unchanged on GPUs, and adapted to CPUs, which it does not support.

What is replaced on a CPU: xfuser's idea of the device (it reads torch.version.cuda), the kernels that need
triton, torch.cuda's synchronize, an attention with log-sum-exp for ring, and the point-to-point messages of
PipeFusion, which gloo needs to be kept until they have arrived.
"""

from __future__ import annotations

import collections
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

MASKS = "xfuser.core.sparge_attention.block_mask"
"""The module of xfuser that always imports triton: block masks of sparse attention."""
KEPT = 1024
"""Messages that are kept alive: more than one generation step has in flight."""
_loaded: str | None = None


def load_xfuser(device_type: str) -> Any:
    """The package xfuser, ready for ranks on this kind of device. One kind of device per process.

    Raises:
        RuntimeError: it was loaded for the other kind of device before.
    """
    global _loaded
    if _loaded not in (None, device_type):
        raise RuntimeError(
            f"xfuser is loaded for {_loaded} in this process and cannot also be loaded for {device_type}"
        )
    if _loaded is None:
        if importlib.util.find_spec("triton") is None:
            sys.modules.setdefault(MASKS, _without_triton())
        if device_type == "cpu":
            _import_for_cpu()
        else:
            _trim_attention()
        _loaded = device_type
    import xfuser.logger

    # xfuser logs every step of its own set-up, through this one handler in each of its loggers.
    xfuser.logger._default_handler.setLevel(logging.ERROR)
    return xfuser


def _without_triton() -> types.ModuleType:
    module = types.ModuleType(MASKS)

    def get_block_map_meansim(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("sparse attention needs triton, which is not installed")

    module.get_block_map_meansim = get_block_map_meansim  # type: ignore[attr-defined]
    return module


def _import_for_cpu() -> None:
    before = torch.version.cuda
    # The import asks which accelerator there is and fails where there is none.
    torch.version.cuda = before or "0.0"
    try:
        import xfuser.core.distributed.group_coordinator as coordinator
        import xfuser.envs as envs
        import xfuser.model_executor.layers.usp as usp
        from yunchang.globals import PROCESS_GROUP
    finally:
        torch.version.cuda = before
    no: Callable[[], bool] = lambda: False  # noqa: E731
    for name, replacement in (
        ("_is_cuda", no),
        ("_is_hip", no),
        ("get_device_version", lambda: None),
        ("get_torch_distributed_backend", lambda: "gloo"),
    ):
        _replace(getattr(envs, name), replacement)
    _replace(coordinator.synchronize, lambda *args: None)
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
    for module in _modules():
        if "HAS_LONG_CTX_ATTN" in vars(module):
            module.HAS_LONG_CTX_ATTN = True  # type: ignore[attr-defined]
    usp.PROCESS_GROUP = PROCESS_GROUP
    _add_attention()
    _keep_messages(coordinator.PipelineGroupCoordinator)


def _modules() -> list[types.ModuleType]:
    return [m for name, m in list(sys.modules.items()) if name.startswith("xfuser") and m is not None]


def _replace(old: Any, new: Any) -> None:
    """Put `new` wherever a loaded module of xfuser has `old`."""
    for module in _modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _trim_attention() -> None:
    """Ring adds up log-sum-exps by row; torch's memory-efficient attention pads them to 32 rows."""
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    efficient = AttentionBackendType.SDPA_EFFICIENT
    ATTENTION_FUNCTION_REGISTRY[efficient] = trimmed(ATTENTION_FUNCTION_REGISTRY[efficient])


def trimmed(attention: Callable[..., Any]) -> Callable[..., Any]:
    """An attention of xfuser's, with log-sum-exps of only the query's rows."""

    def trim(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer, log_sum_exp = attention(query, *args, **kwargs)
        return answer, log_sum_exp[..., : query.shape[2]]

    return trim


def _add_attention() -> None:
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        attention_kwargs: Any = None,
    ) -> Any:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal)[:2]

    ATTENTION_FUNCTION_REGISTRY[AttentionBackendType.SDPA_FLASH] = attention


def _keep_messages(coordinator: Any) -> None:
    """A message of gloo is lost with its handle, and waiting for it is waiting for the receiver."""
    kept: collections.deque[Any] = collections.deque(maxlen=KEPT)

    def keep(work: Any, *tensors: torch.Tensor) -> Any:
        kept.append((work, tensors))
        return work

    def communicate_shapes(
        self: Any, tensor_send_to_next: torch.Tensor | None = None, recv_prev: bool = False
    ) -> torch.Size:
        if tensor_send_to_next is not None:
            shape = list(tensor_send_to_next.shape)
            header = torch.tensor([len(shape), *shape, *[0] * (8 - len(shape))])
            keep(dist.isend(header, self.next_rank, self.device_group), header)
        if not recv_prev:
            return torch.Size([0, 0, 0])
        header = torch.zeros(9, dtype=torch.int64)
        dist.recv(header, self.prev_rank, self.device_group)
        return torch.Size(header[1 : 1 + int(header[0])].tolist())

    coordinator._communicate_shapes = communicate_shapes
    for name in ("_pipeline_isend", "_pipeline_isend_skip"):
        send = getattr(coordinator, name)

        def isend(self: Any, tensor: torch.Tensor, send: Any = send) -> Any:
            return keep(send(self, tensor), tensor)

        setattr(coordinator, name, isend)
