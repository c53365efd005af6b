"""Requests drawn from a host's own /openapi.json to every route: no 500, each answer as the document says.

    python benchmarks/fuzz.py [--requests 10000]              hosts without ranks, one of each kind of launch
    python benchmarks/fuzz.py --url http://127.0.0.1:6000     a host that runs

Most bodies fit their schema, the others differ from it in one field or are anything. Prints, by route, how
many requests got which kind of answer.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
SLOW = 10.0  # seconds that no answer may take
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
IDS = [f"fuzzed-job-{n}" for n in range(12)]  # so few that jobs are asked for, repeated and deleted
FIELDS = (
    *("prompt", "negative_prompt", "size", "n", "response_format", "model", "quality", "stream", "image"),
    *("cfg_scale", "sampler_name", "batch_size", "n_iter", "denoising_strength", "override_settings"),
    *("enable_hr", "hr_scale", "seconds", "alwayson_scripts", "mask", "background", "init_images"),
)  # of bodies without a schema, in other APIs' forms
MAKERS = {
    *("/generate", "/v1/images/generations", "/v1/images/edits", "/v1/videos"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/jobs", "/jobs/{id}", "/jobs/{id}/output"),
}
OF_HTTP = {400, 404, 405, 408, 413, 415}  # HTTP's own errors, of any route
Document = dict[str, Any]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(PIXEL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def fitting(schema: Document, document: Document) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema, as pydantic writes them."""
    if "$ref" in schema:
        return fitting(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    if "anyOf" in schema:
        return st.one_of([fitting(one, document) for one in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    least, most = schema.get("minimum"), schema.get("maximum")
    match schema.get("type"):
        case "string" if "contentEncoding" in schema:
            return st.just(PIXEL) | st.text(max_size=20)
        case "string":
            sizes = schema.get("minLength", 0), min(schema.get("maxLength", 40), 40)
            return st.text(min_size=sizes[0], max_size=max(sizes))
        case "integer":
            low = schema.get("exclusiveMinimum", (-(2**63) if least is None else least) - 1) + 1
            step = schema.get("multipleOf", 1)
            high = 2**64 if most is None else most
            return st.integers(-(-low // step), high // step).map(lambda n: int(n * step))
        case "number":
            above, below = "exclusiveMinimum" in schema, "exclusiveMaximum" in schema
            least, most = schema.get("exclusiveMinimum", least), schema.get("exclusiveMaximum", most)
            return st.floats(
                least, most, exclude_min=above, exclude_max=below, allow_nan=False, allow_infinity=False
            )
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            few = schema.get("minItems", 0), min(schema.get("maxItems", 3), 3)
            return st.lists(fitting(schema.get("items", {}), document), min_size=few[0], max_size=max(few))
        case "object":
            return objects(schema, document)
    return anything


@st.composite
def objects(draw: st.DrawFn, schema: Document, document: Document) -> dict[str, Any]:
    """An object with its needed fields and some others, seldom many."""
    known, needed = schema.get("properties", {}), schema.get("required", [])
    others = sorted(set(known) - set(needed))
    chosen = draw(st.lists(st.sampled_from(others), max_size=4, unique=True)) if others else []
    made = {name: draw(fitting(known[name], document)) for name in (*needed, *chosen)}
    more = schema.get("additionalProperties", False)
    if more and not known:
        values = fitting(more if isinstance(more, dict) else {}, document)
        made |= draw(st.dictionaries(st.text(max_size=8), values, max_size=3))
    return made


@dataclass
class Asked:
    """One request, and what the document says of it."""

    method: str
    route: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    answers: Document  # by status

    @property
    def key(self) -> str:
        return f"{self.method} {self.route}"


@st.composite
def drawn(draw: st.DrawFn, document: Document, route: str, method: str) -> Asked:
    """A request to a route."""
    operation = document["paths"][route][method]
    names = st.sampled_from(IDS) | st.sampled_from(["x", "..", "%00", "style.css"]) | st.text(max_size=8)
    path, query = route, {}
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            given = quote(draw(names), safe="%") or "x"
            given = "x" if given in (".", "..") else given  # which clients take out of a path themselves
            path = path.replace(f"{{{parameter['name']}}}", given)
        elif draw(st.booleans()):
            said = st.sampled_from([*IDS, "", "0", "1", "-1", "0.01", "61", "1e400", "nan", "done"])
            query[parameter["name"]] = draw(said | st.text(max_size=8))
    headers = {"Content-Type": "application/json"}
    if draw(st.integers(0, 2)) == 0:
        headers["X-Request-Id"] = draw(st.sampled_from(IDS))
    if draw(st.integers(0, 3)) == 0:
        headers["Prefer"] = draw(st.sampled_from(["respond-async", "respond-async, wait=1", "wait=0"]))
    if draw(st.integers(0, 3)) == 0:
        headers["Accept"] = draw(
            st.sampled_from(["image/png", "image/webp", "video/mp4", "application/json"])
        )
    body = b""
    if method == "post" or "requestBody" in operation:
        body = draw(bodies(route, operation, document))
    if route.endswith("/edits") and draw(st.booleans()):
        files = {"image": base64.b64decode(PIXEL)} if draw(st.booleans()) else {draw(names): body}
        texts = {"prompt": "x"} | ({draw(names): draw(names)} if draw(st.booleans()) else {})
        form = requests.Request("POST", "http://host", files=files, data=texts).prepare()
        assert isinstance(form.body, bytes)
        body, headers["Content-Type"] = form.body, form.headers["Content-Type"]
    return Asked(method.upper(), route, path, query, headers, body, operation["responses"])


@st.composite
def bodies(draw: st.DrawFn, route: str, operation: Document, document: Document) -> bytes:
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        value = draw(fitting(schema, document))
        named = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if draw(st.booleans()):  # beside what the launch serves
            value = named.get("examples", [{}])[0] | dict(list(value.items())[:1])
    else:
        value = draw(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
        if draw(st.booleans()):
            value = {"init_images": [PIXEL]} if route.endswith("img2img") else {"steps": 2}
            value |= {"prompt": draw(st.text(max_size=40)), draw(st.sampled_from(FIELDS)): draw(anything)}
    match draw(st.integers(0, 9)):
        case 0:
            value |= {draw(st.sampled_from(sorted(value)) if value else st.text(max_size=8)): draw(anything)}
        case 1:
            value = draw(anything)
        case 2:
            return draw(st.binary(max_size=60))
    return json.dumps(value).encode("utf-8", "surrogatepass")


@dataclass
class Answers:
    """What the requests got so far, by route, and the first request of each fault that they found."""

    by_route: dict[str, Counter[int]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def add(self, asked: Asked, status: int) -> None:
        self.by_route.setdefault(asked.key, Counter())[status] += 1

    def table(self) -> str:
        """By route; of these hosts all together."""
        lines = ["| route | requests | 2xx | 4xx | 503 | 500 |", "|---|---:|---:|---:|---:|---:|"]
        total: Counter[int] = Counter()
        for route, of in [
            *sorted(self.by_route.items(), key=lambda item: item[0].split()[::-1]),
            ("all", total),
        ]:
            cells = [
                of.total(),
                *(sum(n for status, n in of.items() if status // 100 == kind) for kind in (2, 4)),
                *(of[503], sum(n for status, n in of.items() if status >= 500) - of[503]),
            ]
            lines.append(f"| {route} | {' | '.join(map(str, cells))} |")
            total += of
        return "\n".join(lines)


def fault(asked: Asked, answer: requests.Response, document: Document) -> str:
    """What is wrong with an answer: a status, media type or JSON that the document has not; "" if nothing."""
    status = answer.status_code
    if status >= 500 and not (status == 503 and answer.headers.get("Retry-After")):
        return "a failure"
    said = asked.answers.get(str(status)) or asked.answers.get("default")
    if said is None and status in OF_HTTP:
        said = document["components"]["responses"][str(status)]
    if said is None:
        return "a status that is not documented"
    if "$ref" in said:
        said = document["components"]["responses"][said["$ref"].rpartition("/")[2]]
    kind, content = answer.headers.get("Content-Type", "").partition(";")[0], said.get("content", {})
    if content and not {kind, "*/*"} & set(content):
        return f"a media type that is not documented, {kind or 'none'}"
    if kind == "application/json" and (schema := content.get(kind, {}).get("schema")):
        whole = schema | {"components": document["components"]}
        try:
            jsonschema.validate(answer.json(), whole, cls=jsonschema.Draft202012Validator)
        except (jsonschema.ValidationError, ValueError) as error:
            return f"not its schema: {getattr(error, 'message', error)}"
    return ""


def fuzz(url: str, count: int, number: int, answers: Answers) -> None:
    """Ask about `count` requests, drawn from the host's own document; what they get goes into `answers`.

    Every route is asked, those that make pictures more often, in an order drawn from `number`.
    """
    with requests.Session() as session:
        document = session.get(f"{url}/openapi.json", timeout=SLOW).json()
        routes = [(path, method) for path, of in document["paths"].items() for method in of]
        turns = routes + 4 * [key for key in routes if key[0] in MAKERS]
        random.Random(number).shuffle(turns)

        def each(asked: Asked) -> None:
            began = time.monotonic()
            with session.request(
                asked.method,
                url + asked.path,
                params=asked.query,
                data=asked.body,
                headers=asked.headers,
                timeout=SLOW,
                stream=asked.route == "/events",
            ) as answer:
                answers.add(asked, answer.status_code)
                stream = answer.headers.get("Content-Type", "").startswith("text/event-stream")
                wrong = "" if stream else fault(asked, answer, document)
                if time.monotonic() - began > SLOW:
                    wrong = f"more than {SLOW:g} s"
                if wrong:
                    told = f"{asked.path} {asked.query} {asked.headers} {asked.body[:300]!r}"
                    answer_told = "" if stream else answer.text[:300]
                    key = f"{asked.key}: {answer.status_code}, {wrong[:200]}"
                    answers.faults.setdefault(key, f"{told} -> {answer_told}")

        for turn, (route, method) in enumerate(turns):
            run = settings(
                max_examples=max(1, round(count / len(turns))),
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            )
            draw_all: Callable[[], None] = run(
                seed(number * 1000 + turn)(given(drawn(document, route, method))(each))
            )
            draw_all()
        assert session.get(f"{url}/health", timeout=SLOW).json()["state"] in ("ready", "busy")


def launches() -> list[Any]:
    """One launch of each kind: pictures, with adapters, a video, a transformer."""
    from tests.httphost import config_of

    adapters: Document = {
        "control_net": {"/c": 1.0},
        "ip_adapter": {"/i": 1.0},
        "lora": {"/models/a.safetensors": 1.0},
    }
    return [
        config_of(allow_lora_paths=True),
        config_of(**adapters),
        config_of("svd"),
        config_of("flux", backend="xdit"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a host that runs, in place of hosts of this program's own")
    options = parser.parse_args()
    answers = Answers()
    if options.url:
        fuzz(options.url, options.requests, options.seed, answers)
    else:
        from tests.httphost import FakeHost

        configs = launches()
        for number, config in enumerate(configs):
            with FakeHost(config) as host:
                fuzz(host.url, -(-options.requests // len(configs)), options.seed + number, answers)
    print(answers.table())
    for key, example in answers.faults.items():
        print(f"{key}\n    {example}", file=sys.stderr)
    if answers.faults:
        raise SystemExit(f"{len(answers.faults)} kinds of faults")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
