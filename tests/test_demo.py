"""The demo's pictures, the rule that judges them, the split, and what the trained checkpoint draws."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))  # the demo's scripts import each other as scripts do

from draw import COLOURS, SHAPES, SIZES, Judgement, Scene, draw, held_out_scenes, judge, scenes  # noqa: E402

CHECKPOINT = DEMO / "checkpoint"
needs_checkpoint = pytest.mark.skipif(
    not (CHECKPOINT / "model_index.json").exists(),
    reason="demo/checkpoint is not there: python demo/train.py --out demo/checkpoint makes it",
)


def test_rule_is_right_on_drawn_pictures() -> None:
    every = scenes(held_out=False) + scenes(held_out=True)
    sample = random.Random(1).sample(every, 400)
    verdicts = [judge(draw(scene, seed)) for seed, scene in enumerate(sample)]
    wrong = [s.caption for s, v in zip(sample, verdicts, strict=True) if not all(v.right(s).values())]
    assert len(wrong) <= 2, wrong  # 99.5 per cent


def test_rule_bears_the_blur_and_noise_of_a_decoder() -> None:
    noise = np.random.default_rng(0)
    sample = random.Random(2).sample(scenes(held_out=True), 60)
    wrong = 0
    for seed, scene in enumerate(sample):
        small = draw(scene, seed).resize((80, 80), Image.Resampling.BILINEAR)
        pixels = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = (pixels + noise.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        wrong += not all(judge(Image.fromarray(noisy)).right(scene).values())
    assert wrong <= 1


def test_rule_says_none_where_there_is_no_shape() -> None:
    plain = Image.new("RGB", (128, 128), COLOURS["blue"])
    assert judge(plain) == Judgement(background="blue")
    halves = Image.new("RGB", (128, 128), COLOURS["blue"])
    halves.paste(COLOURS["red"], (0, 0, 64, 128))
    assert judge(halves) == Judgement()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert judge(Image.fromarray(noise)).shape is None


def test_rule_takes_no_foreign_shape_for_one_of_its_own() -> None:
    two = Image.new("RGB", (128, 128), COLOURS["white"])
    pen = ImageDraw.Draw(two)
    pen.ellipse((10, 20, 50, 60), fill=COLOURS["red"])
    pen.ellipse((70, 60, 110, 100), fill=COLOURS["red"])
    assert judge(two).shape is None
    ring = Image.new("RGB", (128, 128), COLOURS["white"])
    ImageDraw.Draw(ring).ellipse((30, 30, 98, 98), outline=COLOURS["red"], width=8)
    seen = judge(ring)
    assert seen.shape is None and seen.colour == "red" and seen.background == "white"


def test_swapped_colours_are_wrong() -> None:
    verdict = judge(draw(Scene("circle", "red", "blue", "large"), 0))
    assert verdict == Judgement("circle", "red", "blue", "large")
    assert verdict.right(Scene("circle", "blue", "red")) == {
        "shape": True,
        "colour": False,
        "background": False,
    }
    assert verdict.right(Scene("circle", "red", "blue", "small"))["size"] is False


def test_drawing_is_deterministic_by_seed() -> None:
    scene = Scene("star", "yellow", "black")
    assert draw(scene, 3).tobytes() == draw(scene, 3).tobytes() != draw(scene, 4).tobytes()
    assert draw(scene, 3).size == (128, 128) and draw(scene, 3, pixels=64).size == (64, 64)
    assert scene.caption == "a yellow star on a black background"
    assert Scene("star", "yellow", "black", "small").caption == "a small yellow star on a black background"


def test_unknown_words_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"circle, square.*'hexagon'"):
        draw(Scene("hexagon", "red", "blue"), 0)
    with pytest.raises(ValueError, match=r"small, large.*'huge'"):
        draw(Scene("circle", "red", "blue", "huge"), 0)
    with pytest.raises(ValueError, match="got 1000"):
        held_out_scenes(1000)


def test_held_out_scenes_are_never_trained() -> None:
    trained = {(s.shape, s.colour, s.background) for s in scenes(held_out=False)}
    asked = held_out_scenes(200)
    assert len({s.caption for s in asked}) == 200
    assert asked == held_out_scenes(200)
    assert not trained & {(s.shape, s.colour, s.background) for s in asked}
    # What is held out can be put together from what is shown: each word and each pair of words is.
    assert {(s, c) for s, c, _ in trained} == {(s, c) for s in SHAPES for c in COLOURS}
    assert {(s, b) for s, _, b in trained} == {(s, b) for s in SHAPES for b in COLOURS}
    assert {(c, b) for _, c, b in trained} == {(c, b) for c in COLOURS for b in COLOURS if c != b}
    assert {s.size for s in asked} == {None, *SIZES}


def test_training_pictures_are_the_drawn_ones_and_hold_nothing_out() -> None:
    torch = pytest.importorskip("torch")
    from pictures import Pictures

    pictures = Pictures(torch.device("cpu"), seed=0, pixels=128, masks_each=2)
    assert not any(scene.held_out for scene in pictures.scenes)
    torch.manual_seed(0)
    images, index = pictures.draw(40)
    assert images.shape == (40, 3, 128, 128) and images.min() >= -1 and images.max() <= 1
    arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for array, k in zip(arrays, index.tolist(), strict=True):
        assert all(judge(Image.fromarray(array)).right(pictures.scenes[k]).values())


def test_sharpening_changes_the_decoder_alone() -> None:
    torch = pytest.importorskip("torch")
    from architecture import build_models, build_tokenizer
    from pictures import Pictures
    from train import SMALL_TIMES, train_decoder

    pictures = Pictures(torch.device("cpu"), seed=0, pixels=32, masks_each=1, small_times=SMALL_TIMES)
    _, index = pictures.draw(2000)
    small = sum(pictures.scenes[k].size == "small" for k in index.tolist()) / 2000
    assert abs(small - SMALL_TIMES / (SMALL_TIMES + 1)) < 0.05
    vae, _, _ = build_models(build_tokenizer(), 32)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    train_decoder(vae, pictures, until=time.monotonic() + 2, batch=2)
    changed = {
        name.split(".")[0] for name, value in vae.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_each_word_is_one_token_and_the_tokenizer_reloads(tmp_path: Path) -> None:
    from architecture import build_tokenizer
    from transformers import CLIPTokenizer

    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    for tokenizer in (built, CLIPTokenizer.from_pretrained(tmp_path)):
        caption = "a small red circle on a blue background"
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == 10
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption
        assert tokenizer.model_max_length == 77
        assert tokenizer.unk_token_id not in tokenizer("ein Café, 3 €").input_ids[1:-1]


@needs_checkpoint
def test_checkpoint_is_small_and_holds_no_pickle() -> None:
    files = [f for f in CHECKPOINT.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt"}


@needs_checkpoint
def test_checkpoint_obeys_held_out_prompts() -> None:
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline
    from evaluate import count_right, paint

    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = held_out_scenes(8)
    right, wrong = count_right(asked, [judge(picture) for picture in paint(pipe, asked, steps=12)])
    assert right >= 6, wrong


@pytest.fixture(scope="module")
def engine() -> Any:
    """A host's engine of the demo checkpoint, on one rank."""
    torch = pytest.importorskip("torch")
    from shared.launch.backend import Needs
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_pipeline
    from tests import tiny

    config = tiny.config("sd1", checkpoint=str(CHECKPOINT), width=128, height=128)
    pipe = load_pipeline(config.spec, config, torch.device("cpu"), Needs(), quiet=True)
    return PipelineEngine(pipe, config, tiny.world())


def painted(engine: Any, picture: Image.Image, words: str, **fields: Any) -> Image.Image:
    from shared.api.media import encode_image
    from shared.api.parsing import check_request

    body = {"positive": words, "image": encode_image(picture, "png"), "seed": 1, "steps": 20} | fields
    made = engine.generate(check_request(body, engine.config), lambda step, steps: None)
    return made.pictures[0]


@needs_checkpoint
@pytest.mark.parametrize("ground", ["white", "black"])
def test_a_red_circle_becomes_blue(engine: Any, ground: str) -> None:
    red = draw(Scene("circle", "red", ground, "large"), 3)
    made = painted(engine, red, f"a large blue circle on a {ground} background", strength=0.8)
    assert all(judge(made).right(Scene("circle", "blue", ground)).values()), judge(made)


@needs_checkpoint
def test_a_mask_changes_the_background_only(engine: Any) -> None:
    from shared.api.media import encode_image

    red = draw(Scene("circle", "red", "white", "large"), 3)
    pixels = np.asarray(red).astype(int)
    ground = np.abs(pixels - np.asarray(COLOURS["white"])).max(axis=2) < 40
    mask = encode_image(Image.fromarray(np.where(ground, 255, 0).astype(np.uint8)), "png")
    made = painted(engine, red, "a large red circle on a green background", mask=mask)
    assert judge(made) == Judgement("circle", "red", "green", "large")
    assert np.abs(np.asarray(made).astype(int) - pixels)[~ground].max() <= 1
