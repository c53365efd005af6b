"""Kept weights: made once, found again byte by byte, made anew where broken or of other files; bounded."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open

from shared.parallel.sharded import plain
from shared.pipeline import converted, quantize, single_file, store
from tests import tiny, tiny_extras, tiny_original
from tests.pool import RankPool
from tests.seldom import seldom


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the denoiser and the text encoder, those inside of quantized ones too."""
    return {
        f"{part}.{name}.{number}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, parameter in getattr(pipe, part).named_parameters()
        for number, tensor in enumerate(plain(parameter))
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a
    )


def entries(folder: Path) -> dict[str, Path]:
    """The files by the component's name."""
    found = {}
    for file in folder.glob("weights/*/*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found[json.loads(opened.metadata()["key"])[0]] = file
    return found


@pytest.fixture
def freezes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The components that are quantized, rather than found."""
    seen: list[Any] = []
    side_by_side = quantize.side_by_side

    def noting(act: Any, layers: Any, device: torch.device) -> None:
        seen.append(layers)
        side_by_side(act, layers, device)

    monkeypatch.setattr(quantize, "side_by_side", noting)
    return seen


@pytest.mark.parametrize("kind", seldom(["float8", "int8", "int4"], ["int8", "int4"]))
def test_the_second_start_finds_the_same_bytes(tmp_path: Path, freezes: list[Any], kind: str) -> None:
    flags: dict[str, Any] = {"quantize_to": kind, "lora": {str(tiny_extras.lora("sd1")): 0.8}}
    alone = tiny.load("sd1")
    spec = tiny.config("sd1").spec
    assert not (tmp_path / "weights").exists()
    first = tiny.host("sd1", **flags, cache_dir=str(tmp_path))
    assert len(freezes) == 2 and set(entries(tmp_path)) == {"unet", "text_encoder"}
    second = tiny.host("sd1", **flags, cache_dir=str(tmp_path))
    assert len(freezes) == 2, "nothing is quantized again"
    assert equal(weights(first), weights(second))
    assert np.array_equal(tiny.run(first, "sd1"), tiny.run(second, "sd1"))
    quantize.quantize_pipeline(alone, spec, kind, torch.device("cpu"))
    unkept = tiny.host("sd1", quantize_to=kind, cache_dir=str(tmp_path))
    assert len(freezes) == 2 + 2 + 2, "without the LoRA they are others"
    assert equal(weights(alone), weights(unkept)), "kept weights are those that are not kept"


def test_other_files_are_others(tmp_path: Path, freezes: list[Any]) -> None:
    checkpoint, kept = tmp_path / "checkpoint", str(tmp_path / "kept")
    shutil.copytree(tiny.checkpoint("sd1"), checkpoint)

    def quantized() -> int:
        freezes.clear()
        tiny.host("sd1", quantize_to="int8", checkpoint=str(checkpoint), cache_dir=kept)
        return len(freezes)

    assert [quantized(), quantized()] == [2, 0]
    file = next(checkpoint.glob("unet/*.safetensors"))
    os.utime(file, (1e9, 1e9))
    assert [quantized(), quantized()] == [2, 0]


@pytest.mark.parametrize("fault", ["cut", "emptied", "of another"])
def test_a_broken_entry_is_made_anew_with_one_line(
    tmp_path: Path, freezes: list[Any], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    flags: dict[str, Any] = {"quantize_to": "int8", "cache_dir": str(tmp_path)}
    first = weights(tiny.host("sd1", **flags))
    files = entries(tmp_path)
    whole = files["unet"].read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "emptied": b"",
        "of another": files["text_encoder"].read_bytes(),
    }
    os.unlink(files["unet"])
    files["unet"].write_bytes(broken[fault])
    freezes.clear()
    with caplog.at_level("WARNING", "host"):
        assert equal(weights(tiny.host("sd1", **flags)), first)
    assert len(freezes) == 1, "the other component is found"
    assert len(re.findall(r"is broken and made anew: ", caplog.text)) == 1
    assert len([record for record in caplog.records if record.module == "store"]) == 1
    tiny.host("sd1", **flags)
    assert len(freezes) == 1 and entries(tmp_path)["unet"].read_bytes() == whole


def test_what_cannot_be_kept_is_made_all_the_same(
    tmp_path: Path, freezes: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_text("a file")
    with caplog.at_level("WARNING", "host"):
        tiny.host("sd1", quantize_to="int8", cache_dir=str(tmp_path))
    assert len(freezes) == 2 and caplog.text.count("is not kept in") == 2

    def no_room(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    full = tmp_path / "full"
    tiny.host("sd1", quantize_to="int8", cache_dir=str(full))
    assert len(freezes) == 4 and "No space left on device" in caplog.text
    assert not [entry for entry in (full / "weights").iterdir() if entry.is_dir()]


def test_an_entry_that_a_crash_of_the_machine_may_have_cut_is_made_anew(
    tmp_path: Path, freezes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = {"quantize_to": "int8", "cache_dir": str(tmp_path)}
    sync = store._sync
    monkeypatch.setattr(store, "_sync", lambda _: None)  # it did not come to it
    monkeypatch.setattr(store, "BOOT", tmp_path / "boot")
    store.BOOT.write_text("first")
    for boot, quantized in (("first", 2), ("first", 2), ("second", 4)):
        store.BOOT.write_text(boot)
        first = weights(tiny.host("sd1", **flags))
        assert len(freezes) == quantized, "within one start of the machine its memory has the whole file"
    for file in entries(tmp_path).values():
        sync(file.parent)
    store.BOOT.write_text("third")
    assert equal(weights(tiny.host("sd1", **flags)), first) and len(freezes) == 4


def test_entries_used_longest_ago_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("int8", "int4"):
        tiny.host("sd1", quantize_to=kind, cache_dir=str(tmp_path))
    for file in entries(tmp_path).values():
        os.utime(file.parent, (1e9, 1e9))
    monkeypatch.setattr(store, "BYTES", 1)
    tiny.host("sd1", quantize_to="int2", cache_dir=str(tmp_path))
    assert set(entries(tmp_path)) <= {"text_encoder"}


@pytest.mark.parametrize(("name", "variant"), [("pixa", "fp16"), ("sd1", "bf16")])
def test_a_checkpoint_of_another_dtype_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, variant: str
) -> None:
    flags: dict[str, Any] = {"variant": variant, "cache_dir": str(tmp_path)}

    def state(pipe: Any) -> dict[str, torch.Tensor]:
        models = {part: m for part, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        return {f"{part}.{key}": t for part, m in models.items() for key, t in m.state_dict().items()}

    own = state(tiny.host(name, **flags))
    assert not (tmp_path / "weights").exists(), "one rank has nobody to share with"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(converted, "LEAST", 1)
    for _ in range(2):
        shared = state(tiny.host(name, **flags))
        assert {key: t.dtype for key, t in own.items()} == {key: t.dtype for key, t in shared.items()}
        assert all(torch.equal(own[key], shared[key]) for key in own)
    files = sorted(tmp_path.glob("weights/*/*.safetensors"))
    assert {file.name for file in files} == {"diffusion_pytorch_model.safetensors", "model.safetensors"}
    made = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()  # models map it
    files[0].write_bytes(b"broken")
    assert all(torch.equal(own[key], t) for key, t in state(tiny.host(name, **flags)).items())
    assert [f.stat().st_mtime_ns == t for f, t in zip(files, made, strict=True)] == [
        False, *[True] * (len(files) - 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variant"),
    seldom([("sd1", "bf16"), ("sd3", "fp16"), ("sdxl", "fp16"), ("zimage", "bf16"), ("qwen", "bf16")],
           [("sdxl", "fp16"), ("sd3", "fp16"), ("zimage", "bf16")]),
)  # fmt: skip
def test_a_single_file_of_another_dtype_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, variant: str
) -> None:
    """All ranks map the models that the first one has made, and read the file itself no more."""
    flags: dict[str, Any] = {"variant": variant, "cache_dir": str(tmp_path)}
    flags["checkpoint"] = str(tiny_original.single_file(name))

    def load() -> tuple[dict[str, torch.Tensor], str]:
        pipe = tiny.host(name, **flags)
        models = {part: m for part, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        state = {f"{part}.{key}": t for part, m in models.items() for key, t in m.state_dict().items()}
        buffers = {f"{part}.{key}": t for part, m in models.items() for key, t in m.named_buffers()}
        return state | buffers, repr(models)

    own, text = load()
    assert not (tmp_path / "weights").exists(), "one rank has nobody to share with"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(converted, "LEAST", 1)
    for time in range(2):
        if time:
            monkeypatch.setattr(single_file, "read_weights", lambda *_: pytest.fail("it was read again"))
        shared, again = load()
        assert again == text and own.keys() == shared.keys()
        assert all(own[key].dtype == t.dtype and torch.equal(own[key], t) for key, t in shared.items())
    maps = psutil.Process().memory_maps(grouped=False)
    kept = [[int(end, 16) for end in m.addr.split("-")] for m in maps if m.path.startswith(str(tmp_path))]
    denoiser = "unet" if name.startswith("sd") and name != "sd3" else "transformer"
    mapped = [t for key, t in shared.items() if key.startswith((denoiser, "text_encoder", "vae."))]
    inside = [any(first <= t.data_ptr() < last for first, last in kept) for t in mapped]
    assert sum(inside) >= 0.95 * len(mapped)


def load_on_rank(cache: str) -> tuple[int, int]:
    """How many modules this rank quantized, and bytes of kept files that it maps."""
    count, side_by_side = 0, quantize.side_by_side

    def counting(act: Any, layers: Any, device: torch.device) -> None:
        nonlocal count
        count += 1
        side_by_side(act, layers, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "side_by_side", counting)
        pipe = tiny.host("sd1", quantize_to="int8", cache_dir=cache)
    maps = psutil.Process().memory_maps(grouped=False)
    assert np.isfinite(tiny.run(pipe, "sd1")).all()
    return count, sum(m.size for m in maps if m.path.startswith(cache))


def test_one_rank_makes_them_and_all_map_the_file(tmp_path: Path, pool: RankPool) -> None:
    found = pool.run(load_on_rank, 2, str(tmp_path))
    assert sum(count for count, _ in found) == 2, "the UNet and the text encoder, each quantized by one rank"
    sizes = sum(file.stat().st_size for file in entries(tmp_path).values())
    assert all(mapped >= sizes > 0 for _, mapped in found)
