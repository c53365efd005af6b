"""What prompts, a step and decoding of a launch need of memory while they run, counted without any weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from shared.launch.flags import HostConfig
from shared.models import ModelSpec
from shared.parallel.exchange import Pretended
from shared.parallel.peak import FlashAttention, PeakBytes
from shared.parallel.surgery import Forward, Surgery
from shared.parallel.video_decoder import can_share, shared_decoder
from shared.pipeline.memory import decode_in_bands
from shared.pipeline.unloaded import Stored, Unloaded

UNET_RESIDUALS = 6.0
"""What a ControlNet of a UNet keeps for it, in maps (ModelSpec.step_maps)."""


class Work:
    """Bytes beside the weights, of one picture or video: of steps on one rank that shares nothing.

    Args:
        spec: of the launch.
        models: its models, by component.
        dtype: of the computation.
    """

    def __init__(self, spec: ModelSpec, models: dict[str, Unloaded], dtype: torch.dtype) -> None:
        self.spec, self.models, self.dtype = spec, models, dtype
        self._decodes: dict[Any, int] = {}
        self._encodes: int | None = None

    def step(self, config: HostConfig, frames: int | None) -> int:
        """Of a call of the denoiser, with what ControlNets add to it."""
        maps = self.spec.step_maps
        if self.spec.wide_maps is not None and self.spec.tokens is not None:
            width, beside = self.spec.wide_maps
            settings = self._settings
            maps = max(maps, beside + 2 * settings[width] / self.spec.tokens.channels(settings))
        return self._maps(config, maps + self._residuals(), frames)

    def stale(self, config: HostConfig, frames: int | None) -> int:
        """Of what DistriFusion keeps of other patches."""
        return self._maps(config, self.spec.stale_maps, frames)

    def copied(self, config: HostConfig, frames: int | None) -> int:
        """Of the keys and values of a layer, each twice (shared.parallel.peers)."""
        return self._maps(config, 4.0, frames)

    def places(self, config: HostConfig, frames: int | None = None) -> int:
        """Latents of a picture or video, of a UNet's; the picture's tokens, of a transformer's."""
        spec = self.spec
        width, height = (side * spec.size_scale // self._vae_scale() for side in config.size)
        frames = self._latent_frames(frames)
        if spec.tokens is None:
            return width * height * frames
        patch = 2 if spec.packed else _side(self._settings[spec.tokens.side])
        # A picture to look at is as many tokens as the one that is made.
        return (width // patch) * (height // patch) * frames * (2 if spec.refers else 1)

    def levels(self, denoiser: nn.Module) -> int:
        """Of a UNet, each with half as many latents a side as the one before; 1 of a transformer."""
        settings: Any = denoiser.config
        return 1 if self.spec.tokens is not None else len(settings.block_out_channels)

    @property
    def _settings(self) -> Any:
        """The denoiser's configuration."""
        return self.models[self.spec.denoiser].modules[0].config

    def _maps(self, config: HostConfig, maps: float, frames: int | None) -> int:
        spec, places = self.spec, self.places(config, frames)
        if spec.tokens is None:
            channels = self._settings.block_out_channels[0]
        else:
            channels = spec.tokens.channels(self._settings)
            places += spec.text_tokens
        branches = 2 if spec.tokens is None or spec.tokens.guidance == "batch" else 1
        return int(maps * channels * places * branches * self.dtype.itemsize)

    def _residuals(self) -> float:
        """Maps that ControlNets keep for the denoiser: one of each block of a transformer's."""
        nets = [model for name, model in self.models.items() if name.startswith("controlnet")]
        plan = self.spec.tokens and self.spec.tokens.control_net
        if plan is None:
            return UNET_RESIDUALS * len(nets)
        lists = [
            getattr(module, blocks, ()) for net in nets for module in net.modules for blocks in plan.blocks
        ]
        return float(sum(map(len, lists)))

    def _vae_scale(self) -> int:
        settings: Any = self._vae.config
        return self.spec.latent_pixels(settings)

    def _latent_frames(self, frames: int | None) -> int:
        return ((frames or self.spec.frames or 1) - 1) // self.spec.frames_factor + 1

    @property
    def _vae(self) -> nn.Module:
        return self.models["vae"].modules[0]

    @property
    def upcasts(self) -> bool:
        """Whether the VAE is one that overflows in the launch's dtype; sharded it has fp32."""
        settings: Any = self._vae.config
        return bool(getattr(settings, "force_upcast", False)) and self.dtype == torch.float16

    def encode(self) -> int:
        """Of the text encoder that needs the most for a prompt of full length, in calls on meta."""
        if self._encodes is None:
            found = [0]
            for name, tokenizer in zip(self.spec.text_encoders, self.spec.tokenizers, strict=True):
                if name not in self.models:
                    continue
                encoder: Any = self.models[name].modules[0]
                read = self._read_tokens(tokenizer)
                read = min(read, encoder.config.to_dict().get("max_position_embeddings", read))
                tokens = torch.zeros((1, read), dtype=torch.long, device="meta")
                encoder.to(self.dtype)  # outside: weights are counted elsewhere
                with torch.no_grad(), torch.device("meta"), FlashAttention(), PeakBytes() as peak:
                    encoder(tokens, attention_mask=None)
                found.append(peak.most)
            self._encodes = max(found)
        return self._encodes

    def _read_tokens(self, tokenizer: str) -> int:
        usual = (self.spec.most_tokens or 512) if tokenizer in self.spec.sized_tokenizers else 77
        return self.spec.read_tokens.get(tokenizer, usual)

    def latents(
        self, config: HostConfig, frames: int | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the VAE gets in a call, of any content, and its further arguments."""
        spec = self.spec
        settings: Any = self._vae.config
        channels = settings[spec.latent_setting]
        side = [s * spec.size_scale // self._vae_scale() for s in (config.size[1], config.size[0])]
        pictures = frames or spec.frames or 1
        more: dict[str, Any] = {}
        if spec.vae_kind == "video":
            shape = (1, channels, self._latent_frames(frames), *side)
        else:
            shape = (pictures, channels, *side)
            if spec.image == "needed" and spec.output == "video":
                more["num_frames"] = pictures
        return torch.empty(shape, dtype=dtype, device=device), more

    def decode(self, config: HostConfig, frames: int | None, ranks: int = 1) -> int:
        """Of decoding on one of the ranks that share it, in a call on meta."""
        spec = self.spec
        key = (
            config.size,
            config.enable_vae_tiling,
            config.enable_vae_slicing,
            config.compile_vae,
            config.shard_weights,
            frames,
            ranks,
        )
        if key in self._decodes:
            return self._decodes[key]
        vae: Any = self._vae
        upcast = self.upcasts and (spec.decodes_upcast or config.shard_weights)
        dtype = torch.float32 if upcast else self.dtype
        for flag, name in (("enable_vae_tiling", "tiling"), ("enable_vae_slicing", "slicing")):
            if hasattr(vae, f"disable_{name}"):
                getattr(vae, f"{'enable' if getattr(config, flag) else 'disable'}_{name}")()
        vae.to(dtype)
        shares = ranks > 1 and can_share(vae)
        bands = decode_in_bands(vae, config)
        shared: AbstractContextManager[Any] = nullcontext()
        if shares:
            shared = shared_decoder(vae, Pretended(ranks))
        with (
            bands,
            shared,
            Surgery() as surgery,
            torch.no_grad(),
            torch.device("meta"),
            FlashAttention(),
            PeakBytes() as peak,
        ):
            if config.enable_vae_tiling and not shares:
                # Row by row, in place: a minute of a start, and no memory.
                for name in ("blend_v", "blend_h"):
                    if hasattr(vae, name):
                        surgery.replace(vae, name, lambda above, tile, rows: tile)
                if spec.vae_kind == "image":
                    surgery.override(vae.decoder, _once_a_shape())
            latents, more = self.latents(config, frames, dtype, torch.device("meta"))
            pixels = vae.decode(latents, return_dict=False, **more)[0]
            if spec.output == "video" and spec.vae_kind == "image":
                pixels = pixels.float()  # as pipelines do that decode in chunks of frames
            # Every rank ends with all pixels, of which its pipeline makes numbers of 0 to 1.
            (pixels * 0.5 + 0.5).clamp(0, 1)
        found = peak.most
        if upcast and not config.shard_weights:
            found += 2 * self.models["vae"].nbytes(Stored(self.dtype))
        self._decodes[key] = found
        return found


def _once_a_shape() -> Callable[[Forward, tuple, dict], Any]:
    """Calls a decoder for the first tile of each shape: of a large picture there are a hundred."""
    made: dict[torch.Size, tuple[torch.Size, torch.dtype]] = {}

    def call(original: Forward, args: tuple, kwargs: dict) -> Any:
        shape = args[0].shape
        if shape in made:
            size, dtype = made[shape]
            return torch.empty(size, dtype=dtype)
        out = original(*args, **kwargs)
        made[shape] = out.shape, out.dtype
        return out

    return call


def _side(patch: Any) -> int:
    return int(patch[-1]) if isinstance(patch, list | tuple) else int(patch)
