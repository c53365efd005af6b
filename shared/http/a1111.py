"""The part of A1111's API that clients need (SillyTavern, Open WebUI, Photoshop and Krita plug-ins).

Only these routes ignore unknown keys, since such clients send many; sizes are rounded to what the
type takes. What cannot be done is refused in words, never done in another way.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Response, jsonify

from shared.api.a1111_prompts import NotationError, take_networks
from shared.api.a1111_samplers import AUTOMATIC, SCHEDULES, samplers_for, scheduler_for, taken_variant
from shared.api.codecs import MAX_SIDE
from shared.api.faults import FieldProblem, RequestError, all_faults
from shared.api.jobs import Order
from shared.api.metadata import png_info
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.api.requests import MAX_PICTURES, GenerateRequest
from shared.api.warned import merged, warn, with_warnings
from shared.http import a1111_hires as hires
from shared.http.a1111_options import check_options, is_img2img
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.incoming import caller, check_json_type, json_body
from shared.http.routes import App, Route, picture_route
from shared.http.wsgi import MAX_BODY
from shared.launch.flags import HostConfig
from shared.launch.wording import shown

PREFIX = "/sdapi/"
IMG2IMG_STRENGTH = 0.75  # A1111's default
_OURS = {
    "prompt": "positive",
    "negative_prompt": "negative",
    "steps": "steps",
    "cfg_scale": "cfg",
    "seed": "seed",
    "width": "width",
    "height": "height",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()} | {
    "image": "init_images",
    "strength": "denoising_strength",
    "control_image": "alwayson_scripts.ControlNet.image",
    "controlnet_scale": "alwayson_scripts.ControlNet.weight",
}
_WHOLE = frozenset({"steps", "seed", "width", "height"})


_LISTS = {
    "sd-models": "the checkpoint, as a list",
    "samplers": "names of the type's schedulers",
    "schedulers": "names of their noise schedules",
    "upscalers": "none; latents are enlarged by those of latent-upscale-modes",
    "latent-upscale-modes": "the hires fix's ways to enlarge latents",
    "sd-vae": "the launch's own VAE",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """A1111's error shape."""
    kind = "HTTPException" if error.status < 500 else "RuntimeError"
    faults = [f"{_THEIRS.get(p.field, p.field)}: {p.problem}" for p in error.problems if p.field]
    text = all_faults(faults, len(faults) + error.more) if faults else error.message
    return {"error": kind, "detail": text, "body": "", "errors": text}


def add_routes(app: App, dispatcher: Dispatcher) -> None:
    """Add the routes under /sdapi/v1."""
    config, queue = dispatcher.config, dispatcher.queue
    name, samplers = config.model_id, samplers_for(config)
    schedulers = [_scheduler_entry(AUTOMATIC, -1.0)] + [
        _scheduler_entry(label, 7.0 if label == "Karras" else -1.0)
        for label, variant in SCHEDULES.items()
        if any(taken_variant(ours, variant) for ours in samplers.values())
    ]
    vaes = [config.vae] if config.vae else []
    options = {
        "sd_model_checkpoint": name,
        "sd_checkpoint_hash": "",
        "sd_vae": Path(config.vae).name if config.vae else AUTOMATIC,
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
    }
    lists: dict[str, Any] = {
        "sd-models": [
            {
                "title": name,
                "model_name": name,
                "hash": None,
                "sha256": None,
                "filename": config.checkpoint,
                "config": None,
            }
        ],
        "samplers": [{"name": theirs, "aliases": [ours], "options": {}} for theirs, ours in samplers.items()],
        "schedulers": schedulers,
        "upscalers": [],
        "latent-upscale-modes": [{"name": name} for name in hires.served(config.spec)],
        "sd-vae": [{"model_name": Path(vae).name, "filename": vae} for vae in vaes],
    }
    for path, answer in lists.items():
        route = Route(f"A1111: {_LISTS[path]}")
        app.serve("GET", f"/sdapi/v1/{path}", route)(lambda answer=answer: jsonify(answer))

    @app.serve("GET", "/sdapi/v1/options", Route("A1111: the checkpoint"))
    def a1111_options() -> Response:
        return jsonify(options)

    @app.serve("POST", "/sdapi/v1/options", Route("A1111: takes the launch's own checkpoint"))
    def a1111_set_options() -> Response:
        check_json_type()
        wanted = json_body().get("sd_model_checkpoint")
        _check_model(wanted, name)
        return jsonify(None)

    @app.serve("GET", "/sdapi/v1/progress", Route("A1111: progress and jobs"))
    def a1111_progress() -> Response:
        return jsonify(_progress(dispatcher))

    @app.serve("POST", "/sdapi/v1/interrupt", Route("A1111: cancel the running request"))
    def a1111_interrupt() -> Response:
        queue.cancel_running()
        return jsonify({})

    @app.serve("POST", "/sdapi/v1/txt2img", picture_route("A1111: pictures from a prompt"))
    def a1111_txt2img() -> Response:
        return _answer(dispatcher, samplers, with_image=False)

    @app.serve(
        "POST",
        "/sdapi/v1/img2img",
        picture_route("A1111: a picture from a picture, where the type takes one"),
    )
    def a1111_img2img() -> Response:
        return _answer(dispatcher, samplers, with_image=True)

    @app.serve(
        "POST",
        "/sdapi/v1/png-info",
        Route("A1111: what a picture's file says of how it was made", max_body=MAX_BODY),
    )
    def a1111_png_info() -> Response:
        check_json_type()
        return jsonify(dispatcher.read(lambda: png_info(json_body())))


def _scheduler_entry(label: str, rho: float) -> dict[str, Any]:
    return {
        "name": label.lower().replace(" ", "_"),
        "label": label,
        "aliases": None,
        "default_rho": rho,
        "need_inner_model": False,
    }


_TITLE = re.compile(
    r"(\.safetensors|\.sft|\.ckpt)?( \[[0-9a-f]+\])?$"
)  # what A1111 writes behind a model's name


def _check_model(wanted: Any, name: str) -> None:
    """Raise ApiError 422 for another checkpoint than the launch's, by its name or by A1111's title of it."""
    title = _TITLE.sub("", wanted, count=1) if isinstance(wanted, str) else wanted
    if name not in (wanted, title) and wanted not in (None, ""):
        raise ApiError(422, f"this host has only the checkpoint {name!r}; got {shown(wanted)}")


def _progress(dispatcher: Dispatcher) -> dict[str, Any]:
    job = dispatcher.queue.generation
    waiting = len(dispatcher.queue)
    left = 0.0
    if job is not None and 0 < job.progress < 100:
        left = job.seconds_running() * (100 / job.progress - 1)
    return {
        "progress": 0.0 if job is None else job.progress / 100,
        "eta_relative": round(left, 1),
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.cancelled,
            "stopping_generation": False,
            "job": "" if job is None else job.id,
            "job_count": waiting + (job is not None),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": 0,
            "sampling_step": 0 if job is None else job.step,
            "sampling_steps": 0 if job is None else job.steps,
        },
        "current_image": None,
        "textinfo": None if job is not None or not waiting else "waiting",
    }


@dataclass(frozen=True)
class _Asked(Order):
    """An order, and the options that it was made of, in A1111's words."""

    options: dict[str, Any] = field(default_factory=dict)


def _answer(dispatcher: Dispatcher, samplers: dict[str, str], with_image: bool) -> Response:
    check_json_type()
    config = dispatcher.config

    def check(options: dict[str, Any], more: dict[str, Any]) -> GenerateRequest:
        return check_request(translate(options, config, samplers, with_image) | more, config)

    def parse() -> _Asked:
        options = json_body()
        if with_image or not hires.is_asked(options):
            return _Asked(check(options, {}), options=options)
        return _Asked(*hires.two_passes(options, config, check), options=options)

    asked, replies = dispatcher.run(caller(), parse)
    told = {k: v for k, v in asked.options.items() if k not in ("init_images", "alwayson_scripts")}
    info = _info(asked, replies, config) | {"infotexts": [reply.infotext for reply in replies]}
    body = {
        "images": [reply.answer()["output"] for reply in replies],
        "parameters": told,
        "info": json.dumps(info),
    }
    return jsonify(with_warnings(body, merged(*(reply.warnings for reply in replies))))


def _info(asked: _Asked, replies: list[Reply], config: HostConfig) -> dict[str, Any]:
    """What A1111 tells of its pictures; with the hires fix, size and steps are the first pass'."""
    options = asked.options
    first = replies[0] if asked.second is None else asked.request
    prompt, negative = str(options.get("prompt") or ""), str(options.get("negative_prompt") or "")
    sampler = str(options.get("sampler_name") or options.get("sampler_index") or AUTOMATIC)
    cfg = options.get("cfg_scale") or config.spec.cfg
    seeds = [reply.seed for reply in replies]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(replies),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(replies),
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": first.width,
        "height": first.height,
        "sampler_name": sampler,
        "cfg_scale": cfg,
        "steps": first.steps,
        "batch_size": 1,
        "sd_model_name": config.model_id,
        "index_of_first_image": 0,
    }


def translate(
    asked: dict[str, Any], config: HostConfig, samplers: dict[str, str], with_image: bool
) -> dict[str, Any]:
    """A1111's keys -> a body of POST /generate.

    Raises:
        ApiError, RequestError: 422 where this host cannot serve what was asked.
    """
    spec, problems = config.spec, []
    overrides = asked.get("override_settings")
    overrides = overrides if isinstance(overrides, dict) else {}
    _check_model(overrides.get("sd_model_checkpoint"), config.model_id)
    data = {
        ours: _number(theirs, asked[theirs])
        for theirs, ours in _OURS.items()
        if asked.get(theirs) is not None
    }
    problems += _notation(data, bool(asked.get("disable_extra_networks")))
    if spec.output == "video":
        data["output_format"] = "gif"
    if overrides.get("enable_pnginfo") is False:
        data["metadata"] = False
    for side in ("width", "height"):
        if side not in spec.fields:
            data.pop(side, None)
        elif isinstance(value := data.get(side), int) and abs(value) <= MAX_SIDE:
            data[side] = hires.rounded(value, spec.size_multiple)
    skip = _number("steps", overrides.get("CLIP_stop_at_last_layers", asked.get("clip_skip")))
    if isinstance(skip, int) and skip > 1 and "clip_skip" in spec.fields:
        data["clip_skip"] = skip - 1  # theirs counts the last layer as 1
    scheduler, problem = scheduler_for(asked, samplers)
    if scheduler:
        data["scheduler"] = scheduler
    if problem:
        problems.append(problem)
    if with_image:
        images = asked.get("init_images")
        if not isinstance(images, list) or len(images) != 1:
            found = len(images) if isinstance(images, list) else "none"
            problems.append(FieldProblem("init_images", f"must hold one picture, got {found}"))
        else:
            data["image"] = images[0]
        strength = asked.get("denoising_strength")
        if is_img2img(spec):
            data["strength"] = IMG2IMG_STRENGTH if strength is None else strength
        elif strength is not None:
            warn(f"denoising_strength: type {spec.name} ({spec.title}) ignores it with a picture; left out")
    more, faults = check_options(asked, config, with_image)
    data |= more
    problems += faults
    counts = [_number("steps", asked.get(key) or 1) for key in ("batch_size", "n_iter")]
    pictures = 1
    for key, count in zip(("batch_size", "n_iter"), counts, strict=True):
        if not isinstance(count, int) or not 1 <= count <= MAX_PICTURES:
            problems.append(FieldProblem(key, f"must be 1 to {MAX_PICTURES}, got {shown(count)}"))
        else:
            pictures *= count
    if pictures > MAX_PICTURES:
        problems.append(
            FieldProblem("n_iter", f"times batch_size must be at most {MAX_PICTURES}, got {pictures}")
        )
    if problems:
        raise RequestError(422, problems)
    data["pictures"] = pictures
    return data


def _number(key: str, value: Any) -> Any:
    """A number as the field takes it: clients send 20.0 for a whole number."""
    if key in _WHOLE and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _notation(data: dict[str, Any], without_loras: bool) -> list[FieldProblem]:
    """Mark the prompts as A1111's and take the LoRAs out of them; what cannot be read."""
    problems = []
    for theirs, ours in (("prompt", "positive"), ("negative_prompt", "negative")):
        if not isinstance(text := data.get(ours), str) or not text:
            continue
        try:
            taken = take_networks(text)
        except NotationError as error:
            problems.append(FieldProblem(theirs, str(error)))
            continue
        data[ours], data["prompt_syntax"] = taken.text, "a1111"
        if without_loras:
            continue
        if taken.loras and ours == "positive":
            data["lora_scales"] = taken.loras
        elif taken.loras:
            warn(f"{theirs}: LoRAs are read only in the prompt; left out: {', '.join(taken.loras)}")
        for scale in taken.left_out:
            warn(f"{theirs}: a LoRA takes only one scale; left out: {scale}")
    return problems
