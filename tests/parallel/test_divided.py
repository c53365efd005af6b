"""shared.parallel.divided: products over attention's answer and an activation, in two where compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shared.models import Beside
from shared.parallel.divided import DividedProducts
from shared.parallel.surgery import Surgery
from shared.pipeline.eight_bits import quantize_layer

HEADS, CHANNELS, FEATURES = 2, 32, 128


class Block(nn.Module):
    """A block with the feed-forward layer beside attention; `note` gets attention's answer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act = nn.Linear(CHANNELS, FEATURES), nn.GELU()
        self.out = nn.Linear(CHANNELS + FEATURES, CHANNELS)
        self.note: Any = lambda answer: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beside = self.act(self.up(x))
        answer = x.sin().unflatten(-1, (HEADS, -1)).transpose(1, 2)
        self.note(answer)
        return self.out(torch.cat([answer.transpose(1, 2).flatten(2), beside], 2))


def products(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What the compiled block answers, and how many matrix products are in its graph."""
    torch._dynamo.reset()
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        products = (torch.addmm, torch.nn.functional.linear, torch._C._nn.linear)
        count += sum(node.target in products for node in graph.graph.nodes)
        return graph.forward

    answer = torch.compile(block, backend=backend, fullgraph=True)(x)
    return answer, count


@pytest.mark.parametrize("kind", [None, "float8", "int8", "lora"])
def test_a_product_is_divided_where_it_is_compiled(kind: str | None) -> None:
    block, x = Block().eval(), torch.randn(1, 40, CHANNELS)
    if kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=4, target_modules=["out"], init_lora_weights=False), block)
    elif kind is not None:
        quantize_layer(block.out, kind)
    with torch.no_grad(), Surgery() as surgery:
        plain = block(x)
        _, before = products(block, x)
        divided = DividedProducts()
        assert divided.divide(block, Beside("", "act", "out"), surgery)
        block.note = divided.attended
        assert torch.equal(block(x), plain)  # nothing to gain where it is called
        made, after = products(block, x)
        assert after == before + 1
        # Eight bits have a scale for each row of each factor.
        least = {None: 1e-6, "lora": 1e-6, "float8": 0.05, "int8": 0.02}[kind]
        assert (made - plain).norm() / plain.norm() < least
        assert divided._attended is None and divided._activated is None


def test_other_layers_stay_whole() -> None:
    class Other(nn.Linear):
        pass

    block = Block()
    block.out.__class__ = Other
    with Surgery() as surgery:
        assert not DividedProducts().divide(block, Beside("", "act", "out"), surgery)
        assert not len(surgery)
