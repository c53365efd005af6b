"""Orders and replies as JSON and bytes, as the store keeps them; nothing is pickled. Imports no torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from PIL import Image
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from shared.api.faults import FieldProblem
from shared.api.jobs import JobError, Order, SecondPass
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.retouch import Paste, Retouched

_FILES = ("output", "latent", "pictures")  # of a Reply; all else of it is JSON


class StoredError(ValueError):
    """What is stored cannot be read, as by another version of this program."""


def slim(order: Order) -> Order:
    """An order without the pictures and tensors that came with it: what a finished job is listed with."""
    second = order.second
    if second is not None:
        second = replace(second, request=_without_files(second.request))
    retouched = None if order.retouched is None else Retouched(order.retouched.told)
    return Order(_without_files(order.request), second, retouched)


def _without_files(request: GenerateRequest) -> GenerateRequest:
    found = {name: getattr(request, name) for name in request.model_fields_set}
    return request.model_copy(update={name: None for name, value in found.items() if _holds_bytes(value)})


def _holds_bytes(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, list) and any(isinstance(v, bytes) for v in value))


def dump_order(order: Order) -> bytes:
    """An order as JSON, its pictures and tensors as base64."""
    second, retouched = order.second, order.retouched
    data: dict[str, Any] = {"request": _plain_request(order.request)}
    if second is not None:
        data["second"] = _fields_of(second) | {"request": _plain_request(second.request)}
    if retouched is not None:
        paste = retouched.paste
        data["retouched"] = {
            "told": dict(retouched.told),
            "paste": paste and {"picture": _png(paste.picture), "mask": _png(paste.mask), "box": paste.box},
        }
    return to_json(data)


def load_order(data: bytes) -> Order:
    """What `dump_order` gave; every value is checked again. Raises StoredError."""
    try:
        read = from_json(data)
        second, retouched = read.get("second"), read.get("retouched")
        if second is not None:
            second["request"] = GenerateRequest.model_validate(second["request"])
            second = SecondPass(**second | {"covers": tuple(second["covers"])})
        if retouched is not None:
            paste = retouched["paste"]
            paste = paste and Paste(
                _picture(paste["picture"]), _picture(paste["mask"]), paste["box"] and tuple(paste["box"])
            )
            retouched = Retouched(retouched["told"], paste)
        return Order(GenerateRequest.model_validate(read["request"]), second, retouched)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        names = ", ".join(str(fault["loc"][0]) if fault["loc"] else fault["msg"] for fault in faults)
        raise StoredError(f"its request cannot be read by this version: {names}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise StoredError(f"its request cannot be read by this version: {error}") from None


def _plain_request(request: GenerateRequest) -> dict[str, Any]:
    return {name: _plain(getattr(request, name)) for name in sorted(request.model_fields_set)}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _fields_of(made: Any) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in fields(made)}


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return base64.b64encode(out.getvalue()).decode()


def _picture(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def dump_error(error: JobError) -> bytes:
    """An error as JSON."""
    problems = [problem.told() for problem in error.problems]
    return to_json({"status": error.status, "message": str(error), "problems": problems})


def load_error(data: bytes) -> JobError:
    """What `dump_error` gave."""
    read = from_json(data)
    problems = [FieldProblem(p["field"], p["problem"]) for p in read["problems"]]
    return JobError(read["status"], read["message"], problems)


def dump_replies(replies: Sequence[Reply]) -> tuple[bytes, list[bytes]]:
    """Encoded replies as JSON, and their files one after the other; the JSON says where each lies."""
    files: list[bytes] = []
    at = 0

    def place(data: bytes) -> tuple[int, int]:
        nonlocal at
        files.append(data)
        at += len(data)
        return at - len(data), len(data)

    entries = []
    for reply in replies:
        entry = {name: value for name, value in _fields_of(reply).items() if name not in _FILES}
        entry["output"] = [place(data) for data in reply.output]
        entry["latent"] = None if reply.latent is None else place(reply.latent)
        entries.append(entry)
    return to_json(entries), files


def load_replies(data: bytes, read: Callable[[int, int], bytes]) -> list[Reply]:
    """What `dump_replies` gave. Raises StoredError.

    Args:
        read: gives so many bytes from a place of the files, by offset and length.
    """
    try:
        return [_reply(entry, read) for entry in from_json(data)]
    except (TypeError, KeyError, ValueError) as error:
        raise StoredError(f"its answer cannot be read by this version: {error}") from None


def _reply(entry: dict[str, Any], read: Callable[[int, int], bytes]) -> Reply:
    latent = entry["latent"]
    files = {"output": [read(*place) for place in entry["output"]], "latent": latent and read(*latent)}
    return Reply(**entry | files)
