"""An external backend of LocalAI: pictures and videos, made by a host of multigpu diffusion.

python backend.py --addr 127.0.0.1:50051

Failures are gRPC errors with the host's message, because LocalAI does not look at `Result.success`.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import grpc

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from host import Host, HostError, HostProcess  # noqa: E402
from options import (  # noqa: E402
    IMG2IMG_WITH_CONTROL,
    STRENGTH_WITH_CONTROL,
    VIDEO_TYPES,
    LoadPlan,
    OptionError,
    plan,
)

messages, services = grpc.protos_and_services("backend.proto")  # grpcio-tools; found on sys.path

TOKEN = "LOCALAI_GRPC_AUTH_TOKEN"
MISMATCH = "model identity mismatch"  # LocalAI searches for this text
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
    0: grpc.StatusCode.UNAVAILABLE,
}
VIDEOS = {".gif": "gif", ".webp": "webp"}  # any other name gets mp4


class Gone(Exception):
    """The caller of an RPC has left."""


class Backend(services.BackendServicer):  # type: ignore[name-defined]
    """Serves one model: one host, started here or running already."""

    def __init__(self) -> None:
        self.host: Host | None = None
        self.process: HostProcess | None = None
        self.plan = LoadPlan()
        self.model = ""
        self.type = ""
        self.controlled = False  # whether the host has a ControlNet
        self._loading = threading.Lock()

    def Health(self, request: Any, context: grpc.ServicerContext) -> Any:
        return messages.Reply(message=b"OK")

    def Status(self, request: Any, context: grpc.ServicerContext) -> Any:
        return messages.StatusResponse(state=self._state())

    def _state(self) -> int:
        states = messages.StatusResponse
        if self._loading.locked():
            return states.BUSY
        if self.host is None:
            return states.UNINITIALIZED
        try:
            said = self.host.health()["state"]
        except HostError:
            return states.ERROR
        known = {"ready": states.READY, "busy": states.BUSY, "loading": states.BUSY}
        return known.get(said, states.ERROR)

    def LoadModel(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._loading:
            self.end()
            try:
                self.plan = plan(request)
                self._load(_check(context))
            except OptionError as error:
                self.end()
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except HostError as error:
                self.end()
                context.abort(CODES.get(error.status, grpc.StatusCode.INTERNAL), str(error))
            except Gone:
                context.abort(grpc.StatusCode.CANCELLED, "LoadModel was cancelled")
            self.model = request.Model
        return messages.Result(message="OK", success=True)

    def _load(self, check: Callable[[], None]) -> None:
        wanted = self.plan
        if wanted.host_url:
            host = Host(wanted.host_url, wanted.api_key)
            if not host.ready():
                raise HostError(f"the host at {host.url} is still loading", 503)
        else:
            flags = list(wanted.flags)
            self.process = HostProcess(wanted.project, wanted.backend, wanted.ranks, flags, wanted.python)
            print(f"starting a host; its log: {self.process.log}", file=sys.stderr, flush=True)
            try:
                self.process.wait_until_ready(check)
            except HostError as error:
                raise HostError(str(error), 400 if "error: --" in str(error) else 500) from None
            host = self.process.host
        launch = host.launch()
        self.controlled = "control_image" in launch["fields"]
        self.seen = launch["fields"].get("image", {}).get("most", 1) if launch["edits"] else 0
        """How many pictures the model looks at beside the prompt; 0: a picture is where it starts."""
        if self.controlled and wanted.strength is not None:
            raise OptionError(STRENGTH_WITH_CONTROL)
        if self.controlled and wanted.img2img:
            raise OptionError(IMG2IMG_WITH_CONTROL)
        self.type = str(host.health()["type"])
        self.host = host

    def GenerateImage(self, request: Any, context: grpc.ServicerContext) -> Any:
        host = self._ready_for(request, context)
        if self.type in VIDEO_TYPES:
            _refuse(context, f"type {self.type} makes videos; ask GenerateVideo")
        body = _enabled(
            request.EnableParameters,
            negative_prompt=("negative", request.negative_prompt),
            num_inference_steps=("steps", request.step),
            clip_skip=("clip_skip", request.CLIPSkip),
        )
        body |= {
            "positive": request.positive_prompt,
            "seed": request.seed,
            "output_format": "png",
        }
        if self.type != "sdup":  # the upscaler's size is that of its picture
            body |= {"width": request.width, "height": request.height}
        started = _start(request.src, context)
        if "image" in started and self.controlled and "mask" not in started:
            started = {"control_image": started["image"]}
        references = list(request.ref_images) if self.seen and "mask" not in started else []
        if references:
            given = [_file(path, "ref_images", context) for path in references]
            if (count := len(given)) > self.seen:
                _refuse(context, f"ref_images: at most {self.seen} for type {self.type}; got {count}")
            started = {"image": given[0] if count == 1 else given}
        body |= started
        if "image" in started and (not self.seen or "mask" in started):
            body["strength"] = self.plan.strength
        if "mask" in started:  # LocalAI names a fixed size, and picture and mask again as ref_images
            body |= {"width": None, "height": None}
        elif references:
            pass
        elif len(request.ref_images) > 1:
            _refuse(context, f"ref_images: one picture, for the IP-Adapter; got {len(request.ref_images)}")
        else:
            body["ip_image"] = _file("".join(request.ref_images), "ref_images", context)
        self._make(host, body, request.dst, context)
        return messages.Result(message="OK", success=True)

    def GenerateVideo(self, request: Any, context: grpc.ServicerContext) -> Any:
        host = self._ready_for(request, context)
        if self.type not in VIDEO_TYPES:
            _refuse(context, f"type {self.type} makes pictures; ask GenerateImage")
        for name in ("end_image", "audio"):
            if getattr(request, name):
                _refuse(context, f"{name}: no type takes one")
        body: dict[str, Any] = {
            "positive": request.prompt,
            "negative": request.negative_prompt,
            "image": _file(request.start_image, "start_image", context, or_base64=True),
            "width": request.width,
            "height": request.height,
            "frames": request.num_frames,
            "fps": request.fps,
            "seed": request.seed,
            "cfg": round(request.cfg_scale, 6),
            "steps": request.step,
            "output_format": VIDEOS.get(Path(request.dst).suffix.lower(), "mp4"),
        }
        if request.start_image and self.type == "ad":
            body["strength"] = self.plan.strength
        body |= {name: _value(text) for name, text in request.params.items()}
        self._make(host, body, request.dst, context)
        return messages.Result(message="OK", success=True)

    def Free(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._loading:
            self.end()
        return messages.Result(message="OK", success=True)

    def end(self) -> None:
        """End the host that was started here; nothing is loaded then."""
        process, self.process, self.host, self.model, self.type = self.process, None, None, "", ""
        if process is not None:
            process.stop()

    def _ready_for(self, request: Any, context: grpc.ServicerContext) -> Host:
        if self.host is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no model is loaded; call LoadModel first")
        if request.ModelIdentity and self.model and request.ModelIdentity != self.model:
            told = f"{MISMATCH}: loaded {self.model!r}, requested {request.ModelIdentity!r}"
            context.abort(grpc.StatusCode.NOT_FOUND, told)
        if not request.dst:
            _refuse(context, "dst: needed, the file to write")
        assert self.host is not None
        return self.host

    def _make(self, host: Host, body: dict[str, Any], dst: str, context: grpc.ServicerContext) -> None:
        """Ask, and write the file; zeros and empty texts of protobuf mean "not given"."""
        given = {name: value for name, value in body.items() if value or name == "seed"}
        try:
            answer = host.generate(self.plan.defaults | given, check=_check(context), on_away=_told)
        except Gone:
            context.abort(grpc.StatusCode.CANCELLED, "cancelled")
        except HostError as error:
            context.abort(CODES.get(error.status, grpc.StatusCode.INTERNAL), str(error))
        for warning in answer.get("warnings", []):
            _told(f"the host at {host.url}: warning: {warning}")
        try:
            Path(dst).write_bytes(base64.b64decode(answer["output"]))
        except OSError as error:
            context.abort(grpc.StatusCode.INTERNAL, f"dst: cannot write {dst!r}: {error.strerror}")


def _told(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check(context: grpc.ServicerContext) -> Callable[[], None]:
    def check() -> None:
        if not context.is_active():
            raise Gone

    return check


def _refuse(context: grpc.ServicerContext, message: str) -> NoReturn:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
    raise AssertionError("abort raises")


def _enabled(parameters: str, **known: tuple[str, Any]) -> dict[str, Any]:
    """The fields that `EnableParameters` lists, by the names of diffusers; empty: all, "none": none."""
    listed = (
        [name.strip() for name in parameters.split(",")] if parameters not in ("", "all") else list(known)
    )
    return {field: value for name, (field, value) in known.items() if name in listed}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _file(path: str, name: str, context: grpc.ServicerContext, or_base64: bool = False) -> str | None:
    """A picture's file as base64; its problem is the caller's."""
    if not path:
        return None
    if or_base64 and not path.startswith("/") and not _is_file(path):
        return path
    return base64.b64encode(_read(path, name, context)).decode()


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # base64 is too long for a name
        return False


def _read(path: str, name: str, context: grpc.ServicerContext) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        _refuse(context, f"{name}: cannot read {path[:200]!r}: {error.strerror}")


def _start(src: str, context: grpc.ServicerContext) -> dict[str, Any]:
    """The fields of `src`: a picture's file, or JSON with `image` and `mask_image`, white to be painted."""
    data = _read(src, "src", context) if src else b""
    if not data.startswith(b"{"):
        return {"image": base64.b64encode(data).decode()} if src else {}
    try:
        found = json.loads(data)
        return {"image": found["image"], "mask": found["mask_image"]}
    except (ValueError, KeyError):
        _refuse(context, 'src: JSON must have "image" and "mask_image", each in base64')


class TokenCheck(grpc.ServerInterceptor):
    """Refuses every call without the bearer token."""

    def __init__(self, token: str) -> None:
        self._wanted = f"Bearer {token}".encode()

        def refuse(request: Any, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"this backend needs the token of {TOKEN}")

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        given = str(dict(details.invocation_metadata).get("authorization", "")).encode()
        return continuation(details) if hmac.compare_digest(given, self._wanted) else self._refusal


def serve(address: str) -> None:
    """Serve until a signal or the end of the parent process; then end the host. Raises SystemExit."""
    token = os.environ.get(TOKEN, "")
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=8),
        interceptors=[TokenCheck(token)] if token else [],
        options=[("grpc.so_reuseport", 0)],
    )
    backend = Backend()
    services.add_BackendServicer_to_server(backend, server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise SystemExit(f"backend.py: error: --addr: cannot serve on {address}: {error}") from None
    server.start()
    print(f"serving {address}", file=sys.stderr, flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    parent = os.getppid()
    while not ended.wait(0.5) and os.getppid() == parent:
        pass
    server.stop(None)
    backend.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--addr", default="127.0.0.1:50051", help="HOST:PORT to serve")
    serve(parser.parse_args().addr)
