"""The demo's videos, the rule that judges them, the split, and the motion adapter trained on them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.test_demo import DEMO

sys.path.insert(0, str(DEMO))

import train_motion
from checkpoints import CHECKPOINTS
from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from draw import COLOURS, SHAPES, Scene, scenes
from evaluate import count_right, load
from moving import FRAMES, MOTIONS, clips, draw_clip, draw_masks, held_out_clips, judge_clip
from pictures import Clips
from train_motion import PART, build_adapter, save_adapter

STAR = Scene("star", "red", "blue", motion="moving left")


def test_rule_is_right_on_drawn_videos() -> None:
    asked = [
        s
        for motion in MOTIONS
        for s in random.Random(1).sample(clips(held_out=True), 200)
        if s.motion == motion
    ][::20]
    assert {s.motion for s in asked} == set(MOTIONS)
    right, wrong = count_right(asked, [judge_clip(draw_clip(s, k)) for k, s in enumerate(asked)])
    assert right == len(asked), wrong


def test_rule_tells_the_ways_apart_and_what_is_no_motion() -> None:
    frames = draw_clip(STAR, 0)
    assert judge_clip(frames).motion == "moving left"
    assert judge_clip(frames[::-1]).motion == "moving right"
    assert judge_clip([f.transpose(Image.Transpose.ROTATE_90) for f in frames]).motion == "moving down"
    still = judge_clip(frames[:1] * FRAMES)
    assert (still.motion, still.shape, still.colour, still.background) == (None, "star", "red", "blue")
    jumping = [frames[k] for k in (0, 4, 2, 6, 1, 5, 3, 7)]
    assert judge_clip(jumping).motion is None
    assert judge_clip([*frames[:-1], Image.new("RGB", frames[0].size, COLOURS["blue"])]).motion is None
    grown = draw_clip(Scene("star", "red", "blue", motion="growing"), 0)
    assert judge_clip([*frames[:4], *grown[4:]]).motion is None


def test_one_frame_may_be_wrong_and_two_may_not() -> None:
    frames, other = draw_clip(STAR, 0), draw_clip(Scene("circle", "green", "blue", motion="moving left"), 0)
    one, two = (judge_clip([*other[:wrong], *frames[wrong:]]) for wrong in (1, 2))
    assert all(one.right(STAR).values())
    assert two.right(STAR) == {"shape": False, "colour": False, "background": True, "motion": True}


def test_held_out_motions_are_never_trained() -> None:
    trained = clips(held_out=False)
    moves = {(s.shape, s.colour, s.motion) for s in trained}
    asked = held_out_clips(300)
    assert asked == held_out_clips(300) and len({s.caption for s in asked}) == 300
    assert not moves & {(s.shape, s.colour, s.motion) for s in asked}
    assert not {(s.shape, s.colour, s.background) for s in trained} & {
        (s.shape, s.colour, s.background) for s in scenes(held_out=True)
    }
    assert {(s, m) for s, _, m in moves} == {(s, m) for s in SHAPES for m in MOTIONS}
    assert {(c, m) for _, c, m in moves} == {(c, m) for c in COLOURS for m in MOTIONS}


def test_unknown_motions_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"motion must be one of moving left, .*, shrinking, got 'turning'"):
        draw_masks("star", "turning", random.Random(0))


def test_training_videos_are_those_of_their_captions() -> None:
    drawn = Clips(torch.device("cpu"), seed=0, pixels=128, masks_each=1)
    index = torch.tensor([0, 500, 1000])
    images = ((drawn.images(index) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    frames = [Image.fromarray(one) for one in images]
    asked = [drawn.scenes[k] for k in index]
    verdicts = [judge_clip(frames[k * FRAMES : (k + 1) * FRAMES]) for k in range(3)]
    assert count_right(asked, verdicts)[0] == 3

    vae = load(CHECKPOINTS["unet"]).vae
    drawn.encode(vae, 3, 2)
    torch.manual_seed(0)
    latents, caption = drawn.draw(4)
    assert latents.shape == (4, 4, FRAMES, 16, 16)
    kept = caption > 0
    assert kept.sum() > 0 and drawn.captions[0] == ""
    assert [drawn.captions[k] for k in caption[kept]] == [drawn.scenes[k - 1].caption for k in caption[kept]]
    with torch.no_grad():
        pictures = vae.decode(latents[kept][0].transpose(0, 1) / vae.config.scaling_factor).sample
    arrays = ((pictures.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    assert all(
        judge_clip([Image.fromarray(a) for a in arrays]).right(drawn.scenes[caption[kept][0] - 1]).values()
    )


def test_an_untrained_adapter_changes_nothing_and_a_saved_one_is_the_same(tmp_path: Path) -> None:
    plain = UNet2DConditionModel.from_pretrained(CHECKPOINTS["unet"].path / "unet").float()
    adapter = build_adapter(plain)
    unet = UNetMotionModel.from_unet2d(plain, adapter)
    draw = torch.Generator().manual_seed(0)
    noisy, words = (
        torch.randn(1, 4, FRAMES, 16, 16, generator=draw),
        torch.randn(FRAMES, 77, 128, generator=draw),
    )
    with torch.no_grad():
        wanted = plain(noisy[0].transpose(0, 1), 500, words).sample.transpose(0, 1)
        assert torch.allclose(unet(noisy, 500, words).sample[0], wanted, atol=1e-4)
        for name, parameter in unet.named_parameters():
            if PART in name:
                parameter.normal_(generator=draw)

    class Pipe:
        motion_adapter = adapter

    Pipe.unet = unet  # type: ignore[attr-defined]
    save_adapter(Pipe, tmp_path)
    saved = MotionAdapter.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    kept = {name: tensor.half().float() for name, tensor in unet.state_dict().items() if PART in name}
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in kept)
    assert next(unet.parameters()).dtype == torch.float32


def test_training_changes_the_motion_modules_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_step(
        name: str, parameters: list[torch.Tensor], loss_of_batch: Callable[[], torch.Tensor]
    ) -> None:
        loss_of_batch().backward()
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter -= 1e-3 * parameter.grad.sign()

    monkeypatch.setattr(train_motion, "fit", lambda *args, device: one_step(*args))
    plain = UNet2DConditionModel.from_pretrained(CHECKPOINTS["unet"].path / "unet")
    adapter = build_adapter(plain)
    pipe = AnimateDiffPipeline.from_pretrained(
        CHECKPOINTS["unet"].path, unet=UNetMotionModel.from_unet2d(plain, adapter), motion_adapter=adapter
    )
    pipe.unet.requires_grad_(False)
    drawn = Clips(torch.device("cpu"), seed=0, pixels=32, masks_each=1)
    drawn.encode(pipe.vae, 1)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    drawn.captions = drawn.captions[:2]
    train_motion.train(pipe, drawn, 1, torch.device("cpu"), False)
    changed = {name for name, tensor in pipe.unet.state_dict().items() if not before[name].equal(tensor)}
    # At first only the layers that are zero have a gradient.
    last = {name for name in before if PART in name and "proj_out" in name}
    assert last <= changed and all(PART in name for name in changed)
