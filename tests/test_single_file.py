"""Single-file checkpoints: equal to the folder they were made from; the shipped configurations are true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.loading import LoadError
from shared.models import MODELS
from shared.single_file import CONFIGS, clip_tokenizer
from tests import tiny, tiny_extras, tiny_original

# Parameters of the published models.
PARAMETERS = {
    "sd1": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd2": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    "sd3": {"transformer": 2_028_328_000, "text_encoder_3": 4_762_310_656, "vae": 83_819_683},
    "flux": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "vae": 83_819_683},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_equals_the_folder(name: str) -> None:
    pipe = tiny.host(name, checkpoint=str(tiny_original.single_file(name)))
    assert type(pipe).__name__ == MODELS[name].pipeline and not pipe.text_encoder.training
    assert np.abs(tiny.run(pipe, name) - tiny.run(tiny.load(name), name)).max() < 1e-5


def test_with_control_net_and_motion() -> None:
    file = str(tiny_original.single_file("sd1"))
    control = tiny.host("sd1", checkpoint=file, control_net={str(tiny_extras.control_net("sd1")): 1.0})
    assert type(control).__name__ == "StableDiffusionControlNetPipeline"
    motion = {"motion_adapter": str(tiny_extras.motion_adapter())}
    from_file = tiny.host("ad", checkpoint=file, **motion)
    from_folder = tiny.host("ad", checkpoint=str(tiny.checkpoint("sd1")), **motion)
    assert np.abs(tiny.run(from_file, "ad") - tiny.run(from_folder, "ad")).max() < 1e-5


def test_sd3_without_t5(tmp_path: Path) -> None:
    file = tiny_original.single_file("sd3")
    tensors = {key: t for key, t in load_file(file).items() if "t5xxl" not in key}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copytree(file.with_suffix(""), tmp_path / "model")
    pipe = tiny.host("sd3", checkpoint=str(tmp_path / "model.safetensors"))
    assert pipe.text_encoder_3 is None and np.isfinite(tiny.run(pipe, "sd3")).all()


@pytest.mark.parametrize(
    ("drop", "says"),
    [("cond_stage_model", "does not load as type sd1"), ("output_blocks.0.0", "lacks|does not load")],
)
def test_incomplete(tmp_path: Path, drop: str, says: str) -> None:
    file = tiny_original.single_file("sd1")
    save_file({k: t for k, t in load_file(file).items() if drop not in k}, tmp_path / "model.safetensors")
    shutil.copytree(file.with_suffix(""), tmp_path / "model")
    with pytest.raises(LoadError, match=says) as caught:
        tiny.host("sd1", checkpoint=str(tmp_path / "model.safetensors"))
    assert len(str(caught.value).splitlines()) == 1


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(LoadError, match="cannot be read"):
        tiny.host("sd1", checkpoint=str(tmp_path / "a.safetensors"))
    with pytest.raises(LoadError, match="a diffusers folder only"):
        tiny.host("sdup", checkpoint=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configurations(name: str) -> None:
    import diffusers
    import transformers

    folder = CONFIGS / name
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == MODELS[name].pipeline
    for part, count in PARAMETERS[name].items():
        library, class_name = index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        with torch.device("meta"):
            if library == "diffusers":
                model = cls.from_config(cls.load_config(str(folder / part)))
            else:
                model = cls(cls.config_class.from_pretrained(folder / part))
        assert sum(p.numel() for p in model.parameters()) == count, part
    getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")


def test_clip_tokenizer() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = clip_tokenizer("!")("a cat", padding="max_length")["input_ids"]
    assert padded[:5] == [49406, 320, 2368, 49407, 0] and len(padded) == 77
