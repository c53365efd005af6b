"""shared.parallel.joined: self-attention projects once, which changes neither the picture nor the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared.launch.flags import COMPUTED
from shared.parallel.joined import JoinedProjections, of_transformer, of_unet
from shared.pipeline import eight_bits
from shared.pipeline.sharding import parameter_bytes
from tests import tiny, tiny_extras
from tests.parallel.test_asyncdiff import pipeline, psnr
from tests.parallel.test_kept_prompt import counting
from tests.seldom import seldom


def join(pipe: Any, **options: Any) -> JoinedProjections:
    if hasattr(pipe, "unet"):
        return JoinedProjections(of_unet(pipe.unet), **options)
    return JoinedProjections(of_transformer(pipe.transformer), **options)


@pytest.mark.parametrize("name", seldom(("sd1", "sdxl", "ad"), ("sdxl",)))
def test_three_products_become_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = pipeline(name), tiny.run(pipeline(name), name)
    attentions: list[Any] = of_unet(pipe.unet)
    layers = [layer for one in attentions for layer in (one.to_q, one.to_k, one.to_v)]
    before = [layer.weight.clone() for layer in layers]
    taken, text, keys = parameter_bytes(pipe), repr(pipe.unet), list(pipe.unet.state_dict())
    calls = counting(monkeypatch)
    with join(pipe) as joined:
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


TRANSFORMERS = ("chroma", "flux", "hy", "hv15", "ltx2", "pixs", "qwen", "sd3", "wan", "zimage")


@pytest.mark.parametrize("name", seldom(TRANSFORMERS, ("sd3", "zimage")))
def test_transformers_project_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plain = tiny.load(name), tiny.run(tiny.load(name), name)
    attentions = of_transformer(pipe.transformer)
    layers = [getattr(one, part) for one in attentions for part in ("to_q", "to_k", "to_v")]
    assert layers
    calls = counting(monkeypatch)
    with join(pipe) as joined:
        assert joined.layers >= len(layers)
        assert psnr(tiny.run(pipe, name), plain) >= 80
        assert not any(calls[id(layer)] for layer in layers) and calls


@pytest.mark.parametrize("kind", COMPUTED)
def test_layers_in_8_bits_become_one_with_a_lora_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "LEAST", 1)
    pipe = tiny.host("flux", quantize_to=kind, lora={str(tiny_extras.lora("flux")): 0.9})
    plain, taken = tiny.run(pipe, "flux"), parameter_bytes(pipe)
    blocks = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
    made: list[int] = []
    inner = eight_bits.EightBitLinear.multiply

    def multiply(self: Any, input: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        made.append(len(weight))
        return inner(self, input, weight, bias)

    monkeypatch.setattr(eight_bits.EightBitLinear, "multiply", multiply)
    tiny.run(pipe, "flux", steps=1)
    alone = len(made)
    with join(pipe) as joined:
        assert joined.layers == 6 * len(blocks[0]) + 3 * len(blocks[1])
        made.clear()
        tiny.run(pipe, "flux", steps=1)
        assert len(made) == alone - joined.layers * 2 // 3
        assert psnr(tiny.run(pipe, "flux"), plain) >= 60
        assert parameter_bytes(pipe) == taken
        to_q = blocks[0][0].attn.to_q
        weight = getattr(to_q, "base_layer", to_q).weight
        whole = weight.qdata.untyped_storage()
        assert whole.nbytes() == 3 * weight.numel(), "its values are a part of one"
    assert np.array_equal(tiny.run(pipe, "flux"), plain)


def test_a_lora_comes_and_goes_between() -> None:
    pipe = tiny.load("flux")
    plain = tiny.run(pipe, "flux")
    with join(pipe) as joined:
        count = joined.layers
    pipe.load_lora_weights(tiny_extras.lora("flux"))
    changed = tiny.run(pipe, "flux")
    assert psnr(changed, plain) < 60
    with join(pipe) as joined:
        assert joined.layers == count
        assert psnr(tiny.run(pipe, "flux"), changed) >= 100
    pipe.unload_lora_weights()
    with join(pipe) as joined:
        assert joined.layers == count
        assert psnr(tiny.run(pipe, "flux"), plain) >= 100


def test_layers_that_only_keep_fewer_bits_stay_as_they_are() -> None:
    pipe = tiny.host("sd1", quantize_to="int8")
    plain = tiny.run(pipe, "sd1")
    with join(pipe) as joined:
        assert joined.layers == 0
        assert np.array_equal(tiny.run(pipe, "sd1"), plain)


class Attending(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(sizes.get(name, 8), 8, bias=name not in sizes))


def test_layers_of_other_inputs_compute_for_themselves() -> None:
    attention: Any = Attending()
    inputs = torch.randn(3, 4, 8)
    layers = [attention.to_q, attention.to_k, attention.to_v]
    plain = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    again = [layer(inputs[1]) for layer in layers]
    with JoinedProjections([attention]) as joined:
        assert joined.layers == 3
        for layer, x, wanted in zip(reversed(layers), inputs.flip(0), reversed(plain), strict=True):
            torch.testing.assert_close(layer(x), wanted)
        x = inputs[1]
        torch.testing.assert_close([layer(x) for layer in layers], again)
    with JoinedProjections([attention], apart=("to_v",)) as joined:
        assert joined.layers == 2
        torch.testing.assert_close([layer(x) for layer in layers], again)
    with JoinedProjections([Attending(to_k=6), Attending(to_k=8)]) as joined:
        assert joined.layers == 0, "of other widths, or without a bias that the others have"
