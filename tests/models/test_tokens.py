"""Token plans: what they say of the models' classes, and that a class without one is refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from shared.models import MODELS, TOKEN_PLANS, Site, TokenPlan, token_plan
from shared.parallel.surgery import Surgery
from shared.parallel.xdit.cpu import load_xfuser
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from shared.parallel.xdit.sequence import SequenceParallel, blocks_of
from tests import tiny, tiny_extras
from tests.pool import RankPool

PLANNED = [name for name, spec in MODELS.items() if spec.tokens]


def models(name: str) -> list[Any]:
    """The tiny transformer of a type, and its ControlNet if there is one."""
    spec, found = MODELS[name], [tiny.load(name).transformer]
    if spec.control_net_class:
        net = getattr(diffusers, spec.control_net_class)
        found.append(net.from_pretrained(tiny_extras.control_net(name)))
    return found


WHOLE_KEYS = (".attn2", ".audio_attn1", ".audio_attn2", ".audio_to_video_attn")
"""Attention of LTX-2 to keys that every rank has: those of the text and of the sound."""


def attention(model: nn.Module) -> list[nn.Module]:
    """The layers that diffusers runs as attention to all tokens; an embedder's sees the text alone."""
    processed: list[Any] = [
        m
        for name, m in model.named_modules()
        if ("processor" in vars(m) or "processor" in m._modules)
        and not name.startswith("context_embedder.")
        and not (type(m).__name__ == "LTX2Attention" and name.endswith(WHOLE_KEYS))
    ]
    return [m for m in processed if not vars(m).get("is_cross_attention", False)]


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_names_what_its_model_has(name: str) -> None:
    spec, every = MODELS[name], models(name)
    plans = [spec.tokens, spec.tokens and spec.tokens.control_net]
    assert [type(model).__name__ for model in every] == [plan.name for plan in plans if plan]
    for model in every:
        plan = token_plan(type(model).__name__)
        blocks = blocks_of(model, plan)
        names = plan.attention + plan.everywhere
        planned = [m for block in blocks for key, m in block.named_children() if key in names]
        assert planned and set(planned) == set(attention(model))
        for part in plan.blocks:
            for block in model.get_submodule(part).children():
                attentions = [dict(m.named_children()) for m in block.children() if m in planned]
                assert attentions and {"to_v" in found for found in attentions} == {part not in plan.fused}
        for site in (*plan.picture, *plan.text, *plan.positions):
            assert site.at in ("argument", "blocks") or isinstance(model.get_submodule(site.name), nn.Module)
        taken = {site.of for site in plan.picture}
        assert taken == (set() if plan.sections or plan.whole else {("picture",)})
        assert {s.of for s in plan.text} <= {("text",)}
        assert not plan.sections or tuple(section.blocks for section in plan.sections) == plan.blocks
        for section in plan.sections:
            assert section.end is None or isinstance(model.get_submodule(section.end), nn.Module)
        assert (plan.output is None and not plan.sections) == (model is not every[0])


def test_a_type_and_its_plan_say_the_same() -> None:
    for spec in MODELS.values():
        plan = spec.tokens
        assert (spec.denoiser == "transformer") == (plan is not None)
        assert spec.predicts_flow == spec.scheduler_family.startswith("flow")
        assert (plan and plan.control_net and plan.control_net.name) == (plan and spec.control_net_class)


def test_every_plan_is_found_by_its_class() -> None:
    assert {plan.name: plan for plan in TOKEN_PLANS.values()} == TOKEN_PLANS
    assert all(plan.name in dir(diffusers) for plan in TOKEN_PLANS.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux", {"branches": 1, "flow": True, "packed": True, "joined": ("text", "picture")}),
        ("kontext", {"name": "FluxTransformer2DModel", "branches": 1, "stages": None, "control_net": None}),
        ("flux2", {"branches": 2, "flow": True, "packed": True, "joined": ("text", "picture")}),
        ("chroma", {"branches": 2, "flow": True, "packed": True, "joined": ("text", "picture")}),
        ("qwen", {"branches": 2, "flow": True, "packed": True, "joined": ("text", "picture")}),
        ("qwenedit", {"name": "QwenImageTransformer2DModel", "uncapturable": ("zero_cond_t",)}),
        ("zimage", {"branches": 2, "flow": True, "packed": False, "joined": ("picture",)}),
        ("ltx2", {"branches": 2, "flow": True, "packed": False, "joined": ("picture",)}),
        ("wan", {"branches": 2, "flow": True, "packed": False, "joined": ("picture",)}),
        ("wani2v", {"branches": 2, "flow": True, "packed": False, "joined": ("picture",)}),
        ("hv15", {"branches": 2, "flow": True, "packed": False, "joined": ("picture", "text")}),
        ("sd3", {"branches": 2, "flow": True, "packed": False, "joined": ("picture", "text")}),
        ("hy", {"branches": 2, "flow": False, "packed": False, "joined": ("picture",)}),
        ("pixs", {"branches": 2, "flow": False, "packed": False, "joined": ("picture",)}),
    ],
)
def test_a_plan_says_how_its_model_works(name: str, expected: dict[str, Any]) -> None:
    plan: Any = MODELS[name].tokens
    assert {key: getattr(plan, key) for key in expected} == expected


def aura() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


@pytest.mark.parametrize("make", [aura])
def test_a_class_without_a_plan_is_refused_by_name_before_surgery(make: Any) -> None:
    pipe = make()
    before = repr(pipe.transformer)
    words = f"{type(pipe.transformer).__name__} has no token plan; .*FluxTransformer2DModel, Hunyuan"
    for method, degrees in ((XDiT, Degrees(ulysses=2)), (XDiTPipeFusion, Degrees(pipefusion=2))):
        with pytest.raises(ValueError, match=words):
            method(pipe, degrees)
    assert repr(pipe.transformer) == before
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_a_transformer_without_stages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.load("pixa")
    plan = TokenPlan("PixArtTransformer2DModel", "PixArt", ("transformer_blocks",), ("attn1",), ())
    monkeypatch.setitem(TOKEN_PLANS, plan.name, plan)
    with pytest.raises(ValueError, match="PipeFusion does not support PixArtTransformer2DModel"):
        XDiTPipeFusion(pipe, Degrees(pipefusion=2))


class Rope(nn.Module):
    """One factor for each token of the picture and of the text, as Qwen-Image's: two tensors."""

    def forward(self, picture: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(picture + text).float().unsqueeze(1)
        return numbers[text:].cos(), numbers[:text].cos()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_v = nn.Linear(8, 8)

    def forward(self, x: Any, text: Any, factors: Any) -> Any:
        picture_factors, text_factors = factors
        queries = torch.cat([text * text_factors, x * picture_factors], 1)
        heads = [
            y.unflatten(2, (2, 4)).transpose(1, 2) for y in (queries, self.to_v(torch.cat([text, x], 1)))
        ]
        answer = F.scaled_dot_product_attention(heads[0], heads[0], heads[1]).transpose(1, 2).flatten(2)
        return answer[:, text.shape[1] :], answer[:, : text.shape[1]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Any, text: Any, factors: Any) -> Any:
        more, more_text = self.attn(x, text, factors)
        return x + more, text + more_text


class Toy(nn.Module):
    """A transformer whose picture comes in at its first block, in five dimensions, as Wan's does."""

    def __init__(self) -> None:
        super().__init__()
        self.text_in, self.rope = nn.Linear(4, 8), Rope()
        self.x_in, self.blocks = nn.Conv3d(4, 8, 1), nn.ModuleList([Block(), Block()])
        self.first = nn.Identity()
        self.proj_out = nn.Linear(8, 4)
        self.config = {"num_attention_heads": 2, "attention_head_dim": 4}

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> Any:
        tokens = self.first(self.x_in(x).flatten(2).transpose(1, 2))
        text = self.text_in(text)
        factors = self.rope(8, 4)
        for block in self.blocks:
            tokens, text = block(tokens, text, factors)
        return self.proj_out(tokens)


TOY = TokenPlan(
    "Toy", "toy", ("blocks",), ("attn",),
    picture=(Site("first", "output"),),
    text=(Site("text_in", "input", of=("text",)),),
    positions=(Site("rope", "output", dim=0, of=("picture", "text"), each=True),),
    joined=("text", "picture"),
)  # fmt: skip


def toy(by: Any) -> float:
    """On each rank: how far the toy is from itself once its tokens are shared."""
    load_xfuser("cpu")
    TOKEN_PLANS["Toy"] = TOY
    torch.manual_seed(0)
    model, x, text = Toy(), torch.randn(1, 4, 2, 2, 2), torch.randn(1, 4, 4)
    with torch.no_grad(), Surgery() as surgery:
        plain = model(x, text)
        SequenceParallel(model, dist.distributed_c10d._get_default_group(), "SDPA", surgery, by)
        return float((model(x, text) - plain).abs().max())


@pytest.mark.parametrize("by", ["ulysses", "ring"])
def test_a_plan_is_all_that_sequence_parallelism_needs(pool: RankPool, by: str) -> None:
    assert max(pool.run(toy, 2, by)) < 1e-5
