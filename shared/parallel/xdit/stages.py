"""Around PipeFusion's stages: progress from a thread, noise of whole pictures, the model restored."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from shared.parallel.surgery import Surgery

STEPS_AHEAD = 2
"""Steps that a rank may be ahead of the last one that all ranks have finished."""

OnStep = Callable[[torch.Tensor | None, int], None]
"""Called with (latents or None, steps) after each step."""


class StepReporter:
    """Reports finished steps from a thread: stages finish a step in turn and must not wait for it.

    Args:
        steps: of this generation.
        on_step: see XDiTPipeFusion.run.
        device: where steps are computed; on CUDA a step counts once the GPU has finished it.
    """

    def __init__(self, steps: int, on_step: OnStep, device: torch.device) -> None:
        self.steps, self.on_step, self.device = steps, on_step, device
        self.error: BaseException | None = None
        self._calls, self._step = 0.0, 0
        self._reported = threading.Semaphore(STEPS_AHEAD)
        self._finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._report, name="steps", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Before a call of the transformer: wait while this rank is too far ahead."""
        if self._calls == 0:
            self._reported.acquire()

    def called(self, calls: int) -> None:
        """The transformer was called; `calls` such calls make a step."""
        self._calls += 1
        if self._calls < calls:
            return
        self._calls, self._step = 0, self._step + 1
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._finished.put((self._step, event))

    def finish(self) -> BaseException | None:
        """Wait until every finished step is reported. Returns what ended the generation early, or None."""
        self._finished.put(None)
        self._thread.join()
        return self.error

    def _report(self) -> None:
        if self.device.type == "cuda":
            # A new thread starts on the first GPU.
            torch.cuda.set_device(self.device)
        for step, event in self._items():
            try:
                if event is not None:
                    event.synchronize()
                # The last step is reported later, with its latents.
                if self.error is None and step < self.steps:
                    self.on_step(None, self.steps)
            except BaseException as error:  # raised in the thread that generates
                self.error = error
            self._reported.release()

    def _items(self) -> Iterator[Any]:
        while (item := self._finished.get()) is not None:
            yield item


@contextlib.contextmanager
def noise_of_whole_pictures() -> Iterator[None]:
    """Inside, schedulers that draw noise at each step draw what they would for the whole picture.

    xfuser lets them draw for the current patch only, and the same for different parts of a sequence.
    """
    import diffusers.schedulers.scheduling_ddpm as ddpm
    import xfuser.model_executor.schedulers.scheduling_dpmsolver_multistep as dpmsolver
    from xfuser.core.distributed import get_runtime_state

    draw, whole = ddpm.randn_tensor, torch.empty(0)

    def randn(shape: Any, **settings: Any) -> torch.Tensor:
        nonlocal whole
        state = get_runtime_state()
        if not state.patch_mode or state.pipeline_patch_idx == 0:
            height = state.input_config.height // state.vae_scale_factor
            whole = draw((*shape[:2], height, *shape[3:]), **settings)
        rows = state.pp_patches_start_end_idx_global
        rows = [rows[state.pipeline_patch_idx]] if state.patch_mode else rows
        return torch.cat([whole[:, :, start:end] for start, end in rows], 2)

    with Surgery() as during:
        for module in (ddpm, dpmsolver):
            during.replace(module, "randn_tensor", randn)
        yield


def deal_rows(state: Any, ranks: int, rank: int) -> None:
    """Give each rank of a sequence its part of every patch: xfuser's own parts differ where patches do.

    Args:
        state: xfuser's run-time state, which has a size.
        ranks, rank: that share a patch, and this one's place among them.
    """
    size, side = state.input_config, state.backbone_patch_size
    rows, columns = (pixels // state.vae_scale_factor // side for pixels in (size.height, size.width))
    high = -(-rows // (state.parallel_config.pp_config.num_pipeline_patch * ranks))
    own = [(min(high, (rows - first) // ranks), first) for first in range(0, rows, high * ranks)]
    parts = [[first + rank * count, first + (rank + 1) * count] for count, first in own]
    tokens = [[columns * start, columns * end] for start, end in parts]
    counts = [end - start for start, end in tokens]
    heights = [side * count for count, _ in own]
    state.pp_patches_height = heights
    state.pp_patches_start_idx_local = [0, *itertools.accumulate(heights)]
    state.pp_patches_start_end_idx_global = [[side * start, side * end] for start, end in parts]
    state.pp_patches_token_start_end_idx_global = tokens
    state.pp_patches_token_num = counts
    state.pp_patches_token_start_idx_local = [0, *itertools.accumulate(counts)]


class Snapshot:
    """The module tree as it is, to be restored: xfuser replaces blocks, layers and their attributes."""

    def __init__(self, root: nn.Module) -> None:
        self._state: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for m in root.modules():
            for own in (m.__dict__, m._modules, m._parameters, m._buffers):
                self._state.append((own, dict(own)))

    def restore(self) -> None:
        for own, kept in self._state:
            own.clear()
            own.update(kept)
