"""shared.api.hashes, and the hashes in a picture's metadata."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from shared.api import hashes as module
from shared.api.hashes import FileHashes, cache_folder, denoiser_files
from shared.api.metadata import parse_infotext
from tests.api.test_metadata import BODY, DrawingHost, files, texts
from tests.httphost import config_of, wait_for


def lora(path: Path, number: float) -> tuple[str, str]:
    """A LoRA's file, and its hash without the header: A1111's addnet_hash_safetensors, 12 of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({"x": np.full(7, number, np.float32)}, path, {"ss_output_name": "any"})
    data = np.full(7, number, np.float32).tobytes()
    return str(path), hashlib.sha256(data).hexdigest()[:12]


def kept(folder: Path) -> dict[str, Any]:
    index = folder / "hashes.json"
    return json.loads(index.read_text()) if index.exists() else {}


def test_of_a_checkpoint_and_a_lora(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"0123" * 3_000_000)  # more than is read at once
    path, short = lora(tmp_path / "style.safetensors", 1.0)
    config = config_of(checkpoint=str(checkpoint), lora={path: 1.0})
    hashes = FileHashes(tmp_path / "kept")
    assert (hashes.model(config), hashes.lora(path)) == (None, None), "nothing waits for them"
    hashes.wait()
    whole = hashlib.sha256(b"0123" * 3_000_000).hexdigest()
    assert (hashes.model(config), hashes.lora(path)) == (whole[:10], short)


def test_they_are_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    first = FileHashes(tmp_path)
    for file in (path, other):
        first.lora(str(file))
    first.wait()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_entry", lambda *_: pytest.fail("read again"))
        assert FileHashes(tmp_path).lora(str(path)) == hashlib.sha256(b"one").hexdigest()[:12]
    path.write_bytes(b"ONE")
    os.utime(path, ns=(1, 1))
    other.unlink()
    again = FileHashes(tmp_path)
    assert again.lora(str(path)) is None and again.lora(str(other)) is None
    again.wait()
    assert again.lora(str(path)) == hashlib.sha256(b"ONE").hexdigest()[:12]
    assert str(other) not in (tmp_path / "hashes.json").read_text(), "its file is gone"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "[" * 100_000])
def test_a_broken_index_is_made_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "hashes.json").write_text(content)
    path, short = lora(tmp_path / "style.safetensors", 2.0)
    hashes = FileHashes(tmp_path)
    hashes.lora(path)
    hashes.wait()
    assert hashes.lora(path) == short
    [entry] = json.loads((tmp_path / "hashes.json").read_text()).values()
    assert entry["sha256"].startswith(short)


def test_a_folder_that_cannot_be_written_keeps_nothing_and_hashes_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, short = lora(tmp_path / "style.safetensors", 3.0)
    hashes = FileHashes(tmp_path / "style.safetensors" / "inside")
    hashes.lora(path)
    hashes.wait()
    assert hashes.lora(path) == short and "hashes of files are not kept in" in caplog.text


def test_which_files_are_the_denoisers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    name = "diffusion_pytorch_model"

    def chosen(**flags: Any) -> list[str]:
        return [Path(path).name for path in denoiser_files(config_of(checkpoint=str(folder), **flags))]

    assert chosen() == []
    for end in (".fp16-00001-of-00002", ".fp16-00002-of-00002"):
        (folder / "unet" / f"{name}{end}.safetensors").touch()
    half = [f"{name}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert chosen() == chosen(variant="fp16") == half
    (folder / "unet" / f"{name}.safetensors").touch()
    (folder / "unet" / f"{name}.bin").touch()
    assert chosen(variant="fp16") == half
    assert chosen() == chosen(variant="bf16") == [f"{name}.safetensors"]
    assert chosen(gguf_model="/models/q4.gguf") == ["q4.gguf"]


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder(config_of()) == Path("/caches/multigpu_diffusion")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(config_of()) == Path.home() / ".cache" / "multigpu_diffusion"
    assert cache_folder(config_of(cache_dir="/own")) == Path("/own")


def test_a_pictures_text_has_them_as_a1111_writes_them(tmp_path: Path) -> None:
    checkpoint = tmp_path / "demo.safetensors"
    checkpoint.write_bytes(b"weights")
    launched, first = lora(tmp_path / "launched.safetensors", 1.0)
    _, second = lora(tmp_path / "loras" / "sub" / "style.safetensors", 2.0)
    _, unused = lora(tmp_path / "loras" / "unused.safetensors", 3.0)
    config = config_of(
        checkpoint=str(checkpoint),
        lora={launched: 1.0},
        lora_dir=(str(tmp_path / "loras"),),
        cache_dir=str(tmp_path / "kept"),
    )
    asked = BODY | {"lora_scales": {"style": 0.5, "unused": 0.0}}
    with DrawingHost(config) as host:
        [file] = files(host.generate(asked))
        assert "hash" not in (texts(file)[0] or ""), "not computed yet"
        for format in ("png", "jpeg", "webp"):
            wait_for(lambda: len(kept(tmp_path / "kept")) == 3)
            [file] = files(host.generate(asked | {"output_format": format}))
            text = texts(file)[0] or ""
            model = hashlib.sha256(b"weights").hexdigest()[:10]
            assert f"Size: 24x16, Model hash: {model}, Model: demo, Lora hashes: " in text
            told = parse_infotext(text)
            assert told["Lora hashes"] == f"style: {second}, launched: {first}" and unused not in text
    # For the LoRA that the request turns off.
    with DrawingHost(config) as host:
        [file] = files(host.generate(BODY | {"lora_scales": {"launched": 0.0}}))
        assert "Lora hashes" not in (texts(file)[0] or "")
