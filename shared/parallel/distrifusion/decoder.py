"""The VAE decodes pictures on all ranks, each some of them or a patch with everything exchanged: exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLTemporalDecoder

from shared.parallel.distrifusion.bands import in_bands
from shared.parallel.distrifusion.layers import PatchLayers, PatchRun
from shared.parallel.distrifusion.patch_exchange import PatchExchange
from shared.parallel.distrifusion.patched import cuts, gather
from shared.parallel.exchange import Ranks
from shared.parallel.method import Part
from shared.parallel.surgery import Forward, Surgery

APART = (AutoencoderKL, AutoencoderKLFlux2)
"""The VAEs that decode each picture of a batch by itself, as the frames of AnimateDiff."""
KINDS = (*APART, AutoencoderKLTemporalDecoder)
"""The VAEs whose decoder can be divided."""
UNEVEN = 1.25
"""How many times its equal share of a batch a rank may get; else pictures are cut, which are more rows."""


class PatchDecoder(Part):
    """Makes all ranks share ``vae.decode``; each of them gets all pictures whole.

    Every rank must decode the same latents at the same time. Batches are divided where that is even and
    pictures are decoded apart, else the rows of each picture, with what lies beyond them exchanged; a video's
    frames that are decoded together are cut alike, so that what joins them stays on its rank. Tiling and
    slicing still work. Latents with fewer rows than there are ranks are decoded whole by each.

    Args:
        vae: AutoencoderKL, or FLUX.2's or Stable Video Diffusion's, whose layers are the same.
        group: the ranks; None for all.
        least: pixels of a call from which the ranks are to share it; whoever calls sets `active` by it.

    Raises:
        ValueError: another kind of VAE.
    """

    def __init__(self, vae: Any, group: dist.ProcessGroup | None = None, least: int = 0) -> None:
        super().__init__()
        self.least, self.active = least, True
        if not isinstance(vae, KINDS):
            kinds = ", ".join(cls.__name__ for cls in KINDS)
            raise ValueError(f"decoding in patches supports {kinds}; got {type(vae).__name__}")
        self.ranks, self._apart = Ranks.of(group), isinstance(vae, APART)
        surgery = self.held.enter_context(Surgery())
        in_bands(vae.decoder, surgery)
        self._layers = PatchLayers(vae.decoder, surgery)
        surgery.override(vae.decoder, self._forward)

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        kwargs = dict(zip(("sample", "latent_embeds"), args, strict=False)) | kwargs
        whole: torch.Tensor = kwargs["sample"]
        pictures, rows, (group, rank, ranks) = len(whole), whole.shape[2], self.ranks
        divided = self._apart and -(-pictures // ranks) * ranks <= UNEVEN * pictures
        if not self.active or ranks == 1 or not (divided or rows >= ranks):
            return original(**kwargs)
        dim = 0 if divided else 2
        ends = cuts(whole.shape[dim], 1, ranks)
        sizes = [stop - start for start, stop in pairwise(ends)]
        start = ends[rank]
        patch = kwargs["sample"] = whole.narrow(dim, start, sizes[rank])
        if divided:
            return gather(original(**kwargs), 0, sizes, group)
        exchange = PatchExchange(group, whole.device, sizes=sizes)
        exchange.start()
        with self._layers.running(PatchRun(exchange, 2, whole=whole, start=start, patch=patch)):
            decoded = original(**kwargs)
        ratio = decoded.shape[2] // patch.shape[2]
        return gather(decoded, 2, [size * ratio for size in sizes], group)
