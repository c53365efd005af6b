"""FLUX.2's three kinds of checkpoints: each as diffusers' own pipeline draws it, and what each refuses."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from shared.api.faults import RequestError
from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.launch.errors import LoadError, UsageError
from shared.launch.flags import HostConfig
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import check_model
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.latents import picture_latents
from shared.pipeline.loading import load_pipeline
from shared.pipeline.preview import fit_projection, project
from shared.pipeline.turns import decoded
from tests import tiny, tiny_flux2

KINDS = ("klein", "distilled", "dev")
SHORT: dict[str, Any] = {"seed": 3, "steps": 2, "width": 64, "height": 48}


def distilled(folder: Path) -> None:
    tiny_flux2.make_flux2(distilled=True).save_pretrained(folder)


def dev(folder: Path) -> None:
    tiny_flux2.make_dev().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]  # as published; it needs torchvision
    (folder / "model_index.json").write_text(json.dumps(index))


def config_of(kind: str, **flags: Any) -> HostConfig:
    if kind == "klein":
        return tiny.config("flux2", **flags)
    folder = tiny.cached(f"flux2-published-{kind}", distilled if kind == "distilled" else dev)
    return tiny.config("flux2", **{"checkpoint": str(folder)} | flags)


@cache
def engine(kind: str) -> PipelineEngine:
    config = config_of(kind)
    return PipelineEngine(load(config), config, tiny.world())


def load(config: HostConfig) -> Any:
    needs = BACKENDS["xdit"].needs(config, 1)
    return load_pipeline(config.spec, config, torch.device("cpu"), needs, quiet=True)


def drawn(kind: str, **fields: Any) -> tuple[np.ndarray, list[str]]:
    """Pixels in 0..1 and warnings."""
    on = engine(kind)
    with collecting_warnings() as warnings:
        made = on.generate(check_request(SHORT | fields, on.config), lambda step, steps: None)
    assert made is not None
    return np.asarray(made.pictures[0]) / 255, warnings


def plain(kind: str, **arguments: Any) -> np.ndarray:
    pipe = engine(kind).pipe
    usual = {"width": 64, "height": 48, "num_inference_steps": 2, "output_type": "np"}
    return pipe(**usual | arguments, generator=torch.Generator("cpu").manual_seed(3)).images[0]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_pipeline_with_pictures_to_look_at(kind: str) -> None:
    config, scale = config_of(kind), {"klein": 3.0, "distilled": 1.0, "dev": 3.0}[kind]
    assert (config.spec.steps, config.spec.cfg) == {"distilled": (4, 1.0)}.get(kind, (50, 4.0))
    one, other = (tiny.picture(96, seed).resize((96, 64)) for seed in (1, 2))
    made, warnings = drawn(kind, positive="a cat", cfg=scale)
    assert apart(made, plain(kind, prompt="a cat", guidance_scale=scale)) < 3e-3 and not warnings
    assert apart(drawn(kind, positive="a very blue dog", cfg=scale)[0], made) > 3e-3
    images = [encode_image(picture, "png") for picture in (one, other)]
    looked, _ = drawn(kind, positive="a cat", cfg=scale, image=images)
    wanted = plain(kind, prompt="a cat", guidance_scale=scale, image=[one, other])
    assert apart(looked, wanted) < 3e-3 < apart(looked, made)
    if kind == "distilled":
        same, warnings = drawn(kind, positive="a cat", cfg=7.0)
        assert np.array_equal(same, made) and warnings[0].startswith("cfg: 7 has no effect")
    else:
        assert apart(drawn(kind, positive="a cat", cfg=9.0)[0], made) > 3e-3


def test_a_negative_prompt_is_for_two_branches() -> None:
    pipe = engine("klein").pipe
    words = {"positive": "a cat", "negative": "blue, and many more words"}
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(prompt=words["negative"])
    wanted = plain("klein", prompt="a cat", guidance_scale=3.0, negative_prompt_embeds=embeds)
    assert apart(drawn("klein", cfg=3.0, **words)[0], wanted) < 3e-3
    assert apart(wanted, plain("klein", prompt="a cat", guidance_scale=3.0)) > 3e-3
    for kind in ("distilled", "dev"):
        with pytest.raises(RequestError, match="does not support negative"):
            check_request(SHORT | words, config_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_decoded_previewed_and_taken_back(kind: str) -> None:
    on = engine(kind)
    request = check_request(SHORT | {"positive": "a cat", "output_format": "latent"}, on.config)
    made = on.generate(request, lambda step, steps: None)
    assert made is not None and made.latent is not None
    latents = safetensors.torch.load(made.latent)["latent"]
    assert latents.shape == (1, 4 * 3, 4 * tiny_flux2.LATENT)
    scale = float(request.cfg or 0.0)
    watch: Any = type("Watch", (), {"latents": latents, "finite": []})()
    pixels = decoded(on.pipe, on.config, request, watch, 0)[0].permute(1, 2, 0).numpy()
    assert apart(pixels, plain(kind, prompt="a cat", guidance_scale=scale)) < 1e-5
    with collecting_warnings():
        half = {
            "seed": 9,
            "steps": 4,
            "positive": "a cat",
            "latent": made.latent,
            "add_noise": True,
            "output_format": "latent",
        }
        again = on.generate(check_request(SHORT | half | {"strength": 0.5}, on.config), lambda *_: None)
        whole = on.generate(check_request(SHORT | half | {"strength": 1.0}, on.config), lambda *_: None)
    assert again is not None and whole is not None
    near, far = (safetensors.torch.load(r.latent or b"")["latent"] for r in (again, whole))
    assert (near - latents).norm() < (far - latents).norm()
    noise = torch.randn(1, 16, 3, 4, generator=torch.Generator("cpu").manual_seed(3))
    given = {"latent": safetensors.torch.save({"latent": noise.flatten(2).transpose(1, 2).contiguous()})}
    assert apart(*(drawn(kind, positive="a cat", **more)[0] for more in ({}, given))) == 0


def test_previews_know_the_statistics_of_squares() -> None:
    pipe: Any = engine("klein").pipe
    vae = pipe.vae
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, size=64)
    with torch.no_grad():
        theirs = pipe._pack_latents(pipe._encode_vae_image(pixels, None))
    grid = (8, 8)
    shown = project(
        picture_latents(theirs, "packed", grid),
        fit_projection(vae, torch.device("cpu"), engine("klein").spec),
    )
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mode()[0]
    same = project(raw, fit_projection(vae, torch.device("cpu")))
    assert shown.shape == same.shape == (8, 8, 3)
    assert (shown.int() - same.int()).abs().float().mean() < 8


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_what_the_conversation_takes_of_the_tokens_is_counted(kind: str) -> None:
    """The longest prompt that is read whole, and one letter more."""
    pipe: Any = engine(kind).pipe
    if kind == "klein":
        said, settings = [{"role": "user", "content": ""}], {"add_generation_prompt": True}
        text = pipe.tokenizer.apply_chat_template(said, tokenize=False, enable_thinking=False, **settings)
    else:
        text = f"<s>[SYSTEM_PROMPT]{pipe.system_message}[/SYSTEM_PROMPT][INST][/INST]"
    room = 512 - len(pipe.tokenizer(text).input_ids)
    assert not drawn(kind, positive="a" * room)[1]
    _, warnings = drawn(kind, positive="a" * room + "b")
    assert warnings == [f"positive: tokenizer reads {room} of {room + 1} tokens; not read: 'b'"]


@pytest.mark.parametrize("kind", ["distilled", "dev"])
def test_one_branch_is_not_split(kind: str) -> None:
    with pytest.raises(UsageError, match=r"--use_cfg_parallel: .* only one guidance branch"):
        check_config(config_of(kind, use_cfg_parallel=True), BACKENDS["xdit"], 2)
    with pytest.raises(ValueError, match="only one guidance branch"):
        check_model(engine(kind).pipe, Degrees(cfg=2))
    check_config(config_of("klein", use_cfg_parallel=True), BACKENDS["xdit"], 2)
    assert check_model(engine("klein").pipe, Degrees(cfg=2)).branches == 2


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(config_of("dev").checkpoint, tmp_path / "dev")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(LoadError, match="tokenizer has no template of a conversation"):
        load(config_of("dev", checkpoint=str(folder)))


def test_a_mask_is_for_klein_and_for_pictures_that_keep_their_size() -> None:
    """diffusers' pipeline would make larger ones smaller, without a word."""
    image = encode_image(tiny.picture(), "png")
    given = {"seed": 1, "image": image, "mask": image, "width": 1088, "height": 1024}
    for kind in ("klein", "distilled"):
        with pytest.raises(RequestError, match="at most 1024 x 1024 pixels for type flux2; got 1088 x 1024"):
            check_request(given, config_of(kind))
        check_request(given | {"width": 1024}, config_of(kind))
    with pytest.raises(RequestError, match="does not support mask"):
        check_request(given, config_of("dev"))


@pytest.mark.parametrize(("size", "words"), [((32, 64), "Image too small"), ((64, 640), "Aspect ratio")])
def test_pictures_that_the_model_does_not_look_at_are_refused(size: tuple[int, int], words: str) -> None:
    image = encode_image(tiny.picture().resize(size), "png")
    with pytest.raises(RequestError, match=words) as caught:
        drawn("klein", positive="a cat", image=image)
    assert caught.value.status == 422
