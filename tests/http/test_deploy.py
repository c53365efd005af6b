"""deploy/: the examples for nginx, Caddy and systemd, as they are but for ports, certificates, times."""

from __future__ import annotations

import base64
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import urllib3
from PIL import Image

from shared.http import pages
from shared.launch.flags import HostConfig
from tests.http.test_fairness import From
from tests.httphost import FakeHost, config_of, picture, wait_for
from tests.test_host import free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAME = "gpu.example.org"
NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site;
}}
"""
CADDY = "{{\n\tadmin off\n\tdefault_bind 127.0.0.1\n}}\nimport {folder}/site\n"


@dataclass
class Proxied:
    """A host behind a proxy, as clients elsewhere see it."""

    host: FakeHost
    url: str
    origin: str

    def ask(self, method: str, path: str, address: str = "127.0.0.1", **options: Any) -> requests.Response:
        """A request to the proxy, from this address."""
        session = requests.Session()
        session.mount("https://", From(address))
        session.mount("http://", From(address))
        headers = {"Host": self.origin.partition("//")[2], **options.pop("headers", {})}
        return session.request(
            method, self.url + path, headers=headers, verify=False, **{"timeout": 20, **options}
        )


def example(name: str, changes: dict[str, str]) -> str:
    """An example file, changed in these places."""
    text = (DEPLOY / name).read_text()
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture(params=["nginx", "caddy"])
def proxied(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proxied]:
    """Gives up on a host that says nothing for a second, not 1900."""
    kind = request.param
    if shutil.which(kind) is None:
        pytest.skip(f"needs {kind} (apt-get install {kind})")
    monkeypatch.setattr(pages, "HEARTBEAT", 0.4)
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    port = free_port()
    with FakeHost(config_of(trusted_hosts=(NAME,), trusted_proxies=("127.0.0.1/32",))) as host:
        changes = {"127.0.0.1:6000": f"127.0.0.1:{host.server.port}", "1900s": "1s"}
        if kind == "nginx":
            certificate(tmp_path)
            changes |= {"listen 443": f"listen 127.0.0.1:{port}"}
            changes |= {f"/etc/ssl/{NAME}.{end}": f"{tmp_path}/{end}" for end in ("pem", "key")}
            site, main, scheme = example("nginx.conf", changes), NGINX, "https"
            command = ["nginx", "-p", str(tmp_path), "-c", f"{tmp_path}/main"]
        else:
            changes |= {f"{NAME} {{": f"http://{NAME}:{port} {{"}  # a certificate needs a real name
            site, main, scheme = example("Caddyfile", changes), CADDY, "http"
            command = ["caddy", "run", "--config", f"{tmp_path}/main", "--adapter", "caddyfile"]
        (tmp_path / "site").write_text(site)
        (tmp_path / "main").write_text(main.format(folder=tmp_path))
        environment = os.environ | {f"XDG_{name}_HOME": str(tmp_path) for name in ("DATA", "CONFIG")}
        with (tmp_path / "output").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = Proxied(host, f"{scheme}://127.0.0.1:{port}", f"{scheme}://{NAME}:{port}")
            wait_for(lambda: process.poll() is not None or answers(found), 20)
            assert process.poll() is None, (tmp_path / "output").read_text()
            yield found
        finally:
            process.terminate()
            process.wait(10)


def certificate(folder: Path) -> None:
    """One that nobody trusts, as `pem` and `key`."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={NAME}"]
    command += ["-keyout", f"{folder}/key", "-out", f"{folder}/pem"]
    subprocess.run(command, check=True, capture_output=True)


def answers(proxied: Proxied) -> bool:
    try:
        return proxied.ask("GET", "/health", timeout=1).ok
    except requests.RequestException:
        return False


@pytest.mark.alone
def test_behind_a_proxy(proxied: Proxied) -> None:
    a_job_outlives_the_proxys_patience(proxied)
    a_request_without_a_name_ends_with_its_client(proxied)
    events_come_at_once_and_silence_is_filled(proxied)
    twenty_megabytes_pass(proxied)
    pages_and_names_are_checked(proxied)
    clients_are_told_apart(proxied)


def a_job_outlives_the_proxys_patience(proxied: Proxied) -> None:
    named, body = {"X-Request-Id": "a-long-one"}, {"positive": "hold", "steps": 1}
    assert proxied.ask("POST", "/generate", json=body, headers=named).status_code in (502, 504)
    waits = proxied.ask("GET", "/jobs/a-long-one?wait=0.5").json()
    assert waits["state"] == "running"
    queued = proxied.ask("POST", "/generate", json={"positive": "x"}, headers={"Prefer": "respond-async"})
    assert queued.status_code == 202
    assert proxied.ask("GET", queued.headers["Location"]).json()["place"] == 1
    proxied.host.go_on.set()
    done = proxied.ask("GET", "/jobs/a-long-one?wait=0.9").json()
    assert done["state"] == "done" and base64.b64decode(done["answer"]["output"]) == picture()
    again = proxied.ask("POST", "/generate", json=body, headers=named)
    assert again.status_code == 200 and again.json()["output"] == done["answer"]["output"]
    assert proxied.ask("GET", f"{queued.headers['Location']}?wait=0.9").json()["state"] == "done"
    assert proxied.ask("GET", f"{queued.headers['Location']}/output").content == picture()
    assert proxied.ask("DELETE", queued.headers["Location"]).json()["cancelled"] is False
    assert proxied.ask("GET", queued.headers["Location"]).status_code == 404
    assert [request.positive for request in proxied.host.seen] == ["hold", "x"]


def a_request_without_a_name_ends_with_its_client(proxied: Proxied) -> None:
    proxied.host.go_on.clear()
    with pytest.raises(requests.Timeout):
        proxied.ask("POST", "/generate", json={"positive": "hold"}, timeout=0.5)
    wait_for(lambda: proxied.host.queue.running is None)
    proxied.host.go_on.set()
    assert proxied.ask("GET", "/jobs?limit=1").json()["jobs"][0]["state"] == "cancelled"


def events_come_at_once_and_silence_is_filled(proxied: Proxied) -> None:
    stream = proxied.ask("GET", "/events", stream=True)
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.headers["Cache-Control"] == "no-store"
    lines, began, names = stream.iter_lines(chunk_size=1), time.monotonic(), []
    for line in lines:
        if line.startswith(b"event: "):
            names.append(line.decode().removeprefix("event: "))
        if time.monotonic() - began > 2.5:  # of silence but for the beats
            break
    assert names[:2] == ["host", "jobs"] and names.count("beat") >= 3
    sent = time.monotonic()
    proxied.ask("POST", "/generate", json={"positive": "x"}, headers={"X-Request-Id": "watched-one"})
    seen = next(line for line in lines if b"watched-one" in line)
    assert seen and time.monotonic() - sent < 2
    stream.close()


def twenty_megabytes_pass(proxied: Proxied) -> None:
    noise = np.random.default_rng(7).integers(0, 255, (2240, 2240, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG", compress_level=0)
    image = base64.b64encode(out.getvalue()).decode()
    assert len(image) > 20_000_000
    answer = proxied.ask(
        "POST",
        "/generate",
        json={"positive": "x", "image": image, "width": 64, "height": 64},
        headers={"Prefer": "respond-async", "X-Request-Id": "a-large-one"},
        timeout=60,
    )
    assert answer.status_code in (202, 504), answer.text  # this machine may need a second to read it
    wait_for(lambda: proxied.ask("GET", "/jobs/a-large-one").json().get("state") == "done", 30)
    assert proxied.host.seen[-1].image == out.getvalue()


def pages_and_names_are_checked(proxied: Proxied) -> None:
    own, foreign = {"Origin": proxied.origin}, {"Origin": "https://evil.example"}
    assert proxied.ask("POST", "/generate", json={}, headers=own).status_code == 200
    assert proxied.ask("POST", "/generate", json={}, headers=foreign).status_code == 403
    if proxied.url.startswith("https"):  # Caddy itself answers for names that it does not have
        assert proxied.ask("GET", "/", headers={"Host": "evil.example"}).status_code == 403
    assert "<html" in proxied.ask("GET", "/").text


def clients_are_told_apart(proxied: Proxied) -> None:
    forged = {"X-Forwarded-For": "203.0.113.9"}
    assert proxied.ask("POST", "/generate", "127.0.0.2", json={}, headers=forged).status_code == 200
    last = proxied.host.queue.last
    assert last is not None and last.client == "127.0.0.2"


def test_the_unit_is_sound(tmp_path: Path) -> None:
    unit = (DEPLOY / "multigpu-diffusion.service").read_text()
    [command] = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    _, *words = shlex.split(command.removeprefix("ExecStart="))
    names = {field.name for field in fields(HostConfig)} | {"config"}
    script = next(word for word in words if word.endswith("_host.py"))
    assert (DEPLOY.parent / script).exists()
    given = [word.partition("=")[0].removeprefix("--") for word in words[words.index(script) + 1 :]]
    assert set(given) <= names
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    installed = {
        "/opt/multigpu-diffusion/.venv/bin/torchrun": sys.executable,
        "/opt/multigpu-diffusion": str(tmp_path),
        "User=diffusion": "User=root",
    }
    (tmp_path / "multigpu-diffusion.service").write_text(example("multigpu-diffusion.service", installed))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "multigpu-diffusion.service")],
        capture_output=True,
        text=True,
    )
    told = [line for line in done.stderr.splitlines() if "multigpu-diffusion" in line]
    assert done.returncode == 0 and not told, done.stderr
