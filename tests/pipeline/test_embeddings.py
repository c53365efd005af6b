"""Textual inversion: words of --embeddings_dir in prompts, equal to diffusers' own loading."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from shared.api.media import encode_image
from shared.api.parsing import check_request
from shared.api.warned import collecting_warnings
from shared.launch.backend import Needs
from shared.launch.errors import LoadError
from shared.models import MODELS
from shared.pipeline.embeddings import embeddings_of, load_embeddings
from shared.pipeline.engine import PipelineEngine
from shared.pipeline.loading import load_on_rank
from shared.ranks.groups import World, make_groups
from tests import tiny, tiny_extras
from tests.pool import RankPool
from tests.seldom import seldom
from tests.test_matrix import body as matrix_body

TYPES = [name for name, spec in MODELS.items() if "embeddings_dir" not in spec.refuses]
WIDTHS = {"sdxl": [32, 64]}
NAME = "Bad hands-5"


def drawn(widths: list[int], vectors: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = ["emb_params"] if len(widths) == 1 else ["clip_l", "clip_g"]
    return {key: torch.randn(vectors, w, generator=generator) for key, w in zip(keys, widths, strict=True)}


def folder_of(path: Path, name: str, **files: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    given = files or {NAME: drawn(WIDTHS.get(name, [32]))}
    for word, tensors in given.items():
        safetensors.torch.save_file(tensors, path / f"{word}.safetensors")
    return path


def theirs(name: str, tensors: dict[str, torch.Tensor], token: str = "<bad>") -> Any:
    """A pipeline into which diffusers has loaded an embedding."""
    pipe = tiny.from_files(name)
    for tensor, tokenizer, encoder in zip(
        tensors.values(), MODELS[name].tokenizers, MODELS[name].text_encoders, strict=True
    ):
        parts = {"tokenizer": getattr(pipe, tokenizer), "text_encoder": getattr(pipe, encoder)}
        pipe.load_textual_inversion({token: tensor}, **parts)
    return pipe


def latents(pipe: Any, config: Any, told: Any = None, **fields: Any) -> torch.Tensor:
    body = matrix_body(config.type, {}) | {"steps": 2, "seed": 5, "output_format": "latent"} | fields
    with collecting_warnings() as warned:
        reply = PipelineEngine(pipe, config, tiny.world()).generate(
            check_request(body, config), lambda step, steps: None
        )
    if told is not None:
        told += warned
    assert reply is not None and reply.latent is not None
    return safetensors.torch.load(reply.latent)["latent"]


PROMPTS: list[dict[str, str]] = [
    {"positive": "a {} cat", "negative": "({}, blur"},
    {"positive": "word " * 17 + "{} and a dog, {}", "negative": "{}"},
    {"positive": "a ({}:1.4) cat BREAK {}", "negative": "[{}]", "prompt_syntax": "a1111"},
]


@pytest.mark.parametrize("name", seldom(TYPES, ("sd1", "sdxl", "flux")))
def test_words_are_what_diffusers_makes_of_them(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "embeddings", name)
    tensors = drawn(WIDTHS.get(name, [32]))
    config = tiny.config(name, width=64, height=64)
    ours, own, plain = tiny.load(name), theirs(name, tensors), tiny.load(name)
    load_embeddings(ours, MODELS[name], (str(folder),))
    for prompts in PROMPTS if name in ("sd1", "sdxl") else PROMPTS[:1]:

        def said(word: str, prompts: dict[str, str] = prompts) -> dict[str, str]:
            return {key: text.replace("{}", word) for key, text in prompts.items()}

        made = latents(ours, config, **said("bad  HANDS-5"))
        assert torch.equal(made, latents(own, config, **said("<bad>")))
        assert not torch.equal(made, latents(plain, config, **said("bad  HANDS-5")))
        other = said("bad hands-51")
        assert torch.equal(latents(ours, config, **other), latents(plain, config, **other))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_compel_reads_them(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import compel

    tensors = drawn(WIDTHS.get(name, [32]), vectors=1)
    folder = folder_of(tmp_path / "embeddings", name, bad=tensors)
    config = tiny.config(name, width=64, height=64, compel=True)
    ours, own = tiny.load(name), theirs(name, tensors, "veryodd")
    load_embeddings(ours, MODELS[name], (str(folder),))
    made = latents(ours, config, positive="a (Bad)1.4 cat, bad++ dog", negative='("bad", "cat").blend(1, 1)')
    wrapped = getattr(compel, MODELS[name].compel_class or "")
    with monkeypatch.context() as patch:
        patch.setattr(
            *(compel, wrapped.__name__),
            lambda pipe, device: wrapped(pipe, compel.DiffusersTextualInversionManager(pipe), device=device),
        )
        wanted = latents(
            *(own, config),
            positive="a (veryodd)1.4 cat, veryodd++ dog",
            negative='("veryodd", "cat").blend(1, 1)',
        )
    assert torch.equal(made, wanted)


def test_pooled_embeddings_are_those_of_the_end(tmp_path: Path) -> None:
    """SDXL's second encoder says that its last token is 2: transformers then looks for the highest token."""
    folder = folder_of(tmp_path / "embeddings", "sdxl")
    config = tiny.config("sdxl", width=64, height=64)
    made = []
    for eos in (tiny.EOS_ID, 2):
        pipe = tiny.load("sdxl")
        for module in pipe.text_encoder_2.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = eos
        pipe.text_encoder_2.config.eos_token_id = eos
        load_embeddings(pipe, MODELS["sdxl"], (str(folder),))
        made.append(latents(pipe, config, positive=f"a {NAME} cat"))
    assert torch.equal(*made)


@pytest.mark.parametrize("start", [{}, {"image": encode_image(tiny.picture(64, 3), "png"), "strength": 1.0}])
def test_an_embedding_stays_in_one_chunk(tmp_path: Path, start: dict[str, Any]) -> None:
    pipe = tiny.load("sd1")
    load_embeddings(pipe, MODELS["sd1"], (str(folder_of(tmp_path / "e", "sd1", odd=drawn([32], 10))),))
    config = tiny.config("sd1", width=64, height=64)
    long = {"negative": "blur", "prompt_syntax": "a1111"} | start
    broken = latents(pipe, config, positive="w " * 70 + "odd cat", **long)
    assert torch.equal(broken, latents(pipe, config, positive="w " * 70 + "BREAK odd cat", **long))


def test_so_it_does_where_the_refiner_reads_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", "sdxl", odd=drawn([32, 64], 10))
    flags = {
        "refiner": str(tiny_extras.refiner()),
        "embeddings_dir": (str(folder),),
        "width": 64,
        "height": 64,
    }
    pipe, config = tiny.host("sdxl", **flags), tiny.config("sdxl", **flags)
    long = {"negative": "blur", "prompt_syntax": "a1111", "steps": 4, "refiner_start": 0.5}
    broken = latents(pipe, config, positive="w " * 70 + "odd cat", **long)
    assert torch.equal(broken, latents(pipe, config, positive="w " * 70 + "BREAK odd cat", **long))


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class Code:
    def __reduce__(self) -> Any:
        return (print, ("code in an embedding was run",))


def test_files_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = drawn([32])["emb_params"]
    safe = safetensors.torch.save
    files = {
        "emb.safetensors": safe({"emb_params": vectors}),
        "diffusers.safetensors": safe({"<cat-toy>": vectors[0]}),
        "a1111.pt": saved(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(vectors)},
             "name": "x", "step": 700, "sd_checkpoint": "7460a6fa", "sd_checkpoint_name": "model"}
        ),
        "concept.bin": saved({"<cat-toy>": vectors}),
        "below/inner.safetensors": safe({"emb_params": vectors.half()}),
        "emb.pt": b"not read: its word has a safetensors file",
        "notes.txt": b"no embedding",
        "wide.safetensors": safe(drawn([48])),
        "two.safetensors": safe(drawn([32, 64])),
        "words.safetensors": safe({"a": vectors, "b": vectors.clone()}),
        "nan.safetensors": safe({"a": vectors * float("nan")}),
        "many.safetensors": safe(drawn([32], 76)),
        "code.pt": saved({"string_to_param": {"*": vectors}, "name": Code()}),
        "raw.pt": pickle.dumps(Code()),
        "tensor.pt": saved(vectors),
        "broken.safetensors": b"broken",
    }  # fmt: skip
    (tmp_path / "below").mkdir()
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    pipe = tiny.load("sd1")
    load_embeddings(pipe, MODELS["sd1"], (str(tmp_path),))
    found = {one["name"]: one for one in (e.told() for e in embeddings_of(pipe).found)}
    used = {name for name, one in found.items() if "left_out" not in one}
    assert used == {"emb", "diffusers", "a1111", "concept", "inner"}
    assert found["a1111"] == {
        "name": "a1111", "vectors": 2, "shape": 32, "step": 700, "sd_checkpoint": "7460a6fa",
        "sd_checkpoint_name": "model",
    }  # fmt: skip
    assert found["diffusers"]["vectors"] == 1
    for name, says in {
        "wide": "it is 48 wide, this model's text encoders are 32",
        "two": "it is 32 and 64 wide, this model's text encoders are 32",
        "words": "must hold one tensor, or clip_l and clip_g; got 2",
        "nan": "finite",
        "many": r"1 to 75 vectors, as many for each encoder; got [76, 32]",
        "code": "cannot be read",
        "raw": "cannot be read",
        "tensor": "must hold named tensors, got a Tensor",
        "broken": "cannot be read",
    }.items():
        assert says in found[name]["left_out"], name
    assert "code in an embedding" not in capsys.readouterr().out
    config = tiny.config("sd1", width=64, height=64)
    made = {word: latents(pipe, config, positive=f"a {word} cat") for word in ("emb", "a1111", "concept")}
    assert torch.equal(made["emb"], made["a1111"]) and torch.equal(made["emb"], made["concept"])
    told: list[str] = []
    plain = latents(tiny.load("sd1"), config, positive="a wide cat")
    assert torch.equal(latents(pipe, config, told, positive="a wide cat"), plain)
    assert told == ["embedding 'wide' is left out, its word is plain text: " + found["wide"]["left_out"]]


def test_names_with_marks_are_words(tmp_path: Path) -> None:
    pipe = tiny.load("sd1")
    load_embeddings(
        pipe, MODELS["sd1"], (str(folder_of(tmp_path / "e", "sd1", **{"odd (v2)": drawn([32])})),)
    )
    one = embeddings_of(pipe)
    for text in ("an odd (v2) cat", r"an ODD \(v2\) cat"):
        request = check_request({"positive": text}, tiny.config("sd1"))
        assert one.of(request).positive == f"an {one.found[0].text} cat"


def loaded_apart(folder: str) -> str:
    """On each rank: what is said where they have different files of one name."""
    rank = dist.get_rank()
    mine = folder_of(Path(folder) / str(rank), "sd1", word=drawn([32], seed=rank))
    config = tiny.config("sd1", embeddings_dir=(str(mine),))
    world = World(rank, 2, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    with pytest.raises(LoadError) as caught:
        load_on_rank(config, world, Needs())
    return str(caught.value)


def test_ranks_must_load_the_same(pool: RankPool, tmp_path: Path) -> None:
    tiny.checkpoint("sd1")
    assert (
        pool.run(loaded_apart, 2, str(tmp_path))
        == ["--embeddings_dir: the ranks found different files in their folders"] * 2
    )
