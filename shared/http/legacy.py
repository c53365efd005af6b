"""--legacy_pickle: the wire format of the original project's ComfyUI and LocalAI clients.

Pictures and tensors come and go as base64(pickle). What comes is read by `shared.http.unpickle`, which calls
nothing that a pickle names.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import os
import pickle
import signal
import struct
from typing import Any

from flask import Response, jsonify
from flask import request as http

from shared.api.faults import FieldProblem, RequestError
from shared.api.replies import Reply
from shared.api.requests import COMMON_FIELDS, GenerateRequest
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.incoming import check_json_type, json_body
from shared.http.routes import App, Route
from shared.http.unpickle import ForbiddenPickleError, Picture, Tensor, unpickle
from shared.launch.flags import HostConfig

PICTURES = frozenset({"image", "ip_image", "control_image"})
TENSORS = {
    "latent": "latent",
    "sigmas": "sigmas",
    "timesteps": "timesteps",
    "positive_embeds": "embeds",
    "negative_embeds": "embeds",
}
_PROTOCOL = 4
# Fields of theirs that have no meaning here: compel is a launch flag.
_MEANINGLESS = frozenset({"use_compel"})


def translate(data: dict[str, Any], config: HostConfig) -> dict[str, Any]:
    """A request of theirs or of ours -> ours, with PNG and safetensors in place of pickles.

    In a request without output_format (theirs), fields that the type does not take are left out, as the
    original hosts did.

    Raises:
        RequestError: 400 with every field whose pickle is refused.
    """
    theirs = is_legacy(data, config)
    taken = config.spec.fields | COMMON_FIELDS
    problems: list[FieldProblem] = []
    ours: dict[str, Any] = {}
    if theirs:
        data = _started(data)
    for name, value in data.items():
        if theirs and (name in _MEANINGLESS or name in GenerateRequest.model_fields.keys() - taken):
            continue
        ours[name] = value
        pickled = _pickle_of(value) if name in PICTURES or name in TENSORS else None
        if pickled is None:
            continue
        try:
            ours[name] = _plain(name, unpickle(pickled))
        except ForbiddenPickleError as error:
            problems.append(FieldProblem(name, f"the pickle {error}"))
    if problems:
        raise RequestError(400, problems)
    return ours


def _started(data: dict[str, Any]) -> dict[str, Any]:
    """Without `denoise` where there is no `latent` for it; the stock pack always sends it."""
    part = data.get("denoise")
    known = isinstance(part, int | float) and not isinstance(part, bool) and 0 <= part <= 1
    if not known or data.get("latent") is not None:
        return data
    return {name: value for name, value in data.items() if name != "denoise"}


def is_legacy(data: dict[str, Any], config: HostConfig) -> bool:
    """Whether the answer to this request is pickled."""
    return config.legacy_pickle and not data.get("output_format")


def _pickle_of(value: Any) -> bytes | None:
    """The bytes of base64(pickle), None for anything else, which the request's own checks judge."""
    if not isinstance(value, str):
        return None
    try:
        data = base64.b64decode(value)
    except (binascii.Error, ValueError):
        return None
    # A safetensors file may begin with the same two bytes, but its ninth opens a JSON object.
    looks_pickled = data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5") and data[8:9] != b"{"
    return data if looks_pickled else None


def _plain(name: str, value: Any) -> str:
    """A picture or tensor of a pickle as the base64 that the field takes without pickles."""
    if name in PICTURES:
        if not isinstance(value, Picture):
            raise ForbiddenPickleError("holds no PIL picture")
        return base64.b64encode(value.png()).decode()
    tensors: dict[str, Tensor] = {}
    match value:
        case Tensor():
            tensors[TENSORS[name]] = value
        case [[Tensor() as embeds, {**extra}]] if TENSORS[name] == "embeds":  # ComfyUI's CONDITIONING
            tensors["embeds"] = embeds
            if isinstance(pooled := extra.get("pooled_output"), Tensor):
                tensors["pooled"] = pooled
        case _:
            raise ForbiddenPickleError("holds no torch tensor")
    return base64.b64encode(_safetensors(tensors)).decode()


_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file: the header's length, the header, the tensors one after the other.

    Written out here because `safetensors.serialize` differs between versions and numpy has no bfloat16.
    """
    header, start = {}, 0
    for name, tensor in tensors.items():
        end = start + len(tensor.data)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(t.data for t in tensors.values())


def answer(reply: Reply, config: HostConfig) -> dict[str, Any]:
    """The JSON of a reply in png, pickled: `output` a PIL image or a list of them, `latent` a torch tensor.

    `latent` is given for types that make pictures from a prompt; the other samplers of the original node
    pack cannot read an answer that has it.
    """
    from PIL import Image

    pictures = []
    for data in reply.output:
        with Image.open(io.BytesIO(data)) as image:
            plain = image.copy()  # a PIL.Image.Image, not the plug-in's class
        plain.info = {}
        pictures.append(plain)
    is_image = config.spec.output == "image"
    body = reply.answer() | {
        "output": _pickled(pictures[0] if is_image else pictures),
        "format": "pickle",
        "is_image": is_image,
        "latent": None,
    }
    if reply.latent is not None and is_image and config.spec.image != "needed":
        body["latent"] = _pickled(_torch_latent(reply.latent))
    return body


def _pickled(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value, protocol=_PROTOCOL)).decode()


def _torch_latent(data: bytes) -> Any:
    import safetensors.torch  # torch is loaded by then: it made the latent

    return safetensors.torch.load(data)["latent"]


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add /apply, /offload and /close, which the newer original pack calls around /generate."""
    config = dispatcher.config

    @app.serve("POST", "/apply", Route("Legacy: whether the launch is as asked; nothing is loaded"))
    def apply() -> Response:
        check_json_type()
        problems = _unlike_launch(json_body(), config)
        if problems:
            raise ApiError.from_request(RequestError(409, problems))
        dispatcher.check_ready()
        return jsonify({"message": "OK"})

    @app.serve("GET", "/offload", Route("Legacy: moves nothing"))
    @app.serve("POST", "/offload", Route("Legacy: moves nothing"))
    def offload() -> Response:
        _refuse_browsers()
        dispatcher.check_ready()
        message = (
            "OK: idle weights are on the CPU already"
            if config.offloads
            else "OK: nothing was moved; --enable_model_cpu_offload keeps idle models on the CPU"
        )
        return jsonify({"message": message})

    @app.serve("GET", "/close", Route("Legacy: ends the host"))
    @app.serve("POST", "/close", Route("Legacy: ends the host"))
    def close() -> Response:
        _refuse_browsers()
        response = jsonify({"message": "OK"})
        response.call_on_close(_end_launch)
        return response


def _refuse_browsers() -> None:
    """Raise ApiError 403 for a request that another site's page makes; a GET needs no Origin."""
    if http.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise ApiError(403, f"pages of other sites may not call {http.path}")


def _end_launch() -> None:
    """SIGTERM, as an operator sends it: to the launcher, which ends all ranks, where there is one."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    os.kill(os.getppid() if launched else os.getpid(), signal.SIGTERM)


# Their names of flags that both have; paths come as {"checkpoint": path}.
_FLAGS = {"pipeline_type": "type", "synced_steps": "warm_up_steps"}


def _unlike_launch(data: dict[str, Any], config: HostConfig) -> list[FieldProblem]:
    """What /apply asks for and this launch is not: its model is loaded from its flags, once."""
    problems = []
    flags = {field.name for field in dataclasses.fields(config)}
    backend = data.get("backend_config")
    given = {n: v for n, v in data.items() if n != "backend_config"}
    for name, value in (given | (backend if isinstance(backend, dict) else {})).items():
        if isinstance(value, dict) and isinstance(value.get("checkpoint"), str):
            value = value["checkpoint"]
        if value in (None, False, "", "default", 0) or value == {} or value == []:
            continue
        flag = _FLAGS.get(name, name)
        own = getattr(config, flag) if flag in flags else None
        if own is None and flag in ("variant", "model_n"):  # chosen by the launch itself
            continue
        if own is None and flag == "warm_up_steps":
            own = 3  # what a schedule of 18 steps and more has by itself
        same = own == value
        if isinstance(own, str) and isinstance(value, str):
            same = same or os.path.realpath(own) == os.path.realpath(value)
        if not same:
            what = (
                f"the host runs with --{flag}={own}" if own is not None else "is set when a host is started"
            )
            problems.append(FieldProblem(name, f"{what}; got {str(value)[:100]}"))
    return problems
