"""The sampler nodes, which make pictures and videos on a host."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from . import convert
from .launched import Handle
from .nodes import CATEGORY, HOST, SCHEDULER
from .progress import ask

MAX_SIDE = 8192  # pixels
MAX_PICTURES = 16  # of one request


def _host() -> io.Input:
    return HOST.Input("host", tooltip="from Launch Host or Attach to Host")


def _scheduler() -> io.Input:
    return SCHEDULER.Input("scheduler", optional=True, tooltip="instead of the checkpoint's own")


def _prompts(positive: str, negative: str) -> list[io.Input]:
    return [
        io.String.Input(name, default=text, multiline=True, dynamic_prompts=True, tooltip=tooltip)
        for name, text, tooltip in (
            ("positive", positive, "what to show"),
            ("negative", negative, "what not to show"),
        )
    ]


def _numbers(steps: int, cfg: float) -> list[io.Input]:
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="of the noise; further pictures use the next seeds",
        ),
        io.Int.Input(
            "steps",
            default=steps,
            min=1,
            max=1000,
            tooltip="of the whole schedule; denoise runs a part of it",
        ),
        io.Float.Input("cfg", default=cfg, min=0.0, max=100.0, step=0.1, tooltip="guidance"),
    ]


def _size(width: int, height: int) -> list[io.Input]:
    return [
        io.Int.Input("width", default=width, min=16, max=MAX_SIDE, step=8, tooltip="pixels"),
        io.Int.Input("height", default=height, min=16, max=MAX_SIDE, step=8, tooltip="pixels"),
    ]


def _conditionings() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive_conditioning", optional=True, tooltip="instead of the positive text"),
        io.Conditioning.Input("negative_conditioning", optional=True, tooltip="instead of the negative text"),
    ]


def _conditioned() -> list[io.Input]:
    return [
        *_conditionings(),
        io.Image.Input(
            "control_image",
            optional=True,
            tooltip="for the host's ControlNet; a batch: one for each of several",
        ),
        io.Image.Input(
            "ip_image",
            optional=True,
            tooltip="for the host's IP-Adapter; a batch: all of it for one, or one for each of several",
        ),
        _scheduler(),
    ]


def _conditions(
    handle: Handle,
    positive: str,
    negative: str,
    clip_skip: int,
    positive_conditioning: Any,
    negative_conditioning: Any,
    control_image: torch.Tensor | None,
    ip_image: torch.Tensor | None,
    scheduler: Any,
) -> dict[str, Any]:
    body = {
        "positive": positive or None,
        "negative": negative or None,
        "clip_skip": clip_skip or None,
        "control_image": convert.pictures(control_image, "control_image"),
        "ip_image": convert.pictures(ip_image, "ip_image"),
        "scheduler": scheduler,
    }
    if positive_conditioning is not None or negative_conditioning is not None:
        body |= convert.embeds(positive_conditioning, negative_conditioning, handle.type)
    return body


def _clip_skip() -> io.Input:
    return io.Int.Input(
        "clip_skip", default=0, min=0, max=12, tooltip="how many of CLIP's last layers to skip"
    )


class PictureSampler(io.ComfyNode):
    """Pictures, from text, latents, or both."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionSampler",
            display_name="Sampler (multi-GPU)",
            category=CATEGORY,
            description="Makes pictures. Needs a host of type sd1, sd2, sdxl, sd3, flux, kontext, flux2, "
            "chroma, hy, pixa, pixs, qwen, qwenedit or zimage.",
            inputs=[
                _host(),
                *_prompts("a red circle on a blue background", ""),
                *_numbers(30, 5.0),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="how much of the schedule is run from the latent or image; 1: all of it. "
                    "KSampler lengthens the schedule to keep the number of steps; here fewer steps are run",
                ),
                io.Float.Input(
                    "stop_at",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="where in the schedule to stop; below 1 the latent keeps the rest of its noise, "
                    "for a sampler with add_noise off and denoise = 1 - stop_at",
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    tooltip="on: add the seed's noise to the latent, at the level of denoise. off: the "
                    "latent has its noise already, from stop_at = 1 - denoise; with denoise 1 it is noise",
                ),
                *_size(1024, 1024),
                _clip_skip(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="what to start from; it sets the size. Each latent of a batch makes a picture; "
                    "a batch of empty ones is one request",
                ),
                *_conditioned(),
                io.Float.Input(
                    "true_cfg_scale",
                    default=1.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="flux, kontext: above 1 the negative prompt counts, at twice the work",
                ),
                io.Int.Input(
                    "pictures",
                    default=1,
                    min=1,
                    max=MAX_PICTURES,
                    optional=True,
                    tooltip="how many for each latent or image, with seeds seed, seed + 1, ...; a host with "
                    "data_parallel_degree makes that many at the same time",
                ),
                io.Float.Input(
                    "guidance_rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="sd1, sd2, sdxl, hy: takes back contrast that guidance adds; for zero-SNR models",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="what to start from, for kontext, flux2 and qwenedit what to edit; it sets the "
                    "size. Each of a batch makes a picture",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="what is white is painted anew, the rest of the image stays",
                ),
                io.Image.Input(
                    "further_images",
                    optional=True,
                    tooltip="flux2, qwenedit: a batch of pictures that the model looks at beside each image",
                ),
            ],
            outputs=[io.Image.Output(display_name="image"), io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(
        cls,
        host: Handle,
        positive: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        denoise: float,
        stop_at: float,
        add_noise: bool,
        width: int,
        height: int,
        clip_skip: int,
        latent: dict[str, Any] | None = None,
        positive_conditioning: Any = None,
        negative_conditioning: Any = None,
        control_image: torch.Tensor | None = None,
        ip_image: torch.Tensor | None = None,
        scheduler: Any = None,
        true_cfg_scale: float = 1.0,
        pictures: int = 1,
        guidance_rescale: float = 0.0,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        further_images: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if host.type not in convert.FAMILIES:
            raise ValueError(
                f"host: this sampler supports {', '.join(convert.FAMILIES)}; the host's type is {host.type}"
            )
        body = _conditions(
            *(host, positive, negative, clip_skip, positive_conditioning, negative_conditioning),
            *(control_image, ip_image, scheduler),
        )
        starts: list[dict[str, Any]] = [{}]
        size: dict[str, int] = {"width": width, "height": height}
        if image is not None or mask is not None:
            if latent is not None:
                raise ValueError("latent: give a latent or an image, not both")
            if not add_noise:
                raise ValueError("add_noise: must be on where an image is given")
            starts, size = _pictures(image, mask, denoise), {}
        elif latent is not None:
            samples = convert.samples_of(latent)
            height, width = (int(side) * convert.latent_factor(host.type) for side in samples.shape[2:])
            size = {"width": width, "height": height}
            if denoise == 1 and add_noise and convert.is_empty(samples):
                pictures *= samples.shape[0]
            else:
                starts = [_start(one[None], host.type, denoise, add_noise) for one in samples]
        elif denoise < 1 or not add_noise:
            raise ValueError("latent: needed, or an image, where denoise is below 1 or add_noise is off")
        if further_images is not None:
            if image is None:
                raise ValueError("further_images: needs the image that they are beside")
            further = [convert.picture(one, "further_images") for one in further_images]
            starts = [start | {"image": [start["image"], *further]} for start in starts]
        body |= {
            "steps": steps,
            "cfg": cfg,
            "true_cfg_scale": true_cfg_scale if true_cfg_scale > 1 else None,
            "guidance_rescale": guidance_rescale or None,
            **size,
            "denoising_end": stop_at if stop_at < 1 else None,
            "output_format": "png",
            "return_latent": True,
        }
        bodies = []
        for start in starts:
            for first in range(0, pictures, MAX_PICTURES):
                count = min(MAX_PICTURES, pictures - first)
                bodies.append(body | start | _seeds(seed, count))
                seed += count
        answers = ask(host, bodies)
        made = [convert.latent_from_host(a["latent"], host.type, a["width"], a["height"]) for a in answers]
        images = torch.cat([convert.images(a["output"]) for a in answers])
        return io.NodeOutput(images, {"samples": torch.cat(made)})


def _start(samples: torch.Tensor, type: str, denoise: float, add_noise: bool) -> dict[str, Any]:
    """What a request starts from: samples of one picture.

    A host counts `strength` in steps, as KSampler does denoise. Latents that stop_at left noisy go on where
    that was cut, which is in time: denoising_start.
    """
    start: dict[str, Any] = {"latent": convert.latent_to_host(samples, type)}
    if add_noise:
        return start | {"strength": denoise, "add_noise": True}
    return start | {"denoising_start": round(1 - denoise, 6) or None}


def _pictures(image: torch.Tensor | None, mask: torch.Tensor | None, denoise: float) -> list[dict[str, Any]]:
    """What requests start from: each picture of an IMAGE, with its own MASK or the one for all of them."""
    if image is None:
        raise ValueError("mask: needs the image that it is a mask of")
    masks: list[Any] = [None] * len(image)
    if mask is not None:
        masks = list(mask if mask.ndim == 3 else mask[None])
        if len(masks) not in (1, len(image)):
            raise ValueError(f"mask: must be one, or one for each of {len(image)} images; got {len(masks)}")
        masks *= len(image) // len(masks)
    return [
        {"image": convert.picture(one, "image"), "mask": convert.mask(white), "strength": denoise}
        for one, white in zip(image, masks, strict=True)
    ]


def _seeds(seed: int, pictures: int) -> dict[str, Any]:
    return {"seed": seed % 2**64, "pictures": pictures if pictures > 1 else None}


class AnimateDiffSampler(io.ComfyNode):
    """Videos from text, or from a video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionAnimateDiffSampler",
            display_name="AnimateDiff Sampler (multi-GPU)",
            category=CATEGORY,
            description="Makes the frames of a video, without its sound. "
            "Needs a host of type ad, wan, wani2v, hv15 or ltx2.",
            inputs=[
                _host(),
                *_prompts("a red circle on a blue background", ""),
                *_numbers(25, 7.5),
                io.Int.Input("frames", default=16, min=1, max=1024, tooltip="of the video"),
                *_size(512, 512),
                _clip_skip(),
                *_conditioned(),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="ad: the frames of a video to start from; they set its size and length. "
                    "wani2v, ltx2, hv15 of pictures: the picture that the video begins with",
                ),
                io.Float.Input(
                    "denoise",
                    default=0.8,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="ad: how much of the schedule is run from the image; 1: all of it",
                ),
                io.Float.Input(
                    "guidance_scale_2",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Wan 2.2 A14B: cfg of its second transformer; 0: as cfg",
                ),
            ],
            outputs=[io.Image.Output(display_name="frames")],
        )

    @classmethod
    def execute(
        cls,
        host: Handle,
        positive: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        frames: int,
        width: int,
        height: int,
        clip_skip: int,
        positive_conditioning: Any = None,
        negative_conditioning: Any = None,
        control_image: torch.Tensor | None = None,
        ip_image: torch.Tensor | None = None,
        scheduler: Any = None,
        image: torch.Tensor | None = None,
        denoise: float = 0.8,
        guidance_scale_2: float = 0.0,
    ) -> io.NodeOutput:
        body = _conditions(
            *(host, positive, negative, clip_skip, positive_conditioning, negative_conditioning),
            *(control_image, ip_image, scheduler),
        )
        body |= {"seed": seed, "steps": steps, "cfg": cfg, "guidance_scale_2": guidance_scale_2 or None}
        if image is None or host.type in convert.BEGINS:
            body |= {"frames": frames, "width": width, "height": height}
            body |= {"image": convert.picture(image, "image")}
        else:
            body |= {"image": [convert.picture(one, "image") for one in image], "strength": denoise}
        (answer,) = ask(host, [body | {"output_format": "png"}])
        return io.NodeOutput(convert.images(answer["output"]))


class VideoSampler(io.ComfyNode):
    """Videos from a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionSVDSampler",
            display_name="Stable Video Diffusion Sampler (multi-GPU)",
            category=CATEGORY,
            description="Makes the frames of a video that starts with a picture. Needs a host of type svd.",
            inputs=[
                _host(),
                io.Image.Input("image", tooltip="one picture; the video starts with it"),
                *_numbers(25, 3.0),
                io.Int.Input("frames", default=14, min=1, max=1024, tooltip="of the video"),
                *_size(1024, 576),
                io.Int.Input("fps", default=7, min=1, max=120, tooltip="frames a second"),
                io.Int.Input("motion_bucket_id", default=127, min=0, max=1023, tooltip="how much moves"),
                io.Float.Input(
                    "noise_aug_strength",
                    default=0.02,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="noise on the image",
                ),
                io.Int.Input(
                    "decode_chunk_size", default=8, min=1, max=1024, tooltip="frames decoded at once"
                ),
                _scheduler(),
            ],
            outputs=[io.Image.Output(display_name="frames")],
        )

    @classmethod
    def execute(
        cls, host: Handle, image: torch.Tensor, scheduler: Any = None, **numbers: float
    ) -> io.NodeOutput:
        body = {**numbers, "image": convert.picture(image, "image"), "scheduler": scheduler}
        (answer,) = ask(host, [body | {"output_format": "png"}])
        return io.NodeOutput(convert.images(answer["output"]))


class Upscaler(io.ComfyNode):
    """Pictures four times as large."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiGPUDiffusionUpscaler",
            display_name="Upscaler (multi-GPU)",
            category=CATEGORY,
            description="Enlarges each side four times, picture by picture. Needs a host of type sdup.",
            inputs=[
                _host(),
                io.Image.Input("image", tooltip="the pictures to enlarge, one after the other"),
                *_prompts("", ""),
                *_numbers(30, 9.0),
                _clip_skip(),
                *_conditionings(),
                _scheduler(),
                io.Int.Input(
                    "noise_level",
                    default=20,
                    min=0,
                    max=350,
                    optional=True,
                    tooltip="noise on the input; more of it invents more detail",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(
        cls,
        host: Handle,
        image: torch.Tensor,
        positive: str,
        negative: str,
        seed: int,
        steps: int,
        cfg: float,
        clip_skip: int,
        positive_conditioning: Any = None,
        negative_conditioning: Any = None,
        scheduler: Any = None,
        noise_level: int = 20,
    ) -> io.NodeOutput:
        body = _conditions(
            *(host, positive, negative, clip_skip, positive_conditioning, negative_conditioning),
            *(None, None, scheduler),
        )
        body |= {"seed": seed, "steps": steps, "cfg": cfg, "noise_level": noise_level, "output_format": "png"}
        answers = ask(host, [body | {"image": convert.picture(one, "image")} for one in image])
        return io.NodeOutput(torch.cat([convert.images(answer["output"]) for answer in answers]))


SAMPLERS: list[type[io.ComfyNode]] = [PictureSampler, AnimateDiffSampler, VideoSampler, Upscaler]
