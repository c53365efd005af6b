"""Single files of FLUX.2, Wan and LTX-2: which form a file is, and that it makes what its folder makes."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file

from shared.backends import BACKENDS
from shared.launch.checks import check_config
from shared.launch.errors import LoadError, UsageError
from shared.launch.file_header import CONFIGS, DENOISER, config_folder, files_beside, index_of, read_header
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.pipeline.loading import load_pipeline
from shared.pipeline.unloaded import unloaded_models
from shared.ranks.groups import World, make_groups
from tests import tiny, tiny_extras, tiny_original, tiny_single
from tests.parallel.test_wan22 import latents
from tests.pipeline.test_single_file import scaled
from tests.pool import RankPool
from tests.seldom import seldom

# Folder under configs/ -> the type, the file's name, what the launch then is, and the denoiser's parameters.
PUBLISHED: dict[str, tuple[str, str, str, int]] = {
    "flux2/dev": ("flux2", "flux2-dev", "FLUX.2 dev", 32_223_281_152),
    "flux2/klein_4b": ("flux2", "flux-2-klein-4b", "FLUX.2 klein, distilled", 3_875_544_576),
    "flux2/klein_9b": ("flux2", "flux-2-klein-base-9b", "FLUX.2", 9_078_581_248),
    "wan/t2v_1_3b": ("wan", "wan2.1_t2v_1.3B_bf16", "Wan 2.1 and 2.2 text to video", 1_418_996_800),
    "wan/t2v_14b": ("wan", "wan2.1_t2v_14B_slow", "Wan 2.1 and 2.2 text to video", 14_288_491_584),
    "wan/t2v_a14b": ("wan", "Wan2_2-T2V-A14B_HIGH", "Wan 2.1 and 2.2 text to video", 14_288_491_584),
    "wan/i2v_14b": ("wani2v", "i2v", "Wan 2.1 and 2.2 picture to video", 16_394_878_784),
    "wan/i2v_a14b": ("wani2v", "i2v_HighNoise", "Wan 2.1 and 2.2 picture to video", 14_288_901_184),
    "wan/ti2v_5b": ("wan", "ti2v", "Wan 2.1 and 2.2 text to video", 4_999_787_712),
    "ltx2": ("ltx2", "ltx-2-19b-dev", "LTX-2 text to video with sound", 18_876_174_592),
}
TWO = {"wan/t2v_a14b": "Wan2_2-T2V-A14B_LOW", "wan/i2v_a14b": "i2v_LowNoise"}
"""The name of the second denoiser's file."""
RECOGNISED = {
    "flux2/klein_9b": "FLUX.2 klein base 9B",
    "wan/t2v_14b": "Wan 2.1 T2V 14B",
    "wan/t2v_a14b": "Wan 2.2 T2V A14B",
}
"""Of those with the tensors of another."""
LEFT_OUT = {"flux2": "vae and no text_encoder", "wan": "vae and no text_encoder", "ltx2": "connectors and no"}


def launch(name: str, file: Path, **flags: Any) -> HostConfig:
    index_of.cache_clear()
    return tiny.config(name, checkpoint=str(file), **flags)


def loaded(name: str, file: Path, **flags: Any) -> Any:
    config = launch(name, file, **flags)
    needs = BACKENDS[config.backend].needs(config, 1)
    return load_pipeline(config.spec, config, torch.device("cpu"), needs, quiet=True)


@functools.cache
def right(kind: str) -> np.ndarray:
    return tiny.run(tiny_single.plain(kind), tiny_single.KINDS[kind][0])


def denoisers(pipe: Any) -> dict[str, torch.Tensor]:
    """The tensors of all of a pipeline's denoisers."""
    parts = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {
        f"{name}.{key}": value
        for name, part in parts.items()
        if part
        for key, value in part.state_dict().items()
    }


def assert_same(made: Any, kind: str) -> None:
    """The pipeline has exactly the weights of diffusers' own from the folder, and draws what it draws."""
    given, wanted = denoisers(made), denoisers(tiny_single.plain(kind))
    assert given.keys() == wanted.keys()
    assert all(torch.equal(given[key], value) for key, value in wanted.items())
    assert np.abs(tiny.run(made, tiny_single.KINDS[kind][0]) - right(kind)).max() < 1e-5


@pytest.mark.parametrize("config", PUBLISHED)
def test_a_published_file_is_recognised(
    config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its header; diffusers' converter gives exactly the tensors of the shipped configuration."""
    name, stem, title, count = PUBLISHED[config]
    file = tiny_single.published(name, config, tmp_path / f"{stem}.safetensors")
    if config in TWO:
        second = tmp_path / f"{TWO[config]}.safetensors"
        second.write_bytes(b"")
        assert files_beside(file) == [tmp_path / stem, second]
    spec = launch(name, file).spec
    assert spec.title == title
    index = index_of(str(file))
    assert index.get("is_distilled", False) == ("distilled" in title)
    assert bool(index.get("transformer_2")) == (config in TWO)
    assert spec.steps == {"FLUX.2 klein, distilled": 4}.get(
        title, 40 if config in TWO else MODELS[name].steps
    )
    lacks = LEFT_OUT[name.removesuffix("i2v")]
    caplog.set_level("INFO", "host")
    with pytest.raises(LoadError, match=f"has no {lacks}.* in '{file.with_suffix('')}/"):
        loaded(name, file)
    assert f"{file.name}: recognised {RECOGNISED.get(config, '')}" in caplog.text
    settings = json.loads((CONFIGS / config / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = getattr(diffusers, settings["_class_name"]).from_config(settings)
        named = {key: torch.empty(shape) for key, shape in read_header(file).shapes.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[settings["_class_name"]]["checkpoint_mapping_fn"]
    found = {key: value.shape for key, value in convert(named, config=settings).items()}
    assert found == {key: value.shape for key, value in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert planned(launch(name, file)) == [count] * (1 + (config in TWO))


def planned(config: HostConfig) -> list[int]:
    """The parameters of each denoiser, as the memory of a launch is planned; small models lie beside it."""
    beside = Path(config.checkpoint).with_suffix("")
    for part in ("text_encoder", "vae", "image_encoder"):
        if (folder := tiny.checkpoint(config.type) / part).is_dir():
            shutil.copytree(folder, beside / part)
    found = unloaded_models(config, torch.bfloat16)
    modules = [found[name].modules[0] for name in config.spec.denoisers if name in found]
    return [sum(parameter.numel() for parameter in module.parameters()) for module in modules]


PREFIXED = list(itertools.product(tiny_single.KINDS, ("", DENOISER)))


@pytest.mark.parametrize(("kind", "prefix"), seldom(PREFIXED, [*PREFIXED[::4], *PREFIXED[3::4]]))
def test_equals_the_folder(kind: str, prefix: str, tmp_path: Path) -> None:
    file = tiny_single.single(kind, tmp_path, prefix)
    assert_same(loaded(tiny_single.KINDS[kind][0], file), kind)


@pytest.mark.parametrize("kind", seldom(["klein", "wani2v", "ltx2"], ("klein",)))
def test_in_diffusers_own_names(kind: str, tmp_path: Path) -> None:
    file = tiny_single.single(kind, tmp_path)
    tiny_single.save(tiny_single.plain(kind).transformer.state_dict(), file)
    assert_same(loaded(tiny_single.KINDS[kind][0], file), kind)


@pytest.mark.parametrize("kind", ["a14b", "a14b_i2v"])
def test_two_denoisers_in_two_files(kind: str, tmp_path: Path) -> None:
    file = tiny_single.single(kind, tmp_path, stem="wan2.2_high_noise_14B", two=True)
    name = tiny_single.KINDS[kind][0]
    assert_same(loaded(name, file), kind)
    (tmp_path / "wan2.2_low_noise_14B.safetensors").unlink()
    with pytest.raises(
        LoadError, match=r"has no transformer_2 \(the file 'wan2\.2_low_noise_14B\.safetensors'"
    ):
        loaded(name, file)


@pytest.mark.parametrize("name", ["wan", "ltx2"])
def test_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    """Only configurations, the tokenizer, and Gemma lie beside it."""
    pipe = tiny_single.plain(name)
    if name == "wan":  # its VAE is read in the shape that the published one has
        settings = {**pipe.vae.config, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
        pipe.vae = tiny.seeded(35, lambda: diffusers.AutoencoderKLWan.from_config(settings))
    file = tiny_single.save(tiny_single.whole(name, pipe), tmp_path / "a.safetensors")
    pipe.save_pretrained(tmp_path / "a")
    for weights in (tmp_path / "a").glob("*/*.safetensors"):
        if name == "wan" or weights.parent.name != "text_encoder":
            weights.unlink()
    made = loaded(name, file)
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            given = getattr(made, part).state_dict()
            assert all(torch.equal(given[key], value) for key, value in module.state_dict().items()), part
    assert np.abs(tiny.run(made, name) - tiny.run(pipe, name)).max() < 1e-5
    if name == "wan":  # both names of the embedding are one tensor, as in a folder
        assert made.text_encoder.encoder.embed_tokens.weight is made.text_encoder.shared.weight


@pytest.mark.parametrize("kind", ["wan", "klein"])
@pytest.mark.parametrize("own_names", [False, True])
def test_dtypes_are_those_of_a_folder(kind: str, own_names: bool, tmp_path: Path) -> None:
    """Wan's norms, tables and time embedding stay in fp32."""
    name, folder = tiny_single.KINDS[kind]
    file = tiny_single.single(kind, tmp_path)
    if own_names:
        tiny_single.save(tiny_single.plain(kind).transformer.state_dict(), file)
    made = loaded(name, file, variant="bf16").transformer
    cls = type(made)
    wanted = cls.from_pretrained(folder() / "transformer", torch_dtype=torch.bfloat16, local_files_only=True)
    assert {key: value.dtype for key, value in made.state_dict().items()} == {
        key: value.dtype for key, value in wanted.state_dict().items()
    }
    assert all(torch.equal(made.state_dict()[key], value) for key, value in wanted.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "spelling", "form"),
    [("klein", "weight_scale", "all"), ("wan", "scale_weight", "all1"), ("ltx2", "weight_scale", "row")],
)
def test_scaled_float8(kind: str, spelling: str, form: str, tmp_path: Path) -> None:
    """The oracle is a file with the products in it."""
    name = tiny_single.KINDS[kind][0]
    file = tiny_single.single(kind, tmp_path)
    given, products = load_file(file), load_file(file)
    for key, value in load_file(file).items():
        layer = key.removesuffix(".weight")
        if "blocks." in key and layer != key and value.ndim == 2:
            packed, scale = scaled(value, form)
            given |= {key: packed, f"{layer}.{spelling}": scale, f"{layer}.input_scale": torch.ones(1)}
            products[key] = packed.float() * scale
    given["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    made = loaded(name, tiny_single.save(given, file))
    exact = loaded(name, tiny_single.save(products, file))
    assert all(torch.equal(denoisers(made)[key], value) for key, value in denoisers(exact).items())
    difference = np.abs(tiny.run(made, name) - right(kind)).max()
    assert 0 < difference < 0.3


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        pytest.param("a14b", {"quantize_to": "int8_weight"}, marks=pytest.mark.slow),
        ("klein", {"quantize_to": "int4"}),
        pytest.param("ltx2", {"lora": True}, marks=pytest.mark.slow),
    ],
)
def test_flags_do_what_they_do_with_a_folder(kind: str, flags: dict[str, Any], tmp_path: Path) -> None:
    name, folder = tiny_single.KINDS[kind]
    if "lora" in flags:
        flags = {"lora": {str(tiny_extras.lora(name)): 1.0}}
    file = tiny_single.single(kind, tmp_path, stem="high", two=kind == "a14b")
    made = tiny.run(loaded(name, file, **flags), name)
    wanted = tiny.run(loaded(name, folder(), **flags), name)
    assert np.abs(made - wanted).max() < 1e-5 < np.abs(made - right(kind)).max()


def sharded(file: Path, folder: Path) -> tuple[float | None, dict[str, dict[str, int]]]:
    """On each rank: how far weights sharded from single files change the latents, and the bytes it keeps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), *make_groups(60, "gloo"))
    made = []
    for place in (folder, file):
        flags = {"width": 64, "height": 64, "ulysses_degree": 2, "shard_weights": place == file}
        config = launch("wan", place, **flags)
        check_config(config, BACKENDS["xdit"], size)
        engine = BACKENDS["xdit"].build_engine(config, world)
        made.append(latents(engine, "wan"))
        kept = engine.parameters
        engine.close()
    whole, parts = made
    return (None if whole is None or parts is None else float((whole - parts).abs().max())), kept


def test_two_files_are_sharded(pool: RankPool, tmp_path: Path) -> None:
    file = tiny_single.single("a14b", tmp_path, stem="high", two=True)
    ranks = pool.run(sharded, 2, file, tiny_single.KINDS["a14b"][1](), timeout=240)
    assert [far is None for far, _ in ranks] == [False, True] and ranks[0][0] < 1e-4
    for _, kept in ranks:
        for model in ("transformer", "transformer_2"):
            assert kept[model]["kept"] < 0.6 * kept[model]["whole"]


def test_gguf_beside_a_single_file(tmp_path: Path) -> None:
    """--gguf_model takes the place of the file's denoiser, also with the prefix of ComfyUI's checkpoints."""
    file = tiny_single.single("klein", tmp_path)
    packed = str(tiny_original.gguf("flux2", "prefixed"))
    made = tiny.run(loaded("flux2", file, gguf_model=packed), "flux2")
    wanted = tiny.run(tiny.host("flux2", gguf_model=str(tiny_original.gguf("flux2"))), "flux2")
    assert np.abs(made - wanted).max() < 1e-5 < np.abs(made - right("klein")).max()


def test_zimage_without_a_prefix(tmp_path: Path) -> None:
    """Its padding tokens then have names without a dot, as marks of other files have."""
    pipe = tiny.load("zimage")
    file = tiny_single.save(tiny_original.zimage(pipe.transformer), tmp_path / "a.safetensors")
    shutil.copytree(tiny.checkpoint("zimage"), tmp_path / "a")
    made = loaded("zimage", file)
    assert np.abs(tiny.run(made, "zimage") - tiny.run(pipe, "zimage")).max() < 1e-5


ONE = torch.ones(1)
WAN = {"blocks.0.self_attn.norm_q.weight": ONE}


def patches(width: int, channels: int) -> dict[str, torch.Tensor]:
    return WAN | {"patch_embedding.weight": torch.zeros(width, channels, 1, 2, 2, dtype=torch.int8)}


LAST = {"img_emb.emb_pos": ONE}
CLIP = {"img_emb.proj.0.bias": ONE}
VACE = {"vace_blocks.0.a": ONE}
HV15 = {"byt5_in.fc1.weight": ONE}
NEWER = {"audio_patchify_proj.weight": ONE, "transformer_blocks.0.attn1.to_gate_logits.weight": ONE}
KLEIN = {
    "double_stream_modulation_img.lin.weight": ONE,
    "double_blocks.0.img_attn.a": ONE,
    "img_in.weight": torch.zeros(3072, 128, dtype=torch.int8),
}
NO_CONVERTER = "diffusers converts no single files of it"
# The type, the file's name, its tensors, what is said.
REFUSED: dict[str, tuple[str, str, dict[str, torch.Tensor], str]] = {
    "picture": ("wan", "a", patches(5120, 36), r"is Wan 2\.2 I2V A14B, not of .*: --type=wani2v loads it"),
    "text": ("wani2v", "a", patches(1536, 16), r"is Wan 2\.1 T2V 1\.3B, not of .*: --type=wan loads it"),
    "second": (
        "wan",
        "a_low_b",
        patches(5120, 16),
        r"is the second .* of Wan 2\.2 T2V A14B, by the word 'low'",
    ),
    "alone": ("wani2v", "a", patches(5120, 36), "has no transformer_2 and no vae and no text_encoder"),
    "last": ("wani2v", "a", patches(5120, 36) | LAST, "FLF2V 14B.*: no type takes its last frame"),
    "clip": ("wani2v", "a", patches(5120, 36) | CLIP, "no text_encoder and no image_encoder"),
    "unknown": (
        "wan",
        "a",
        patches(64, 16),
        r"of no known form: .* \[64, 16, 1, 2, 2\] \(Wan 2\.1 T2V 1\.3B",
    ),
    "vace": ("wan", "a", WAN | VACE, r"is a Wan with inputs of its own .*: no type loads it"),
    "flux": ("flux", "a", KLEIN, r"is FLUX\.2 klein 4B, not of type flux: --type=flux2 loads it"),
    "ltx": ("ltx2", "a", NEWER, r"is LTX-2\.3 or newer, .*: " + NO_CONVERTER),
    "hv15": ("wan", "a", HV15, r"is HunyuanVideo 1\.5, .*: " + NO_CONVERTER),
    "hv15 itself": ("hv15", "a", HV15, "type hv15 loads from a diffusers folder only"),
    "vae": ("wan", "a", {"vae.encoder.conv1.weight": ONE}, "a VAE, .* --vae takes it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_says_what_a_file_is_before_weights_are_read(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("single_file", "loading"):
        monkeypatch.setattr(
            f"shared.pipeline.{module}.read_weights", lambda *_: pytest.fail("weights were read")
        )
    name, stem, tensors, says = REFUSED[what]
    file = tiny_single.save(tensors, tmp_path / f"{stem}.safetensors")
    with pytest.raises((LoadError, UsageError), match=says) as caught:
        loaded(name, file)
    assert "\n" not in str(caught.value)


def test_files_of_other_shapes_are_refused(tmp_path: Path) -> None:
    file = tiny_single.single("a14b", tmp_path, stem="high", two=True)
    other = load_file(tmp_path / "low.safetensors")
    other["patch_embedding.weight"] = other["patch_embedding.weight"].repeat(1, 2, 1, 1, 1)
    tiny_single.save(other, tmp_path / "low.safetensors")
    with pytest.raises(LoadError, match=re.escape("[64, 4, 1, 2, 2], that of 'low.safetensors', the second")):
        loaded("wan", file)


def test_the_distilled_schedule(tmp_path: Path) -> None:
    """LTX-2's distilled file takes the steps as they are given; the header is that of the other."""
    for stem, dynamic in (("ltx-2-19b-distilled", False), ("ltx-2-19b-dev", True)):
        file = tiny_single.published("ltx2", "ltx2", tmp_path / f"{stem}.safetensors")
        folder = config_folder(MODELS["ltx2"], file, "scheduler") / "scheduler"
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
        assert scheduler.config.use_dynamic_shifting == dynamic
        assert scheduler.config.shift_terminal == (0.1 if dynamic else None)
