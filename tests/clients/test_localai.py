"""clients/localai: the backend's own process, asked by a gRPC client made from its proto."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
import yaml
from PIL import Image

from shared.backends import BACKENDS
from shared.launch.parser import parse_config
from shared.models import MODELS
from tests.httphost import FakeHost, config_of, picture
from tests.test_host import DEMO_CHECKPOINT, ROOT, Launch, alive, children, free_port, until

FOLDER = ROOT / "clients" / "localai"
TOKEN = "secret"
CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def proto() -> Iterator[tuple[Any, Any]]:
    """Messages and services of backend.proto."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield grpc.protos_and_services("backend.proto")


class Client:
    """A running backend and a stub for it."""

    def __init__(self, proto: tuple[Any, Any], token: str = TOKEN) -> None:
        self.messages, services = proto
        self.address = f"127.0.0.1:{free_port()}"
        environment = {**os.environ, "MULTIGPU_PYTHON": sys.executable, "LOCALAI_GRPC_AUTH_TOKEN": TOKEN}
        # A shell in between, as a parent that a test may kill.
        command = ["sh", "-c", f"{FOLDER / 'run.sh'} --addr {self.address}; true"]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        self.stub = services.BackendStub(grpc.insecure_channel(self.address))
        self.metadata = [("authorization", f"Bearer {token}")]
        self.call("Health", "HealthMessage", wait=True)
        self.pid = children(self.process.pid)[0]

    def start(self, rpc: str, message: str, wait: bool = False, **fields: Any) -> Any:
        request = getattr(self.messages, message)(**fields)
        method = getattr(self.stub, rpc)
        return method.future(request, metadata=self.metadata, timeout=120, wait_for_ready=wait)

    def call(self, rpc: str, message: str, wait: bool = False, **fields: Any) -> Any:
        return self.start(rpc, message, wait, **fields).result()

    def fails(self, rpc: str, message: str, **fields: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(rpc, message, **fields)
        error: Any = caught.value
        return error.code(), error.details()

    def load(self, *options: str, **fields: Any) -> dict[str, Any]:
        return {"Model": str(DEMO_CHECKPOINT), "Options": [f"project:{ROOT}", "type:sd1", *options], **fields}

    def state(self) -> int:
        return self.call("Status", "HealthMessage").state


@pytest.fixture(scope="module")
def client(proto: tuple[Any, Any]) -> Iterator[Client]:
    client = Client(proto)
    try:
        yield client
    finally:
        client.process.kill()


def test_the_proto_has_localais_numbers(proto: tuple[Any, Any]) -> None:
    messages, _ = proto
    numbers = {
        "ModelOptions": "Model 1, LowVRAM 9, ModelFile 21, PipelineType 26, SchedulerType 27, CUDA 28, "
        "CFGScale 29, IMG2IMG 30, CLIPSkip 33, ControlNet 48, TensorParallelSize 55, ModelPath 59, "
        "LoraAdapters 60, LoraScales 61, Options 62",
        "GenerateImageRequest": "height 1, width 2, step 4, seed 5, positive_prompt 6, negative_prompt 7, "
        "dst 8, src 9, EnableParameters 10, CLIPSkip 11, ref_images 12, ModelIdentity 13",
        "GenerateVideoRequest": "prompt 1, negative_prompt 2, start_image 3, end_image 4, width 5, height 6, "
        "num_frames 7, fps 8, seed 9, cfg_scale 10, step 11, dst 12, audio 13, params 14, ModelIdentity 15",
        "Result": "message 1, success 2",
        "Reply": "message 1",
        "StatusResponse": "state 1",
    }
    for name, expected in numbers.items():
        fields = getattr(messages, name).DESCRIPTOR.fields
        assert ", ".join(f"{f.name} {f.number}" for f in fields) == expected
    assert messages.StatusResponse.State.items() == [
        *(("UNINITIALIZED", 0), ("BUSY", 1), ("READY", 2)),
        ("ERROR", -1),
    ]


def test_options_become_flags_that_the_host_parses(
    proto: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = importlib.import_module("options")
    assert list(options.BACKENDS) == list(BACKENDS)
    assert set(options.VIDEO_TYPES) == {name for name, spec in MODELS.items() if spec.output == "video"}
    messages, _ = proto
    model = yaml.safe_load((FOLDER / "model.yaml").read_text())
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl" / "model_index.json").write_text("{}")
    for name in ("style.safetensors", "line.safetensors"):
        (tmp_path / name).write_bytes(b"")
    given = messages.ModelOptions(
        Model=model["parameters"]["model"],
        ModelPath=str(tmp_path),
        SchedulerType=model["diffusers"]["scheduler_type"],
        CFGScale=model["cfg_scale"],
        Options=[o for o in model["options"] if not o.startswith("project:")] + [f"project:{ROOT}"],
        LoraAdapters=["style.safetensors", "line.safetensors"],
        LoraScales=[0.8, 0.5],
    )
    plan = options.plan(given)
    monkeypatch.setenv("WORLD_SIZE", str(plan.ranks))
    config = parse_config(BACKENDS[plan.backend], BACKENDS, list(plan.flags))
    assert (config.type, config.variant, config.scheduler) == ("sdxl", "bf16", "k_dpmpp_2m")
    assert config.auto_balance and plan.ranks == 2 and plan.defaults == {"cfg": 5.0}
    assert config.lora == {str(tmp_path / "style.safetensors"): 0.8, str(tmp_path / "line.safetensors"): 0.5}

    def refused(**fields: Any) -> str:
        with pytest.raises(options.OptionError) as caught:
            options.plan(messages.ModelOptions(**fields))
        return str(caught.value)

    assert "type: required" in refused(Model="x", Options=[f"project:{ROOT}"])
    assert "backend: must be one of" in refused(Options=["backend:async"])
    assert "lora_scales: must be one for each of 1" in refused(
        LoraAdapters=["a"], LoraScales=[1, 2], Options=["type:sd1"]
    )
    assert "img2img: not supported with a ControlNet" in refused(
        IMG2IMG=True, ControlNet="x", Options=["type:sd1"]
    )
    for pipeline, name in (
        ("StableDiffusionImg2ImgPipeline", "sd1"),
        ("StableDiffusionXLInpaintPipeline", "sdxl"),
        ("StableDiffusion3Img2ImgPipeline", "sd3"),
        ("FluxInpaintPipeline", "flux"),
        ("FluxKontextInpaintPipeline", "kontext"),
        ("QwenImageEditPlusPipeline", "qwenedit"),
    ):
        flags = options.plan(messages.ModelOptions(PipelineType=pipeline, IMG2IMG=True)).flags
        assert flags[0] == f"--type={name}"
    assert "cannot change type" in refused(Options=["host_url:http://x", "type:sd1"])
    for wrong in ("strength:0", "strength:1.5", "strength:much"):
        assert "strength: must be a number above 0 and at most 1" in refused(
            Options=["host_url:http://x", wrong]
        )
    assert "strength: not supported with a ControlNet" in refused(
        Options=["type:sd1", "strength:0.5"], ControlNet="x"
    )
    assert options.plan(messages.ModelOptions(Options=["type:sd1", "strength:0.4"])).strength == 0.4
    assert "stride is given twice" in refused(Options=["stride:1", "stride:2"])
    assert options.plan(
        messages.ModelOptions(
            PipelineType="StableDiffusionXLPipeline", Options=["compel:true", "compile_vae:false"]
        )
    ).flags == ("--type=sdxl", "--checkpoint=", "--compel")


def test_a_backend_without_a_model_and_without_a_token(client: Client) -> None:
    assert client.call("Health", "HealthMessage").message == b"OK"
    assert client.state() == 0
    assert client.fails("GenerateImage", "GenerateImageRequest", dst="/tmp/x")[0] == CODE.FAILED_PRECONDITION
    right, client.metadata = client.metadata, [("authorization", "Bearer wrong")]
    try:
        assert client.fails("Health", "HealthMessage")[0] == CODE.UNAUTHENTICATED
    finally:
        client.metadata = right
    code, told = client.fails("LoadModel", "ModelOptions", **client.load("stride:3"))
    assert code == CODE.INVALID_ARGUMENT and "--stride: must be at most 2; got '3'" in told
    assert client.state() == 0


def test_a_model_is_loaded_draws_cancels_and_is_freed(
    client: Client, demo_host: Launch, tmp_path: Path
) -> None:
    options = client.load(
        "ranks:2", "variant:fp32", "width:128", "height:128", "warm_up_steps:4", CFGScale=4.0
    )
    assert client.call("LoadModel", "ModelOptions", **options).success
    assert client.state() == 2
    guard = children(client.pid)[0]
    family = [guard, *children(guard), *(rank for child in children(guard) for rank in children(child))]
    assert len(family) == 4, "guard, torchrun, two ranks"

    dst = tmp_path / "picture.png.tmp"
    asked: dict[str, Any] = {
        "positive_prompt": "a red circle",
        "negative_prompt": "blue",
        "seed": 7,
        "step": 4,
        "dst": str(dst),
    }
    asked |= {"width": 128, "height": 128}
    assert client.call("GenerateImage", "GenerateImageRequest", **asked).success
    body = {"positive": "a red circle", "negative": "blue", "seed": 7, "steps": 4, "cfg": 4.0}
    answer = requests.post(f"{demo_host.url}/generate", json=body, timeout=60).json()
    assert dst.read_bytes() == base64.b64decode(answer["output"])
    client.call(
        "GenerateImage", "GenerateImageRequest", **asked | {"EnableParameters": "num_inference_steps"}
    )
    assert dst.read_bytes() != base64.b64decode(answer["output"]), "negative_prompt was not enabled"

    def fails(**changes: Any) -> tuple[Any, str]:
        return client.fails("GenerateImage", "GenerateImageRequest", **asked | changes)

    code, told = fails(width=20)
    assert code == CODE.INVALID_ARGUMENT and "width: must be a multiple of 8 for sd1, got 20" in told
    assert fails(ModelIdentity="other")[0] == CODE.NOT_FOUND
    assert fails(src=str(tmp_path / "none.png"))[0] == CODE.INVALID_ARGUMENT
    # The picture that it made, drawn on and read back: a body that gives the same pixels, with `src` again.
    again = tmp_path / "again.png.tmp"
    start = asked | {"src": str(dst), "dst": str(again), "positive_prompt": "a blue circle"}
    assert client.call("GenerateImage", "GenerateImageRequest", **start).success
    with Image.open(again) as made:
        body = json.loads(made.info["multigpu_diffusion"])
        assert body["image"] == "(left out)" and made.info["parameters"].startswith("a blue circle\n")
        body["image"] = base64.b64encode(dst.read_bytes()).decode()
        answer = requests.post(f"{demo_host.url}/generate", json=body, timeout=60).json()
        other = Image.open(io.BytesIO(base64.b64decode(answer["output"])))
        assert other.tobytes() == made.tobytes() and made.tobytes() != Image.open(dst).tobytes()
    assert fails(ref_images=[str(dst)])[1] == "ip_image: the host was started without --ip_adapter"
    assert fails(dst="/nowhere/x.png")[0] == CODE.INTERNAL
    code, told = client.fails("GenerateVideo", "GenerateVideoRequest", dst=str(dst))
    assert code == CODE.INVALID_ARGUMENT and "makes pictures" in told

    running = client.start("GenerateImage", "GenerateImageRequest", **asked | {"step": 900})
    until(lambda: client.state() == 1, 20)
    running.cancel()
    until(lambda: client.state() == 2, 5)

    assert client.call("Free", "HealthMessage").success
    assert client.state() == 0 and not any(map(alive, family))


def test_a_running_host_is_asked_for_a_video(client: Client, tmp_path: Path) -> None:
    with FakeHost(config_of("svd")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}"], CFGScale=2.5)
        picture = tmp_path / "start.png"
        picture.write_bytes(base64.b64decode(_PNG))
        dst = tmp_path / "video"
        fields: dict[str, Any] = {
            "num_frames": 4,
            "fps": 9,
            "seed": 3,
            "dst": str(dst),
            "params": {"motion_bucket_id": "99"},
        }
        client.call("GenerateVideo", "GenerateVideoRequest", start_image=str(picture), **fields)
        client.call("GenerateVideo", "GenerateVideoRequest", start_image=_PNG, cfg_scale=3.5, **fields)
        first, second = host.seen
        assert dst.read_bytes()[4:8] == b"ftyp" and first.output_format == "mp4"
        assert (first.frames, first.fps, first.seed, first.motion_bucket_id, first.cfg) == (4, 9, 3, 99, 2.5)
        assert second.image == first.image and second.cfg == 3.5
        code, told = client.fails("GenerateVideo", "GenerateVideoRequest", audio="x", dst=str(dst))
        assert code == CODE.INVALID_ARGUMENT and "audio" in told
        code, told = client.fails("GenerateVideo", "GenerateVideoRequest", dst=str(dst))
        assert code == CODE.INVALID_ARGUMENT and "needs an input image" in told
        code, told = client.fails("GenerateImage", "GenerateImageRequest", dst=str(dst))
        assert code == CODE.INVALID_ARGUMENT and "makes videos" in told
    assert client.state() == -1
    assert client.fails("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}"])[0] == CODE.UNAVAILABLE


@pytest.mark.parametrize(
    ("name", "begins"), [("wan", False), ("wani2v", True), ("hv15", False), ("ltx2", True)]
)
def test_every_type_of_videos_makes_one(client: Client, tmp_path: Path, name: str, begins: bool) -> None:
    fields: dict[str, Any] = {"prompt": "x", "num_frames": 9, "step": 3, "dst": str(tmp_path / "video.mp4")}
    if begins:
        fields["start_image"] = _PNG
    with FakeHost(config_of(name, backend="xdit")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}"])
        client.call("GenerateVideo", "GenerateVideoRequest", params={"fps": "12"}, **fields)
        # What LocalAI has no field for goes in `params`; the checkpoint of this host has one transformer.
        params = {"guidance_scale_2": "3.5"}
        code, told = client.fails("GenerateVideo", "GenerateVideoRequest", params=params, **fields)
        assert code == CODE.INVALID_ARGUMENT and f"type {name}" in told and "guidance_scale_2" in told
        code, told = client.fails("GenerateImage", "GenerateImageRequest", dst=fields["dst"])
        assert code == CODE.INVALID_ARGUMENT and "makes videos" in told
    [seen] = host.seen
    assert (seen.frames, seen.steps, seen.fps, seen.image is not None) == (9, 3, 12, begins)


def test_a_gif_is_the_video_that_animatediff_starts_from(client: Client, tmp_path: Path) -> None:
    clip = tmp_path / "start.gif"
    clip.write_bytes(picture("GIF", (16, 16), frames=4))
    with FakeHost(config_of("ad")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}", "strength:0.4"])
        dst = str(tmp_path / "out.gif")
        client.call("GenerateVideo", "GenerateVideoRequest", start_image=str(clip), dst=dst)
        client.call("GenerateVideo", "GenerateVideoRequest", dst=dst)
    assert [(len(seen.images), seen.frames, seen.strength) for seen in host.seen] == [
        (4, 4, 0.4),
        (0, 16, None),
    ]


def test_a_reference_is_what_kontext_looks_at(client: Client, tmp_path: Path) -> None:
    picture, dst = tmp_path / "seen.png", str(tmp_path / "out.png")
    picture.write_bytes(base64.b64decode(_PNG))
    with FakeHost(config_of("kontext", backend="xdit")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}", "strength:0.4"])
        for fields in ({"src": str(picture)}, {"ref_images": [str(picture)]}):
            client.call("GenerateImage", "GenerateImageRequest", dst=dst, **fields)
        code, told = client.fails(
            "GenerateImage", "GenerateImageRequest", dst=dst, ref_images=[str(picture)] * 2
        )
    assert (code, told) == (CODE.INVALID_ARGUMENT, "ref_images: at most 1 for type kontext; got 2")
    assert [(len(seen.images), seen.strength) for seen in host.seen] == [(1, None), (1, None)]


def test_references_are_what_qwenedit_looks_at(client: Client, tmp_path: Path) -> None:
    picture, dst = tmp_path / "seen.png", str(tmp_path / "out.png")
    picture.write_bytes(base64.b64decode(_PNG))
    with FakeHost(config_of("qwenedit", backend="xdit")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}", "strength:0.4"])
        for fields in ({"src": str(picture)}, {"ref_images": [str(picture)] * 3}):
            client.call("GenerateImage", "GenerateImageRequest", dst=dst, **fields)
        code, told = client.fails("GenerateImage", "GenerateImageRequest", dst=dst)
    assert code == CODE.INVALID_ARGUMENT and "type qwenedit (Qwen-Image-Edit) needs an input image" in told
    assert [(len(seen.images), seen.strength) for seen in host.seen] == [(1, None), (3, None)]


def test_src_starts_at_the_models_strength(client: Client, tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    picture.write_bytes(base64.b64decode(_PNG))
    given: dict[str, Any] = {"src": str(picture), "dst": str(tmp_path / "out.png"), "positive_prompt": "x"}
    with FakeHost(config_of("sdup")) as host:
        options = [f"host_url:{host.url}"]
        client.call("LoadModel", "ModelOptions", Options=[*options, "strength:1"])
        client.call("GenerateImage", "GenerateImageRequest", **given)
        client.call("LoadModel", "ModelOptions", Options=options)
        client.call("GenerateImage", "GenerateImageRequest", **given)
        assert [one.strength for one in host.seen] == [1.0, None]
        client.call("LoadModel", "ModelOptions", Options=[*options, "strength:0.4"])
        code, told = client.fails("GenerateImage", "GenerateImageRequest", **given)
        assert code == CODE.INVALID_ARGUMENT and "strength: below 1 needs" in told and "got 0.4" in told
    with FakeHost(config_of("sd1")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}", "strength:0.4"])
        client.call("GenerateImage", "GenerateImageRequest", **given | {"src": ""})
        assert host.seen[0].strength is None


def test_inpainting_is_a_picture_and_a_mask_in_one_file(client: Client, tmp_path: Path) -> None:
    """As LocalAI's /v1/images/inpainting writes it."""
    image, mask = Image.new("RGB", (64, 48), "red"), Image.new("L", (64, 48))
    mask.paste(255, (8, 8, 24, 24))
    paths = [tmp_path / "refimg_1", tmp_path / "refmask_1"]
    for one, path in zip((image, mask), paths, strict=True):
        one.save(path, "PNG")
    texts = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    src = tmp_path / "inpaint_1.json"
    src.write_text(json.dumps(dict(zip(("image", "mask_image"), texts, strict=True))) + "\n")
    given: dict[str, Any] = {
        "src": str(src),
        "dst": str(tmp_path / "out_1.png"),
        "positive_prompt": "a hat",
        "ref_images": list(map(str, paths)),
        "width": 512,
        "height": 512,
        "step": 25,
    }
    with FakeHost(config_of("sd1")) as host:
        client.call(
            "LoadModel", "ModelOptions", Options=[f"host_url:{host.url}", "strength:0.6"], IMG2IMG=True
        )
        client.call("GenerateImage", "GenerateImageRequest", **given)
        [seen] = host.seen
        assert (seen.image, seen.mask) == tuple(path.read_bytes() for path in paths)
        assert (seen.width, seen.height, seen.strength, seen.steps) == (64, 48, 0.6, 25)
        src.write_text('{"image": "x"}')
        code, told = client.fails("GenerateImage", "GenerateImageRequest", **given)
        assert code == CODE.INVALID_ARGUMENT and 'src: JSON must have "image" and "mask_image"' in told
    with FakeHost(config_of("sd1", control_net={"/x": 1.0})) as host:
        code, told = client.fails("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}"], IMG2IMG=True)
        assert code == CODE.INVALID_ARGUMENT and "img2img: not supported with a ControlNet" in told


def test_src_is_the_image_of_a_running_hosts_control_net(client: Client, tmp_path: Path) -> None:
    picture = tmp_path / "control.png"
    picture.write_bytes(base64.b64decode(_PNG))
    with FakeHost(config_of("sd1", control_net={"/x": 1.0})) as host:
        options = [f"host_url:{host.url}"]
        code, told = client.fails("LoadModel", "ModelOptions", Options=[*options, "strength:0.4"])
        assert code == CODE.INVALID_ARGUMENT and "strength: not supported with a ControlNet" in told
        assert client.state() == 0
        client.call("LoadModel", "ModelOptions", Options=options)
        dst = str(tmp_path / "out.png")
        client.call("GenerateImage", "GenerateImageRequest", src=str(picture), dst=dst)
        assert host.seen[0].control_image and host.seen[0].image is None


def test_warnings_are_in_the_log(client: Client, tmp_path: Path) -> None:
    assert client.process.stderr is not None
    with FakeHost(config_of("sd1")) as host:
        client.call("LoadModel", "ModelOptions", Options=[f"host_url:{host.url}"])
        fields: dict[str, Any] = {
            "positive_prompt": "warn: the prompt was cut",
            "dst": str(tmp_path / "out.png"),
        }
        client.call("GenerateImage", "GenerateImageRequest", **fields)
        wanted = f"the host at {host.url}: warning: warn: the prompt was cut\n"
    os.set_blocking(client.process.stderr.fileno(), False)
    said = (client.process.stderr.read() or b"").decode()
    assert said.count(wanted) == 1


_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


def test_the_backend_ends_with_its_parent(client: Client) -> None:
    assert alive(client.pid)
    client.process.kill()
    client.process.wait()
    began = time.monotonic()
    until(lambda: not alive(client.pid), 10)
    assert time.monotonic() - began < 5
