"""The VAE decodes a picture in patches, one on each rank, with everything exchanged: exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from shared.parallel.distrifusion.layers import PatchLayers, PatchRun
from shared.parallel.distrifusion.patch_exchange import PatchExchange
from shared.parallel.distrifusion.patched import cuts, gather
from shared.parallel.exchange import Ranks
from shared.parallel.method import Part
from shared.parallel.surgery import Forward, Surgery

KINDS = (AutoencoderKL, AutoencoderKLFlux2)
"""The VAEs whose decoder can be divided."""


class PatchDecoder(Part):
    """Makes all ranks share ``vae.decode``; each of them gets the whole picture.

    Every rank must decode the same latents at the same time. Tiling and slicing still work. Latents with
    fewer rows than there are ranks are decoded whole by each.

    Args:
        vae: AutoencoderKL, or FLUX.2's, whose decoder is the same.
        group: the ranks; None for all.
        least: pixels of a call from which the ranks are to share it; whoever calls sets `active` by it.

    Raises:
        ValueError: another kind of VAE.
    """

    def __init__(self, vae: Any, group: dist.ProcessGroup | None = None, least: int = 0) -> None:
        super().__init__()
        self.least, self.active = least, True
        if not isinstance(vae, KINDS):
            raise ValueError(f"decoding in patches supports AutoencoderKL; got {type(vae).__name__}")
        self.ranks = Ranks.of(group)
        surgery = self.held.enter_context(Surgery())
        self._layers = PatchLayers(vae.decoder, surgery)
        surgery.override(vae.decoder, self._forward)

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        kwargs = dict(zip(("sample", "latent_embeds"), args, strict=False)) | kwargs
        whole: torch.Tensor = kwargs["sample"]
        rows, (group, rank, ranks) = whole.shape[2], self.ranks
        if not self.active or ranks == 1 or rows < ranks:
            return original(**kwargs)
        ends = cuts(rows, 1, ranks)
        sizes = [stop - start for start, stop in pairwise(ends)]
        start = ends[rank]
        patch = kwargs["sample"] = whole.narrow(2, start, sizes[rank])
        exchange = PatchExchange(group, whole.device, sizes=sizes)
        exchange.start()
        with self._layers.running(PatchRun(exchange, 2, whole=whole, start=start, patch=patch)):
            decoded = original(**kwargs)
        ratio = decoded.shape[2] // patch.shape[2]
        return gather(decoded, 2, [size * ratio for size in sizes], group)
