"""--legacy_pickle: what the original project's clients send and read, and what an attacker may send."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.http import unpickle as unpickle_module
from shared.http.unpickle import ForbiddenPickleError, Picture, Tensor, unpickle
from tests.httphost import FakeHost, config_of, picture, wait_for

PROTOCOLS = range(6)
ROOT = Path(__file__).parents[2]


def encoded(value: Any, protocol: int | None = None) -> str:
    return base64.b64encode(pickle.dumps(value, protocol)).decode()


def decoded(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


def legacy_config(type: str = "sd1", **changes: Any) -> Any:
    return config_of(type, legacy_pickle=True, **changes)


class LatentHost(FakeHost):
    """Its replies have a latent, as rank 0's have with --legacy_pickle."""

    def _reply(self, request: Any) -> Any:
        reply = super()._reply(request)
        reply.latent = safetensors.torch.save({"latent": torch.arange(8.0).reshape(1, 2, 2, 2)})
        return reply


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with LatentHost(legacy_config(ip_adapter={"x": 1.0})) as host:
        yield host


# The clients of the original project.


def test_a_picture_and_a_latent_come_pickled(host: FakeHost) -> None:
    body = host.generate({"positive": "a", "negative": "", "use_compel": False, "frames": 3}).json()
    image = decoded(body["output"])
    assert type(image) is Image.Image and image.size == (8, 8) and body["is_image"] is True
    assert torch.equal(decoded(body["latent"]), torch.arange(8.0).reshape(1, 2, 2, 2))
    assert body["message"] == "OK"


def test_a_request_that_names_a_format_is_answered_without_pickles(host: FakeHost) -> None:
    body = host.generate({"output_format": "png"}).json()
    assert base64.b64decode(body["output"]) == picture()
    assert base64.b64decode(body["latent"])[8:9] == b"{"
    assert host.generate({"output_format": "png", "frames": 3}).status_code == 422
    raw = host.generate({}, headers={"Accept": "image/png"})
    assert raw.headers["Content-Type"] == "image/png" and raw.content == picture()


def test_frames_come_as_a_pickled_list() -> None:
    with LatentHost(legacy_config("svd")) as host:
        body = host.generate(
            {"image": encoded(Image.new("RGB", (16, 8), "red")), "positive": "x", "frames": 3}
        ).json()
        frames = decoded(body["output"])
        assert [type(f) for f in frames] == [Image.Image] * 3 and body["is_image"] is False
        assert body["latent"] is None
        with Image.open(io.BytesIO(host.seen[0].images[0])) as image:
            assert (image.size, image.getpixel((0, 0))) == ((16, 8), (255, 0, 0))


def test_the_upscaler_has_no_latent_in_its_answer() -> None:
    with LatentHost(legacy_config("sdup")) as host:
        body = host.generate({"image": encoded(Image.new("RGB", (16, 8))), "width": 512}).json()
        assert body["latent"] is None and isinstance(decoded(body["output"]), Image.Image)


def test_pictures_may_come_plain_too(host: FakeHost) -> None:
    data = base64.b64encode(picture("JPEG")).decode()
    assert host.generate({"ip_image": data}).status_code == 200
    assert host.seen[0].ip_image == picture("JPEG")


def test_latent_and_conditioning(host: FakeHost) -> None:
    latent, embeds, pooled = torch.randn(1, 4, 2, 3), torch.randn(1, 7, 8).half(), torch.randn(1, 9)
    conditioning = [[embeds, {"pooled_output": pooled}]]
    body = {
        "latent": encoded(latent),
        "positive_embeds": encoded(conditioning),
        "sigmas": encoded(torch.ones(3)),
    }
    assert host.generate(body).status_code == 200
    seen = host.seen[0]
    assert torch.equal(safetensors.torch.load(seen.latent or b"")["latent"], latent)
    sent = safetensors.torch.load(seen.positive_embeds or b"")
    assert torch.equal(sent["embeds"], embeds) and torch.equal(sent["pooled"], pooled)


def test_denoise_is_the_part_that_runs_and_one_is_all_of_it(host: FakeHost) -> None:
    stock = {"seed": 7, "steps": 20, "cfg": 7.0, "clip_skip": 0, "denoising_end": 1.0, "positive": "a"}
    latent = encoded(torch.randn(1, 4, 2, 3))
    for denoise in (1.0, 0.3, 0.75):
        answer = host.generate(stock | {"negative": "", "denoise": denoise, "latent": latent})
        assert answer.status_code == 200, answer.text
        assert (host.seen[-1].strength, host.seen[-1].denoising_start) == (denoise, None)
        # Without a latent the original ran all of the schedule, whatever it said.
        assert host.generate(stock | {"denoise": denoise}).status_code == 200
        assert host.seen[-1].strength is None and host.seen[-1].denoising_start is None
    for wrong in (1.5, -0.1, "much", 0.0):
        answer = host.generate(stock | {"denoise": wrong, "latent": latent})
        assert answer.status_code == 400 and "denois" in answer.json()["errors"][0]["field"]


def test_apply_offload_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr("shared.http.legacy.os.kill", lambda *given: ended.append(given))
    config = legacy_config(checkpoint="/models/a")
    with LatentHost(config) as host:
        wanted = {
            "pipeline_type": "sd1",
            "checkpoint": {"checkpoint": "/models/x/../a"},
            "backend_config": {"model_n": 2, "stride": 1, "time_shift": False, "synced_steps": 3},
            "enable_vae_tiling": False,
        }
        answer = host.post("/apply", json=wanted)
        assert answer.status_code == 200 and answer.json() == {"message": "OK"}
        other = host.post("/apply", json=wanted | {"backend_config": {"synced_steps": 9}})
        assert other.status_code == 409 and other.json()["errors"][0]["field"] == "synced_steps"
        answer = host.post("/apply", json=wanted | {"pipeline_type": "sdxl", "lora": {"/l": 1.0}})
        assert answer.status_code == 409
        told = {e["field"]: e["problem"] for e in answer.json()["errors"]}
        assert told["pipeline_type"] == "the host runs with --type=sd1; got sdxl" and set(told) == {
            "pipeline_type",
            "lora",
        }
        assert "--enable_model_cpu_offload" in host.get("/offload").json()["message"]
        assert host.get("/close", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert not ended
        assert host.get("/close").json() == {"message": "OK"}
        wait_for(lambda: len(ended) == 1)
        host.status.state = "loading"
        assert host.post("/apply", json=wanted).status_code == 503
    with FakeHost() as plain:
        assert [plain.get(path).status_code for path in ("/offload", "/close")] == [404, 404]


def test_without_the_flag_no_pickle_is_read() -> None:
    with FakeHost(config_of(ip_adapter={"x": 1.0})) as host:
        answer = host.generate({"ip_image": encoded(Image.new("RGB", (8, 8)))})
        assert answer.status_code == 400 and "is not a picture" in answer.text
        assert base64.b64decode(host.generate({}).json()["output"]) == picture()


# The unpickler, on what it admits.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_every_mode_and_protocol(mode: str, protocol: int) -> None:
    image = Image.new("RGB", (5, 3), (200, 30, 10)).convert(mode)
    found = unpickle(pickle.dumps(image, protocol))
    assert isinstance(found, Picture)
    with Image.open(io.BytesIO(found.png())) as png:
        assert list(png.convert("RGB").getdata()) == list(image.convert("RGB").getdata())


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_pictures_of_the_plug_ins(format: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (9, 4), "blue").save(out, format, dpi=(72.5, 72.5))
    with Image.open(out) as image:
        found = unpickle(pickle.dumps(image))
        assert isinstance(found, Picture) and found.png()


def test_info_with_texts() -> None:
    from PIL.PngImagePlugin import PngInfo

    info, out = PngInfo(), io.BytesIO()
    info.add_itxt("prompt", "a circle", "en")
    Image.new("RGB", (2, 2)).save(out, "PNG", pnginfo=info)
    with Image.open(out) as image:
        image.load()
        assert unpickle(pickle.dumps(image)).png()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3),
        torch.randn(4, 4)[1:, ::2],
        torch.randn(3, 5).t(),
        torch.randn(2).expand(3, 2),
        torch.randn(2, 2).half(),
        torch.randn(2, 2).bfloat16(),
        torch.randn(2, 2).double(),
        torch.arange(5),
        torch.arange(5, dtype=torch.int32),
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor(1.5),
        torch.empty(0, 3),
    ],
)
def test_tensors(tensor: torch.Tensor, protocol: int) -> None:
    found = unpickle(pickle.dumps(tensor, protocol))
    assert isinstance(found, Tensor) and found.shape == tuple(tensor.shape)
    assert f"torch.{found.dtype}" == str(tensor.dtype)
    if found.data:
        again = torch.frombuffer(bytearray(found.data), dtype=tensor.dtype).reshape(tensor.shape)
        assert torch.equal(again, tensor)


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys; from shared.http.unpickle import unpickle; "
        "unpickle(sys.stdin.buffer.read()); import shared.http.legacy; sys.exit('torch' in sys.modules)"
    )
    data = pickle.dumps(torch.ones(2))
    subprocess.run([sys.executable, "-c", code], input=data, cwd=ROOT, check=True, timeout=30)


# What it refuses.


class Gadget:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def test_gadgets_are_gadgets(tmp_path: Path) -> None:
    """The plain unpickler runs them: the test below would fail if nothing were done."""
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Gadget(os.system, f"touch {marker}")))
    assert marker.exists()


def nested_load(marker: Path) -> Any:
    """A gadget inside the stream that _load_from_bytes would give to torch.load."""
    stream = io.BytesIO()
    torch.save(Gadget(os.system, f"touch {marker}"), stream, _use_new_zipfile_serialization=False)
    return Gadget(torch.storage._load_from_bytes, stream.getvalue())


def gadgets(marker: Path) -> dict[str, bytes]:
    touch = f"touch {marker}"
    with_state = Image.new("RGB", (2, 2))
    with_state.info["x"] = Gadget(os.system, touch)
    values: dict[str, Any] = {
        "os.system": Gadget(os.system, touch),
        "eval": Gadget(eval, f"__import__('os').system({touch!r})"),
        "exec": Gadget(exec, f"import os; os.system({touch!r})"),
        "subprocess": Gadget(subprocess.check_output, ["touch", str(marker)]),
        "open": Gadget(open, str(marker), "w"),
        "getattr": Gadget(getattr, Image.Image, "open"),
        "import": Gadget(__import__, "os"),
        "pickle.loads": Gadget(pickle.loads, pickle.dumps(Gadget(os.system, touch))),
        "torch.load": Gadget(torch.load, str(marker)),
        "nested": nested_load(marker),
        "Image.open": Gadget(Image.open, "/etc/passwd"),
        "in the info of a picture": with_state,
        "in a list": [1, [Gadget(os.system, touch)]],
        "a hook": Gadget(torch._utils._rebuild_parameter, Gadget(os.system, touch), False, OrderedDict()),
        "a class": Gadget,
        "a function": os.system,
        "a set": {1, 2},
    }
    found = {f"{name}, {p}": pickle.dumps(v, p) for name, v in values.items() for p in (2, 4, 5)}
    return found | {
        "by hand": b"\x80\x04cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "inst": b"\x80\x04(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj": b"\x80\x04(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "extension": b"\x80\x04\x82\x01.",
        "persistent": b"\x80\x04Pfile\n.",
        "state of a class": b"\x80\x04cPIL.Image\nImage\n}X\x01\x00\x00\x00aK\x01sb.",
        "dotted name": b"\x80\x04\x8c\x09PIL.Image\x8c\x0fImage.open.call\x93.",
        "dotted module": b"\x80\x04\x8c\x12PIL.Image.os.systm\x8c\x05Image\x93.",
    }


@pytest.mark.parametrize("name", sorted(gadgets(Path("x"))))
def test_gadgets_are_refused_and_never_run(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = gadgets(marker)[name]
    with pytest.raises(ForbiddenPickleError):
        unpickle(data)
    assert not marker.exists()


def test_over_http_a_gadget_is_a_400_that_names_the_field(host: FakeHost, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    gadget = Gadget(os.system, f"touch {marker}")
    answer = host.generate({"ip_image": encoded(gadget), "latent": encoded([gadget]), "positive": "a"})
    assert answer.status_code == 400
    problems = {e["field"]: e["problem"] for e in answer.json()["errors"]}
    assert set(problems) == {"ip_image", "latent"}
    assert "names posix.system; only PIL pictures and torch tensors are admitted" in problems["latent"]
    assert not marker.exists() and not host.seen


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ip_image", torch.ones(2)),
        ("ip_image", [Image.new("RGB", (2, 2))]),
        ("latent", Image.new("RGB", (2, 2))),
        ("latent", [[torch.ones(2), {}]]),
        ("positive_embeds", "text"),
    ],
)
def test_the_wrong_kind_is_a_400(host: FakeHost, field: str, value: Any) -> None:
    answer = host.generate({field: encoded(value)})
    assert answer.status_code == 400 and "the pickle holds no" in answer.text


DEEP = b"\x80\x04)" + b"\x85" * 15_000 + b"."
BOMBS = {
    "more opcodes than a picture has": b"\x80\x04" + b"N0" * 20_000 + b"N.",
    "a deep tuple as a key": b"\x80\x04})" + b"\x85" * 15_000 + b"Ns.",
    "the same text encoded again and again": b"\x80\x04X"
    + (1 << 24).to_bytes(4, "little")
    + b"a" * (1 << 24)
    + b"\x94\x8c\x07_codecs\x8c\x06encode\x93\x94\x8c\x06latin1\x94"
    + b"h\x01h\x00h\x02\x86R" * 100
    + b".",
    "a tensor that repeats one element": pickle.dumps(torch.ones(1).expand(1 << 30)),
    "a mark missing": b"\x80\x04Nt.",
    "an empty stack": b"\x80\x04.",
    "not ended": b"\x80\x04N",
    "a memo that is not there": b"\x80\x04h\x05.",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs(name: str) -> None:
    with pytest.raises(ForbiddenPickleError):
        unpickle(BOMBS[name])


def test_a_deep_pickle_is_harmless() -> None:
    depth, value = 0, unpickle(DEEP)
    while value:
        value, depth = value[0], depth + 1
    assert depth == 15_000


@pytest.mark.parametrize(
    "state",
    [
        [{}, "RGB", (2, 2), None, b"short"],
        [{}, "RGB", (10**6, 10**6), None, b""],
        [{}, "RGB", (-1, 2), None, b""],
        [{}, "F", (1, 1), None, b"1234"],
        [{}, "P", (1, 1), ["x"], b"1"],
        "text",
        None,
    ],
)
def test_pictures_that_are_none(state: Any) -> None:
    with pytest.raises(ForbiddenPickleError):
        Picture(state).png()


SEEDS = [pickle.dumps(Image.new("RGB", (3, 2)), p) for p in (2, 4)] + [pickle.dumps(torch.randn(2, 3))]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=8))
def test_damaged_pickles_are_read_or_refused(seed: bytes, flips: list[tuple[int, int]]) -> None:
    data = bytearray(seed)
    for position, value in flips:
        data[position % len(data)] = value
    try:
        found = unpickle(bytes(data))
        if isinstance(found, Picture):
            found.png()
    except ForbiddenPickleError:
        pass


OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=4), max_size=40))
def test_any_opcodes_are_read_or_refused(parts: list[bytes]) -> None:
    with contextlib.suppress(ForbiddenPickleError):
        unpickle(b"\x80\x04" + b"".join(parts) + b".")


def test_the_unpickler_has_no_way_to_call() -> None:
    """Nothing in the module imports, evaluates or looks up what a pickle names."""
    source = Path(unpickle_module.__file__ or "").read_text()
    for word in ("getattr(", "__import__", "importlib", "eval(", "exec(", "pickle.load", "Unpickler("):
        assert word not in source
