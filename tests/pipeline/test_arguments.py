"""The pipeline's arguments and engine on one rank: parts of a schedule, what is refused, what is counted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.image_processor import VaeImageProcessor

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.api.warned import collecting_warnings
from shared.http.pages import offer
from shared.launch.flags import HostConfig
from shared.models import MODELS, SCHEDULERS, schedulers_for
from shared.parallel.graphs import Graphs
from shared.parallel.pipeline import part_of
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.pictures import to_picture
from shared.pipeline.schedulers import scheduler_for_request
from tests import tiny, tiny_extras
from tests.seldom import seldom

PAIRED = ("dpm_2", "heun", "dpmpp_sde")
"""Schedulers whose steps come in pairs."""
ONE_STEP = ("ddim", "euler", "k_euler")
"""Those that remember nothing of the step before, and draw nothing."""
DRAWING = ("ddpm", "euler_a", "dpmpp_2m_sde", "k_dpmpp_2m_sde")
EVERY = [
    name
    for name in schedulers_for(MODELS["sd1"])
    if (name in SCHEDULERS or name.startswith("k_"))
    and not name.removeprefix("k_").startswith((*PAIRED, "lcm", "tcd"))
]
PARTIAL = [name for name, spec in MODELS.items() if "denoising_start" in spec.fields]


@cache
def engine(name: str) -> PipelineEngine:
    config = tiny.config(name, width=64, height=64)
    return PipelineEngine(tiny.load(name), config, tiny.world())


def reply(name: str, **fields: Any) -> Reply:
    spec, on = MODELS[name], engine(name)
    body = {"seed": 3, "steps": 12, "cfg": 2.0, "output_format": "latent"} | fields
    if "positive" in spec.fields and "positive_embeds" not in body:
        body.setdefault("positive", "a cat")
    if spec.image == "needed":
        body.setdefault("image", encode_image(tiny.picture(16), "png"))
    if spec.output == "video":
        body.setdefault("frames", 2 if spec.frames_factor == 1 else spec.frames_factor + 1)
    made = on.generate(check_request(body, on.config), lambda step, steps: None)
    assert made is not None
    return made


def latents(name: str, **fields: Any) -> torch.Tensor:
    made = reply(name, **fields).latent
    assert made is not None
    return safetensors.torch.load(made)["latent"]


def packed(tensor: torch.Tensor, name: str = "latent") -> bytes:
    return safetensors.torch.save({name: tensor.contiguous()})


def distance(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "scheduler",
    seldom(EVERY, ("ddim", "euler_a", "pndm", "heun", "unipc")),  # of each kind one
)
def test_two_parts_make_the_whole_with_every_scheduler(scheduler: str) -> None:
    whole = latents("sd1", scheduler=scheduler)
    half = latents("sd1", scheduler=scheduler, denoising_end=0.5)
    rest = latents("sd1", scheduler=scheduler, denoising_start=0.5, latent=packed(half))
    assert torch.isfinite(rest).all() and distance(half, whole) > 0.01
    if scheduler in ONE_STEP:
        assert distance(rest, whole) < 1e-5
    elif scheduler not in DRAWING:  # multistep solvers begin anew, and forget a little
        assert distance(rest, whole) < 0.01
    again = latents("sd1", scheduler=scheduler, denoising_start=0.3, add_noise=True, latent=packed(whole))
    assert torch.isfinite(again).all() and distance(again, whole) < 2


@pytest.mark.parametrize("name", seldom(PARTIAL, ("sdxl", "ad", "flux2", "qwen", "sd3")))
def test_two_parts_make_the_whole_of_every_type(name: str) -> None:
    scheduler = {"discrete": "ddim"}.get(MODELS[name].scheduler_family, "flow_euler")
    asked: dict[str, Any] = {"scheduler": scheduler, "steps": 4}
    whole = latents(name, **asked)
    middle = 0.2 if name in ("flux2", "zimage") else 0.5  # its shift leaves no step for the second half
    half = latents(name, **asked, denoising_end=middle)
    rest = latents(name, **asked, denoising_start=middle, latent=packed(half))
    assert distance(half, whole) > 1e-3 and distance(rest, whole) < 1e-5


STRENGTHS = [
    *((name, None, 0.55) for name in ("sd1", "sdxl", "sd3", "flux")),
    *(
        ("sd1", scheduler, 0.5)
        for scheduler in ("dpmpp_2m", "k_dpmpp_2m_sde", "heun", "dpm_2", "lms", "unipc")
    ),
    *(("sd1", scheduler, 0.5) for scheduler in ("ddim", "ddpm", "euler_a", "dpmpp_sde")),
    ("flux", None, 1.0),
]


@pytest.mark.parametrize(
    ("name", "scheduler", "strength"),
    seldom(STRENGTHS, [*STRENGTHS[:5], ("sd1", "heun", 0.5), STRENGTHS[-1]]),
)
def test_strength_makes_what_image_to_image_of_diffusers_makes(
    name: str, scheduler: str | None, strength: float
) -> None:
    spec, pipe = MODELS[name], engine(name).pipe
    finished = latents(name, steps=2, seed=8)
    image = finished
    if spec.latent_layout == "packed":
        image = type(pipe)._unpack_latents(finished, 64, 64, pipe.vae_scale_factor)
    made = latents(name, scheduler=scheduler, strength=strength, add_noise=True, latent=packed(finished))
    theirs = getattr(diffusers, spec.image_pipeline)(**pipe.components)
    with scheduler_for_request(pipe, spec, scheduler):
        theirs.scheduler = pipe.scheduler
        torch.manual_seed(3)  # dpmpp_sde draws from the global state
        wanted = theirs(
            "a cat",
            image=image.clone(),
            strength=strength,
            num_inference_steps=12,
            guidance_scale=2.0,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="latent",
            **({} if name in ("sd1", "sdxl") else {"height": 64, "width": 64}),
        ).images
    assert distance(made, wanted) < 1e-5
    assert distance(wanted, finished) > 0.01


def test_strength_counts_steps() -> None:
    start = {"latent": packed(torch.zeros(1, 4, 8, 8)), "scheduler": "ddim", "add_noise": True}
    assert reply("sd1", **start, strength=0.3).steps == 3
    assert reply("sd1", **start, denoise=1.0).steps == 12
    assert reply("sd1", **start, strength=0.5, denoising_end=0.75).steps == 3
    with pytest.raises(RequestError, match=r"strength: leaves no step to run: 0.05 of 12 steps"):
        reply("sd1", **start, strength=0.05)
    whole = latents("sd1", scheduler="heun")
    assert distance(latents("sd1", scheduler="heun", steps=3, strength=1.0), whole) > 0


def test_parts_of_pairs_are_refused() -> None:
    for scheduler in ("heun", "dpm_2", "k_dpmpp_sde"):
        with pytest.raises(RequestError, match="does not support a part of a schedule"):
            latents("sd1", scheduler=scheduler, denoising_end=0.5)
    with pytest.raises(RequestError, match="PNDMScheduler does not support a part of a schedule"):
        latents("sd1", scheduler={"scheduler": "pndm", "skip_prk_steps": False}, denoising_end=0.5)


def test_true_guidance_hears_a_negative_prompt() -> None:
    usual = latents("flux", steps=2)
    guided = [latents("flux", steps=2, true_cfg_scale=3.0, **more) for more in ({}, {"negative": "blur"})]
    assert distance(guided[0], usual) > 1e-4 and distance(*guided) > 1e-4
    assert distance(latents("flux", steps=2, true_cfg_scale=1.0), usual) == 0
    for fields in ({}, {"true_cfg_scale": 1.0}):
        with pytest.raises(
            RequestError, match="type flux ignores a negative prompt unless true_cfg_scale is above 1"
        ):
            latents("flux", negative="blur", **fields)


def own(name: str, **changes: Any) -> torch.Tensor:
    """What diffusers' own pipeline makes of a request of `latents`."""
    arguments = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 7.0, "output_type": "latent"}
    if name == "sdup":
        arguments["image"] = tiny.picture(16)
    else:
        arguments |= {"width": 64, "height": 64}
    generator = torch.Generator("cpu").manual_seed(3)
    made = engine(name).pipe(**arguments, **MODELS[name].pipeline_defaults, **changes, generator=generator)
    return made.images


@pytest.mark.parametrize(("ours", "diffusers"), [(4.0, 3.0), (1.0, 0.0), (0.0, 0.0)])
def test_guidance_of_one_is_none(ours: float, diffusers: float) -> None:
    """Of Z-Image's pipeline 0 is: it adds the scale times the difference of the branches to one of them."""
    made = latents("zimage", steps=4, cfg=ours)
    wanted = (
        engine("zimage")
        .pipe(
            prompt="a cat",
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=diffusers,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="latent",
        )
        .images
    )
    assert distance(made, wanted) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sdup", "wan", "qwen", "zimage"])
def test_guidance_below_one_is_none_and_told(name: str) -> None:
    with collecting_warnings() as told:
        below = latents(name, steps=2, cfg=0.5)
    assert told == [f"cfg: 0.5 is the same as 1, no guidance: type {name} is guided only above 1"]
    with collecting_warnings() as told:
        assert distance(below, latents(name, steps=2, cfg=1.0)) == 0
        latents(name, steps=2, cfg=0.0)
    assert not told


@pytest.mark.parametrize("name", ["flux", "hv15"])
def test_guidance_below_one_counts_where_it_is_an_input_or_a_guider_goes_away(name: str) -> None:
    with collecting_warnings() as told:
        below = latents(name, steps=2, cfg=0.5)
    assert not told and distance(below, latents(name, steps=2, cfg=1.0)) > 1e-4


def test_a_unet_that_takes_the_scale_of_guidance_as_an_input() -> None:
    """LCM's: scales below 1 count, and a negative prompt does not, which is told."""
    pipe = tiny.load("sd1")
    pipe.unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    on = PipelineEngine(pipe, tiny.config("sd1", width=64, height=64), tiny.world())
    made = []
    for fields, warned in (
        ({"cfg": 0.5}, []),
        ({"cfg": 1.0}, []),
        ({"cfg": 3.0}, []),
        ({"cfg": 3.0, "negative": "blur"}, ["negative"]),
    ):
        body = {"positive": "a cat", "seed": 3, "steps": 1, "output_format": "latent"} | fields
        with collecting_warnings() as told:
            reply = on.generate(check_request(body, on.config), lambda *_: None)
        assert reply is not None and reply.latent is not None
        made.append(safetensors.torch.load(reply.latent)["latent"])
        assert [line.partition(":")[0] for line in told] == warned
    assert distance(made[0], made[1]) > 1e-6 and distance(made[3], made[2]) == 0


def test_sides_beyond_the_checkpoints_positions_are_refused() -> None:
    """Up to what diffusers draws; it refuses more in its own words, in the first step."""
    on = engine("sd3")
    longest = math.prod(on.config.position_table or ())
    assert longest == 512 and latents("sd3", steps=1, width=512).shape[-1] == 64
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        on.pipe(prompt="a cat", width=528, height=64, num_inference_steps=1)
    assert {offer(on.config)["fields"][name]["maximum"] for name in ("width", "height")} == {longest}
    assert all(max(size) <= longest for size in offer(replace(on.config, width=512, height=512))["sizes"])
    text = "must be at most 512 for this checkpoint, which has positions for 32 x 32 tokens of 16 x 16 pixels"
    large = encode_image(tiny.picture(600), "png")
    for fields, told in (
        ({"width": 528}, f"width: {text}; got 528"),
        ({"height": 1024}, f"height: {text}; got 1024"),
        ({"image": large, "strength": 0.5}, f"image: makes a height that {text}; got 592"),
        ({"image": large, "strength": 0.5, "width": 64, "height": 64}, None),
    ):
        if told is None:
            check_request({"positive": "a cat"} | fields, on.config)
            continue
        with pytest.raises(RequestError) as caught:
            check_request({"positive": "a cat"} | fields, on.config)
        assert caught.value.status == 422 and told in str(caught.value)


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("name", [n for n, spec in MODELS.items() if "guidance_rescale" in spec.fields])
def test_rescaled_guidance(name: str) -> None:
    asked: dict[str, Any] = {"steps": 4, "cfg": 7.0}
    made = latents(name, **asked, guidance_rescale=0.7)
    assert distance(made, own(name, guidance_rescale=0.7)) < 1e-6
    assert distance(made, latents(name, **asked)) > 1e-3
    if name == "hy":
        return
    zero: Any = {"scheduler": {"scheduler": "ddim", **ZERO_SNR}}
    made = latents(name, **asked, **zero, guidance_rescale=0.7)
    with scheduler_for_request(engine(name).pipe, MODELS[name], zero["scheduler"]):
        assert distance(made, own(name, guidance_rescale=0.7)) < 1e-6


def test_pipelines_without_rescaled_guidance_refuse_it() -> None:
    config = tiny.config("sd1", width=64, height=64, control_net={str(tiny_extras.control_net("sd1")): 1.0})
    request = {"control_image": encode_image(tiny.picture(), "png"), "guidance_rescale": 0.5, "steps": 1}
    on = PipelineEngine(tiny.host("sd1", control_net=config.control_net), config, tiny.world())
    with pytest.raises(RequestError, match="StableDiffusionControlNetPipeline does not support it"):
        on.generate(check_request(request, config), lambda step, steps: None)
    for name in ("ad", "sd3", "sdup", "flux"):
        with pytest.raises(RequestError, match=rf"type {name} \(.*\) does not support guidance_rescale"):
            latents(name, guidance_rescale=0.5)


def test_the_upscalers_noise_level() -> None:
    asked: dict[str, Any] = {"steps": 4, "cfg": 7.0}
    made = {level: latents("sdup", **asked, noise_level=level) for level in (None, 0, 20, 350)}
    for level in (0, 350):
        assert distance(made[level], own("sdup", noise_level=level)) < 1e-6
        assert distance(made[level], made[None]) > 1e-3
    assert torch.equal(made[20], made[None]) and distance(made[20], own("sdup")) < 1e-6
    with pytest.raises(RequestError, match="noise_level: must be at most 350 here, got 351"):
        latents("sdup", noise_level=351)


def embeds(tokens: int) -> bytes:
    """Embeddings of noise, for sd1."""
    noise = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
    return packed(noise, "embeds")


NAN = float("nan")
EULER = {"scheduler": "euler"}


@pytest.mark.parametrize(
    ("name", "fields", "field", "words"),
    [
        ("sd1", {"latent": packed(torch.full((1, 4, 8, 8), NAN))}, "latent", "must hold finite numbers"),
        ("sd1", {"latent": packed(torch.zeros(1, 4, 8, 9))}, "latent", "must have shape"),
        ("sd1", EULER | {"sigmas": packed(torch.tensor([5.0]), "sigmas")}, "sigmas", "no step is left"),
        ("sd1", EULER | {"sigmas": packed(torch.tensor([1.0, NAN]), "sigmas")}, "sigmas", "finite"),
        ("sd1", EULER | {"sigmas": packed(torch.tensor([1.0, 5.0]), "sigmas")}, "sigmas", "must decrease"),
        ("sd3", {"sigmas": packed(torch.zeros(2), "sigmas")}, "sigmas", "must decrease"),
        ("qwen", {"sigmas": packed(torch.ones(1), "sigmas")}, "sigmas", "must be at least 2 numbers"),
        ("sd1", {"timesteps": packed(torch.tensor([5000, 1]), "timesteps")}, "timesteps", "0 to 999"),
        ("sd1", {"positive_embeds": packed(torch.zeros(1, 77, 5), "embeds")}, "positive_embeds", "wide"),
        ("sd1", {"clip_skip": 5}, "clip_skip", "at most"),
        ("sd1", {"lora_scales": {"x": 1.0}}, "lora_scales", "is not loaded"),
        ("sd1", {"scheduler": {"scheduler": "ddim", "bogus": 1}}, "scheduler", "no setting 'bogus'"),
        ("sd1", {"scheduler": {"scheduler": "unipc", "solver_p": "x"}}, "scheduler", "must be left out"),
        ("sd1", {"sigmas": packed(torch.tensor([5.0, 1.0]), "sigmas")}, "sigmas",
         r"PNDMScheduler takes none; scheduler may be .*\beuler\b"),
        ("sd1", {"timesteps": packed(torch.tensor([900, 1]), "timesteps")}, "timesteps",
         r"PNDMScheduler takes none; scheduler may be .*\bdpmpp_2m\b"),
        ("sd1", {"negative_embeds": embeds(10)}, "negative_embeds", "must hold 77 tokens .*, got 10"),
        ("sd1", {"positive_embeds": embeds(10), "negative": "more than so many tokens"},
         "positive_embeds", "must hold 77 tokens .*, got 10"),
        ("sd1", {"positive_embeds": embeds(154), "negative_embeds": embeds(77)},
         "negative_embeds", "must have as many tokens as positive_embeds, 154; got 77"),
        ("pixa", {"negative_embeds": packed(torch.zeros(1, 8, 32), "embeds")}, "negative_embeds", "together"),
    ],
)  # fmt: skip
def test_a_fault_that_the_ranks_find_names_its_field(name: str, fields: dict, field: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        latents(name, **{"steps": 2} | fields)
    assert refused.value.status == 422
    assert [problem.field for problem in refused.value.problems] == [field]


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_long_embeddings_beside_a_prompt(side: str) -> None:
    """The prompt of the other side is read in as many chunks, those behind its end empty."""
    pipe, other = engine("sd1").pipe, "negative" if side == "positive" else "positive"
    short, empty = (
        pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0] for text in ("a dog", "")
    )
    given = {f"{side}_embeds": embeds(154)}
    both = given | {f"{other}_embeds": packed(torch.cat([short, empty], 1), "embeds")}
    fields: dict[str, Any] = {"steps": 2, "positive": None}
    made = latents("sd1", **fields | given | {other: "a dog"})
    assert distance(made, latents("sd1", **fields, **both)) < 1e-6
    assert latents("sd1", **fields, positive_embeds=embeds(154), cfg=1.0).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 64), (1, 65), (1, 1, 64)])
def test_pooled_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    both = safetensors.torch.save({"embeds": torch.zeros(1, 77, 96), "pooled": torch.zeros(shape)})
    with pytest.raises(RequestError, match=r"'pooled' must be \[1, 64\]"):
        latents("sdxl", positive_embeds=both)


@pytest.mark.parametrize("scheduler", ["pndm", "heun", "dpm_2", "ddim"])
def test_steps_are_counted_as_clients_count_them(scheduler: str) -> None:
    assert reply("sd1", scheduler=scheduler, steps=4).steps == 4
    if scheduler in ("pndm", "ddim"):
        assert reply("sd1", scheduler=scheduler, steps=4, denoising_end=0.5).steps == 2


def test_guidance_of_a_single_frame_is_the_requests() -> None:
    made = [latents("svd", frames=1, cfg=cfg, steps=2) for cfg in (1.0, 3.0)]
    assert distance(*made) > 1e-3


def test_an_upscaled_picture_of_any_size() -> None:
    image = encode_image(tiny.picture().resize((18, 13)), "png")
    made = reply("sdup", image=image, steps=2)
    assert made.latent is not None
    own = safetensors.torch.load(made.latent)["latent"]
    assert (made.width, made.height) == (own.shape[3] * 4, own.shape[2] * 4) == (64, 48)
    assert latents("sdup", image=image, steps=2, latent=packed(own)).shape == own.shape


@pytest.mark.parametrize(
    "name",
    seldom(
        [n for n, spec in MODELS.items() if "positive" in spec.fields],
        ("sd1", "sdxl", "sd3", "flux", "qwen", "wan"),
    ),
)
def test_a_prompt_is_encoded_once(name: str) -> None:
    asked: list[int] = []
    hook = engine(name).pipe.text_encoder.register_forward_hook(lambda *_: asked.append(1))
    try:
        short: dict[str, Any] = {"steps": 2, "positive": f"words for {name} alone"}
        first = latents(name, **short)
        once = len(asked)
        assert once > 0
        other = latents(name, **short, seed=4)
        assert len(asked) == once and distance(other, first) > 0.01
        changed = latents(name, **(short | {"positive": "other words"}))
        assert len(asked) > once and distance(changed, first) > 1e-6
        assert torch.equal(latents(name, **short), first)
        engine(name)._prompts.forget()
        assert torch.equal(latents(name, **short), first)
    finally:
        hook.remove()


def test_words_are_encoded_anew_beside_another_picture() -> None:
    """Qwen-Image-Edit's encoder sees the picture beside the words."""
    asked: list[int] = []
    pictures = [encode_image(tiny.picture(16, seed), "png") for seed in (1, 2, 1)]
    hook = engine("qwenedit").pipe.text_encoder.register_forward_hook(lambda *_: asked.append(1))
    try:
        made = [latents("qwenedit", image=seen, positive="as in") for seen in pictures]
    finally:
        hook.remove()
    once = len(asked) // 2
    assert once > 0 and len(asked) == 2 * once
    assert torch.equal(made[0], made[2]) and distance(made[1], made[0]) > 1e-3


def words_lora(folder: Path) -> str:
    """A LoRA for sd1's text encoder, named words."""
    torch.manual_seed(0)
    tensors = {}
    for name, module in tiny.load("sd1").text_encoder.named_modules():
        if name.endswith("q_proj"):
            tensors[f"text_encoder.{name}.lora_A.weight"] = torch.randn(4, module.in_features)
            tensors[f"text_encoder.{name}.lora_B.weight"] = torch.randn(module.out_features, 4)
    safetensors.torch.save_file(tensors, folder / "words.safetensors")
    return str(folder / "words.safetensors")


def check_loras_reach_prompts(on: PipelineEngine, lora: str) -> None:
    """A text encoder's LoRA comes, is scaled to nothing, comes back and goes."""

    def drawn(**fields: Any) -> torch.Tensor:
        body = {"seed": 3, "steps": 2, "cfg": 2.0, "output_format": "latent", "positive": "a cat"} | fields
        made = on.generate(check_request(body, on.config), lambda step, steps: None)
        assert made is not None and made.latent is not None
        return safetensors.torch.load(made.latent)["latent"]

    usual = drawn()
    on.add_lora(lora, 1.0)
    try:
        changed = drawn()
        assert distance(changed, usual) > 1e-4
        assert distance(drawn(lora_scales={"words": 0.0}), usual) < 1e-6
        assert torch.equal(drawn(), changed)
    finally:
        on.remove_lora(lora)
    assert torch.equal(drawn(), usual)


def test_a_prompt_is_encoded_anew_when_loras_change(tmp_path: Path) -> None:
    check_loras_reach_prompts(engine("sd1"), words_lora(tmp_path))


class Remembering(Graphs):
    """As stale as captured graphs are: the same tokens get the same answer until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Any] = {}
        self.calls = 0

    def run(self, kind: Any, fn: Any, **kwargs: Any) -> Any:
        self.calls += 1
        key = f"{kind} {kwargs}"
        if key not in self.answers:
            self.answers[key] = fn(**kwargs)
        return self.answers[key]

    def close(self) -> None:
        self.answers.clear()


def test_captured_encoders_are_ready_and_forgotten_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Remembering] = []

    def remembering() -> Remembering:
        made.append(Remembering())
        return made[-1]

    monkeypatch.setattr("shared.parallel.graphs.Graphs", remembering)
    monkeypatch.setattr(HostConfig, "captures", lambda config, device: True)
    config = tiny.config("sd1", width=64, height=64)
    on = PipelineEngine(tiny.load("sd1"), config, tiny.world())
    on.warm_up()
    assert made[0].calls >= 2, "the first call is eager, the second is captured"
    check_loras_reach_prompts(on, words_lora(tmp_path))
    on.close()
    assert "forward" not in on.pipe.text_encoder.__dict__
    compiled = replace(config, compile_text_encoder=True)
    assert not PipelineEngine(tiny.load("sd1"), compiled, tiny.world())._encoders.captures


def test_a_size_without_room_beside_captured_steps_is_no_longer_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[int] = []

    @contextlib.contextmanager
    def eagerly() -> Iterator[None]:
        entered.append(1)
        yield

    monkeypatch.setattr("shared.pipeline.engine.uncaptured", eagerly)
    config = tiny.config("sd1", width=64, height=64)
    on = PipelineEngine(tiny.load("sd1"), config, tiny.world())
    large, small = (check_request({"width": w, "steps": 1, "seed": 1}, config) for w in (96, 64))
    for request in (large, small):
        on.generate(request, lambda *_: None)
    assert not entered
    on.free_memory(None)
    on.free_memory(large)
    for request in (large, small, large):
        on.generate(request, lambda *_: None)
    assert len(entered) == 2


def test_a_motion_module_of_few_frames_is_warmed_up_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    on = PipelineEngine(tiny.load("ad"), tiny.config("ad", width=64, height=64), tiny.world())
    adapter: Any = part_of(on.pipe, "motion_adapter")
    adapter.register_to_config(motion_max_seq_length=4)
    frames: list[int | None] = []
    monkeypatch.setattr(on, "generate", lambda request, on_step: frames.append(request.frames))
    on.warm_up()
    assert set(frames) == {4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pictures_are_rounded_as_diffusers_does(dtype: torch.dtype) -> None:
    halves = (torch.arange(0, 256) + 0.5) / 255
    pixels = torch.cat([torch.rand(6000), halves.clamp(max=1), torch.tensor([0.0, 1.0])])[:6144]
    pixels = pixels.reshape(1, 3, 32, 64).to(dtype)
    (wanted,) = VaeImageProcessor().postprocess(pixels, "pil", do_denormalize=[False])
    assert np.array_equal(np.asarray(to_picture(pixels[0])), np.asarray(wanted))


@pytest.mark.parametrize("name", seldom(("sd1", "svd", "flux"), ("sd1", "flux")))
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_in_words(name: str, broken: float) -> None:
    """In latents and in pixels, which clamping would make black or white; the engine goes on."""
    on = engine(name)
    video = MODELS[name].output == "video"
    vae = on.pipe.vae.decoder.conv_out.bias
    denoiser = getattr(on.pipe, MODELS[name].denoiser)
    last = denoiser.proj_out if hasattr(denoiser, "proj_out") else denoiser.conv_out
    whole = np.asarray(reply(name, steps=2, output_format="png").pictures[0])
    for bias, format in ((vae, "png"), (last.bias, "png"), (last.bias, "latent")):
        kept = bias.detach().clone()
        with torch.no_grad():
            bias[0] = broken
        try:
            with pytest.raises(RequestError) as caught:
                reply(name, steps=2, output_format=format)
        finally:
            bias.data.copy_(kept)
        what = "latent" if format == "latent" else "video" if video else "picture"
        assert caught.value.status == 422 and f"a {what} contains NaN or Inf" in str(caught.value)
    assert np.array_equal(np.asarray(reply(name, steps=2, output_format="png").pictures[0]), whole)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_consistency_models_do_not_run_in_parts(name: str) -> None:
    with pytest.raises(RequestError, match="does not support a part of a schedule"):
        reply("sd1", scheduler=name, denoising_end=0.5)
