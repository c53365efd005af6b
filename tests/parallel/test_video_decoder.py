"""shared.parallel.video_decoder on CPU ranks: the shared decoders of videos equal the whole ones."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch

from shared.parallel.peak import PeakBytes
from shared.parallel.video_decoder import VideoDecoder, shared_decoder
from tests import tiny, tiny_wan
from tests.pool import RankPool
from tests.seldom import seldom

KINDS = ("wan", "ti2v", "qwen", "hv15", "ltx2")


@functools.cache
def vae_of(kind: str) -> Any:
    if kind == "ti2v":
        return diffusers.AutoencoderKLWan.from_pretrained(tiny_wan.wan22(kind), subfolder="vae")
    return tiny.load(kind).vae


def latents(vae: Any, frames: int, rows: int, columns: int) -> torch.Tensor:
    channels = vae.config.get("z_dim") or vae.config["latent_channels"]
    return torch.randn((1, channels, frames, rows, columns), generator=torch.Generator().manual_seed(8))


Size = tuple[int, int, bool]
UNEVEN, EVEN, FEW, TILED = (5, 2, False), (16, 3, False), (1, 2, False), (5, 5, True)
"""Rows and columns of latents, and whether they are decoded in tiles."""


def decoded(kind: str, sizes: list[Size]) -> list[tuple[float, list[int], float]]:
    """By latents, on this rank: the largest difference to the whole decoder, the rows that it was given, and
    the most memory while it decodes, as a part of what the whole takes."""
    vae = vae_of(kind)
    found = []
    seen: list[int] = []
    vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    frames = 1 if kind == "qwen" else 3
    for rows, columns, tiled in sizes:
        given = latents(vae, frames, rows, columns)
        vae.use_tiling = False
        if tiled:
            # Tiles of 4 latents, every 3.
            factor = getattr(vae, "spatial_compression_ratio", 8)
            for side in ("height", "width"):
                vae.__dict__.update({f"tile_sample_min_{side}": 4 * factor, f"tile_latent_min_{side}": 4})
                vae.__dict__[f"tile_sample_stride_{side}"] = 3 * factor
            vae.use_tiling = True
        with torch.no_grad():
            with PeakBytes() as alone:
                whole = vae.decode(given, return_dict=False)[0]
            with VideoDecoder(vae):
                seen.clear()
                with PeakBytes() as peak:
                    shared = vae.decode(given, return_dict=False)[0]
                mine = list(seen)
            assert torch.equal(vae.decode(given, return_dict=False)[0], whole)
        assert shared.shape == whole.shape and whole.abs().max() > 0.02
        found.append((float((shared - whole).abs().max()), mine, peak.most / alone.most))
    assert not any("forward" in module.__dict__ for module in vae.modules())
    return found


@pytest.mark.parametrize(
    ("kind", "ranks", "sizes"),
    [
        ("wan", 2, [UNEVEN]),
        ("hv15", 2, [UNEVEN, FEW]),
        *seldom([(kind, ranks, [UNEVEN, EVEN, FEW, TILED]) for kind in KINDS for ranks in (2, 3)], often=()),
    ],
)
def test_rows_on_ranks_equal_the_whole(pool: RankPool, kind: str, ranks: int, sizes: list[Size]) -> None:
    tiny_wan.wan22(kind) if kind == "ti2v" else tiny.checkpoint(kind)
    sizes = [size for size in sizes if kind != "ltx2" or size != FEW]  # its padding reflects: of two rows
    found = pool.run(decoded, ranks, kind, sizes, timeout=300)
    for place, (rows, _, tiled) in enumerate(sizes):
        seen = [max(rank[place][1]) for rank in found]
        assert max(rank[place][0] for rank in found) < 2e-5, (place, found)
        if rows < ranks:
            assert seen == [rows] * ranks
        else:
            assert tiled or sum(seen) == rows
            assert max(seen) == -(-min(rows, 4 if tiled else rows) // ranks)
        if rows == EVEN[0] and kind != "ltx2":  # a tiny one has fewer channels inside than in its answer
            assert max(rank[place][2] for rank in found) < 1.3 * max(seen) / rows + 0.05


Chunks = tuple[int, int, int]
"""Frames, how many of them are decoded at a time, and rows of latents."""


def in_chunks(name: str, chunks: list[Chunks]) -> list[tuple[float, float, list[tuple[int, int]]]]:
    """On this rank: the largest difference of the pipeline's frames to those that it decodes alone, and to
    those of chunks of one frame; by call of the decoder the pictures and rows that it was given."""
    pipe = tiny.load(name)
    seen: list[tuple[int, int]] = []
    pipe.vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[::2]))
    found = []
    for frames, chunk, rows in chunks:
        given = latents(pipe.vae, frames, rows, 3)
        args = (given.movedim(1, 2), frames) if name == "svd" else (given,)
        with torch.no_grad():
            whole, apart = pipe.decode_latents(*args, chunk), pipe.decode_latents(*args, 1)
            seen.clear()
            with shared_decoder(pipe.vae, None):
                shared = pipe.decode_latents(*args, chunk)
            mine = list(seen)
            assert torch.equal(pipe.decode_latents(*args, chunk), whole)
        assert shared.shape == whole.shape and whole.abs().max() > 0.02
        found.append((float((shared - whole).abs().max()), float((shared - apart).abs().max()), mine))
    assert not any("forward" in module.__dict__ for module in pipe.vae.modules())
    return found


@pytest.mark.parametrize(
    ("name", "ranks"), seldom([("ad", 2), ("ad", 3), ("svd", 2), ("svd", 3)], [("svd", 2)])
)
def test_frames_in_chunks_on_ranks_equal_the_whole(pool: RankPool, name: str, ranks: int) -> None:
    chunks = [(8, 8, 5), (7, 3, 4), (3, 3, 1)]
    tiny.checkpoint(name)
    found = pool.run(in_chunks, ranks, name, chunks, timeout=300)
    for place, (frames, chunk, rows) in enumerate(chunks):
        pictures = [min(chunk, frames - start) for start in range(0, frames, chunk)]
        close, apart, _ = (max(rank[place][kind] for rank in found) for kind in range(3))
        assert close < 2e-5, (place, found)
        # The frames of a chunk depend on each other in one of the two.
        assert (apart > 1e-3) == (name == "svd" and chunk > 1), (place, apart)
        for call, count in enumerate(pictures):
            given = [rank[place][2][call] for rank in found]
            divided = name == "ad" and -(-count // ranks) * ranks <= 1.25 * count
            if divided:
                assert sum(n for n, _ in given) == count and {r for _, r in given} == {rows}
            else:
                cut = rows >= ranks
                assert {n for n, _ in given} == {count}
                assert sum(r for _, r in given) == (rows if cut else ranks * rows)
                assert max(r for _, r in given) == (-(-rows // ranks) if cut else rows)


def test_what_cannot_be_cut_is_refused() -> None:
    noisy = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 16, 32, 32), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        decoder_inject_noise=(True, False, False, False),
    )  # fmt: skip
    for vae, words in ((noisy, "noise"), (torch.nn.Identity(), "got Identity")):
        with pytest.raises(ValueError, match=words):
            VideoDecoder(vae)
