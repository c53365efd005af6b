"""shared.parallel.joined: self-attention projects once, which changes neither the picture nor the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from shared.parallel.joined import JoinedProjections
from shared.pipeline.sharding import parameter_bytes
from tests import tiny, tiny_extras
from tests.parallel.test_asyncdiff import pipeline, psnr
from tests.parallel.test_kept_prompt import counting
from tests.seldom import seldom


def self_attentions(pipe: Any) -> list[Any]:
    return [m for m in pipe.unet.modules() if isinstance(m, Attention) and not m.is_cross_attention]


@pytest.mark.parametrize("name", seldom(("sd1", "sdxl", "ad"), ("sdxl",)))
def test_three_products_become_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = pipeline(name), tiny.run(pipeline(name), name)
    layers = [layer for one in self_attentions(pipe) for layer in (one.to_q, one.to_k, one.to_v)]
    before = [layer.weight.clone() for layer in layers]
    taken, text, keys = parameter_bytes(pipe), repr(pipe.unet), list(pipe.unet.state_dict())
    calls = counting(monkeypatch)
    with JoinedProjections(pipe.unet) as joined:
        assert joined.layers == len(layers) > 0
        assert psnr(tiny.run(pipe, name), plain) >= 100
        assert not any(calls[id(layer)] for layer in layers) and calls
        lie = {layer.weight.untyped_storage().data_ptr() for layer in layers}
        assert len(lie) == len(layers) // 3, "there is one copy of a weight"
        assert (parameter_bytes(pipe), repr(pipe.unet)) == (taken, text)
        assert list(pipe.unet.state_dict()) == keys
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    assert np.array_equal(tiny.run(pipe, name), plain)
    assert all(calls[id(layer)] for layer in layers)


def test_layers_with_an_adapter_and_quantized_ones_stay_as_they_are() -> None:
    for flags in ({"lora": {str(tiny_extras.lora("sd1")): 0.9}}, {"quantize_to": "int8"}):
        pipe = tiny.host("sd1", **flags)
        plain = tiny.run(pipe, "sd1")
        with JoinedProjections(pipe.unet) as joined:
            assert joined.layers == 0
            assert np.array_equal(tiny.run(pipe, "sd1"), plain)
