"""Clients that are not put off: each way in, asked again with the same X-Request-Id until it is answered."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests

PAUSE = 0.5  # seconds before asking again
CONNECT, READ = 5.0, 300.0  # seconds


@dataclass(eq=False)
class Asked:
    """One job of a client, and what became of it."""

    way: str
    body: dict[str, Any]  # of POST /generate
    id: str = field(default_factory=lambda: f"kills-{uuid.uuid4().hex[:12]}")
    picture: bytes | None = None
    seed: int | None = None  # as the answer tells it
    again: int = 0  # how often it was asked again
    lost: str = ""  # why it counts as lost
    hit: bool = False  # it was at work when something was killed
    other: bool | None = None  # its bytes differ from those of the same request alone; None: not compared

    @property
    def over(self) -> bool:
        return self.picture is not None or bool(self.lost)

    @property
    def wrong(self) -> bool:
        return bool(self.lost or self.other)

    @property
    def key(self) -> str:
        """What makes the picture."""
        return json.dumps([self.way, self.body], sort_keys=True)


def _openai(body: dict[str, Any]) -> dict[str, Any]:
    """The body in OpenAI's words."""
    words = {"prompt": body["positive"], "size": f"{body['width']}x{body['height']}"}
    return words | {name: body[name] for name in ("steps", "seed") if name in body}


def _a1111(body: dict[str, Any]) -> dict[str, Any]:
    """The body in A1111's words."""
    return {"prompt" if name == "positive" else name: value for name, value in body.items()}


def _generated(answer: requests.Response) -> tuple[bytes, int]:
    data = answer.json()
    return base64.b64decode(data["output"]), data["seed"]


def _raw(answer: requests.Response) -> tuple[bytes, int]:
    return answer.content, int(answer.headers["X-Seed"])


def _from_openai(answer: requests.Response) -> tuple[bytes, int]:
    [data] = answer.json()["data"]
    return base64.b64decode(data["b64_json"]), data["seed"]


def _from_a1111(answer: requests.Response) -> tuple[bytes, int]:
    data = answer.json()
    return base64.b64decode(data["images"][0]), json.loads(data["info"])["seed"]


Body = Callable[[dict[str, Any]], dict[str, Any]]
Read = Callable[[requests.Response], tuple[bytes, int]]
WAYS: dict[str, tuple[str, dict[str, str], Body, Read]] = {
    "generate": ("/generate", {}, dict, _generated),
    "raw": ("/generate", {"Accept": "image/png"}, dict, _raw),
    "async": ("/generate", {"Prefer": "respond-async"}, dict, _raw),
    "openai": ("/v1/images/generations", {}, _openai, _from_openai),
    "a1111": ("/sdapi/v1/txt2img", {}, _a1111, _from_a1111),
}
"""Each way in: its route, its headers, its body and how its answer is read."""


def ask(url: str, job: Asked, seen: dict[str, int | None], patience: float) -> None:
    """Ask until the job is done or lost.

    Args:
        seen: ids of jobs that were accepted, with the seeds that they had then; the host must know them.
        patience: seconds after which a job that is not done is lost.
    """
    until = time.monotonic() + patience
    while not job.over:
        try:
            _once(url, job, seen)
        except requests.RequestException as error:
            if time.monotonic() > until:
                job.lost = f"not done after {patience:g} s: {error}"
        if not job.over:
            time.sleep(PAUSE)
            job.again += 1
    drawn = seen.get(job.id)
    if not job.lost and drawn is not None and drawn != job.seed:
        job.lost = f"its seed was {drawn}, then {job.seed}"


def _once(url: str, job: Asked, seen: dict[str, int | None]) -> None:
    """Ask one time; raises RequestException where it is to be asked again."""
    if job.id in seen:
        known = requests.get(f"{url}/jobs/{job.id}", timeout=(CONNECT, 30))
        if known.status_code == 404:
            job.lost = "it was accepted, and is not known any more"
            return
    path, headers, body_of, read = WAYS[job.way]
    headers = {"X-Request-Id": job.id, **headers}
    answer = requests.post(url + path, json=body_of(job.body), headers=headers, timeout=(CONNECT, READ))
    if answer.status_code == 202:
        seen.setdefault(job.id, None)
        polled = _polled(url, job)
        if polled is None:
            return
        answer = polled
    if answer.status_code in (500, 503) and "host" in answer.text:
        raise requests.RequestException(answer.text[:300])  # it ends, loads or stops
    if answer.status_code != 200:
        job.lost = f"{answer.status_code}: {answer.text[:300]}"
        return
    job.picture, job.seed = read(answer)


def _polled(url: str, job: Asked) -> requests.Response | None:
    """The file of a job that the client does not wait for; None where it is lost."""
    while True:
        told = requests.get(f"{url}/jobs/{job.id}", params={"wait": 20}, timeout=(CONNECT, READ))
        if told.status_code == 404:
            job.lost = "it was answered 202, and is not known any more"
            return None
        told.raise_for_status()
        state = told.json()["state"]
        if state in ("failed", "cancelled"):
            job.lost = f"{state}: {told.json()['message']}"
            return None
        if state == "done":
            return requests.get(f"{url}/jobs/{job.id}/output", timeout=(CONNECT, READ))
