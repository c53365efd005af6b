"""Odd parts of requests for tests/test_fuzz.py: numbers, texts, pictures, tensors, pickles and forms."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from shared.api.requests import GenerateRequest
from shared.http.a1111_options import OF_IMAGES, OPTIONS, OVERRIDES

KEYS = sorted(
    {*GenerateRequest.model_fields, *OPTIONS, *OF_IMAGES, *OVERRIDES, "path", "scale", "", "\0", "__proto__"}
    | {
        "prompt",
        "negative_prompt",
        "cfg_scale",
        "sampler_name",
        "sampler_index",
        "batch_size",
        "n_iter",
        "eta",
    }
    | {"override_settings", "alwayson_scripts", "sd_model_checkpoint", "denoising_strength", "init_images"}
    | {"n", "size", "response_format", "background", "stream", "partial_images", "model", "quality", "mask"}
    | {"backend_config", "checkpoint", "pipeline_type", "weight", "args", "ControlNet", "enabled", "denoise"}
)
DEEP = 3000
LITERALS = [
    *("null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "7", "512", "1000", "1e400", "-1e400", "NaN"),
    *("Infinity", "-Infinity", "9" * 400, "9" * 5000, "1e999999999", "1e-400", "18446744073709551616", "+1"),
    *(
        '""',
        '"x"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"a\\u0000b"',
        '"7"',
        '"a1111"',
        '"png"',
        '"mp4"',
        '"1x1"',
    ),
    *("[]", "{}", "[[]]", "[null]", '{"":null}', '{"a":1,"a":2}', '{"scheduler":{}}', '{"scheduler":"ddim"}'),
    *("[" * 100 + "]" * 100, '{"a":' * 100 + "1" + "}" * 100, "[" * DEEP, '"', "\ud800", "\ufeff1", ""),
    *('{"scheduler":"unipc","disable_corrector":"x"}', '{"scheduler":"DDIMScheduler","eta":"\\u0000"}'),
    *('"' + "(" * 2000 + '"', '"((a:1.5):nan)[b]BREAK<lora:x:1>"', '"(a:' + "9" * 400 + ')"', '"<lora::>"'),
    *(
        '"' + "A" * 30_000 + '"',
        "[" + "1," * 5000 + "1]",
        "{" + ",".join(f'"k{i}":1' for i in range(500)) + "}",
    ),
]


BODIES = [
    b"{" + b",".join(b'"%d":1' % i for i in range(5000)) + b"}",
    json.dumps(dict.fromkeys(KEYS, "A" * 5000)).encode(),
    json.dumps({key: {key: [key] * 50} for key in KEYS}).encode(),
    b'{"steps":1,"steps":"x"}',
]
"""Whole ones, in JSON."""


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _png(width: int, height: int, data: bytes, kind: int = 0, depth: int = 1) -> bytes:
    """A PNG with this header, whatever its data are."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _pictures() -> list[bytes]:
    small = Image.new("RGB", (16, 16), "red")
    palette = small.quantize(4)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = _saved(small, "PNG")
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(3)]
    return [
        *(
            whole,
            _saved(Image.new("RGB", (1, 1)), "PNG"),
            whole[:40],
            whole[:-20],
            whole[:8],
            whole + b"x" * 99,
        ),
        _saved(Image.new("I;16", (16, 16)), "PNG"),
        _saved(palette, "PNG", transparency=b"\0\x80\xff\x10"),
        *(_saved(Image.new(mode, (16, 16)), "PNG") for mode in ("RGBA", "LA", "1", "L")),
        *(_saved(Image.new(mode, (16, 16)), "JPEG") for mode in ("CMYK", "L")),
        _saved(small, "JPEG", exif=exif),
        _saved(small, "JPEG")[:-30],
        *(
            _saved(frames[0], kind, save_all=True, append_images=frames[1:])
            for kind in ("PNG", "WEBP", "GIF")
        ),
        *(_saved(small, kind) for kind in ("BMP", "TIFF", "WEBP")),
        _saved(small, "BMP").replace(struct.pack("<i", 16), struct.pack("<i", -(2**31)), 1),
        _png(30_000, 30_000, zlib.compress(bytes(1000))),
        _png(60_000, 100, zlib.compress(bytes(1 << 20))),
        *(_png(0, 0, b""), _png(16, 16, b"\0" * 30), _png(16, 16, zlib.compress(b"\5" * 48), 3, 8)),
        *(b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 20, b"<svg/>", b"%PDF-1.4", b"\0", b"GIF89a", b"BM"),
    ]


def _tensors() -> list[bytes]:
    from safetensors.numpy import save

    def raw(header: Any, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def one(name: str, **changes: Any) -> dict[str, Any]:
        return {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}

    nan = np.full((1, 4, 2, 2), np.nan, np.float32)
    return [
        *(save({name: np.ones(5, np.float32)}) for name in ("latent", "embeds", "sigmas", "timesteps", "x")),
        *(save({"latent": nan}), save({"latent": np.ones((1, 4, 16, 16), np.float16)})),
        *(save({"sigmas": np.full(4, np.inf, np.float32)}), save({"sigmas": np.ones((20_000,), np.float32)})),
        *(save({"timesteps": -np.ones(3, np.int64)}), save({"timesteps": np.ones((2, 2), np.int64)})),
        *(save({"embeds": np.ones((1, 77, 3), np.float32)}), save({"latent": np.ones((), np.float32)})),
        *(save({"latent": np.ones(3, np.uint8)}), save({"latent": np.ones((0, 4), np.float32)}), save({})),
        *(struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**40), struct.pack("<Q", 0), b"\0" * 7),
        *(raw(b"{"), raw(b"[" * DEEP), raw(b"null"), raw({"latent": 1}), raw({"__metadata__": {"a": "b"}})),
        *(raw(one("latent"), bytes(4)), raw(one("latent", shape=[2**40, 2**40]), bytes(4))),
        *(raw(one("latent", data_offsets=[4, 0])), raw(one("latent", data_offsets=[0, 2**62]))),
        *(raw(one("sigmas", shape=[-1]), bytes(4)), raw(one("sigmas", dtype="F8_E4M3"), bytes(4))),
        *(raw(one("embeds", dtype="\ud800"), bytes(4)), raw(one("n" * 5000), bytes(4))),
        raw({**one("latent"), **one("pooled")}, bytes(4)),
    ]


def _pickles() -> list[bytes]:
    good = pickle.dumps(Image.new("RGB", (8, 8)), 4)
    loop: list[Any] = []
    loop.append(loop)
    return [
        *(good, good[:-5], pickle.dumps(loop, 4), pickle.dumps(print, 4), pickle.dumps({"a": [1, 2]}, 4)),
        *(pickle.dumps("x" * 5000, 4), pickle.dumps(10**4000, 4), b"\x80\4" + b"(" * DEEP + b".", b"\x80\4."),
        *(
            b"\x80\4\x8d" + b"\xff" * 8,
            b"\x80\4" + b"N2" * 50 + b".",
            b"\x80\3cos\nsystem\nX\2\0\0\0ls\x85R.",
        ),
    ]


def _form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n%s\r\n\r\n%s\r\n" % (head.encode("latin-1"), data) for head, data in parts) + end


_FIELD = 'Content-Disposition: form-data; name="{}"'
_FILE = 'Content-Disposition: form-data; name="{}"; filename="a.png"\r\nContent-Type: image/png'
_PICTURES = _pictures()
PICTURES = [
    *map(text64, _PICTURES),
    "data:image/png;base64," + text64(_PICTURES[0]),
    "data:,",
    "data:;base64,=",
    "====",
]
TENSORS = [text64(data) for data in _tensors()]
PICKLES = [text64(data) for data in _pickles()]
FORMS = [
    _form((_FIELD.format("prompt"), b"x"), (_FILE.format("image"), _PICTURES[0])),
    *(_form((_FIELD.format("prompt"), b"x"), (_FILE.format("image"), picture)) for picture in _PICTURES[1:]),
    _form((_FIELD.format("prompt"), b"\xff\xfe"), (_FILE.format("image"), b"")),
    _form((_FIELD.format("prompt"), b"x"), (_FIELD.format("prompt"), b"y"), (_FILE.format("image[]"), b"")),
    _form((_FIELD.format("steps"), b"9" * 5000), (_FILE.format("image"), _PICTURES[0])),
    _form((_FIELD.format("prompt"), b"x"), (_FILE.format("mask"), b"x"), (_FILE.format("k" * 3000), b"x")),
    *(
        _form((head, b"x"))
        for head in ("Content-Disposition: form-data", "Content-Disposition: form-data; name")
    ),
    *(
        _form((head, b"x"))
        for head in ("", "X", _FIELD.format("a\0b"), _FIELD.format('"'), _FIELD.format("\xff"))
    ),
    _form(("Content-Disposition: form-data; name*=utf-8''%ff; filename*=x", b"x")),
    *(_form((_FIELD.format("prompt"), b"x"), end=b""), b"--b", b"--b--\r\n", b"", b"--c\r\n\r\n"),
    _form(*((_FIELD.format(f"f{i}"), b"1") for i in range(300))),
]
