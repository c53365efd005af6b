"""The part of A1111's API that clients need (SillyTavern, Open WebUI, Photoshop and Krita plug-ins).

Only these routes ignore unknown keys, since such clients send many; sizes are rounded to what the
type takes. What cannot be done is refused in words, never done in another way.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Response, jsonify
from flask import request as http
from PIL import Image

from shared.api.a1111_samplers import AUTOMATIC, SCHEDULES, samplers_for, taken_variant
from shared.api.faults import RequestError, all_faults
from shared.api.jobs import Order, Preview
from shared.api.media import encode_image
from shared.api.metadata import png_info
from shared.api.parsing import check_request
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.retouch import Retouched
from shared.api.warned import collecting_warnings, merged, with_warnings
from shared.http import a1111_hires as hires
from shared.http.a1111_options import check_settings, warn_of_unset
from shared.http.a1111_request import OURS, check_model, translate
from shared.http.connections import MAX_BODY
from shared.http.dispatch import ApiError, Dispatcher
from shared.http.incoming import caller, check_json_type, json_body
from shared.http.routes import App, Route, picture_route
from shared.launch.flags import HostConfig

PREFIX = "/sdapi/"
_THEIRS = {ours: theirs for theirs, ours in OURS.items()} | {
    "image": "init_images",
    "strength": "denoising_strength",
    "control_image": "alwayson_scripts.ControlNet.image",
    "controlnet_scale": "alwayson_scripts.ControlNet.weight",
}
_LARGE = ("init_images", "mask", "alwayson_scripts")  # are not told again

_LISTS = {
    "sd-models": "the checkpoint, as a list",
    "samplers": "names of the type's schedulers",
    "schedulers": "names of their noise schedules",
    "upscalers": "the hires fix's ways to enlarge pixels",
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
        "upscalers": [_upscaler_entry(name) for name in hires.served_pixels(config.spec)],
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
        settings = json_body()
        check_model(settings.get("sd_model_checkpoint"), name)
        if problems := check_settings(settings, config):
            raise RequestError(422, problems)
        with collecting_warnings() as warnings:
            warn_of_unset(settings)
        caller().warnings = warnings
        return jsonify(None)

    skip = {"skip_current_image": "true: without the picture so far"}

    @app.serve(
        "GET", "/sdapi/v1/progress", Route("A1111: progress, queue and the picture so far", query=skip)
    )
    def a1111_progress() -> Response:
        skipped = http.args.get("skip_current_image", "false").lower() in ("true", "1")
        return jsonify(_progress(dispatcher, with_image=not skipped))

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


def _upscaler_entry(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}


def _scheduler_entry(label: str, rho: float) -> dict[str, Any]:
    return {
        "name": label.lower().replace(" ", "_"),
        "label": label,
        "aliases": None,
        "default_rho": rho,
        "need_inner_model": False,
    }


def _progress(dispatcher: Dispatcher, with_image: bool) -> dict[str, Any]:
    """The running job and the queue, in A1111's words."""
    queue = dispatcher.queue
    job, waiting = queue.generation, len(queue)
    preview = queue.glance() if with_image else None
    left = 0.0
    if job is not None and 0 < job.progress < 100:
        left = job.seconds_running() * (100 / job.progress - 1)
    began = time.time() - (0.0 if job is None else job.seconds_running())
    return {
        "progress": 0.0 if job is None else job.progress / 100,
        "eta_relative": round(left, 1),
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.cancelled,
            "stopping_generation": False,
            "job": "" if job is None else job.id,
            "job_count": waiting + (job is not None),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(began)),
            "job_no": 0 if job is None else len(job.made),
            "sampling_step": 0 if job is None else job.step,
            "sampling_steps": 0 if job is None else job.steps,
        },
        "current_image": None if preview is None else _picture(preview),
        "textinfo": f"{waiting} waiting" if waiting else None,
    }


def _picture(preview: Preview) -> str:
    image = Image.frombytes("RGB", (preview.width, preview.height), preview.rgb)
    return base64.b64encode(encode_image(image, "jpeg")).decode()


@dataclass(frozen=True)
class _Asked(Order):
    """An order, and the options that it was made of, in A1111's words."""

    options: dict[str, Any] = field(default_factory=dict)


def _answer(dispatcher: Dispatcher, samplers: dict[str, str], with_image: bool) -> Response:
    check_json_type()
    config = dispatcher.config

    def parse() -> _Asked:
        retouched: Retouched | None = None

        def check(options: dict[str, Any], more: dict[str, Any]) -> GenerateRequest:
            nonlocal retouched
            made = translate(options, config, samplers, with_image)
            retouched = made.retouched
            return check_request(made.data | more, config)

        options = json_body()
        if with_image:
            return _Asked(check(options, {}), None, retouched, options)
        if not hires.is_asked(options):
            return _Asked(hires.one_pass(options, check), None, retouched, options)
        return _Asked(*hires.two_passes(options, config, check), retouched, options)

    asked, replies = dispatcher.run(caller(), parse)
    told = {k: v for k, v in asked.options.items() if k not in _LARGE}
    info = _info(asked, replies, config) | {"infotexts": [reply.infotext for reply in replies]}
    body = {
        "images": [reply.answer()["output"] for reply in replies],
        "parameters": told,
        "info": json.dumps(info),
    }
    return jsonify(with_warnings(body, merged(*(reply.warnings for reply in replies))))


def _info(asked: _Asked, replies: list[Reply], config: HostConfig) -> dict[str, Any]:
    """What A1111 tells of its pictures; the size is the painted one, with the hires fix the first pass'."""
    options = asked.options
    pasted = asked.retouched is not None and asked.retouched.paste is not None
    first = asked.request if pasted or asked.second is not None else replies[0]
    prompt, negative = str(options.get("prompt") or ""), str(options.get("negative_prompt") or "")
    sampler = str(options.get("sampler_name") or options.get("sampler_index") or AUTOMATIC)
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
        "cfg_scale": asked.request.cfg,
        "steps": first.steps,
        "batch_size": 1,
        "sd_model_name": config.model_id,
        "index_of_first_image": 0,
    }
