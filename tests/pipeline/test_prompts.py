"""Prompts: compel, embeddings and clip_skip."""

from __future__ import annotations

import contextlib
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.parallel.graphs import Captured, Graphs, signature
from shared.pipeline.arguments import call_arguments
from shared.pipeline.prompts import KEPT_PROMPTS, EncodedPrompts, PromptError, prompt_arguments
from tests import tiny
from tests.seldom import seldom

COMPEL = [name for name, spec in MODELS.items() if spec.compel_class]
EMBEDS = [name for name, spec in MODELS.items() if "positive_embeds" in spec.fields]
TEXT = "a small red cat"


@cache
def pipe_of(name: str) -> Any:
    return tiny.load(name)


def made(name: str, changes: dict[str, Any] | None = None, **arguments: Any) -> np.ndarray:
    """A picture for prompt_arguments(**arguments); tiny.run's own prompt is taken away."""
    prompt = {"prompt": None} | prompt_arguments(pipe_of(name), MODELS[name], **arguments)
    return tiny.run(pipe_of(name), name, **prompt, **(changes or {}))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", seldom(COMPEL, ("sd1", "sdxl", "flux")))
def test_compel(name: str) -> None:
    # Flux: its T5 embeddings are compel's full length, and its negative prompt needs true guidance.
    flux = name in ("flux", "kontext")
    extra = {"max_sequence_length": 512, "true_cfg_scale": 2.0} if flux else {}
    negative = "blue" if flux else None
    plain = made(name, extra, positive=TEXT, negative=negative)
    assert apart(made(name, extra, positive=TEXT, negative=negative, compel=True), plain) < 2e-3
    weighted = made(name, extra, positive="a small (red)1.8 cat", negative=negative, compel=True)
    assert apart(weighted, plain) > 1e-3


@pytest.mark.parametrize("name", seldom([n for n in COMPEL if n != "flux"], ("sd1", "sdxl")))
def test_compel_reads_past_77_tokens(name: str) -> None:
    start = "word " * 20
    one, other = (
        made(name, positive=start + end, negative="short", compel=True) for end in ("cat", "dog on a hill")
    )
    assert apart(one, other) > 1e-4
    cut, same = [made(name, positive=start + end, negative="short") for end in ("cat", "dog on a hill")]
    assert np.array_equal(cut, same), "without compel the end is cut off"
    arguments = prompt_arguments(pipe_of(name), MODELS[name], start, "short", compel=True)
    assert arguments["prompt_embeds"].shape == arguments["negative_prompt_embeds"].shape


def pictured(name: str, positive: str, negative: str | None, notation: str | None = None) -> np.ndarray:
    pipe = pipe_of(name)
    with EncodedPrompts().of(pipe, None, MODELS[name], notation, negative), collecting_warnings() as told:
        picture = made(name, positive=positive, negative=negative)
    pictured.told = told  # type: ignore[attr-defined]
    return picture


def test_a1111s_notation_is_not_compels() -> None:
    config = HostConfig(backend="asyncdiff", type="sd1", checkpoint="/m/x", compel=True)
    for notation, argument in ((None, "prompt_embeds"), ("a1111", "prompt")):
        request = check_request({"positive": "a (red:1.3) cat", "prompt_syntax": notation}, config)
        assert argument in call_arguments(pipe_of("sd1"), config, request, torch.device("cpu"))


CHUNKED = [name for name, spec in MODELS.items() if spec.prompt_chunks]


@pytest.mark.parametrize("name", seldom(CHUNKED, ("sd1", "sdxl")))
def test_prompts_of_any_length_and_weight(name: str) -> None:
    assert np.array_equal(pictured(name, TEXT, "blue"), made(name, positive=TEXT, negative="blue"))
    assert np.array_equal(pictured(name, TEXT, "blue", "a1111"), made(name, positive=TEXT, negative="blue"))
    start = "word " * 40
    one, other = (pictured(name, start + end, "short") for end in ("cat", "dog on a hill"))
    assert apart(one, other) > 1e-5 and not pictured.told  # type: ignore[attr-defined]
    assert (
        apart(pictured(name, "short", start + "cat"), pictured(name, "short", start + "dog on a hill")) > 1e-5
    )
    plain = pictured(name, "a red cat", None, "a1111")
    weighted = pictured(name, "a (red:1.21) cat", None, "a1111")
    assert apart(weighted, plain) > 1e-5
    assert apart(weighted, pictured(name, "a ((red)) cat", None, "a1111")) < 1e-4
    assert apart(pictured(name, "a red BREAK cat", None, "a1111"), plain) > 1e-5


ENCODED = [n for n, s in MODELS.items() if s.text_encoders and not s.prompt_chunks]


@pytest.mark.parametrize("name", seldom(ENCODED, set(ENCODED) - {"hv15", "kontext", "qwenedit", "wani2v"}))
def test_what_the_encoders_cut_or_leave_out_is_told(name: str) -> None:
    assert np.array_equal(pictured(name, TEXT, None), made(name, positive=TEXT))
    assert not pictured.told  # type: ignore[attr-defined]
    if MODELS[name].whole_prompts:
        pictured(name, "word " * 400, None)
        assert not pictured.told  # type: ignore[attr-defined]
        most = f"must have at most {MODELS[name].most_tokens} tokens"
        with pytest.raises(ValueError, match=f"positive: {most}"):
            pictured(name, "word " * 550, None)
    else:
        pictured(name, "word " * 400 + "zebra", None)
        told = " ".join(pictured.told)  # type: ignore[attr-defined]
        assert "zebra" in told or "not read" in told
    assert np.array_equal(pictured(name, "a (red:1.3) cat", None, "a1111"), made(name, positive="a red cat"))
    assert "carry no weights" in pictured.told[0]  # type: ignore[attr-defined]


def test_what_is_cut_is_what_the_model_reads_not_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_of("hy").tokenizer_2, "model_max_length", 512)
    pictured("hy", "word " * 70, None)
    told = " ".join(pictured.told)  # type: ignore[attr-defined]
    assert "tokenizer reads 77 of" in told and "tokenizer_2 reads 256 of" in told


def test_what_a_template_takes_of_the_tokens_is_counted() -> None:
    """The longest prompt that is read whole, and one letter more."""
    empty = [{"role": "user", "content": ""}]
    chat = pipe_of("zimage").tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True)
    room = 1024 - len(pipe_of("zimage").tokenizer(chat).input_ids)
    pictured("zimage", "a" * room, None)
    assert not pictured.told  # type: ignore[attr-defined]
    pictured("zimage", "a" * room + "b", None)
    assert f"tokenizer reads {room} of {room + 1} tokens" in pictured.told[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "prompt", ["( )", "(" * 2000, "a cat.swap(dog) " * 1200, "a" + "+" * 3000, "word " * 3000]
)
def test_compel_is_bounded(prompt: str) -> None:
    began = time.monotonic()
    with contextlib.suppress(PromptError):
        prompt_arguments(pipe_of("sd1"), MODELS["sd1"], prompt, compel=True)
    assert time.monotonic() - began < 10


def encoded(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The pipeline's own embeddings of TEXT and of the empty prompt."""
    pipe, spec = pipe_of(name), MODELS[name]
    others = {f"prompt_{i + 1}": None for i in range(1, len(spec.tokenizers))}
    short = {"max_sequence_length": 32} if name in ("sd3", "flux", "kontext") else {}
    sides = []
    with torch.no_grad():
        for prompt in (TEXT, ""):
            base: dict[str, Any] = {"prompt": prompt, "device": torch.device("cpu"), **others, **short}
            if name in ("flux", "kontext"):
                found, pooled, _ = pipe.encode_prompt(**base)
            else:
                count = "num_videos_per_prompt" if name == "svd" else "num_images_per_prompt"
                result = pipe.encode_prompt(**base, **{count: 1}, do_classifier_free_guidance=False)
                found, pooled = result[0], result[2] if spec.pooled_embeds else None
            sides.append({"embeds": found} | ({"pooled": pooled} if pooled is not None else {}))
    return sides[0], sides[1]


@pytest.mark.parametrize("name", seldom(EMBEDS, set(EMBEDS) - {"ad", "chroma", "kontext", "sd2", "sdup"}))
def test_embeddings_instead_of_prompts(name: str) -> None:
    spec = MODELS[name]
    positive, negative = encoded(name)
    extra = {"true_cfg_scale": 2.0} if name in ("flux", "kontext") else {}
    from_text = made(name, extra, positive=TEXT, negative="")
    from_embeds = made(name, extra, positive_embeds=positive, negative_embeds=negative)
    if not spec.embeds_mask:  # with a mask, padding is attended to: embeddings come without padding
        assert apart(from_embeds, from_text) < 1e-4
    assert apart(made(name, extra, positive_embeds=negative, negative_embeds=negative), from_embeds) > 1e-4
    mixed = made(name, extra, positive_embeds=positive, negative="")
    assert apart(mixed, from_embeds) < 1e-3 or spec.embeds_mask


@pytest.mark.parametrize(
    ("name", "embeds", "says"),
    [
        ("sdxl", {"embeds": torch.zeros(1, 77, 96)}, "type sdxl needs 'pooled' too"),
        (
            "sd1",
            {"embeds": torch.zeros(1, 77, 32), "pooled": torch.zeros(1, 32)},
            "type sd1 takes no 'pooled'",
        ),
        ("sd1", {"embeds": torch.zeros(1, 77, 48)}, "must be 32 wide for this checkpoint, got 48"),
        ("sd1", {"embeds": torch.zeros(77, 32)}, r"must be \[1, tokens, width\], got \[77, 32\]"),
    ],
)
def test_embeddings_refused(name: str, embeds: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        prompt_arguments(pipe_of(name), MODELS[name], positive_embeds=embeds)


@pytest.mark.parametrize("name", [n for n, s in MODELS.items() if "clip_skip" in s.fields])
def test_clip_skip(name: str) -> None:
    plain = made(name, positive=TEXT)
    assert np.array_equal(made(name, positive=TEXT, clip_skip=0), plain)
    assert apart(made(name, positive=TEXT, clip_skip=1), plain) > 1e-4


def test_clip_skip_refused() -> None:
    with pytest.raises(PromptError, match="must be at most 1, because the text encoder has 2 layers; got 2"):
        prompt_arguments(pipe_of("sd1"), MODELS["sd1"], TEXT, clip_skip=2)
    with pytest.raises(PromptError, match="clip_skip: compel"):
        prompt_arguments(pipe_of("sd1"), MODELS["sd1"], TEXT, clip_skip=1, compel=True)


def test_types_without_prompts() -> None:
    assert prompt_arguments(pipe_of("svd"), MODELS["svd"]) == {}


@pytest.mark.alone
@pytest.mark.parametrize(
    "prompt", ["((((((((a cat))))))))", "((((((a", "((((masterpiece)))), ((((best quality))))"]
)
def test_compel_parses_brackets_in_time(prompt: str) -> None:
    prompt_arguments(pipe_of("sd1"), MODELS["sd1"], "(imports)", compel=True)
    began = time.monotonic()
    assert "prompt_embeds" in prompt_arguments(pipe_of("sd1"), MODELS["sd1"], prompt, compel=True)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("prompt", ['("a", "b").and(1,2,3)', "(" * 300 + "a" + ")" * 300])
def test_what_compel_cannot_parse_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="compel"):
        prompt_arguments(pipe_of("sd1"), MODELS["sd1"], prompt, compel=True)


class Encoder:
    """A pipeline that counts what it is asked to encode."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def encode_prompt(self, prompt: Any, negative: str | None = None) -> int:
        self.asked.append(prompt)
        return len(self.asked)


def test_what_an_encoded_prompt_depends_on() -> None:
    pipe: Any = Encoder()
    prompts = EncodedPrompts()

    def ask(*args: Any, state: Any = None, **kwargs: Any) -> int:
        with prompts.of(pipe, state):
            return pipe.encode_prompt(*args, **kwargs)

    assert ask("cat") == ask("cat") == 1
    assert ask("cat", negative="dog") == 2 and ask("cat", "dog") == 3
    assert ask("cat", state=(("style", 0.5),)) == 4 and ask("cat") == 1
    for given in (torch.zeros(1), ["cat"]):  # the first may change under its name, the second is no key
        count = len(pipe.asked)
        assert ask(given) == count + 1 and ask(given) == count + 2
    for number in range(KEPT_PROMPTS):
        ask(f"cat {number}")
    assert ask("cat") == len(pipe.asked) and pipe.asked[-1] == "cat", "the oldest are forgotten"
    prompts.forget()
    assert ask("cat") == len(pipe.asked) == 9 + KEPT_PROMPTS + 1
    assert "encode_prompt" not in pipe.__dict__
    no_encoder: Any = object()
    with prompts.of(no_encoder, None, MODELS["svd"]):
        pass


def test_a_prompt_that_fails_is_not_kept() -> None:
    class Failing(Encoder):
        def encode_prompt(self, prompt: Any, negative: str | None = None) -> int:
            super().encode_prompt(prompt)
            raise ValueError("no")

    pipe: Any = Failing()
    prompts = EncodedPrompts()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"), prompts.of(pipe, None):
            pipe.encode_prompt("cat")
    assert len(pipe.asked) == 2 and "encode_prompt" not in pipe.__dict__


@pytest.mark.parametrize(
    "name",
    seldom([n for n, spec in MODELS.items() if spec.text_encoders], ("sd1", "sdxl", "sd3", "flux", "wan")),
)
def test_captured_encoders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is captured, but every call goes through the graphs and comes back as it was."""
    pipe, spec, seen, run = pipe_of(name), MODELS[name], set(), Graphs.run

    def noting(graphs: Graphs, kind: str, fn: Any, **kwargs: Any) -> Any:
        seen.add(kind)
        signature(kwargs)
        answer = run(graphs, kind, fn, **kwargs)
        copied = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, answer)
        assert type(copied) is type(answer)
        return copied

    text = f'{TEXT} with a "sign"' if spec.quoted_tokenizers else TEXT
    plain = made(name, positive=text)
    monkeypatch.setattr(Graphs, "run", noting)
    assert not Captured(pipe, spec.text_encoders, enabled=False).captures
    with Captured(pipe, spec.text_encoders) as encoders:
        assert encoders.captures
        assert np.array_equal(made(name, positive=text), plain)
        assert seen == set(spec.text_encoders)
        encoders.reset()
    assert not any("forward" in getattr(pipe, encoder).__dict__ for encoder in spec.text_encoders)
