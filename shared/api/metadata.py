"""What a picture's file says of how it was made: A1111's infotext, and a body for /generate.

How files hold the two texts: shared.api.embedded. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from shared.api.a1111_samplers import AUTOMATIC, sampler_labels
from shared.api.codecs import LEFT_OUT, check_image
from shared.api.embedded import KEY, PARAMETERS, Metadata, read
from shared.api.faults import FieldProblem, RequestError
from shared.api.hashes import FileHashes
from shared.api.jobs import Order
from shared.api.lora_dir import SUFFIX, LoraNameError, find_lora, is_named, lora_files
from shared.api.replies import Reply
from shared.api.requests import COMMON_FIELDS, GenerateRequest
from shared.launch.flags import HostConfig

_FORMATS = ("png", "jpeg", "webp")
_NOT_MAKING = frozenset({"metadata", "return_latent"})  # they change no pixel
MAX_JPEG_EXIF = 65533  # bytes of a JPEG's segment
# A name stands at the start or behind a comma, or the time would grow with the square of the length.
_PAIR = re.compile(r'(?:^|,)\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)')
_SIZE = re.compile(r"(\d+)x(\d+)")


def made_by(order: Order, reply: Reply, config: HostConfig) -> Metadata | None:
    """What the reply's files tell of the order; None where they have no place for it, or shall not.

    A JPEG's EXIF has 64 KB. Of longer texts the body is left out, and then A1111's; `reply.warnings` says so.
    """
    if order.request.metadata is False or reply.format not in _FORMATS:
        return None
    # Of a picture that was prepared or is pasted into another one no body of /generate gives it again.
    body = "" if order.retouched else json.dumps(body_of(order.last, reply.seed, config))
    made = Metadata(reply.infotext, body)
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


def infotext(order: Order, reply: Reply, config: HostConfig, hashes: FileHashes) -> str:
    """A picture's parameters as A1111 writes them: the prompts, and a line from "Steps" to "Lora hashes".

    With a second pass, steps and size are the first one's. Hashes that are not computed yet are left out.
    """
    request, second = order.request, order.second
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
        "Model hash": hashes.model(config),
        "Model": config.model_id,
        "Denoising strength": _strength(request, config),
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
    if config.refiner and (start := order.last.refiner_start or 1) < 1:
        told |= {"Refiner": config.refiner_id, "Refiner switch at": start}
    if order.retouched is not None:
        told |= order.retouched.told
    told["Lora hashes"] = _lora_hashes(order.last, config, hashes)
    return _infotext(f"{request.positive or ''}{networks}", request.negative or "", told)


def _strength(request: GenerateRequest, config: HostConfig) -> float | None:
    """How much of the schedule is run, where that is not all of it by the nature of the request."""
    if request.strength is not None or not request.starts(config):
        return request.strength
    start = config.spec.start("image" if request.mask is None else "inpaint", bool(config.control_net))
    return None if start is None else start.strength


def _lora_hashes(request: GenerateRequest, config: HostConfig, hashes: FileHashes) -> str | None:
    """Those of the LoRAs that made the picture, by name: the request's and the launch's."""
    used: dict[str, str | None] = {}
    asked = dict(request.lora_scales or {})
    for name in asked:
        with contextlib.suppress(LoraNameError):
            path = find_lora(config, name, config.lora or ()).path
            used[_public(name, config)] = hashes.lora(path) if asked[name] else None
    for path, scale in (config.lora or {}).items():
        if scale and not any(is_named(path, name) for name in asked):
            used[_public(path, config)] = hashes.lora(path)
    return ", ".join(f"{name}: {short}" for name, short in used.items() if short) or None


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
