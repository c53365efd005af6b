"""The command line: every flag, every refusal, and that a usage error answers at once."""

from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from shared.backends import BACKENDS
from shared.launch.errors import UsageError
from shared.launch.file_header import index_of, position_table
from shared.launch.flags import HostConfig
from shared.launch.logs import shows_progress
from shared.launch.parser import build_parser, parse_config
from shared.models import FEATURES, MODELS, CacheSettings, schedulers_for
from tests.httphost import asyncdiff

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A diffusers folder as far as the flags look, and a few files beside it."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "model_index.json").write_text("{}")
    (checkpoint / "config.json").write_text("{}")
    (tmp_path / "key").write_text("secret")
    for name in ("file.safetensors", "file.gguf", "other.safetensors", "file.ckpt"):
        (tmp_path / name).touch()
    return tmp_path


def parse(
    folder: Path,
    *flags: str,
    type: str = "sd1",
    backend: str = "asyncdiff",
    world: int = 1,
    beside: tuple[str, ...] = (),
) -> HostConfig:
    """Parse as rank 0 of `world` ranks; `beside` are further flags."""
    import os
    from unittest import mock

    argv = [f"--type={type}", f"--checkpoint={folder / 'model'}", *flags, *beside]
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(world)}):
        return parse_config(BACKENDS[backend], BACKENDS, argv)


def refused(folder: Path, *flags: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        parse(folder, *flags, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Each flag once: what is given and what comes out. {f} is the folder.
VALUES: dict[str, tuple[str, Any]] = {
    "type": ("", "sd1"),
    "checkpoint": ("", None),
    "variant": ("bf16", "bf16"),
    "height": ("256", 256),
    "width": ("320", 320),
    "scheduler": ("k_euler", "k_euler"),
    "vae": ("{f}/other.safetensors", "{f}/other.safetensors"),
    "gguf_model": ("{f}/file.gguf", "{f}/file.gguf"),
    "quantize_to": ("int8", "int8"),
    "preset": ("exact", "exact"),
    "lora": ('{{"{f}/file.safetensors": 0.5}}', {"{f}/file.safetensors": 0.5}),
    "lora_dir": ("{f}/model,{f}", ("{f}/model", "{f}")),
    "refiner": ("{f}/other.safetensors", "{f}/other.safetensors"),
    "embeddings_dir": ("{f}/model,{f}", ("{f}/model", "{f}")),
    "control_net": ("{f}/model", {"{f}/model": 1.0}),
    "ip_adapter": ('{{"{f}/file.safetensors": 1}}', {"{f}/file.safetensors": 1.0}),
    "compile_backend": ("eager", "eager"),
    "compile_mode": ("max-autotune", "max-autotune"),
    "compile_options": ('{{"a": 1}}', {"a": 1}),
    "warm_up_steps": ("5", 5),
    "device": ("cpu", "cpu"),
    "model_n": ("3", 3),
    "stride": ("2", 2),
    "stage_weights": ("1,1,0.5", (1.0, 1.0, 0.5)),
    "async_steps": ("4", 4),
    "exchange_dtype": ("int8", "int8"),
    "parallelism": ("tensor", "tensor"),
    "split_scheme": ("col", "col"),
    "sync_mode": ("no_sync", "no_sync"),
    "ulysses_degree": ("1", 1),
    "ring_degree": ("1", 1),
    "pipefusion_parallel_degree": ("1", 1),
    "tensor_parallel_degree": ("1", 1),
    "data_parallel_degree": ("1", 1),
    "num_pipeline_patch": ("2", 2),
    "attn_layer_num_for_pp": ("10,9", (10, 9)),
    "step_cache": ("mask:1101", CacheSettings("mask", mask="1101")),
    "port": ("7001", 7001),
    "host": ("0.0.0.0", "0.0.0.0"),
    "max_queue": ("0", 0),
    "max_queue_per_client": ("4", 4),
    "request_timeout": ("2.5", 2.5),
    "collective_timeout": ("60", 60.0),
    "stop_grace": ("12.5", 12.5),
    "log_level": ("debug", "debug"),
    "api_key": ("secret", "secret"),
    "api_key_file": ("{f}/key", "{f}/key"),
    "trusted_hosts": ("gpu.example,b", ("gpu.example", "b")),
    "allow_origin": ("https://app.example", ("https://app.example",)),
    "trusted_proxies": ("127.0.0.1, 10.0.0.0/8", ("127.0.0.1/32", "10.0.0.0/8")),
    "max_pixel_steps": ("1000", 1000),
    "sizes": ("1024x1024,832x1216", ((1024, 1024), (832, 1216))),
    "cache_dir": ("{f}/new", "{f}/new"),
    "state_dir": ("{f}/state", "{f}/state"),
    "keep_jobs": ("60", 60.0),
    "keep_bytes": ("1000000", 1000000),
}
# Flags that need others, another type or another world size beside them.
COMPANY: dict[str, dict[str, Any]] = {
    "model_n": {"world": 3},
    "stride": {"world": 3},
    "stage_weights": {"world": 3},
    "use_cfg_parallel": {"world": 4},
    **{
        f"compile_{name}": {"beside": ("--compile_vae",)}
        for name in ("backend", "mode", "options", "fullgraph_off")
    },
    "refiner": {"type": "sdxl"},
    "motion_module": {"type": "ad"},
    "motion_adapter": {"type": "ad"},
    "motion_adapter_lora": {"type": "ad"},
    "use_teacache": {"type": "flux"},
    "use_fbcache": {"type": "flux"},
    "use_parallel_vae": {"world": 2},
    "num_pipeline_patch": {"type": "sd3", "world": 2, "beside": ("--pipefusion_parallel_degree=2",)},
    "attn_layer_num_for_pp": {"type": "sd3", "world": 2, "beside": ("--pipefusion_parallel_degree=2",)},
}
VALUES |= {
    "motion_module": ("{f}/file.ckpt", "{f}/file.ckpt"),
    "motion_adapter": ("{f}/model", "{f}/model"),
    "motion_adapter_lora": ('{{"{f}/file.safetensors": 1}}', {"{f}/file.safetensors": 1.0}),
}


def served_types(backend: str, flag: str) -> list[str]:
    return [t for t in BACKENDS[backend].types if not BACKENDS[backend].refusal(MODELS[t], flag)]


DEEP = '{"a":' * 100_000
CASES = [(b, f.name) for b in BACKENDS for f in BACKENDS[b].config_flags if served_types(b, f.name)]


def filled(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {str(k).replace("{f}", str(folder)): v for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(filled(part, folder) for part in value)
    return value.replace("{f}", str(folder)) if isinstance(value, str) else value


def test_lora_dir_several_times_and_in_yaml(folder: Path) -> None:
    both = (f"{folder}/model", str(folder))
    assert parse(folder, *(f"--lora_dir={path}" for path in both)).lora_dir == both
    (folder / "dirs.yaml").write_text(f"lora_dir: [{both[0]}, {both[1]}]\n")
    assert parse(folder, f"--config={folder}/dirs.yaml").lora_dir == both
    for wrong, says in (("file.safetensors", "must be a folder; got the file"), ("none", "no such file")):
        with pytest.raises(UsageError, match=f"--lora_dir: {says}"):
            parse(folder, f"--lora_dir={folder}/{wrong}")


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_every_flag_parses(folder: Path, backend: str, name: str) -> None:
    options = {"type": served_types(backend, name)[-1], "backend": backend, **COMPANY.get(name, {})}
    [f] = [f for f in BACKENDS[backend].config_flags if f.name == name]
    if f.metadata["parse"] is None:
        assert getattr(parse(folder, f"--{name}", **options), name) is True
        return
    if name in ("type", "checkpoint"):
        assert getattr(parse(folder, **options), name)
        return
    given, expected = VALUES[name]
    if name == "scheduler":
        given = expected = schedulers_for(MODELS[options["type"]])[0]
    text = given.format(f=folder)
    for flags in ((f"--{name}={text}",), (f"--{name}", text)):
        assert getattr(parse(folder, *flags, **options), name) == filled(expected, folder)
    for alias in f.metadata["aliases"]:
        assert getattr(parse(folder, f"--{alias}={text}", **options), name) == expected


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_every_default_is_the_dataclass_default(folder: Path, backend: str, name: str) -> None:
    config = parse(folder, backend=backend, type=BACKENDS[backend].types[-1])
    [f] = [f for f in BACKENDS[backend].config_flags if f.name == name]
    if name not in ("type", "checkpoint"):
        assert getattr(config, name) == f.default


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--height=tall", "--height: must be a whole number; got 'tall'"),
        ("--height=8", "--height: must be at least 16; got '8'"),
        ("--height=100", "--height: must be a multiple of 8 for type sd1; got 100 (nearest: 96 and 104)"),
        ("--variant=fp8", "--variant: must be one of fp16, bf16, fp32; got 'fp8'"),
        ("--port=70000", "--port: must be at most 65535; got '70000'"),
        ("--port=", "--port: must be a whole number; got ''"),
        ("--request_timeout=0", "--request_timeout: must be a number of seconds above 0; got '0'"),
        ("--request_timeout=nan", "--request_timeout: must be a number of seconds above 0"),
        ("--request_timeout=soon", "--request_timeout: must be a number of seconds above 0"),
        ("--stage_weights=[nan,1]", "--stage_weights: must be numbers above 0"),
        ("--stage_weights=1,inf", "--stage_weights: must be numbers above 0"),
        ("--max_queue=-1", "--max_queue: must be at least 0; got '-1'"),
        ("--lora=x.safetensors", '--lora: must be JSON such as {"path": 1.0}'),
        ('--lora={"a": true}', "--lora: must be JSON"),
        ("--lora={}", "--lora: must be JSON"),
        ('--lora={"a": NaN}', "--lora: must be JSON"),
        ('--lora={"a": 1e999}', "--lora: must be JSON"),
        pytest.param(f'--lora={{"a": 1{"0" * 400}}}', "--lora: must be JSON", id="too large"),
        pytest.param("--lora=" + DEEP, "--lora: must be JSON", id="deep lora"),
        ('--lora={"nothing.safetensors": 1}', "--lora: no such file or folder: 'nothing.safetensors'"),
        ("--vae=/nothing", "--vae: no such file or folder: '/nothing'"),
        ("--compile_options=[1]", "--compile_options: must be a JSON object; got '[1]'"),
        pytest.param(
            "--compile_options=" + DEEP, "--compile_options: must be a JSON object", id="deep options"
        ),
        ('--scheduler={"scheduler": "ddim", "beta_end": NaN}', "--scheduler: must be a JSON object"),
        ("--scheduler=nonsense", "--scheduler: type sd1 supports ddim"),
        ('--scheduler={"name": "ddim"}', "--scheduler: must be a name, or JSON"),
        ("--stride=3", "--stride: must be at most 2; got '3'"),
        ("--compel=yes", "--compel"),
        ("--nonsense=1", "--nonsense: unknown flag"),
        ("--warmup_step=1", "did you mean --warm_up_steps"),
        ("--sync_mode=no_sync", "a flag of distrifuser_host.py, not of asyncdiff_host.py"),
        ("--chekpoint=x", "did you mean --checkpoint"),
        ("stray", "'stray' is not a flag"),
        ("--vae", "--vae"),
        ("--config=/nothing.yaml", "--config: cannot read '/nothing.yaml': No such file or directory"),
        ("--config=", "--config: cannot read ''"),
    ],
)
def test_a_wrong_value_names_flag_value_and_choices(folder: Path, flag: str, words: str) -> None:
    assert words in refused(folder, flag)


def test_type_and_checkpoint(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--type: asyncdiff_host\.py serves ad, sd1.*; got nothing"):
        asyncdiff([])
    assert "(xdit_host.py serves it)" in refused(folder, type="flux")
    with pytest.raises(UsageError, match=r"asyncdiff_host\.py and xdit_host\.py serve it"):
        parse_config(BACKENDS["distrifuser"], BACKENDS, ["--type=sd3"])
    with pytest.raises(UsageError, match="--checkpoint: must be a diffusers folder"):
        asyncdiff(["--type=sd1"])
    for given, words in (
        (folder, "no model_index.json"),
        (folder / "file.ckpt", "must be .safetensors"),
        (folder / "nothing", "no such file or folder"),
    ):
        with pytest.raises(UsageError, match=words):
            asyncdiff(["--type=sd1", f"--checkpoint={given}"])
    other = folder / "of another type"
    other.mkdir()
    other.joinpath("model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(
        UsageError, match="of another type' is a StableDiffusionXLPipeline, so its type is sdxl"
    ):
        asyncdiff(["--type=sd1", f"--checkpoint={other}"])
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": [None, None]}
    other.joinpath("model_index.json").write_text(json.dumps(index))
    index_of.cache_clear()
    for part in ("unet", "vae"):
        for lacks in ("", "/config.json", "/*.safetensors"):
            words = re.escape(f"of another type' has no {part}{lacks}, which its model_index.json names")
            with pytest.raises(UsageError, match=words):
                asyncdiff(["--type=sd1", f"--checkpoint={other}"])
            match lacks:
                case "":
                    (other / part).mkdir()
                case "/config.json":
                    (other / part / "config.json").write_text("{}")
                case _:
                    (other / part / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert asyncdiff(["--type=sd1", f"--checkpoint={other}"]).model_id == "of another type"
    (other / "unet" / "config.json").unlink()
    asyncdiff(["--type=sd1", f"--checkpoint={other}", f"--gguf_model={folder / 'file.gguf'}"])
    with pytest.raises(UsageError, match="loads from a diffusers folder only"):
        asyncdiff(["--type=svd", f"--checkpoint={folder / 'file.safetensors'}"])
    single = asyncdiff(["--type=sd1", f"--checkpoint={folder / 'file.safetensors'}"])
    assert single.checkpoint.endswith("file.safetensors")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--enable_model_cpu_offload", "--enable_group_offload"], "one kind of offload"),
        (["--enable_model_cpu_offload", "--device=cpu"], "needs a GPU; got --device=cpu"),
        *(
            (
                [f"--enable_{how}_offload", flag],
                f"--enable_{how}_offload: not supported with {flag.split('=')[0]}",
            )
            for how, flags in (
                ("sequential_cpu", ("--quantize_to=int4", "--gguf_model={f}/file.gguf", "--compel")),
                ("group", ("--quantize_to=float8", "--compile_unet", "--compile_vae")),
            )
            for flag in flags
        ),
        (["--gguf_model={f}/file.gguf", "--quantize_to=int8"], "--quantize_to: the weights"),
        *(
            (["--shard_weights", flag], f"--shard_weights: not supported with {flag}: ")
            for flag in (
                *(f"--enable_{how}_offload" for how in ("sequential_cpu", "group")),
                "--compile_text_encoder",
            )
        ),
        (
            ["--shard_weights", "--enable_model_cpu_offload"],
            "--shard_weights: with --enable_model_cpu_offload it needs 2 ranks or more",
        ),
        (["--compile_mode=default", '--compile_options={{"a": 1}}'], "--compile_options"),
        *(
            ([flag], f"{flag.split('=')[0]}: has no effect without --compile_unet or --compile_vae")
            for flag in (
                "--compile_backend=eager",
                "--compile_mode=default",
                '--compile_options={{"a": 1}}',
                "--compile_fullgraph_off",
            )
        ),
        (["--gguf_model={f}/model"], "--gguf_model: must be a file; got the folder"),
        (["--control_net={f}/file.ckpt"], "--control_net: a file must be .safetensors"),
        (["--refiner={f}/file.ckpt"], "--refiner: a single file must be .safetensors or .sft (no pickles)"),
        (["--refiner={f}"], "--refiner: no model_index.json in"),
        (["--control_net={f}"], "--control_net: must be a diffusers folder with a config.json, or a"),
        (
            ["--type=sdxl", "--refiner={f}/other.safetensors", "--shard_weights"],
            "--refiner: not supported with --shard_weights",
        ),
        (['--lora={{"{f}/file.ckpt": 1}}'], "--lora: a file must be .safetensors"),
        (
            ["--type=sd3", '--ip_adapter={{"{f}/file.safetensors": 1, "{f}/other.safetensors": 1}}'],
            "--ip_adapter: type sd3 takes one adapter; got 2",
        ),
        (["--model_n=2"], "needs 2 ranks; the world size is 1"),
        (["--sizes=64x64,64x100"], "--sizes: 64x100: height must be a multiple of 8 for type sd1; got 100"),
        (["--sizes=64"], "--sizes: must be sizes such as 1024x1024,832x1216, with sides of 16 to 8192 pix"),
        (["--sizes=64x8200"], "--sizes: must be sizes such as"),
        (["--sizes=64x64", "--max_pixel_steps=4095"], "--sizes: 64x64: one step of it exceeds --max_pixel"),
    ],
)
def test_impossible_combinations(folder: Path, flags: list[str], words: str) -> None:
    assert words in refused(folder, *(flag.format(f=folder) for flag in flags))


def sides(folder: Path, tokens: int) -> None:
    """Put configurations into a folder: so many tokens a side have positions, each of 16 x 16 pixels."""
    for name, settings in (
        ("transformer", {"pos_embed_max_size": tokens, "patch_size": 2}),
        ("vae", {"block_out_channels": [1, 1, 1, 1]}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(settings))


def test_a_size_that_the_checkpoint_has_no_positions_for(folder: Path) -> None:
    sides(folder / "model", 32)
    text = "must be at most 512 for this checkpoint, which has positions for 32 x 32 tokens of 16 x 16 pixels"
    assert parse(folder, "--width=512", "--height=512", type="sd3").size == (512, 512)
    assert refused(folder, "--width=512", "--height=528", type="sd3") == f"--height: {text}; got 528"
    assert refused(folder, type="sd3") == f"--width: {text}; got 1024"
    size = ("--width=512", "--height=512")
    assert (
        refused(folder, *size, "--sizes=512x640", type="sd3") == f"--sizes: 512x640: height {text}; got 640"
    )
    net = folder / "net"
    net.mkdir()
    settings = {"_class_name": "SD3ControlNetModel", "pos_embed_max_size": 24}
    for more, most in (({}, 384), ({"pos_embed_type": None}, 512)):
        (net / "config.json").write_text(json.dumps(settings | more))
        position_table.cache_clear()
        config = parse(folder, "--width=256", "--height=256", f"--control_net={net}", type="sd3")
        assert math.prod(config.position_table or ()) == most


def test_a_size_that_a_single_file_has_no_positions_for(tmp_path: Path) -> None:
    file = tmp_path / "sd3.safetensors"
    table = {"model.diffusion_model.pos_embed": np.zeros((1, 36 * 36, 4), np.float32)}
    safetensors.numpy.save_file(table, file)
    with pytest.raises(UsageError, match=r"--width: must be at most 576 for this checkpoint, .*; got 1024"):
        parse(tmp_path, f"--checkpoint={file}", type="sd3")


REFUSALS = [
    (backend, type, flag)
    for backend, spec in BACKENDS.items()
    for type in spec.types
    for flag in FEATURES
    if spec.refusal(MODELS[type], flag)
]


@pytest.mark.parametrize(("backend", "type", "flag"), REFUSALS)
def test_every_refusal_names_flag_type_and_reason(folder: Path, backend: str, type: str, flag: str) -> None:
    given = VALUES.get(flag, ("", None))[0].format(f=folder)
    argument = f"--{flag}={given}" if given else f"--{flag}"
    message = refused(folder, argument, backend=backend, type=type)
    assert message.startswith(f"--{flag}: not supported for type {type} on {backend}_host.py: ")


@pytest.mark.parametrize(
    ("world", "flags", "fits"),
    [
        (2, [], True),
        (4, [], True),
        (5, [], False),
        (5, ["--stride=2"], True),
        (3, ["--stride=2", "--model_n=2"], True),
        (3, ["--model_n=2"], False),
        (2, ["--use_cfg_parallel", "--model_n=1"], True),
        (4, ["--use_cfg_parallel"], True),
        (3, ["--use_cfg_parallel"], False),
        (4, ["--use_cfg_parallel", "--stride=2", "--model_n=1"], False),
        (2, ["--use_cfg_parallel", "--async_steps=4"], True),
        (2, ["--use_cfg_parallel", "--async_steps=4", "--model_n=1"], False),
        (2, ["--use_cfg_parallel", "--async_steps=4", "--stride=2"], False),
        (3, ["--use_cfg_parallel", "--async_steps=4", "--stride=2"], False),
        (4, ["--use_cfg_parallel", "--async_steps=4"], True),
        (2, ["--stage_weights=1,2"], True),
        (2, ["--stage_weights=1,2,3"], False),
        (2, ["--use_cfg_parallel", "--async_steps=auto"], True),
        (2, ["--use_cfg_parallel", "--async_steps=auto", "--stride=2"], False),
        (2, ["--warm_up_steps=auto"], True),
        (2, ["--warm_up_steps=automatic"], False),
        (2, ["--warm_up_steps=0"], False),
        (1, ["--warm_up_steps=0"], True),
    ],
)
def test_world_size_of_asyncdiff(folder: Path, world: int, flags: list[str], fits: bool) -> None:
    if fits:
        parse(folder, *flags, world=world)
    else:
        assert refused(folder, *flags, world=world).startswith("--")


@pytest.mark.parametrize(
    ("backend", "world", "flags", "idle"),
    [
        ("asyncdiff", 1, ["--time_shift", "--auto_balance"], ["time_shift", "auto_balance"]),
        ("asyncdiff", 1, ["--stage_weights=1,1", "--warm_up_steps=0"], ["stage_weights"]),
        ("asyncdiff", 1, ["--async_steps=2"], ["async_steps"]),
        ("asyncdiff", 2, ["--use_cfg_parallel", "--time_shift"], ["time_shift"]),
        ("asyncdiff", 2, ["--use_cfg_parallel", "--async_steps=2", "--time_shift"], []),
        ("asyncdiff", 2, ["--time_shift", "--stage_weights=1,2"], []),
        ("distrifuser", 2, ["--parallelism=tensor", "--split_scheme=row"], []),
        ("distrifuser", 2, ["--parallelism=tensor", "--split_scheme=col"], ["split_scheme"]),
        ("distrifuser", 2, ["--parallelism=tensor", "--sync_mode=full_sync"], ["sync_mode"]),
        ("distrifuser", 2, ["--parallelism=naive_patch", "--sync_mode=full_sync"], []),
        ("distrifuser", 2, ["--parallelism=naive_patch", "--sync_mode=no_sync"], ["sync_mode"]),
        ("distrifuser", 2, ["--split_scheme=col", "--sync_mode=no_sync"], []),
        ("distrifuser", 2, ["--exchange_dtype=int8"], ["exchange_dtype"]),
        ("distrifuser", 2, ["--exchange_dtype=int8", "--no_split_batch"], []),
        ("distrifuser", 4, ["--exchange_dtype=int4"], []),
        ("distrifuser", 4, ["--exchange_dtype=int4", "--parallelism=tensor"], ["exchange_dtype"]),
    ],
)
def test_flags_that_do_nothing_are_told(
    folder: Path, backend: str, world: int, flags: list[str], idle: list[str]
) -> None:
    lines = BACKENDS[backend].idle(parse(folder, *flags, backend=backend, world=world), world)
    assert [line.split(" has no effect: ")[0] for line in lines] == [f"--{flag}" for flag in idle]
    assert all(line.split(": ")[1] for line in lines)


def test_bars_show_on_rank_0_of_a_log_for_people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.launch.logs._terminal", False)
    assert not shows_progress(parse(folder), 0)
    monkeypatch.setattr("shared.launch.logs._terminal", True)
    assert shows_progress(parse(folder), 0) and shows_progress(parse(folder, "--log_level=debug"), 0)
    assert not shows_progress(parse(folder), 1)
    for flag in ("--log_json", "--log_level=warning", "--log_level=error"):
        assert not shows_progress(parse(folder, flag), 0)


def test_an_empty_yaml_file_has_no_flags(folder: Path) -> None:
    (folder / "host.yaml").write_text("# nothing yet\n")
    assert parse(folder, f"--config={folder / 'host.yaml'}") == parse(folder)


def test_yaml_holds_the_same_flags_and_the_command_line_wins(folder: Path) -> None:
    yaml = folder / "host.yaml"
    lora = folder / "file.safetensors"
    yaml.write_text(
        f"height: 256\nwidth: 256\nwarm_up: 4\ncompel: true\nport: 7000\nvae:\nlora: {{{lora}: 0.5}}\n"
    )
    config = parse(folder, f"--config={yaml}", "--height=128")
    assert (config.height, config.width, config.warm_up_steps, config.port) == (128, 256, 4, 7000)
    assert config.compel is True and config.vae is None and config.lora == {str(lora): 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hieght: 3", "did you mean --height"),
        ("height: tall", "--height: must be a whole number; got 'tall'"),
        ("compel: 1", "--compel: must be true or false; got 1"),
        ("- a", "must contain `flag: value` lines; got list"),
        ("height: 64\nlora: {a\nwidth: }: 3", "host.yaml': line 3: expected ',' or '}', but got ':'"),
        ("a: [", "line 1: "),
        ("a: 2024-13-13", "month must be in 1..12"),
        pytest.param("[" * 10_000, "nested too deeply", id="deep"),
        ("request_timeout: true", "--request_timeout: must be a number of seconds above 0; got True"),
        ("lora: {a: true}", "--lora: must be JSON"),
        ("stage_weights: [null, 1]", "--stage_weights: must be numbers above 0"),
        ("stage_weights: [[1], 1]", "--stage_weights: must be numbers above 0"),
        ("sync_mode: no_sync", "a flag of distrifuser_host.py"),
    ],
)
def test_wrong_yaml(folder: Path, text: str, words: str) -> None:
    (folder / "host.yaml").write_text(text)
    assert words in refused(folder, f"--config={folder / 'host.yaml'}")


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_help_tells_every_flag(backend: str) -> None:
    text = build_parser(BACKENDS[backend]).format_help()
    for f in BACKENDS[backend].config_flags:
        assert f"--{f.name}" in text
    assert all(t in text for t in BACKENDS[backend].types)


@pytest.mark.parametrize(
    ("argument", "code"), [("--help", 0), ("--type=nonsense", 2), ("--nonsense", 2), ("--port=x", 2)]
)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_answers_in_half_a_second_without_torch(backend: str, argument: str, code: int) -> None:
    script = f"""
import atexit, sys
from shared.backends import BACKENDS
from shared.launch.parser import parse_or_exit
assert "torch" not in sys.modules and "flask" not in sys.modules
parse_or_exit(BACKENDS[{backend!r}], BACKENDS)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script, argument], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    # Of the processor: other processes share the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    if code == 2:
        assert len(done.stderr.strip().splitlines()) == 1 and argument.split("=")[0] in done.stderr


def test_paths_may_begin_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    loras = '--lora={"~/file.safetensors": 0.5, "~/other.safetensors": 1}'
    config = parse(folder, "--checkpoint=~/model", "--vae=~/file.safetensors", loras)
    assert (config.checkpoint, config.vae) == (f"{folder}/model", f"{folder}/file.safetensors")
    assert config.lora == {f"{folder}/file.safetensors": 0.5, f"{folder}/other.safetensors": 1.0}
    (folder / "flags.yaml").write_text("checkpoint: ~/model\ngguf_model: ~/file.gguf\ntype: sd1\n")
    from_yaml = asyncdiff(["--config=~/flags.yaml"])
    assert (from_yaml.checkpoint, from_yaml.gguf_model) == (f"{folder}/model", f"{folder}/file.gguf")
    assert "no such file or folder" in refused(folder, "--vae=~/nothing")
