"""Converts ComfyUI's tensors to and from request and answer fields of hosts.

IMAGE is float [N, height, width, 3] in 0..1. LATENT is {"samples": float [N, channels, height/8, width/8]} as
a VAE encodes it (FLUX.2's height/16 and width/16, with four times the channels); a host's latents are scaled
as the denoiser sees them, so the two differ by the factors of the model family, the same as in ComfyUI.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

LATENT_FACTOR = 8  # pixels a latent
# Of the VAE of Wan 2.1, which Qwen-Image has too, by channel.
_WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
# (scale, shift) of the VAE by type, of all channels or of each: the denoiser sees (samples - shift) * scale.
FAMILIES: dict[str, tuple[float | tuple[float, ...], float | tuple[float, ...]]] = {
    "sd1": (0.18215, 0.0),
    "sd2": (0.18215, 0.0),
    "pixa": (0.18215, 0.0),
    "sdxl": (0.13025, 0.0),
    "pixs": (0.13025, 0.0),
    "hy": (0.13025, 0.0),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
    "kontext": (0.3611, 0.1159),
    "flux2": (1.0, 0.0),
    "chroma": (0.3611, 0.1159),
    "zimage": (0.3611, 0.1159),
    "qwen": (tuple(1 / std for std in _WAN_STD), _WAN_MEAN),
    "qwenedit": (tuple(1 / std for std in _WAN_STD), _WAN_MEAN),
}
OF_VIDEOS = frozenset({"qwen", "qwenedit"})  # whose samples are [N, channels, frames, h, w], of one frame
PACKED = frozenset(  # types whose latents are rows of 2 x 2 patches
    {"chroma", "flux", "flux2", "kontext", "qwen", "qwenedit"}
)
SQUARES = frozenset({"flux2"})  # of these, types whose samples have such patches as channels
BEGINS = frozenset({"hv15", "ltx2", "wani2v"})  # types whose videos may begin with a picture
POOLED = frozenset({"sdxl", "sd3", "flux", "kontext"})  # types whose embeddings come with pooled ones
_PLAIN_CONDITIONING = frozenset({"pooled_output"})


def picture(image: torch.Tensor | None, name: str) -> str | None:
    """An IMAGE of one picture as base64 PNG. Raises ValueError where there are more."""
    if image is None:
        return None
    if image.ndim == 3:
        image = image[None]
    if image.shape[0] != 1:
        raise ValueError(f"{name}: must be one picture; got a batch of {image.shape[0]}")
    return _png(image[0, ..., :3])


def mask(mask: torch.Tensor | None) -> str | None:
    """One picture of a MASK, [height, width] in 0..1 with 1 to be painted, as base64 PNG."""
    return None if mask is None else _png(mask)


def _png(values: torch.Tensor) -> str:
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def pictures(image: torch.Tensor | None, name: str) -> str | list[str] | None:
    """An IMAGE as base64 PNG: of a batch a list of them."""
    if image is None or image.ndim == 3 or image.shape[0] == 1:
        return picture(image, name)
    return [one for single in image if (one := picture(single, name))]


def images(output: str | list[str]) -> torch.Tensor:
    """A host's `output`, one file, or one a frame or a picture, as IMAGE."""
    frames = []
    for text in [output] if isinstance(output, str) else output:
        with Image.open(io.BytesIO(base64.b64decode(text))) as file:
            frames.append(torch.from_numpy(np.asarray(file.convert("RGB"), dtype=np.float32) / 255))
    return torch.stack(frames)


def latent_factor(type: str) -> int:
    """Pixels a side of one of its samples."""
    return 2 * LATENT_FACTOR if type in SQUARES else LATENT_FACTOR


def _factors(type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, for samples [N, channels, h, w]."""
    scale, shift = (torch.tensor(value).view(1, -1, 1, 1) for value in FAMILIES[type])
    return scale, shift


def samples_of(latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a LATENT, checked. Raises ValueError."""
    samples = latent["samples"]
    if samples.ndim == 5 and samples.shape[2] == 1:
        samples = samples[:, :, 0]
    if samples.ndim != 4:
        raise ValueError(f"latent: samples must be [N, channels, height, width], got {list(samples.shape)}")
    if latent.get("noise_mask") is not None:
        raise ValueError("latent: noise masks are not supported; the sampler's image and mask are")
    return samples


def _encoded(**tensors: torch.Tensor) -> str:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return base64.b64encode(safetensors.torch.save(plain)).decode()


def is_empty(samples: torch.Tensor) -> bool:
    """Whether a LATENT holds no picture, as ComfyUI takes it: all zeros, which it does not shift either."""
    return not bool(samples.count_nonzero())


def latent_to_host(samples: torch.Tensor, type: str) -> str:
    """Samples [1, channels, h, w] as a host's `latent`."""
    scale, shift = _factors(type)
    latent = (samples.float() - (0.0 if is_empty(samples) else shift)) * scale
    if type in SQUARES:  # [1, h * w, channels]
        latent = latent.flatten(2).transpose(1, 2)
    elif type in PACKED:  # [1, h/2 * w/2, channels * 4]
        n, c, h, w = latent.shape
        latent = latent.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        latent = latent.reshape(n, (h // 2) * (w // 2), c * 4)
    return _encoded(latent=latent)


def latent_from_host(given: str | list[str], type: str, width: int, height: int) -> torch.Tensor:
    """A host's `latent`, one a picture of that size, pixels, as samples [N, channels, h, w]."""
    if isinstance(given, list):
        return torch.cat([latent_from_host(one, type, width, height) for one in given])
    scale, shift = _factors(type)
    latent = safetensors.torch.load(base64.b64decode(given))["latent"].float()
    if type in SQUARES:
        h, w = (side // latent_factor(type) for side in (height, width))
        latent = latent.transpose(1, 2).unflatten(2, (h, w))
    elif type in PACKED:
        h, w = height // LATENT_FACTOR, width // LATENT_FACTOR
        n, c = latent.shape[0], latent.shape[2] // 4
        latent = latent.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)
    samples = latent / scale + shift
    return samples[:, :, None] if type in OF_VIDEOS else samples


def embeds(positive: Any, negative: Any, type: str) -> dict[str, str]:
    """CONDITIONINGs (either may be None) as `positive_embeds` and `negative_embeds`.

    The shorter of the two is repeated to the length of both, which attention does not notice.
    Raises ValueError for what hosts do not support: several prompts in one, areas, masks, hooks.
    """
    given = {"positive_embeds": positive, "negative_embeds": negative}
    found = {
        name: _one(conditioning, name) for name, conditioning in given.items() if conditioning is not None
    }
    tokens = math.lcm(*(tensor.shape[1] for tensor, _ in found.values()))
    made = {}
    for name, (tensor, pooled) in found.items():
        tensors = {"embeds": tensor.float().repeat(1, tokens // tensor.shape[1], 1)}
        if type in POOLED and pooled is not None:
            tensors["pooled"] = pooled.float()
        made[name] = _encoded(**tensors)
    return made


def _one(conditioning: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    if len(conditioning) != 1:
        raise ValueError(f"{name}: must be one prompt; got {len(conditioning)} combined")
    tensor, settings = conditioning[0]
    unknown = [key for key, value in settings.items() if key not in _PLAIN_CONDITIONING and value is not None]
    if unknown:
        raise ValueError(f"{name}: only plain prompts are supported, without {', '.join(unknown)}")
    return tensor, settings.get("pooled_output")
