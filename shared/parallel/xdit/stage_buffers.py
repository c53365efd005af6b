"""What PipeFusion's stages keep from one call to the next, where it does not move: as captured calls need it.

xfuser keeps tensors as they come and finds them through Python, both of which a CUDA graph cannot follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from shared.parallel.shapes import Latest
from shared.parallel.surgery import Forward, Surgery

TABLES = 16
"""Picture sizes whose positions are kept."""


class StageBuffers:
    """Keys and values of all patches, texts and positions of a rank's blocks, in memory that stays in place.

    Args:
        dtype, device: of the computation.
        channels: of a token.
        moved: called when memory that calls were captured with is given up.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, channels: int, moved: Callable[[], None]
    ) -> None:
        self._memory: dict[Hashable, torch.Tensor] = {}
        self._dtype, self._device, self._channels, self._moved = dtype, device, channels, moved
        self._layers: list[Any] = []
        """xfuser's attention layers that see all patches."""
        self._sized: tuple[int, int] | None = None
        self._tables: Latest[tuple[Any, int, int]] = Latest(TABLES, lambda table: moved())

    def install(self, stages: nn.Module, text: str | None, surgery: Surgery) -> None:
        """Let xfuser's form of a transformer keep its tensors here.

        Args:
            text: the attribute in which it keeps each block's text of the first patch; None: it has none.
            surgery: collects what is overridden.
        """
        from xfuser.core.cache_manager.cache_manager import get_cache_manager
        from xfuser.core.distributed import get_ulysses_parallel_world_size
        from xfuser.model_executor.layers.conv import xFuserConv2dWrapper
        from xfuser.model_executor.layers.embeddings import xFuserPatchEmbedWrapper

        caches, ulysses = get_cache_manager(), get_ulysses_parallel_world_size()

        def own(
            new_kv: torch.Tensor, layer: Any, slice_dim: int = 1, layer_type: str = "attn"
        ) -> torch.Tensor:
            return _with_other_patches(new_kv, layer, slice_dim, 1)

        def exchanged(
            new_kv: torch.Tensor, layer: Any, slice_dim: int = 1, layer_type: str = "attn"
        ) -> torch.Tensor:
            return _with_other_patches(new_kv, layer, slice_dim, ulysses)

        self._layers = [layer for _, layer in caches.cache]
        surgery.replace(caches, "_naive_cache_update", own)
        surgery.replace(caches, "_sequence_parallel_cache_update", exchanged)
        if text is not None:
            texts = _Texts(self)
            surgery.replace(stages, text, texts)
            surgery.override(stages, texts.during)
        for module in stages.modules():
            if isinstance(module, xFuserConv2dWrapper) and module.module.padding == (0, 0):
                # Patches do not overlap: xfuser would still write each into the picture that it had before.
                surgery.replace(module, "forward", module.naive_forward)
            if isinstance(module, xFuserPatchEmbedWrapper):
                surgery.override(module, self._positions(module.module))

    def begin_call(self, state: Any, batch: int) -> None:
        """Make room for the keys and values of whole pictures; `state` is xfuser's run-time state."""
        sized = batch, state.pp_patches_token_start_idx_local[-1]
        if sized == self._sized:
            return
        self._sized = sized
        for layer in self._layers:
            # Where the layer finds it itself: compiled code of one block serves the others too.
            layer.all_patches = self.place(layer, (math.prod(sized) * 2 * self._channels,), self._dtype)

    def place(self, owner: Hashable, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The owner's memory as a tensor of this shape; what it held before is lost where it must grow."""
        size = math.prod(shape)
        found = self._memory.get(owner)
        if found is None or found.numel() < size or found.dtype != dtype:
            # Not an inference tensor, which could not be written to outside of inference mode.
            with torch.inference_mode(False):
                self._memory[owner] = torch.empty(size, dtype=dtype, device=self._device)
            if found is not None:
                self._moved()
            found = self._memory[owner]
        return found[:size].view(*shape)

    def _positions(self, embed: Any) -> Callable[[Forward, tuple, dict], Any]:
        """Keep the table of each size, which xfuser replaces when the size changes."""

        def forward(original: Forward, args: tuple, kwargs: dict) -> Any:
            from xfuser.core.distributed import get_runtime_state

            size = get_runtime_state().input_config.height, args[0].shape[-1]
            if (found := self._tables.get(size)) is not None:
                embed.pos_embed, embed.height, embed.width = found
            answer = original(*args, **kwargs)
            if found is None:
                self._tables.put(size, (embed.pos_embed, embed.height, embed.width))
            return answer

        return forward


def _with_other_patches(new: torch.Tensor, layer: Any, dim: int, ranks: int) -> torch.Tensor:
    """Keys and values of the whole picture, of which `new` are this patch's, or all in a full step."""
    from xfuser.core.distributed import get_runtime_state

    state = get_runtime_state()
    if state.num_pipeline_patch == 1:
        return new
    starts = [ranks * start for start in state.pp_patches_token_start_idx_local]
    whole = layer.all_patches.view(*new.shape[:dim], starts[-1], *new.shape[dim + 1 :])
    if not state.patch_mode:
        whole.copy_(_patch_by_patch(new, dim, ranks, state.pp_patches_token_num) if ranks > 1 else new)
        return new
    patch = state.pipeline_patch_idx
    whole.narrow(dim, starts[patch], starts[patch + 1] - starts[patch]).copy_(new)
    return whole


def _patch_by_patch(whole: torch.Tensor, dim: int, ranks: int, tokens: list[int]) -> torch.Tensor:
    """What Ulysses' exchange gives rank by rank, in the order in which single patches of all ranks come."""
    parts = [part.split(tokens, dim) for part in whole.chunk(ranks, dim)]
    return torch.cat([part[patch] for patch in range(len(tokens)) for part in parts], dim)


def place_of(state: Any) -> Hashable:
    """What layers read of xfuser's run-time state: calls that agree in it are the same computation."""
    return (
        state.patch_mode,
        state.patch_mode and state.pipeline_patch_idx,
        state.input_config.height,
        state.input_config.width,
        tuple(state.pp_patches_token_start_idx_local),
        state.max_condition_sequence_length,
        state.split_text_embed_in_sp,
    )


class _Texts:
    """Each block's text of the first patch, copied to where it stays; as long as the current call's text."""

    def __init__(self, buffers: StageBuffers) -> None:
        self._buffers = buffers
        self._given = self._like = torch.empty(0)

    def during(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self._given = kwargs["encoder_hidden_states"]
        return original(*args, **kwargs)

    def __setitem__(self, block: int, text: torch.Tensor) -> None:
        self._like = text.new_empty(0, text.shape[-1])
        self[block].copy_(text)

    def __getitem__(self, block: int) -> torch.Tensor:
        shape = (*self._given.shape[:-1], self._like.shape[-1])
        return self._buffers.place(("text", block), shape, self._like.dtype)
