"""What a picture's file says of how it was made: A1111's infotext, and a body for /generate.

PNG has both as text chunks, `parameters` and `multigpu_diffusion`. JPEG and WebP have them in EXIF: the text
as UserComment, as A1111 writes it (through piexif); the body as ImageDescription, which takes ASCII, with
Software to tell whose it is. Imports no torch.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo, putchunk
from pydantic_core import PydanticCustomError

from shared.api.a1111_samplers import AUTOMATIC, sampler_labels
from shared.api.codecs import IMAGE_INPUTS, LEFT_OUT, check_image
from shared.api.jobs import SecondPass
from shared.api.lora_dir import SUFFIX, is_named, lora_files
from shared.api.requests import COMMON_FIELDS, FieldProblem, GenerateRequest, Reply, RequestError
from shared.launch.flags import HostConfig

KEY = "multigpu_diffusion"
PARAMETERS = "parameters"
_FORMATS = ("png", "jpeg", "webp")
_NOT_MAKING = frozenset({"metadata", "return_latent"})  # they change no pixel
_IHDR_END = 33  # bytes of a PNG's signature and its first chunk
MAX_JPEG_EXIF = 65533  # bytes of a JPEG's segment
_UNICODE = b"UNICODE\0"  # EXIF's name of the encoding, in front of a UserComment
# A name stands at the start or behind a comma, or the time would grow with the square of the length.
_PAIR = re.compile(r'(?:^|,)\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_BROKEN_EXIF = (SyntaxError, struct.error, ValueError, TypeError, KeyError, OSError)


@dataclass(frozen=True)
class Metadata:
    """The two texts of one file."""

    parameters: str
    body: str  # JSON in ASCII

    def in_png(self, file: bytes) -> bytes:
        """A PNG with the texts before its pixels."""
        info, out = PngInfo(), io.BytesIO()
        for name, text in ((PARAMETERS, self.parameters), (KEY, self.body)):
            if text:
                info.add_text(name, text)
        out.write(file[:_IHDR_END])
        for kind, data, _ in info.chunks:
            putchunk(out, kind, data)
        out.write(memoryview(file)[_IHDR_END:])
        return out.getvalue()

    def exif(self) -> bytes:
        """The texts as EXIF with its head, big endian as piexif's: readers differ on the comment's order."""
        exif = Image.Exif()
        exif.endian = ">"
        if self.body:
            exif[Base.ImageDescription], exif[Base.Software] = self.body, KEY
        if self.parameters:
            comment = _UNICODE + self.parameters.encode("utf-16-be")
            exif.get_ifd(IFD.Exif)[Base.UserComment] = comment
        return exif.tobytes()


def made_by(
    request: GenerateRequest, reply: Reply, config: HostConfig, second: SecondPass | None = None
) -> Metadata | None:
    """What the reply's files tell of the request; None where they have no place for it, or shall not.

    A JPEG's EXIF has 64 KB. Of longer texts the body is left out, and then A1111's; `reply.warnings` says so.
    """
    if request.metadata is False or reply.format not in _FORMATS:
        return None
    last = request if second is None else second.request
    body = json.dumps(body_of(last, reply.seed, config))
    made = Metadata(infotext(request, reply, config, second), body)
    if reply.format != "jpeg":
        return made
    for left in (made, replace(made, body="")):
        if len(left.exif()) <= MAX_JPEG_EXIF:
            break
    else:
        left = replace(made, body="", parameters="")
    if left != made:
        names = " and ".join(n for n, t in ((KEY, left.body), (PARAMETERS, left.parameters)) if not t)
        reply.warnings.append(f"the prompts are too long for a JPEG's metadata; left out: {names}")
    return left if left.parameters else None


def body_of(request: GenerateRequest, seed: int, config: HostConfig) -> dict[str, Any]:
    """A body of POST /generate for this one picture again.

    Pictures and tensors stand as LEFT_OUT, which /generate refuses by name, since without them it would be
    another picture.

    Args:
        request: as `GenerateRequest.filled` gives it.
        seed: the picture's own.
    """
    taken = (config.spec.fields | COMMON_FIELDS) - _NOT_MAKING
    body: dict[str, Any] = {}
    for name in type(request).model_fields:
        value = getattr(request, name)
        if name not in taken or value is None:
            continue
        files = value if isinstance(value, list) else [value]
        body[name] = LEFT_OUT if any(isinstance(file, bytes) for file in files) else value
    if request.lora_scales:
        body["lora_scales"] = {_public(n, config): scale for n, scale in request.lora_scales.items()}
    return body | {"seed": seed, "pictures": 1}


def _public(name: str, config: HostConfig) -> str:
    """A LoRA's name; of a path of the server the shortest end that means no other LoRA."""
    if not name.startswith("/"):
        return name
    known = {
        *(config.lora or {}),
        *(config.motion_adapter_lora or {}),
        *(file.path for file in lora_files(config)),
    }
    parts = Path(name.removesuffix(SUFFIX)).parts[1:]
    ends = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return next((end for end in ends if sum(is_named(path, end) for path in known) < 2), LEFT_OUT)


def infotext(
    request: GenerateRequest, reply: Reply, config: HostConfig, second: SecondPass | None = None
) -> str:
    """A picture's parameters as A1111 writes them: the prompts, and a line from "Steps" to "Model".

    With a second pass, steps and size are the first one's.
    """
    loras = {_public(name, config): scale for name, scale in (request.lora_scales or {}).items()}
    networks = "".join(f" <lora:{name}:{_number(scale)}>" for name, scale in loras.items())
    scheduler = request.scheduler or config.scheduler or AUTOMATIC
    name = scheduler["scheduler"] if isinstance(scheduler, dict) else scheduler
    sampler, schedule = sampler_labels(name)
    told = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": request.cfg,
        "Seed": reply.seed,
        "Size": f"{reply.width}x{reply.height}",
        "Model": config.model_id,
        "Denoising strength": request.strength,
        "Clip skip": request.clip_skip + 1
        if request.clip_skip
        else None,  # theirs counts the last layer as 1
    }
    if second is not None:
        told |= {
            "Size": f"{request.width}x{request.height}",
            "Denoising strength": second.request.strength,
            "Hires resize": f"{second.request.width}x{second.request.height}",
            "Hires steps": second.request.steps,
            "Hires upscaler": second.upscaler,
        }
    return _infotext(f"{request.positive or ''}{networks}", request.negative or "", told)


def _infotext(prompt: str, negative: str, told: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name}: {_quoted(value)}" for name, value in told.items() if value is not None)
    text = f"{prompt}\n" + (f"Negative prompt: {negative}\n" if negative else "") + values
    return text.replace("\0", "").strip()  # it ends a text of PNG


def _number(value: float) -> str:
    """7 of 7.0, as A1111's pages give numbers."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _quoted(value: Any) -> str:
    text = _number(value) if isinstance(value, int | float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def png_info(data: dict[str, Any]) -> dict[str, Any]:
    """A1111's answer of png-info: `info` and the other texts of a file, and `parameters`, `info` taken apart.

    Raises:
        RequestError: 400 where `image` is no picture.
    """
    try:
        info, items = read(check_image(data.get("image")))
    except PydanticCustomError as error:
        raise RequestError(400, [FieldProblem("", f"image: {error.message()}")]) from None
    return {"info": info, "items": items, "parameters": parse_infotext(info)}


def read(file: bytes) -> tuple[str, dict[str, str]]:
    """A1111's infotext of a checked picture, "" where it has none, and the file's other texts by name."""
    with Image.open(io.BytesIO(file), formats=IMAGE_INPUTS) as image:
        if image.format == "PNG":
            image.load()  # its texts may stand behind its pixels
        items = {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}
        try:
            exif = image.getexif()
            comment, body = exif.get_ifd(IFD.Exif).get(Base.UserComment), exif.get(Base.ImageDescription)
            ours = exif.get(Base.Software) == KEY
        except _BROKEN_EXIF:
            comment, body, ours = None, None, False
    if ours and isinstance(body, str):
        items[KEY] = body
    info = items.pop(PARAMETERS, "")
    return _comment_text(comment) or info, items


def _comment_text(comment: Any) -> str:
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else ""
    if comment.startswith(_UNICODE):
        return comment[len(_UNICODE) :].decode("utf-16-be", "replace")
    for prefix in (b"ASCII\0\0\0", bytes(8)):
        comment = comment.removeprefix(prefix)
    return comment.decode("utf-8", "ignore").strip("\0")


def parse_infotext(text: str) -> dict[str, str]:
    """An infotext as A1111 takes it apart: Prompt, Negative prompt, Steps, …; sizes as Size-1 and Size-2.

    The last line holds the values where it has three of them.
    """
    if not text.strip():
        return {}
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    at = "Prompt"
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            at, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        prompts[at].append(line)
    found = {name: "\n".join(part).lstrip("\n") for name, part in prompts.items()}
    for name, value in pairs:
        value = _unquoted(value.strip())
        if size := _SIZE.fullmatch(value):
            found |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            found[name] = value
    return found | {"Clip skip": found.get("Clip skip", "1")}  # A1111 leaves a 1 out


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
