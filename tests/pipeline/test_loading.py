"""Loading: every type, dtypes and weight variants, VAEs, and what is broken or of another type."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.launch.errors import UsageError
from shared.models import MODELS
from shared.pipeline.loading import LoadError, check_environment, compute_dtype, pick_variant
from shared.pipeline.lora_file import LoraError
from tests import tiny, tiny_extras
from tests.seldom import seldom


@cache
def plain(name: str) -> np.ndarray:
    """Of weights mapped from files, as a host's are: how sums round depends on where in memory they begin."""
    return tiny.run(tiny.from_files(name), name)


@pytest.mark.parametrize(
    "name", seldom(MODELS, set(MODELS) - {"kontext", "pixs", "qwenedit", "sd2", "wani2v"})
)
def test_equals_diffusers(name: str, recwarn: pytest.WarningsRecorder) -> None:
    pipe = tiny.host(name)
    assert type(pipe).__name__ == MODELS[name].pipeline
    assert np.array_equal(tiny.run(pipe, name), plain(name))
    assert not pipe.lora_set.loaded and getattr(pipe, "safety_checker", None) is None
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(part.training for part in modules)
    assert not any(p.requires_grad for part in modules for p in part.parameters())


def test_variant_is_the_dtype() -> None:
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        pipe = tiny.host("pixa", variant=variant)
        assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == dtype
    assert compute_dtype(tiny.config("pixa"), torch.device("cpu")) is torch.float32
    assert compute_dtype(tiny.config("pixa"), torch.device("cuda")) is torch.float16
    half = tiny.run(tiny.host("pixa", variant="bf16"), "pixa")
    assert 0 < np.abs(half - plain("pixa")).max() < 0.2


def test_variant_files_are_preferred_and_plain_ones_do(tmp_path: Path) -> None:
    both, only = tmp_path / "both", tmp_path / "only"
    shutil.copytree(tiny.checkpoint("pixa"), both)
    other = tiny.load("pixa")
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    other.transformer.save_pretrained(both / "transformer", variant="fp16")
    tiny.load("pixa").save_pretrained(only, variant="fp16")
    marked = tiny.host("pixa", checkpoint=str(both), variant="fp16").transformer.proj_out.weight
    unmarked = tiny.host("pixa", checkpoint=str(both), variant="bf16").transformer.proj_out.weight
    assert torch.allclose(marked.float(), 2 * unmarked.float(), rtol=1e-2)
    assert np.array_equal(tiny.run(tiny.host("pixa", checkpoint=str(only)), "pixa"), plain("pixa"))


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (["model.safetensors"], "fp16", None),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "fp16"),
        (["model.safetensors", "model.fp16.safetensors"], None, None),
        (["model.safetensors", "model.fp16.safetensors"], "fp32", None),
        (["model.fp16.safetensors"], "fp32", "fp16"),
        (["model.fp16-00001-of-00002.safetensors"], None, "fp16"),
        (["config.json"], "fp16", None),
    ],
)
def test_pick_variant(files: list[str], wanted: str | None, chosen: str | None) -> None:
    assert pick_variant(files, wanted) == chosen


def test_vae() -> None:
    path = tiny_extras.vae("sd1")
    made = tiny.run(tiny.host("sd1", vae=str(path)), "sd1")
    assert np.abs(made - plain("sd1")).max() > 0.05
    inside = tiny.host("sd1", vae=str(tiny.checkpoint("sd1")))
    assert np.array_equal(tiny.run(inside, "sd1"), plain("sd1"))
    with pytest.raises(LoadError, match="has 16 latent channels, the checkpoint's has 4"):
        tiny.host("sd1", vae=str(tiny_extras.vae("sd3")))
    with pytest.raises(LoadError, match=r"--vae .* cannot be loaded as AutoencoderKL"):
        tiny.host("sd1", vae=str(tiny_extras.lora("sd1")))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("sd1", "sdxl", "is a StableDiffusionXLPipeline, so its type is sdxl; got --type=sd1"),
        ("sd1", "ad", "so its type is ad"),
        ("kontext", "flux", "is a FluxPipeline, so its type is flux; got --type=kontext"),
        ("sdup", "sd1", "so its type is sd1 or sd2"),
        ("pixs", "pixa", "so its type is pixa"),
    ],
)
def test_another_type(name: str, given: str, says: str) -> None:
    with pytest.raises(LoadError, match=says):
        tiny.host(name, checkpoint=str(tiny.checkpoint(given)))


def test_broken_checkpoints(tmp_path: Path) -> None:
    def copy(label: str) -> Path:
        return Path(shutil.copytree(tiny.checkpoint("sd1"), tmp_path / label))

    def says(folder: Path, text: str) -> None:
        with pytest.raises(LoadError, match=text) as caught:
            tiny.host("sd1", checkpoint=str(folder))
        assert len(str(caught.value).splitlines()) == 1

    cut = copy("cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    says(cut, "cannot be loaded")
    missing = copy("missing")
    (missing / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    says(missing, "cannot be loaded: .*no file named")
    no_json = copy("no_json")
    (no_json / "model_index.json").write_text("{")
    says(no_json, r"no model_index\.json")
    renamed = copy("renamed")
    index = json.loads((renamed / "model_index.json").read_text())
    (renamed / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "CommunityPipeline", "text_encoder_2": index["text_encoder"]})
    )
    says(renamed, r"is not of type sd1 \(text_encoder_2\)")


@pytest.mark.parametrize(("name", "tokenizer"), [("sd1", "tokenizer"), ("hy", "tokenizer_2")])
def test_tokenizers_without_a_vocabulary(name: str, tokenizer: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint(name), tmp_path / name))
    for gone in (folder / tokenizer / "tokenizer.json", folder / tokenizer / "tokenizer_config.json"):
        gone.unlink()
        with pytest.raises(LoadError, match=f"{tokenizer} has no vocabulary"):
            tiny.host(name, checkpoint=str(folder))
    (folder / tokenizer).rmdir()
    with pytest.raises(LoadError, match=f"{tokenizer} has no vocabulary"):
        tiny.host(name, checkpoint=str(folder))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"compile_backend": "nosuch"}, "--compile_backend: must be one of .*inductor.*; got 'nosuch'"),
        ({"compile_options": {"max_autotun": True}}, "no option 'max_autotun'; see max_autotune"),
        ({"compile_options": {"max_autotune": "yes"}}, "--compile_options: .*max_autotune"),
    ],
)
def test_what_torch_compile_does_not_know(flags: dict[str, Any], says: str) -> None:
    config = tiny.config("sd1", compile_vae=True, **flags)
    with pytest.raises(UsageError, match=says) as caught:
        check_environment(config, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_what_torch_compile_knows() -> None:
    for flags in ({}, {"compile_options": {"max-autotune": True}}, {"compile_backend": "eager"}):
        check_environment(tiny.config("sd1", compile_vae=True, **flags), torch.device("cpu"))


@pytest.mark.parametrize(
    "settings", [{"trained_betas": []}, {"num_train_timesteps": -5}, {"spacing": "trailing"}]
)
def test_schedulers_are_refused_before_weights_are_read(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.pipeline.loading._load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="--scheduler: .*" + next(iter(settings))):
        tiny.host("sd1", scheduler={"scheduler": "ddim", **settings})


def test_loras_stay_under_offload_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep their scales, which a request may change."""
    monkeypatch.setattr("shared.pipeline.memory.check_memory_flags", lambda *_: None)
    monkeypatch.setattr("shared.pipeline.memory.place", lambda *_: None)
    path = str(tiny_extras.lora("sd1"))
    for flag in ("enable_sequential_cpu_offload", "enable_group_offload"):
        loras = tiny.host("sd1", lora={path: 0.5}, **{flag: True}).lora_set
        for change in (lambda: loras.remove(path), lambda: loras.add(path)):  # noqa: B023
            with pytest.raises(LoraError, match=f"layers come and go one by one under --{flag}"):
                change()
        loras.set_scales({path: 0.2})
        assert list(loras.loaded) == [path]


def test_safety_checker_is_dropped(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint("sd1"), tmp_path / "sd1"))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe = tiny.host("sd1", checkpoint=str(folder))
    assert pipe.safety_checker is None and np.array_equal(tiny.run(pipe, "sd1"), plain("sd1"))


def test_progress_bars_only_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    from shared.launch.backend import Needs
    from shared.pipeline.loading import load_pipeline

    for quiet in (True, False):
        pipe = load_pipeline(MODELS["pixa"], tiny.config("pixa"), torch.device("cpu"), Needs(), quiet=quiet)
        capsys.readouterr()
        tiny.run(pipe, "pixa")
        assert ("it/s" in capsys.readouterr().err) is not quiet


@pytest.mark.slow
def test_everything_at_once() -> None:
    """LoRA, ControlNet, IP-Adapter, VAE, scheduler, quantization and tiling on one pipeline."""
    from shared.pipeline.adapters import ip_arguments
    from shared.pipeline.control_nets import control_arguments

    flags: dict[str, Any] = {
        "lora": {str(tiny_extras.lora("sdxl", "kohya", text=True)): 0.8},
        "control_net": {str(tiny_extras.control_net("sdxl")): 0.9},
        "ip_adapter": {str(tiny_extras.ip_adapter("sdxl", "plus")): 0.6},
        "vae": str(tiny_extras.vae("sdxl")),
        "scheduler": "k_dpmpp_2m",
        "quantize_to": "int8",
        "enable_vae_tiling": True,
    }
    image = tiny.picture(64, 1)

    def made(without: str | None) -> np.ndarray:
        given = {key: value for key, value in flags.items() if key != without}
        pipe = tiny.host("sdxl", **given)
        arguments: dict[str, Any] = {}
        if "control_net" in given:
            arguments |= control_arguments(MODELS["sdxl"], given["control_net"], [image])
        if "ip_adapter" in given:
            arguments |= ip_arguments(pipe, MODELS["sdxl"], given["ip_adapter"], [image])
        return tiny.run(pipe, "sdxl", size=96, **arguments)

    whole = made(None)
    assert np.isfinite(whole).all()
    for flag in flags:
        assert np.abs(made(flag) - whole).max() > 1e-3, flag
