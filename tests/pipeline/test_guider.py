"""Types whose guidance is a component of the pipeline, and whose encoders read a part of the prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.models import MODELS
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import LoadError
from shared.pipeline.long_prompts import fit
from tests import tiny


def test_the_scale_of_a_request_is_the_guiders() -> None:
    engine = PipelineEngine(tiny.load("hv15"), tiny.config("hv15", width=64, height=64), tiny.world())
    pipe = tiny.load("hv15")
    made = []
    for scale in (1.0, 3.0):
        body = {"positive": "a cat", "seed": 3, "steps": 2, "frames": 5, "cfg": scale}
        request = check_request(body | {"output_format": "latent"}, engine.config)
        reply = engine.generate(request, lambda step, steps: None)
        assert reply is not None
        made.append(load(reply.output[0])["latent"])
        pipe.register_modules(guider=pipe.guider.new(guidance_scale=scale))
        wanted = pipe(
            prompt="a cat", num_inference_steps=2, num_frames=5, height=64, width=64, output_type="latent",
            generator=torch.Generator().manual_seed(3),
        ).frames  # fmt: skip
        assert torch.equal(made[-1], wanted)
    assert float((made[0] - made[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("changes", [{"stop": 0.5}, {"_class_name": "TangentialClassifierFreeGuidance"}])
def test_another_guider_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.checkpoint("hv15"), folder)
    file = folder / "guider" / "guider_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if cls := changes.get("_class_name"):
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"guider": ["diffusers", cls]}))
    with pytest.raises(LoadError, match="its guider must be ClassifierFreeGuidance in all steps"):
        tiny.host("hv15", checkpoint=str(folder))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a" * 300, []),  # nothing in quotes
        (f'"{"a" * 100}" and "{"b" * 200}"', ["positive: tokenizer_2 reads 256 of 319 tokens"]),
        ("a" * 1010, ["positive: tokenizer reads 1000 of 1010 tokens"]),
    ],
)
def test_what_an_encoder_does_not_read_is_told(prompt: str, said: list[str]) -> None:
    with collecting_warnings() as warnings:
        fit(tiny.load("hv15"), MODELS["hv15"], {"prompt": prompt}, None)
    assert [text.partition(";")[0] for text in warnings] == said
