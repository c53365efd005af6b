"""clients/comfyui: the node pack in a stand-in for ComfyUI, against real hosts and real processes."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.backends import BACKENDS
from shared.launch.flags import HostConfig
from shared.launch.parser import parse_config
from shared.models import MODELS, SCHEDULERS, schedulers_for
from tests.comfy_stub import INPUTS, PACK, SCHEMA, ComfyUI, InterruptProcessingException
from tests.comfy_workflows import FOLDER, WORKFLOWS, texts
from tests.httphost import FakeHost, config_of
from tests.test_host import DEMO_CHECKPOINT, ROOT, alive, until


def defaults(comfy: ComfyUI, node: str, **given: Any) -> dict[str, Any]:
    """A node of a prompt, widgets at their defaults."""
    inputs = {}
    for one in comfy.nodes[node].define_schema().inputs:
        if "default" in one.given:
            inputs[one.id] = one.given["default"]
        elif one.given.get("options"):
            inputs[one.id] = one.given["options"][0]
    return {"class_type": node, "inputs": inputs | given}


def test_the_choices_are_the_registrys(comfy: ComfyUI) -> None:
    choices = sys.modules[comfy.pack["nodes"].__name__.replace(".nodes", ".choices")]
    assert set(choices.TYPES) == set(MODELS) and list(BACKENDS) == choices.BACKENDS
    assert set(choices.SCHEDULERS) == {n for spec in MODELS.values() for n in schedulers_for(spec)}
    assert set(comfy.pack["convert"].FAMILIES) == {
        n for n, s in MODELS.items() if s.output == "image" and (s.image != "needed" or s.refers)
    }
    assert {n for n, s in MODELS.items() if s.pooled_embeds} == comfy.pack["convert"].POOLED
    begin = {
        n
        for n, s in MODELS.items()
        for image in (s.image, *(changes.get("image") for changes in s.variants.values()))
        if s.output == "video" and image in ("needed", "begins")
    }
    assert begin - {"svd"} == comfy.pack["convert"].BEGINS  # which has a sampler of its own
    assert {n for n, s in MODELS.items() if s.packed} == comfy.pack["convert"].PACKED
    assert {n for n, s in MODELS.items() if s.squares} == comfy.pack["convert"].SQUARES
    assert {n for n in comfy.pack["convert"].FAMILIES if MODELS[n].vae_kind == "video"} == comfy.pack[
        "convert"
    ].OF_VIDEOS
    assert len(choices.SCHEDULERS) == len(set(choices.SCHEDULERS)) and set(SCHEDULERS) <= set(
        choices.SCHEDULERS
    )


def test_the_pack_is_a_client_and_its_pyproject_is_comfys() -> None:
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert "comfyui" not in project["project"]["name"].lower()
    assert (PACK / project["project"]["license"]["file"]).is_file() and "DisplayName" in project["tool"][
        "comfy"
    ]
    for file in PACK.glob("*.py"):
        text = file.read_text()
        assert "import shared" not in text and "from shared" not in text and "import torch.dist" not in text


@pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI is not set to a ComfyUI checkout")
def test_the_stand_in_has_comfyuis_signatures() -> None:
    code = f"""
import inspect, sys
sys.path.insert(0, {os.environ["COMFYUI"]!r})
from comfy_api.latest import io
wanted = {INPUTS!r}
for name, (io_type, keywords) in wanted.items():
    kind = getattr(io, name)
    assert kind.io_type == io_type, name
    missing = set(keywords) - set(inspect.signature(kind.Input.__init__).parameters)
    assert not missing, (name, missing)
assert not set({SCHEMA!r}) - set(inspect.signature(io.Schema).parameters)
"""
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_workflows_are_current(comfy: ComfyUI) -> None:
    for name, text in texts(comfy).items():
        assert (FOLDER / f"{name}.json").read_text() == text, "run python -m tests.comfy_workflows"


@pytest.mark.parametrize("name", list(WORKFLOWS))
def test_workflows_run_and_their_launches_parse(
    comfy: ComfyUI, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the saved file to a request that a host of the type accepts, and to flags that it parses."""
    import json

    flags: list[str] = []
    hosts: list[FakeHost] = []

    class NoProcess:
        def __init__(self, project: str, backend: str, ranks: int, given: list[str], python: str) -> None:
            flags.extend(given)
            config = parse_config(BACKENDS[backend], BACKENDS, given)
            hosts.append(FakeHost(config_of(config.type)))
            hosts[-1].latent = np.zeros((1, 4, 128, 128), np.float32)
            self.host = comfy.pack["host"].Host(hosts[-1].url)
            self.pid, self.log = 0, Path("none")

        def wait_until_ready(self, check: Any, on_loading: Any) -> None:
            check()

        def alive(self) -> bool:
            return True

        def stop(self) -> None:
            hosts[-1].close()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(comfy.pack["launched"], "HostProcess", NoProcess)
    prompt = comfy.prompt_of(json.loads((FOLDER / f"{name}.json").read_text()))
    try:
        outputs = comfy.run(prompt)
        (request,) = hosts[0].seen
    finally:
        comfy.pack["launched"].HOSTS.stop_all()
    assert f"--type={hosts[0].config.type}" in flags
    assert request.output_format == "png" and len(outputs) == len(prompt)
    if name == "pictures":
        assert request.scheduler == "k_dpmpp_2m" and "--auto_balance" in flags
        assert outputs["4"][1]["samples"].shape == (1, 4, 128, 128)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A project whose host is tests/fake_host.py."""
    script = f"import runpy\nrunpy.run_path({str(ROOT / 'tests' / 'fake_host.py')!r}, run_name='__main__')\n"
    (tmp_path / "asyncdiff_host.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return str(tmp_path)


def test_a_launched_host_lives_until_something_needs_another(comfy: ComfyUI, project: str) -> None:
    hosts = comfy.pack["launched"].HOSTS

    def run(**given: Any) -> int:
        first = {"type": "sd1", "checkpoint": "demo/", "ranks": 1, "project": project}
        launch = defaults(comfy, "MultiGPUDiffusionLaunchHost", **first | given)
        adapter = defaults(comfy, "MultiGPUDiffusionLora", lora="a.safetensors", strength=0.5)
        handle = comfy.run({"1": launch, "2": adapter} | ({"3": {**adapter}} if "features" in given else {}))
        assert handle["1"][0].host.ready()
        return hosts.pids()["1"]

    first = run()
    comfy.executed.clear()
    assert run() == first and not comfy.executed, "an unchanged host was asked for again"
    second = run(warm_up_steps=5)
    assert second != first and not alive(first)
    os.kill(second, signal.SIGTERM)
    until(lambda: not alive(second), 5)
    third = run(warm_up_steps=5)
    assert third not in (first, second) and alive(third)
    with pytest.raises(comfy.pack["host"].HostError, match="--stride: must be at most 2; got '3'"):
        run(flags="--stride=3")
    assert not hosts.pids() and not alive(third)


def test_a_host_that_loads_is_seen_to(comfy: ComfyUI, project: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    comfy.progress.clear()
    plain = {"type": "sd1", "checkpoint": "demo/", "ranks": 1, "project": project}
    comfy.run({"9": defaults(comfy, "MultiGPUDiffusionLaunchHost", **plain)})
    comfy.pack["launched"].HOSTS.stop_all()
    assert 5 in comfy.progress and comfy.progress == sorted(set(comfy.progress))
    assert "the host is loading: importing libraries" in [r.getMessage() for r in caplog.records]


def test_a_cancelled_launch_and_one_whose_node_is_gone_leave_nothing(comfy: ComfyUI, project: str) -> None:
    hosts = comfy.pack["launched"].HOSTS
    plain = {"type": "sd1", "checkpoint": "demo/", "ranks": 1, "project": project}
    launch = defaults(comfy, "MultiGPUDiffusionLaunchHost", **plain)
    comfy.run({"7": launch})
    first = hosts.pids()["7"]
    comfy.interrupted = True
    other = defaults(comfy, "MultiGPUDiffusionLaunchHost", **plain, warm_up_steps=4)
    with pytest.raises(InterruptProcessingException):
        comfy.run({"8": other})
    assert not hosts.pids() and not alive(first)


def test_a_host_ends_with_its_launch_whatever_other_nodes_are_called(comfy: ComfyUI, project: str) -> None:
    hosts = comfy.pack["launched"].HOSTS
    plain = {"type": "sd1", "checkpoint": "demo/", "ranks": 1, "project": project}
    other = defaults(comfy, "MultiGPUDiffusionScheduler")

    def run(**launches: int) -> dict[str, Any]:
        made = {
            id[1:]: defaults(comfy, "MultiGPUDiffusionLaunchHost", **plain, warm_up_steps=steps)
            for id, steps in launches.items()
        }
        return comfy.run(made if "_3" in launches else {"3": other, **made})

    run(_3=1)
    first = hosts.pids()["3"]
    run(_2=2)  # node 3 is a scheduler now
    assert set(hosts.pids()) == {"2"} and not alive(first)
    # ComfyUI's cache gives node 7, which asks for the same, the handle of node 2: its host lives on.
    asked = comfy.pack["launched"].asked_by
    launch = defaults(comfy, "MultiGPUDiffusionLaunchHost", **plain, warm_up_steps=2)
    assert asked("2", {"2": launch}) == asked("7", {"7": launch})
    second = hosts.pids()["2"]
    comfy._cache["7"] = comfy._cache["2"]
    run(_7=2, _10=3)
    assert set(hosts.pids()) == {"7", "10"} and hosts.pids()["7"] == second and alive(second)
    hosts.stop_all()


# Flags that no node has, and why.
LEFT_OUT = {
    "the Launch Host's text widget `flags` takes them": {
        *("height", "width", "scheduler", "vae", "gguf_model", "motion_adapter_lora", "compel"),
        *("compile_unet", "compile_vae", "compile_text_encoder", "compile_backend", "compile_mode"),
        *("compile_options", "compile_fullgraph_off", "enable_vae_tiling", "enable_vae_slicing"),
        *("xformers_efficient", "enable_model_cpu_offload", "enable_sequential_cpu_offload"),
        *("enable_group_offload", "shard_weights", "fit", "device", "sizes", "embeddings_dir", "refiner"),
        *("exchange_dtype", "preset"),
    },
    "the LoRA node names files itself": {"lora_dir"},
    "every launch has it, for those files": {"allow_lora_paths"},
}


def test_every_flag_has_a_widget_and_every_input_a_tooltip(comfy: ComfyUI) -> None:
    named: set[str] = set()
    for name, cls in comfy.nodes.items():
        if name.startswith("MultiGPUDiffusion"):
            inputs = cls.define_schema().inputs
            named |= {one.id for one in inputs}
            bare = [one.id for one in inputs if not one.given.get("tooltip")]
            assert not bare, f"{name}: no tooltip for {bare}"
    plans = comfy.pack["nodes"].PLANS
    for flag in dataclasses.fields(HostConfig):
        group, backend = flag.metadata.get("group", "serving"), flag.metadata.get("backend")
        for one in (backend or "").split():
            assert flag.name in plans[one][1], f"--{flag.name} is in no plan of {one}"
        if group != "serving" and not backend and flag.name != "motion_adapter":  # by motion_module
            assert flag.name in named or any(flag.name in names for names in LEFT_OUT.values()), flag.name


def test_scales_and_loras_need_no_other_host(comfy: ComfyUI) -> None:
    launched = comfy.pack["launched"]

    def launch(features: dict[str, Any], *flags: str) -> Any:
        return launched.Launch("/p", "asyncdiff", "sd1", "/c", 2, flags=flags, features=features)

    loras = [{"lora": {"a": 1.0}}, {"lora": {"a": 0.5, "b": 1.0}}, {}]
    assert len({launch(f).key for f in loras}) == 1
    assert len({launch(f, "--compile_unet").key for f in loras}) == 3, "fused LoRAs cannot change"
    nets = [{"control_net": {"n": 1.0}}, {"control_net": {"n": 0.5}}, {"control_net": {"m": 0.5}}]
    assert [launch(nets[0]).key == launch(f).key for f in nets] == [True, True, False]
    assert "--allow_lora_paths" in launch({}).command_flags()
    with FakeHost(config_of(allow_lora_paths=True)) as host:
        process: Any = type("Process", (), {"host": comfy.pack["host"].Host(host.url)})
        running = launched.Running(launch(loras[0]), process, launch(loras[0]).live())
        host.loras = {"a": 1.0}
        running.adopt(launch(loras[1]))
        assert host.loras == {"a": 1.0, "b": 1.0}
        assert running.handle(launch(loras[1])).scales == {"lora_scales": {"a": 0.5, "b": 1.0}}
        running.adopt(launch(loras[2]))
        assert not host.loras and running.handle(launch({})).scales == {}


def test_the_host_ends_when_its_starter_is_killed(project: str) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(PACK)!r})
from host import HostProcess
flags = ["--type=sd1", {f"--checkpoint={DEMO_CHECKPOINT}"!r}]
process = HostProcess({project!r}, "asyncdiff", 1, flags)
process.wait_until_ready()
print(process.pid, flush=True)
import time; time.sleep(60)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    guard = int(starter.stdout.readline())
    host = subprocess.run(["ps", "-o", "pid=", "--ppid", str(guard)], capture_output=True, text=True).stdout
    starter.kill()
    starter.wait()
    until(lambda: not alive(guard) and not alive(int(host)), 10)


def test_both_clients_have_the_same_link_to_a_host() -> None:
    copies = [ROOT / "clients" / name / "host.py" for name in ("comfyui", "localai")]
    assert copies[0].read_text() == copies[1].read_text()


def test_every_node_gets_what_its_schema_names(comfy: ComfyUI) -> None:
    for name, cls in comfy.nodes.items():
        parameters = inspect.signature(cls.execute).parameters
        named = {one.id for one in cls.define_schema().inputs}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = {n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        assert known <= named and (open_ended or known == named), name
