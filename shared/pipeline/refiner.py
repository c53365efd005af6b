"""A refiner: a second denoiser for the end of the schedule, under the same parallel method as the first.

It goes on from the latents that the first one leaves, as diffusers' own pipeline for it does, and shares
what both have: the VAE, and the text encoder that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from shared.api.faults import refused
from shared.api.requests import GenerateRequest
from shared.launch import file_header
from shared.launch.errors import LoadError, first_line
from shared.launch.file_header import SingleFileError, read_header
from shared.models import ModelSpec
from shared.parallel.method import Method
from shared.parallel.pipeline import Pipeline, model_of, part_of
from shared.pipeline.embeddings import embeddings_of
from shared.pipeline.from_picture import after_get_timesteps
from shared.pipeline.long_prompts import encode_chunks
from shared.pipeline.pictures import noting_broken_pixels
from shared.pipeline.prompts import EncodedPrompts
from shared.pipeline.schedulers import scheduler_for_request
from shared.pipeline.single_file import BROKEN, load_denoiser, model_from_folder
from shared.pipeline.steps import StepWatch

SHARED = ("vae", "text_encoder_2", "tokenizer_2")
TAKEN = (
    "num_inference_steps", "guidance_scale", "guidance_rescale", "generator", "num_images_per_prompt",
    "prompt", "negative_prompt", "clip_skip", "eta", "sigmas", "timesteps",
)  # fmt: skip
"""Arguments of the first denoiser's pipeline that mean the same to the refiner's."""
TIME_IDS = 5  # size, crop and aesthetic score, in place of the base model's six numbers


def load_refiner(path: str, base: Pipeline, spec: ModelSpec, dtype: torch.dtype) -> Pipeline:
    """The refiner of a diffusers folder or a single file, with its denoiser and its scheduler alone.

    Args:
        base: the pipeline that it will go on from.

    Raises:
        LoadError: it cannot be read, or is no refiner for this model.
    """
    import diffusers

    place, said = Path(path), f"--refiner {path!r}"
    folder = place.with_suffix("") if place.is_file() else place
    if place.is_file() and not (folder / "model_index.json").is_file():
        folder = file_header.CONFIGS / (spec.refiner_config or "")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        if not index.get("requires_aesthetics_score"):
            raise LoadError(f"{said} is a {index.get('_class_name')}, not the refiner of type {spec.name}")
        cls = getattr(diffusers, index[spec.denoiser][1])
        if place.is_file():
            denoiser = load_denoiser(read_header(place, "--refiner"), cls, spec, folder, dtype)
        else:
            denoiser = model_from_folder(cls, folder / spec.denoiser, dtype)
        scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    except (*BROKEN, SingleFileError) as error:
        raise LoadError(f"{said} cannot be loaded: {first_line(error)}") from error
    config, encoder = denoiser.config, part_config(base)
    given = config.cross_attention_dim, config.projection_class_embeddings_input_dim
    needed = encoder.hidden_size, TIME_IDS * config.addition_time_embed_dim + encoder.projection_dim
    if given != needed:
        raise LoadError(
            f"{said} does not fit the checkpoint: it reads prompts {given[0]} wide and {given[1]} numbers of "
            f"the picture, needed are {needed[0]} and {needed[1]}"
        )
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", *SHARED))
    zeros = index.get("force_zeros_for_empty_prompt", True)
    pipe = getattr(diffusers, spec.refiner_pipeline or "")(
        **parts, unet=denoiser, scheduler=scheduler, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
    denoiser.eval().requires_grad_(False)
    return pipe


def part_config(base: Pipeline) -> Any:
    """The configuration of the text encoder that the refiner reads."""
    return base.components["text_encoder_2"].config


class Refiner:
    """The refiner of one pipeline, made parallel as that is.

    Args:
        pipe: of `load_refiner`, on this rank's device.
        base: the pipeline that it goes on from.
        spec: of its type.
        make_parallel: makes the parallel method on a pipeline.
    """

    def __init__(
        self, pipe: Pipeline, base: Pipeline, spec: ModelSpec, make_parallel: Callable[[Pipeline], Method]
    ) -> None:
        self.pipe, self.spec = pipe, spec
        # The base's method has divided the VAE already: this one must not see it.
        pipe.register_modules(**dict.fromkeys(SHARED))
        self.method = make_parallel(pipe)
        pipe.register_modules(**{name: base.components[name] for name in SHARED})
        pipe.vae_scale_factor = base.vae_scale_factor
        pipe.embeddings, pipe.watermark = embeddings_of(base), part_of(base, "watermark")
        pipe.image_processor = VaeImageProcessor(vae_scale_factor=base.vae_scale_factor)

    def run(
        self,
        request: GenerateRequest,
        arguments: dict[str, Any],
        latents: torch.Tensor,
        prompts: EncodedPrompts,
        watch: StepWatch,
        output_type: str,
    ) -> Any:
        """Go on from the latents of a call of the base's pipeline with these arguments, on all ranks.

        Args:
            request: has a `refiner_start` below 1.
            watch: of the call before; it counts on.

        Raises:
            RequestError: 422, no step is left to it.
        """
        watch.pipe = self.pipe
        given = {name: arguments[name] for name in TAKEN if name in arguments}
        given |= self._embeddings(request, arguments)
        given |= {"image": latents, "denoising_start": request.refiner_start, "output_type": output_type}
        state = tuple(sorted((request.lora_scales or {}).items()))
        self.method.begin(given["num_inference_steps"], latents.shape[0])
        with (
            scheduler_for_request(self.pipe, self.spec, request.scheduler, request.steps),
            self._some_step(request),
            noting_broken_pixels(self.pipe, watch.finite),
            prompts.of(self.pipe, state, self.spec, request.prompt_syntax, request.negative),
        ):
            try:
                return self.method.run(given, watch)
            finally:
                self.pipe.maybe_free_model_hooks()

    def _embeddings(self, request: GenerateRequest, arguments: dict[str, Any]) -> dict[str, Any]:
        """The part that the refiner reads of embeddings, which are of both encoders: that of the last.

        What the base has zeros for, an absent negative prompt, the refiner reads as an empty one.
        """
        width = model_of(self.pipe, self.spec.denoiser).config.cross_attention_dim
        found: dict[str, Any] = {}
        for side in ("", "negative_"):
            if (embeds := arguments.get(f"{side}prompt_embeds")) is not None:
                pooled = f"{side}pooled_prompt_embeds"
                found |= {f"{side}prompt_embeds": embeds[..., -width:], pooled: arguments[pooled]}
        absent = request.negative is None and request.negative_embeds is None
        if "prompt_embeds" not in found or not (absent or "negative_prompt_embeds" not in found):
            return found
        text = None if absent and self.pipe.config.force_zeros_for_empty_prompt else request.negative or ""
        values = {"negative_prompt": text, "prompt_embeds": found["prompt_embeds"]}
        encode_chunks(self.pipe, self.spec, values, request.prompt_syntax)  # as many tokens as the prompt
        sides = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
        return found | {name: values.get(name) for name in sides} | {"negative_prompt": None}

    def _some_step(self, request: GenerateRequest) -> AbstractContextManager[None]:
        """Refuse a start after the last step, from which diffusers would run all of them."""
        scheduler = self.pipe.scheduler

        def act(timesteps: torch.Tensor) -> None:
            if not len(timesteps):
                last = 1 - float(scheduler.timesteps[-1]) / scheduler.config.num_train_timesteps
                text = f"must be at most {last:.3f} with these steps, got {request.refiner_start:g}"
                raise refused("refiner_start", text)

        return after_get_timesteps(self.pipe, act)

    def close(self) -> None:
        """Undo what the parallel method has changed."""
        self.method.close()
