"""SDXL's refiner: what diffusers' two pipelines make by hand, and what does not fit is refused."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.launch.errors import LoadError
from shared.models import MODELS
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.prompts import EncodedPrompts
from shared.pipeline.schedulers import set_scheduler
from tests import tiny, tiny_extras
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_matrix import EXACT_DB, flags_of, launch, psnr, run_cell

STEPS = 10


@cache
def engine(**flags: Any) -> PipelineEngine:
    path = flags.pop("path", None) or str(tiny_extras.refiner())
    given: dict[str, Any] = {"width": 64, "height": 64, "refiner": path} | flags
    return PipelineEngine(tiny.host("sdxl", **given), tiny.config("sdxl", **given), tiny.world())


def reply(on: PipelineEngine, told: list[tuple[int, int]] | None = None, **fields: Any) -> Any:
    body = {"positive": "a cat", "negative": "blur", "seed": 3, "steps": STEPS, "cfg": 4.0} | fields
    made = on.generate(
        check_request({"output_format": "latent"} | body, on.config),
        lambda *step: told.append(step) if told is not None else None,
    )
    assert made is not None
    return made


def latents(on: PipelineEngine, **fields: Any) -> torch.Tensor:
    return safetensors.torch.load(reply(on, **fields).latent)["latent"]


def hand_refiner(base: Any) -> Any:
    """The refiner as diffusers' documentation loads it."""
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tiny_extras.refiner(), text_encoder_2=base.text_encoder_2, vae=base.vae
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hand_arguments(**given: Any) -> dict[str, Any]:
    return {
        "prompt": "a cat", "negative_prompt": "blur", "num_inference_steps": STEPS, "guidance_scale": 4.0,
        "generator": torch.Generator("cpu").manual_seed(3),
    } | given  # fmt: skip


def by_hand(switch: float = 0.8, scheduler: str | None = None, **given: Any) -> Any:
    """diffusers' base and refiner, one after the other, as its documentation shows."""
    base = tiny.load("sdxl")
    refiner, both = hand_refiner(base), hand_arguments(**given)
    for pipe in (base, refiner):
        set_scheduler(pipe, MODELS["sdxl"], scheduler)
    half = base(**both, width=64, height=64, denoising_end=switch, output_type="latent").images
    return refiner(**both, image=half, denoising_start=switch, output_type="latent").images


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"negative": None}, {"negative_prompt": None}),
    ({"refiner_start": 0.35}, {"switch": 0.35}),
    ({"scheduler": "dpmpp_2m"}, {"scheduler": "dpmpp_2m"}),
    ({"scheduler": "euler_a", "refiner_start": 0.5}, {"scheduler": "euler_a", "switch": 0.5}),
    ({"scheduler": "heun"}, {"scheduler": "heun"}),
    ({"cfg": 1.0}, {"guidance_scale": 1.0}),
    ({"guidance_rescale": 0.7, "clip_skip": 1}, {"guidance_rescale": 0.7, "clip_skip": 1}),
]


@pytest.mark.parametrize(
    ("fields", "given"),
    seldom(CASES, [CASES[0], *CASES[4:6], CASES[7]]),
    ids=[str(sorted(f.items())) for f, _ in CASES],
)
def test_two_pipelines_by_hand(fields: dict[str, Any], given: dict[str, Any]) -> None:
    torch.testing.assert_close(latents(engine(), **fields), by_hand(**given), rtol=1e-6, atol=1e-5)


def test_a_picture_goes_through_both() -> None:
    image = encode_image(tiny.picture(), "png")
    fields = {"image": image, "strength": 0.6, "refiner_start": 0.7}
    told: list[tuple[int, int]] = []
    made = reply(engine(), told, **fields)
    assert told == [(step, 6) for step in range(1, 7)] and made.steps == 6
    base = diffusers.StableDiffusionXLImg2ImgPipeline(**tiny.load("sdxl").components)
    base.set_progress_bar_config(disable=True)
    refiner = hand_refiner(base)
    both = hand_arguments()
    half = base(**both, image=tiny.picture(), strength=0.6, denoising_end=0.7, output_type="latent").images
    wanted = refiner(**both, image=half, denoising_start=0.7, output_type="latent").images
    assert torch.equal(safetensors.torch.load(made.latent)["latent"], wanted)
    # Without being asked a picture is not refined.
    plain = latents(engine(), image=image, strength=0.6)
    assert torch.equal(plain, latents(engine(), image=image, strength=0.6, refiner_start=1.0))
    with pytest.raises(RequestError, match="refiner_start: strength leaves no step before it"):
        reply(engine(), image=image, strength=0.2, refiner_start=0.5)


def test_only_where_it_is_asked_for() -> None:
    base = PipelineEngine(tiny.load("sdxl"), tiny.config("sdxl", width=64, height=64), tiny.world())
    assert torch.equal(latents(engine(), refiner_start=1.0), latents(base))
    assert torch.equal(latents(engine(), denoising_end=0.5), latents(base, denoising_end=0.5))
    told: list[tuple[int, int]] = []
    picture = reply(engine(), told, output_format="png", return_latent=True)
    assert told == [(step, STEPS) for step in range(1, STEPS + 1)] and picture.steps == STEPS
    assert torch.equal(safetensors.torch.load(picture.latent)["latent"], latents(engine()))
    decoded = engine().pipe.vae.decode(latents(engine()) / engine().pipe.vae.config.scaling_factor).sample
    ours = torch.from_numpy(np.asarray(picture.pictures[0]) / 127.5 - 1).permute(2, 0, 1)
    assert (ours - decoded[0].clamp(-1, 1)).abs().max() < 1 / 127


def test_it_watermarks_as_the_base_does() -> None:
    flags: dict[str, Any] = {"width": 64, "height": 64, "refiner": str(tiny_extras.refiner())}
    pipe = tiny.host("sdxl", **flags)
    pipe.watermark = SimpleNamespace(apply_watermark=torch.ones_like)
    on = PipelineEngine(pipe, tiny.config("sdxl", **flags), tiny.world())
    assert np.asarray(reply(on, output_format="png", steps=4).pictures[0]).min() == 255


def test_prompts_of_every_kind() -> None:
    """The refiner reads what the second encoder makes: the end of the embeddings, and the pooled one."""
    on = engine()
    for text in ("a cat", "word " * 30 + "cat"):
        with EncodedPrompts().of(on.pipe, None, MODELS["sdxl"]), torch.no_grad():
            cat, blur, pooled, of_blur = on.pipe.encode_prompt(
                text, device=torch.device("cpu"), num_images_per_prompt=1,
                do_classifier_free_guidance=True, negative_prompt="blur",
            )  # fmt: skip
        given = {"positive": None, "negative": None} | {
            name: safetensors.torch.save({"embeds": embeds.contiguous(), "pooled": pool.contiguous()})
            for name, embeds, pool in (("positive_embeds", cat, pooled), ("negative_embeds", blur, of_blur))
        }
        assert torch.equal(latents(on, positive=text), latents(on, **given)), text
    noted = {"prompt_syntax": "a1111"}
    assert not torch.equal(latents(on, positive="a (cat:1.5)", **noted), latents(on, positive="a cat"))


@pytest.mark.parametrize("tokens", [77, 154])
def test_an_absent_negative_prompt_beside_embeddings(tokens: int) -> None:
    """The base has zeros for it, the refiner an empty prompt, of as many tokens as the embeddings."""
    base = tiny.load("sdxl")
    refiner, both = hand_refiner(base), hand_arguments(prompt=None, negative_prompt=None)
    embeds = torch.randn(1, tokens, 96, generator=torch.Generator().manual_seed(8))
    pooled = embeds[:, 0, :64].clone()
    with torch.no_grad():
        empty, _, of_empty, _ = refiner.encode_prompt("", do_classifier_free_guidance=False)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    half = base(**both, **given, width=64, height=64, denoising_end=0.8, output_type="latent").images
    wanted = refiner(
        **both,
        **given | {"prompt_embeds": embeds[..., 32:]},
        negative_prompt_embeds=empty.repeat(1, tokens // 77, 1),
        negative_pooled_prompt_embeds=of_empty,
        **{"image": half, "denoising_start": 0.8, "output_type": "latent"},
    ).images
    body = safetensors.torch.save({"embeds": embeds, "pooled": pooled})
    assert torch.equal(latents(engine(), positive=None, negative=None, positive_embeds=body), wanted)


def test_compels_prompts() -> None:
    """Without weights they are the plain ones, with a negative prompt and without one."""
    on = engine(compel=True)
    for negative in ("blur", None):
        made, plain = latents(on, negative=negative), latents(engine(), negative=negative)
        assert torch.allclose(made, plain, atol=1e-4)
        assert not torch.allclose(latents(on, positive="a (cat)1.5", negative=negative), plain, atol=1e-3)


def test_several_pictures_are_those_drawn_alone() -> None:
    request = check_request(
        {"positive": "a cat", "seed": 3, "steps": 4, "output_format": "latent"}, engine().config
    )
    both = engine().generate_all(request, lambda *_: None, 2)
    for number, one in enumerate(both):
        alone = latents(engine(), negative=None, cfg=MODELS["sdxl"].cfg, steps=4, seed=3 + number)
        made = safetensors.torch.load(one.latent or b"")["latent"]
        assert torch.allclose(made, alone, atol=1e-4)


def test_both_are_warmed_and_prepared_alike() -> None:
    on = engine(quantize_to="int8")
    base: Any = on.pipe
    for part in (base.unet, base.refiner.unet):
        assert any("QLinear" in type(module).__name__ for module in part.modules())
    assert base.refiner.text_encoder_2 is base.text_encoder_2
    called: list[str] = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, part in (("base", base.unet), ("refiner", base.refiner.unet))
    ]
    on.warm_up()
    for hook in hooks:
        hook.remove()
    assert {"base", "refiner"} == set(called)


def test_a_single_file(tmp_path: Path) -> None:
    folder = tiny_extras.refiner()
    shutil.copytree(folder, tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "mine.safetensors"
    save_file({f"unet.{name}": tensor for name, tensor in weights.items()}, file)
    assert torch.equal(latents(engine(path=str(file))), latents(engine()))
    weights.pop("conv_out.bias")
    save_file({f"unet.{name}": tensor for name, tensor in weights.items()}, file)
    with pytest.raises(LoadError, match="--refiner"):
        tiny.host("sdxl", refiner=str(file))


def test_what_is_no_refiner_is_refused() -> None:
    for path, says in (
        (tiny.checkpoint("sdxl"), "is a StableDiffusionXLPipeline, not the refiner of type sdxl"),
        (tiny_extras.refiner(cross_attention_dim=32), "it reads prompts 32 wide and 104 numbers"),
        (tiny_extras.refiner().parent, "cannot be loaded"),
    ):
        with pytest.raises(LoadError, match=says):
            tiny.host("sdxl", refiner=str(path))


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"refiner_start": 0.9995}, 422, "refiner_start: must be at most 0.999 with these steps, got 0.9995"),
        ({"refiner_start": 0.5, "denoising_end": 0.7}, 400, "give refiner_start or denoising_end, not both"),
        ({"refiner_start": 0.0}, 400, "refiner_start: must be above 0"),
    ],
)
def test_requests_refused(fields: dict[str, Any], status: int, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        reply(engine(), **fields)
    assert caught.value.status == status
    with pytest.raises(RequestError, match="refiner_start: the host was started without --refiner"):
        check_request({"refiner_start": 0.5}, tiny.config("sdxl"))


PLANS: list[tuple[str, int, dict[str, Any]]] = [
    ("asyncdiff", 2, {}),
    ("asyncdiff", 3, {"stride": 2}),
    ("asyncdiff", 2, {"use_cfg_parallel": True, "async_steps": 2}),
    ("distrifuser", 2, {}),
    ("distrifuser", 2, {"no_split_batch": True}),
]


@pytest.mark.parametrize(("backend", "size", "plan"), seldom(PLANS, PLANS[:1]))
def test_on_several_ranks(pool: RankPool, backend: str, size: int, plan: dict[str, Any]) -> None:
    flags = {"refiner": str(tiny_extras.refiner())}
    if not plan:
        flags |= flags_of(backend, "sdxl", "control_net") | flags_of(backend, "sdxl", "lora")
    ask = {"steps": 8, "refiner_start": 0.5}
    ranks = pool.run(run_cell, size, backend, "sdxl", flags, {"warm_up_steps": 8, **plan, "ask": ask}, False)
    holder = next(r for r in ranks if r["exact"] is not None)
    assert psnr(holder["exact"], holder["plain"]) >= EXACT_DB
    stale = psnr(holder["asynchronous"], holder["plain"])
    if backend == "distrifuser" and "no_split_batch" not in plan:
        assert stale >= EXACT_DB, "a guidance branch on each rank is exact whatever the warm-up"
    else:
        assert 10 < stale < float("inf")


def decoded(backend: str) -> list[np.ndarray]:
    """On each rank: a picture through both, with the patches decoded once, and that of the plain pipeline."""
    flags = {"refiner": str(tiny_extras.refiner())}
    config, world, host, _ = launch(backend, "sdxl", flags, {})
    engine = host.build_engine(config, world)
    asked = {"positive": "a cat", "seed": 3, "steps": 4, "output_format": "png"}
    found = [engine.generate(check_request(asked, config), lambda *_: None)]
    engine.close()
    found.append(
        PipelineEngine(engine.pipe, config, world).generate(check_request(asked, config), lambda *_: None)
    )
    return [np.asarray(one.pictures[0], np.float32) for one in found if one is not None]


def test_the_divided_decoder_decodes_what_was_refined(pool: RankPool) -> None:
    made, wanted = pool.run(decoded, 2, "distrifuser")[0]
    assert np.abs(made - wanted).max() <= 1
