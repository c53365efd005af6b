"""What xfuser's FLUX.2 pipeline leaves out: the second guidance branch, and pictures to look at.

Both go through its stages inside of what they send each other: the branches as a batch of two, or one on each
of the ranks that share them; the pictures' tokens behind those of the last patch, the same in every step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.pipeline import Pipeline
from shared.parallel.surgery import Surgery

ADDED = frozenset({"image", "negative_prompt_embeds"})
"""Arguments of diffusers' pipeline that are added."""
MOST_PIXELS = 1024 * 1024
"""Of a picture to look at; diffusers makes larger ones smaller."""
BRANCHES = 2


class StageInputs:
    """The added inputs of one request.

    Args:
        pipeline: diffusers', with its VAE.
        arguments: of its call.
        guided: whether the checkpoint has two guidance branches, which count above a scale of 1.
        pair: the ranks that compute one branch each, that without prompt first; None: this one computes both.
        sequence: the ranks that share the sequence, and this one's place among them.

    Raises:
        ValueError: a picture that the model does not look at, or that these ranks cannot share.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        arguments: dict[str, Any],
        guided: bool,
        pair: Ranks | None,
        sequence: Ranks,
    ) -> None:
        self._pipe, self._arguments = pipeline, arguments
        default = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
        self._scale = float(arguments.get("guidance_scale", default))
        self._guided, self._pair, self._ranks = guided and self._scale > 1, pair, sequence.size
        self._batch = BRANCHES if self._guided and pair is None else 1
        self._tokens = self._places = torch.empty(0)
        self._each = 0
        """The pictures' tokens on each rank."""
        images = arguments.get("image")
        if images is not None:
            tokens, places = self._encoded(images if isinstance(images, list) else [images])
            if tokens.shape[1] % self._ranks:
                raise ValueError(
                    f"image: {self._ranks} ranks share the pictures' squares of 16 pixels, whose number must "
                    f"be a multiple of {self._ranks}; got {tokens.shape[1]}"
                )
            self._each = tokens.shape[1] // self._ranks
            self._tokens = tokens.chunk(self._ranks, 1)[sequence.rank]
            self._places = places.chunk(self._ranks, 1)[sequence.rank]

    def install(self, wrapped: Any, state: Any, surgery: Surgery) -> None:
        """Put them into one call of xfuser's pipeline.

        Args:
            wrapped: xfuser's pipeline.
            state: its run-time state.
            surgery: collects what is overridden.
        """
        self._state = state
        for owner, name, override in (
            (self._pipe, "encode_prompt", self._prompts),
            (state, "_calc_patches_metadata", self._patches),
            (wrapped, "_init_sync_pipeline", self._whole),
            (wrapped, "_init_async_pipeline", self._in_patches),
            (wrapped, "_scheduler_step", self._step),
        ):
            surgery.replace(owner, name, _around(getattr(owner, name), override))

    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """The picture's tokens alone of what the last stage ends with, of all ranks of the sequence."""
        latents = latents[: len(latents) // self._batch]
        starts = self._state.pp_patches_token_start_idx_local
        last = starts[-1] - starts[-2]
        first, behind = latents.split([latents.shape[1] - last * self._ranks, last * self._ranks], 1)
        behind = behind.unflatten(1, (self._ranks, last))[:, :, : last - self._each].flatten(1, 2)
        return torch.cat([first, behind], 1)

    def _encoded(self, images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their places, as diffusers' pipeline makes them inside of its call."""
        pipe: Any = self._pipe
        processor, made = pipe.image_processor, []
        multiple = 2 * pipe.vae_scale_factor
        for image in images:
            processor.check_image_input(image)
            if image.width * image.height > MOST_PIXELS:
                image = processor._resize_to_target_area(image, MOST_PIXELS)
            width, height = (side // multiple * multiple for side in image.size)
            made.append(processor.preprocess(image, height=height, width=width, resize_mode="crop"))
        with torch.no_grad():
            return pipe.prepare_image_latents(
                images=made,
                batch_size=1,
                generator=self._arguments.get("generator"),
                device=pipe._execution_device,
                dtype=pipe.vae.dtype,
            )

    def _prompts(self, original: Any, **settings: Any) -> Any:
        # xfuser passes the layers of dev's text encoder, whichever pipeline it is.
        layers = {name: settings.pop(name) for name in ("text_encoder_out_layers",) if name in settings}
        settings |= {name: self._arguments[name] for name in layers if name in self._arguments}
        text, places = original(**settings)
        if not self._guided:
            return text, places
        given = self._arguments.get("negative_prompt_embeds")
        empty, others = original(**settings | {"prompt": "", "prompt_embeds": given})
        if empty.shape != text.shape:
            raise ValueError(
                "PipeFusion needs prompt_embeds and negative_prompt_embeds of the same length; got "
                f"{text.shape[1]} and {empty.shape[1]}"
            )
        if self._pair is None:
            return torch.cat([empty, text]), places
        return (text, places) if self._pair.rank else (empty, others)

    def _patches(self, original: Any) -> None:
        original()
        for numbers in (self._state.pp_patches_token_num, self._state.pp_patches_token_start_idx_local):
            numbers[-1] += self._each

    def _whole(self, original: Any, *args: Any) -> Any:
        latents, places, text, text_places = original(*args)
        if self._each:
            latents = torch.cat([latents, self._tokens.to(latents.dtype)], 1)
            places = torch.cat([places, self._places], 1)
        return latents.repeat(self._batch, 1, 1), places, text, text_places

    def _in_patches(self, original: Any, **settings: Any) -> Any:
        latents, places = original(**settings)
        if self._each:
            places[-1] = torch.cat([places[-1], self._places], 1)
        return latents, places

    def _step(self, original: Any, noise: torch.Tensor, latents: torch.Tensor, step: Any) -> torch.Tensor:
        state = self._state
        ends = not state.patch_mode or state.pipeline_patch_idx == state.num_pipeline_patch - 1
        own = noise.shape[1] - (self._each if ends else 0)
        noise, shown = noise[:, :own], latents[:, own:]
        if self._guided:
            both = noise if self._pair is None else all_gather(noise, self._pair.group)
            empty, full = both.chunk(BRANCHES)
            noise = empty + self._scale * (full - empty)
        stepped = original(noise, latents[: len(latents) // self._batch, :own], step)
        return torch.cat([stepped.repeat(self._batch, 1, 1), shown], 1)


def _around(original: Any, override: Any) -> Any:
    def call(*args: Any, **settings: Any) -> Any:
        return override(original, *args, **settings)

    return call
