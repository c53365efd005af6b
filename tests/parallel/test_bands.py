"""shared.parallel.distrifusion.bands: decoders on large maps, alone and on patches: equal, in less memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from shared.parallel.distrifusion import bands
from shared.parallel.distrifusion.decoder import PatchDecoder
from shared.parallel.peak import PeakBytes
from shared.parallel.sharded import ShardedWeights
from shared.parallel.surgery import Surgery
from tests import tiny
from tests.pool import RankPool
from tests.seldom import seldom


def autoencoder(**settings: Any) -> AutoencoderKL:
    """Of SDXL's shape and fewer channels, with weights that are not as norms begin with."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        **{
            "block_out_channels": (16, 32, 32),
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "latent_channels": 4,
        }
        | settings
    )
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias)
    return vae.eval().requires_grad_(False)


@contextlib.contextmanager
def small_bands(decoder: nn.Module, large: int = 1000, band: int = 2000) -> Iterator[Any]:
    """A decoder in bands of few rows; yields the numbers of bands of the layers that have been called."""
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch, Surgery() as surgery:
        patch.setattr(bands, "BAND", band)
        patch.setattr(bands, "LARGE", large)
        count = bands._count

        def noted(x: torch.Tensor, channels: int) -> int:
            counts.append(count(x, channels))
            return counts[-1]

        patch.setattr(bands, "_count", noted)
        bands.in_bands(decoder, surgery)
        yield counts


def latents(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


SHAPES = ((1, 4, 7, 5), (2, 4, 12, 9), (1, 4, 3, 6))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_bands_make_what_the_decoder_makes(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    vae = autoencoder().to(memory_format=layout)
    z = latents(*shape)
    with torch.inference_mode():
        plain = vae.decode(z).sample
        with small_bands(vae.decoder, large=32 * z[:, 0].nbytes) as counts:
            made = vae.decode(z).sample
        assert min(counts) == 0 and max(counts) > 5, counts
        assert torch.allclose(made, plain, atol=1e-5)
        assert made.is_contiguous(memory_format=layout) == plain.is_contiguous(memory_format=layout)
        assert torch.equal(vae.decode(z).sample, plain)


def test_in_half_precision_they_are_as_close_as_the_decoder_is() -> None:
    vae, z = autoencoder(), latents(1, 4, 16, 16)
    with torch.inference_mode():
        exact = vae.decode(z).sample
        vae.to(torch.bfloat16)
        plain = vae.decode(z.bfloat16()).sample
        with small_bands(vae.decoder):
            made = vae.decode(z.bfloat16()).sample
    assert made.dtype == torch.bfloat16
    error, usual = ((x.float() - exact).square().mean().sqrt() for x in (made, plain))
    assert error < 1.5 * usual


def test_with_autograd_layers_are_called_as_they_are() -> None:
    vae, z = autoencoder(), latents(1, 4, 8, 8).requires_grad_()
    plain = vae.decode(z).sample
    with small_bands(vae.decoder):
        made = vae.decode(z).sample
    assert torch.equal(made, plain)
    (slope,) = torch.autograd.grad(made.sum(), z)
    assert slope.abs().max() > 0


def on_patches(name: str) -> list[tuple[float, int]]:
    """Differences to the plain decoder with uneven patches, and bands of the layer with most of them."""
    found = []
    vae = autoencoder() if name == "own" else tiny.load(name).vae
    frames = name == "svd"
    more: dict[str, Any] = {"num_frames": 2} if frames else {}
    channels = vae.config.latent_channels
    for batch, _, rows, columns in SHAPES:
        z = latents(2 if frames else batch, channels, rows, columns)
        with torch.inference_mode():
            plain = vae.decode(z, **more).sample
            with small_bands(vae.decoder) as counts, PatchDecoder(vae):
                made = vae.decode(z, **more, return_dict=False)[0]
            with (
                small_bands(nn.Module()) as same,
                PatchDecoder(vae),
            ):  # which puts them on where there are none
                again = vae.decode(z, **more, return_dict=False)[0]
        assert torch.equal(again, made) and same == counts
        found.append((float((made - plain).abs().max()), max(counts)))
    return found


@pytest.mark.parametrize(
    ("ranks", "name"),
    seldom(
        [(2, "own"), (3, "own"), (3, "sdxl"), (2, "svd"), (2, "flux")], [(3, "own"), (3, "sdxl"), (2, "flux")]
    ),
)
def test_patches_are_decoded_in_bands(pool: RankPool, ranks: int, name: str) -> None:
    if name != "own":
        tiny.checkpoint(name)
    for rank in pool.run(on_patches, ranks, name):
        for difference, count in rank:
            assert difference < 1e-4 and count > 1


def sharded() -> tuple[float, int, float]:
    """The same with weights in parts, tiled too: blocks are called as they are without bands."""
    vae, z = autoencoder(), latents(1, 4, 11, 8)
    device = torch.device("cpu")
    with torch.inference_mode():
        plain = vae.decode(z).sample
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = 6, 24
        tiled = vae.decode(z).sample
        vae.disable_tiling()
        with (
            small_bands(vae.decoder) as counts,
            ShardedWeights({"vae": vae}, None, device, {"vae": [vae.encoder, vae.decoder]}),
            PatchDecoder(vae),
        ):
            made = [vae.decode(z).sample for _ in range(2)][1]
            vae.enable_tiling()
            in_tiles = vae.decode(z).sample
    assert not torch.equal(tiled, plain)
    differences = (float((x - y).abs().max()) for x, y in ((made, plain), (in_tiles, tiled)))
    first, second = differences
    return first, max(counts), second


def test_bands_of_sharded_weights_and_tiles(pool: RankPool) -> None:
    for whole, count, tiles in pool.run(sharded, 2):
        assert whole < 1e-4 and tiles < 1e-4 and count > 1


def peak(vae: AutoencoderKL, rows: int, columns: int) -> int:
    """Bytes of the most that decoding takes."""
    z = latents(1, 4, rows, columns)
    with torch.inference_mode(), PeakBytes() as found:
        vae.decode(z)
    return found.most


def test_the_most_is_the_input_and_the_output_of_the_first_full_size_resnet() -> None:
    vae = autoencoder(block_out_channels=(16, 32, 64))
    rows = columns = 32
    pixels = 16 * rows * columns * 4
    band = 4 * pixels
    plain = peak(vae, rows, columns)
    with small_bands(vae.decoder, large=band, band=band):
        found = peak(vae, rows, columns)
    maps = (32 + 16) * pixels  # before and after it
    assert maps < found < maps + 4 * band < 0.7 * plain
