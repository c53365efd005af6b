"""ControlNets, IP-Adapters and motion modules: effect, identity at scale 0, and refusals."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shared.api.warned import collecting_warnings
from shared.models import MODELS
from shared.pipeline.adapters import (
    AdapterError,
    ip_arguments,
    read_tensors,
)
from shared.pipeline.control_nets import control_arguments, load_control_nets
from shared.pipeline.loading import LoadError
from tests import tiny, tiny_extras
from tests.seldom import seldom

IP_TYPES = [name for name, spec in MODELS.items() if spec.ip_adapter_encoder]
DRAWING = ("FluxControlNetPipeline", "QwenImageControlNetPipeline")
"""diffusers' pipelines that draw the latents of the control image before those of the picture."""
CONTROL_TYPES = [name for name, spec in MODELS.items() if spec.control_net_class]


@cache
def plain(name: str) -> np.ndarray:
    return tiny.run(tiny.load(name), name)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", seldom(CONTROL_TYPES, ("sd1", "sd3", "flux", "qwen", "hy")))
def test_control_net(name: str) -> None:
    spec = MODELS[name]
    launch = {str(tiny_extras.control_net(name)): 0.8}
    pipe = tiny.host(name, control_net=launch)
    assert type(pipe).__name__ == spec.control_net_pipeline

    def made(*args: Any, seed: int = 5) -> np.ndarray:
        torch.manual_seed(seed)  # some pipelines draw the control latents from the global state
        image, *scales = args
        images = [] if image is None else [image]
        return tiny.run(pipe, name, **control_arguments(spec, launch, images, scales, (64, 64), 4))

    image, other = tiny.picture(64, 1), tiny.picture(64, 2)
    none = made(None)
    assert apart(made(image), none) > 0.02
    assert apart(made(image), made(other)) > 1e-3
    assert apart(made(image, 0.0), none) < 1e-6
    assert np.array_equal(made(image), made(image)), "the same on all ranks"
    if spec.control_net_pipeline not in DRAWING:
        assert np.array_equal(none, plain(name)), "scale 0 is the plain picture"


@pytest.mark.parametrize("name", seldom(["sdxl", "flux", "hy"], ("sdxl", "flux")))
def test_several_control_nets(name: str) -> None:
    paths = [str(tiny_extras.control_net(name, seed)) for seed in (0, 1)]
    launch = dict(zip(paths, (0.8, 0.5), strict=True))
    pipe = tiny.host(name, control_net=launch)

    def made(given: dict[str, float]) -> np.ndarray:
        torch.manual_seed(5)
        return tiny.run(pipe, name, **control_arguments(MODELS[name], given, [tiny.picture(64, 1)]))

    both, first, none = made(launch), made({paths[0]: 0.8, paths[1]: 0.0}), made(dict.fromkeys(paths, 0.0))
    assert apart(both, first) > 1e-3 and apart(first, none) > 1e-3


@pytest.mark.parametrize("name", seldom(IP_TYPES, ("sd1", "sdxl", "sd3", "flux")))
def test_ip_adapter(name: str) -> None:
    launch = {str(tiny_extras.ip_adapter(name)): 0.7}
    pipe = tiny.host(name, ip_adapter=launch)

    def made(*args: Any) -> np.ndarray:
        image, *scales = args
        return tiny.run(
            pipe, name, **ip_arguments(pipe, MODELS[name], launch, [] if image is None else [image], scales)
        )

    image, other = tiny.picture(64, 1), tiny.picture(64, 2)
    assert apart(made(image), plain(name)) > 0.02
    assert apart(made(image), made(other)) > 1e-3
    assert apart(made(image), made(image, 0.2)) > 1e-3
    assert apart(made(None), plain(name)) < 1e-5, "a request without ip_image is the plain picture"
    assert apart(made(image, 0.0), plain(name)) < 1e-5


@pytest.mark.parametrize("name", seldom(["sd1", "sdxl"], ("sd1",)))
def test_ip_adapter_plus_and_bin(name: str) -> None:
    made = {}
    for suffix in (".safetensors", ".bin"):
        launch = {str(tiny_extras.ip_adapter(name, "plus", suffix)): 0.7}
        pipe = tiny.host(name, ip_adapter=launch)
        made[suffix] = tiny.run(pipe, name, **ip_arguments(pipe, MODELS[name], launch, [tiny.picture(64, 1)]))
        assert np.array_equal(
            tiny.run(pipe, name, **ip_arguments(pipe, MODELS[name], launch, [])), plain(name)
        )
    assert np.array_equal(made[".safetensors"], made[".bin"]) and apart(made[".bin"], plain(name)) > 0.02


def image_projection(form: str) -> dict[str, torch.Tensor]:
    """The image_proj of other kinds of adapters, for an encoder of width 32 and a cross attention of 32."""
    mlp = {"proj.0.bias": 32, "proj.2.bias": 32, "proj.3.bias": 32, "proj.0.weight": (32, 32)}
    if form == "full-face":
        sizes: dict[str, Any] = mlp | {"proj.2.weight": (32, 32), "proj.3.weight": 32}
    elif form == "FaceID":
        sizes = mlp | {"proj.0.weight": (64, 512), "norm.weight": 32, "norm.bias": 32}
    elif form == "InstantID":
        sizes = {"latents": (1, 16, 32), "proj_in.weight": (32, 512), "proj_in.bias": 32}
    else:
        sizes = {"something.weight": (32, 32)}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {f"image_proj.{key}": torch.randn(size) * 0.3 for key, size in sizes.items()}


def ip_adapter_of(form: str, folder: Path) -> Path:
    source = tiny_extras.ip_adapter("sd1")
    layers = {k: v for k, v in load_file(source).items() if k.startswith("ip_adapter.")}
    shutil.copytree(source.parent / "image_encoder", folder / "image_encoder")
    save_file(layers | image_projection(form), folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def test_ip_adapter_full_face_is_diffusers_picture(tmp_path: Path) -> None:
    path = ip_adapter_of("full-face", tmp_path)
    launch = {str(path): 0.7}
    pipe = tiny.host("sd1", ip_adapter=launch)
    made = tiny.run(pipe, "sd1", **ip_arguments(pipe, MODELS["sd1"], launch, [tiny.picture(64, 1)]))
    theirs = tiny.load("sd1")
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder")
    theirs.register_modules(image_encoder=encoder, feature_extractor=tiny.image_processor())
    parts: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(path).items():
        head, _, rest = key.partition(".")
        parts[head][rest] = value
    theirs.load_ip_adapter(parts, subfolder="", weight_name="")
    theirs.set_ip_adapter_scale(0.7)
    assert apart(made, tiny.run(theirs, "sd1", ip_adapter_image=tiny.picture(64, 1))) < 1e-6
    assert apart(made, plain("sd1")) > 0.01


@pytest.mark.parametrize(
    ("form", "says"),
    [("FaceID", "a FaceID adapter"), ("InstantID", "InstantID"), ("odd", "not of a supported kind")],
)
def test_other_kinds_of_ip_adapters_are_refused(form: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=says):
        tiny.host("sd1", ip_adapter={str(ip_adapter_of(form, tmp_path)): 1.0})


def test_image_encoder_of_the_checkpoint(tmp_path: Path) -> None:
    """An adapter without an encoder beside it uses the checkpoint's; where there is none, that is said."""
    bare = {str(tiny_extras.ip_adapter("sd1", encoder=False)): 0.7}
    with pytest.raises(LoadError, match=r"needs an image encoder of width 32 .* found none"):
        tiny.host("sd1", ip_adapter=bare)
    pipe = tiny.load("sd1", image_encoder=tiny.clip_vision())
    pipe.save_pretrained(tmp_path / "sd1")
    pipe = tiny.host("sd1", ip_adapter=bare, checkpoint=str(tmp_path / "sd1"))
    full = {str(tiny_extras.ip_adapter("sd1")): 0.7}
    expected = tiny.host("sd1", ip_adapter=full)
    one, other = (
        tiny.run(p, "sd1", **ip_arguments(p, MODELS["sd1"], bare, [tiny.picture(64, 1)]))
        for p in (pipe, expected)
    )
    assert np.array_equal(one, other)


def test_motion_adapters() -> None:
    sd1 = {"checkpoint": str(tiny.checkpoint("sd1"))}
    folder, file = str(tiny_extras.motion_adapter("folder")), str(tiny_extras.motion_adapter("file"))
    from_folder = tiny.run(tiny.host("ad", motion_adapter=folder, **sd1), "ad")
    assert np.array_equal(tiny.run(tiny.host("ad", motion_module=file, **sd1), "ad"), from_folder)
    # A checkpoint with motion modules of its own takes the given one's weights in their place.
    replaced = tiny.run(tiny.host("ad", motion_adapter=folder), "ad")
    assert apart(replaced, plain("ad")) > 0.02
    with pytest.raises(LoadError, match="motion adapter of its own; got neither"):
        tiny.host("ad", **sd1)


def test_motion_lora() -> None:
    path = str(tiny_extras.motion_lora())
    made = tiny.host("ad", motion_adapter_lora={path: 1.0})
    assert apart(tiny.run(made, "ad"), plain("ad")) > 0.01
    made.lora_set.set_scales({path: 0.0})
    assert np.array_equal(tiny.run(made, "ad"), plain("ad"))


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        (
            "sd1",
            lambda: {"ip_adapter": {str(tiny_extras.ip_adapter("sdxl")): 1.0}},
            "IP-Adapter .* does not fit this checkpoint",
        ),
        ("sd1", lambda: {"ip_adapter": {str(tiny_extras.lora("sd1")): 1.0}}, "has no image_proj"),
        (
            "sd1",
            lambda: {"control_net": {str(tiny_extras.control_net("sdxl")): 1.0}},
            "cross_attention_dim is 96, the checkpoint's is 32",
        ),
        (
            "sd1",
            lambda: {"control_net": {str(tiny_extras.control_net("sd3")): 1.0}},
            "is a SD3ControlNetModel; type sd1 takes ControlNetModel",
        ),
        ("sd1", lambda: {"control_net": {str(tiny_extras.lora("sd1")): 1.0}}, "is no ControlNet: it holds"),
        ("ad", lambda: {"motion_module": str(tiny_extras.lora("sd1"))}, "has no motion_modules tensors"),
    ],
)
def test_refused(name: str, flags: Any, says: str) -> None:
    with pytest.raises(LoadError, match=says):
        tiny.host(name, **flags())


@pytest.mark.parametrize("text", ["not JSON", "[1]", "\udcff"])
def test_control_net_with_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AdapterError, match=r"config\.json must hold a JSON object"):
        load_control_nets(MODELS["sd1"], {str(tmp_path): 1.0}, torch.float32)


def test_a_union_control_net_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxControlNetModel", "num_mode": 10}')
    with pytest.raises(AdapterError, match="a union of 10 control types"):
        load_control_nets(MODELS["flux"], {str(tmp_path): 1.0}, torch.float32)


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"image_proj": Trap()}, tmp_path / "trap.bin")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_tensors(tmp_path / "trap.bin", "IP-Adapter")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(AdapterError, match=r"must be a \.safetensors, \.bin"):
        read_tensors(tmp_path / "trap.pkl", "IP-Adapter")


@pytest.mark.parametrize("name", seldom([n for n in IP_TYPES if n != "sd3"], ("sd1", "flux")))
@pytest.mark.parametrize("adapters", [1, 2])
def test_several_ip_pictures(name: str, adapters: int, tmp_path: Path) -> None:
    """Several pictures for one adapter, and one for each of two: as plain diffusers takes them."""
    first = tiny_extras.ip_adapter(name)
    tensors = {key: t.flip(0).contiguous() for key, t in load_file(first).items()}
    save_file(tensors, tmp_path / "second.safetensors")
    paths = [str(first), str(tmp_path / "second.safetensors")][:adapters]
    launch = dict(zip(paths, (0.7, 0.4), strict=False))
    pipe = tiny.host(name, ip_adapter=launch)
    one, two = tiny.picture(64, 1), tiny.picture(64, 2)

    def made(images: list[Any], *scales: float) -> np.ndarray:
        return tiny.run(pipe, name, **ip_arguments(pipe, MODELS[name], launch, images, scales))

    pictures = [[one, two]] if adapters == 1 else [one, two]
    both = made([one, two])
    pipe.set_ip_adapter_scale([0.7, 0.4] if adapters == 2 else 0.7)
    assert np.array_equal(both, tiny.run(pipe, name, ip_adapter_image=pictures))
    assert apart(both, made([one])) > 1e-3 and apart(both, made([two])) > 1e-3
    assert apart(made([]), plain(name)) < 1e-5
    if adapters == 2:
        assert np.array_equal(made([one]), made([one, one]))
        assert np.array_equal(made([one, two], 0.3), made([one, two], 0.3, 0.3))
        assert apart(made([one, two], 0.3, 0.9), made([one, two], 0.3)) > 1e-3
        assert apart(both, made([two, one])) > 1e-3


@pytest.mark.parametrize(("name", "done"), [("sd1", "cropped"), ("sd3", "stretched")])
def test_a_picture_that_the_image_encoder_does_not_see_as_it_is(name: str, done: str) -> None:
    launch = {str(tiny_extras.ip_adapter(name)): 0.7}
    pipe, wide = tiny.host(name, ip_adapter=launch), tiny.picture(64).resize((128, 64))
    with collecting_warnings() as told:
        seen = ip_arguments(pipe, MODELS[name], launch, [wide])["ip_adapter_image"]
    assert told == [f"ip_image: 128x64 pixels are {done} to the shape of 32x32"]
    pixels = pipe.feature_extractor(seen, return_tensors="pt").pixel_values
    middle = pipe.feature_extractor(wide.crop((32, 0, 96, 64)), return_tensors="pt").pixel_values
    assert torch.allclose(pixels, middle, atol=0.05) is (done == "cropped")
    with collecting_warnings() as told:
        ip_arguments(pipe, MODELS[name], launch, [tiny.picture(64)])
    assert not told
