"""A client of a host: its HTTP API, and its process if it is started here. Uses only the standard library.

The same file is in clients/comfyui and in clients/localai (a test checks that they are equal), so that each
folder works when it is copied without the rest. Run as a program it is the guard of a started host: the guard
ends the host, and then itself, as soon as its standard input closes, which it does when the starter ends or
dies.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

END_SECONDS = 20.0  # for a host to end, between Ctrl-C and SIGKILL
QUICK_SECONDS = 10.0  # for a host to answer anything but /generate
CANCEL_SECONDS = 2.0  # that a cancelled request waits until the host knows of it
POST_SECONDS = 60.0  # for a host to take a request, whose pictures it checks first
WAIT_SECONDS = 20.0  # that a host is asked to keep an answer back until a job is over
EVENT_SECONDS = 30.0  # without data in GET /events, which sends something every 10 s
LORA_SECONDS = 600.0  # for a host to add or remove a LoRA, which waits in its queue
SILENT_SECONDS = 180.0  # without any answer, after which a host is given up; it may be starting again
LOADING_SECONDS = 1800.0  # of answers that it takes nothing now, after which it is given up
MOST_LOSSES = 1  # of a request with hosts that ended; then it is not posted again
RETRY_SECONDS = 1.0  # between two tries of a host that is away
AWAY = frozenset({0, 429, 502, 503, 504})  # statuses of a host, or of a proxy before it, to ask again later


class HostError(RuntimeError):
    """An error of a host, with its message.

    Attributes:
        status: the HTTP status; 0 where there was no answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        self.status = status
        super().__init__(message)


class Host:
    """The HTTP API of a running host.

    Args:
        url: such as http://127.0.0.1:6000.
        api_key: the bearer token, where the host asks for one.
    """

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a host's address must be like http://127.0.0.1:6000; got {url!r}")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.api_key = api_key
        self.end_reason: Callable[[], str] = lambda: ""  # of a host that will not come back
        self._parts = parts

    def _connection(self, timeout: float | None) -> http.client.HTTPConnection:
        https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=timeout)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Any = None,
        more: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        headers = {"Accept": "application/json"} | (more or {})
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: Exception) -> HostError:
        return HostError(f"no answer from the host at {self.url}: {str(error) or type(error).__name__}")

    @contextlib.contextmanager
    def events(self) -> Iterator[tuple[Callable[[], None], http.client.HTTPResponse]]:
        """GET /events: what hangs up, from any thread, and the open stream. Raises HostError."""
        with contextlib.closing(self._connection(EVENT_SECONDS)) as connection:
            headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
            try:
                connection.connect()
                sock = connection.sock  # the connection lets go of it where the answer says "close"
                connection.request("GET", self._parts.path.rstrip("/") + "/events", headers=headers)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise HostError(_message(answer.read(), answer.status), answer.status)
            except (OSError, http.client.HTTPException) as error:
                raise self._no_answer(error) from None
            with answer:
                yield lambda: _hang_up(sock), answer

    def call(
        self, method: str, path: str, body: Any = None, timeout: float = QUICK_SECONDS
    ) -> tuple[int, bytes]:
        """One call: (status, body). Raises HostError where there is no answer in time."""
        with contextlib.closing(self._connection(timeout)) as connection:
            return self._send(connection, method, path, body)

    def change_lora(self, method: str, body: dict[str, Any]) -> None:
        """POST or DELETE /lora. Raises HostError; 409 where it cannot while it runs."""
        status, data = self.call(method, "/lora", body, LORA_SECONDS)
        if status != 200:
            raise HostError(_message(data, status), status)

    def health(self) -> dict[str, Any]:
        """GET /health: state, backend, type, plan, ... Raises HostError."""
        _, data = self.call("GET", "/health")
        return _object(data)

    def launch(self) -> dict[str, Any]:
        """GET /launch: the request `fields` that it supports, ... Raises HostError."""
        status, data = self.call("GET", "/launch")
        if status != 200:
            raise HostError(_message(data, status), status)
        return _object(data)

    def ready(self) -> bool:
        """Whether it can take a request. Raises HostError where it says why it cannot at all."""
        status, data = self.call("GET", "/initialize")
        if status in (200, 202):
            return status == 200
        raise HostError(_message(data, status), status)

    def job(self, id: str) -> dict[str, Any]:
        """GET /jobs/{id}: state, progress, ... Raises HostError; 404 where there is no such job."""
        status, data = self.call("GET", f"/jobs/{id}")
        if status != 200:
            raise HostError(_message(data, status), status)
        return _object(data)

    def generate(
        self,
        body: dict[str, Any],
        check: Callable[[], None] = lambda: None,
        interval: float = 0.2,
        id: str = "",
        on_away: Callable[[str], None] = lambda why: None,
    ) -> dict[str, Any]:
        """POST /generate, as a job that a restart of the host does not end: it is waited out.

        Args:
            body: the request; keys whose value is None are left out.
            check: called every `interval` seconds on the calling thread; what it raises cancels this request
                and no other, and is raised here.
            id: by which the host's events name it, 8 to 64 letters and digits; drawn where there is none.
            on_away: told why, once each time that the host does not answer or takes nothing; on any thread.

        Raises:
            HostError: with the host's message, or what became of a host that did not come back in time.
        """
        given = {name: value for name, value in body.items() if value is not None}
        job = _Job(self, id or secrets.token_hex(8), given, on_away)
        worker = threading.Thread(target=job.run, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(interval)
                check()
        except BaseException:
            job.cancel()
            worker.join(CANCEL_SECONDS)
            raise
        if job.error is not None:
            raise job.error
        return job.answer


class _Job:
    """One request as a job of a host: posted, awaited, and posted again where the host has lost it.

    Args:
        host: that makes it.
        id: its name, so that it is never made twice.
        body: of POST /generate.
        on_away: as in `Host.generate`.
    """

    def __init__(self, host: Host, id: str, body: dict[str, Any], on_away: Callable[[str], None]) -> None:
        self.host, self.id, self.body, self.on_away = host, id, body, on_away
        self.answer: dict[str, Any] = {}
        self.error: HostError | None = None
        self._cancelled = threading.Event()
        self._taken = False  # whether the host has it
        self._losses = 0  # how often it was lost with a host that ended
        self._waits_on: socket.socket | None = None  # while the host keeps an answer back
        self._heard = self._known = time.monotonic()  # when the host last answered at all; of this job
        self._told = False  # that the host is away

    def run(self) -> None:
        """Get the answer, or the error; on a thread of its own, which `cancel` ends."""
        while not self._cancelled.is_set():
            try:
                if not self._taken:
                    self._post()
                began = time.monotonic()
                if self._poll():
                    return
                self._known, self._told = time.monotonic(), False
                # A host on which too many wait keeps no answer back.
                self._cancelled.wait(max(0.0, began + RETRY_SECONDS - time.monotonic()))
            except HostError as error:
                if error.status not in AWAY or self._is_gone(error):
                    self.error = self.error or error
                    return
            except (KeyError, TypeError, ValueError) as error:
                self.error = HostError(f"not a host: {self.host.url} answered something else ({error!r})")
                return
        self._remove()

    def cancel(self) -> None:
        """Ask for its end, from any thread."""
        self._cancelled.set()
        _hang_up(self._waits_on)

    def _post(self) -> None:
        headers = {"X-Request-Id": self.id, "Prefer": "respond-async"}
        status, data = self._call("POST", "/generate", POST_SECONDS, self.body, headers)
        if status == 200:
            raise HostError(f"the host at {self.host.url} is older than this client: it has no /jobs", 501)
        if status != 202:
            raise HostError(_message(data, status), status)
        self._taken = True

    def _poll(self) -> bool:
        """Ask for the answer; whether it is there, or the error that the job ended with."""
        path = f"/jobs/{self.id}?wait={WAIT_SECONDS:g}"
        status, data = self._call("GET", path, WAIT_SECONDS + QUICK_SECONDS)
        if status == 404:
            self._lose("the host was started again")  # and keeps no jobs on disk
            return False
        if status != 200:
            raise HostError(_message(data, status), status)
        job = _object(data)
        if job["state"] in ("failed", "cancelled"):
            self.error = HostError(str(job["error"]["message"]), int(job["status"]))
            if self.error.status in (500, 503) and self._host_ended():
                why, self.error = str(self.error), None
                self._lose(why)
                raise HostError(why, 503)
        self.answer = job.get("answer") or {}
        return job["state"] not in ("queued", "running")

    def _lose(self, why: str) -> None:
        """The host has it no more, so it is posted again. Raises HostError where that was done before."""
        self._losses += 1
        if self._losses > MOST_LOSSES:  # the request itself may be what ends hosts
            times = f"the host ended {self._losses} times while it had this request"
            raise HostError(f"{times}; the last time: {why}", 500)
        self._taken = False

    def _host_ended(self) -> bool:
        """Whether the host ends, so that what failed did so with it; it keeps no jobs on disk then."""
        try:
            return self.host.health().get("state") in ("broken", "stopping", "loading")
        except HostError:
            return True

    def _call(self, method: str, path: str, timeout: float, *more: Any) -> tuple[int, bytes]:
        with contextlib.closing(self.host._connection(timeout)) as connection:
            try:
                connection.connect()  # here, so that there is a socket to hang up
            except OSError as error:
                raise self.host._no_answer(error) from None
            self._waits_on = connection.sock if method == "GET" else None
            if self._cancelled.is_set():
                raise HostError("cancelled")
            status, data = self.host._send(connection, method, path, *more)
        if status not in (502, 504):  # those are a proxy's, before a host that is away
            self._heard = time.monotonic()
        return status, data

    def _is_gone(self, error: HostError) -> bool:
        """Whether the host will not come back, with why in `self.error`; where it may, after a pause."""
        if self._cancelled.is_set():
            return False
        now = time.monotonic()
        if ended := self.host.end_reason():
            self.error = HostError(ended, error.status)
        elif now > self._heard + SILENT_SECONDS or now > self._known + LOADING_SECONDS:
            since = SILENT_SECONDS if now > self._heard + SILENT_SECONDS else LOADING_SECONDS
            self.error = HostError(f"{error}; it was waited for {since:g} s", error.status)
        elif not self._told:
            self._told = True
            self.on_away(f"{error}; it is waited for")
        self._cancelled.wait(RETRY_SECONDS)
        return self.error is not None

    def _remove(self) -> None:
        """Cancel it at the host, also at one that is away now: it would make the picture when it is back."""
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline and not self.host.end_reason():
            with contextlib.suppress(HostError):
                self.host.call("DELETE", f"/jobs/{self.id}")
                return
            time.sleep(RETRY_SECONDS)


def _hang_up(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise HostError(f"not a host: it answered {data[:80]!r}")
    return found


def _message(data: bytes, status: int) -> str:
    try:
        return str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        return f"the host answered {status}: {data[:200].decode(errors='replace')}"


def free_port() -> int:
    """A free port below the ephemeral ones, so that no other program gets it before the host listens."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class HostProcess:
    """A host that this side starts under torchrun, and ends.

    Args:
        project: the folder with the host scripts.
        backend: asyncdiff, distrifuser or xdit.
        ranks: how many ranks, one a GPU; 1 starts it without torchrun.
        flags: of the host, `--name=value`; the port is chosen here.
        python: the interpreter that has the host's packages; empty: the project's .venv, else this one.

    Raises:
        HostError: no such project or interpreter.
    """

    def __init__(self, project: str, backend: str, ranks: int, flags: list[str], python: str = "") -> None:
        script = Path(project).expanduser() / f"{backend}_host.py"
        if not script.is_file():
            raise HostError(f"project: no {script.name} in {project!r}")
        taken = [flag for flag in flags if flag.split("=")[0] in ("--port", "--host")]
        if taken:
            raise HostError(f"{taken[0]}: the address is chosen automatically; leave the flag out")
        api_keys = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--api_key=")]
        port = free_port()
        self.host = Host(f"http://127.0.0.1:{port}", *api_keys[-1:])
        self.host.end_reason = lambda: "" if self.alive() else self.end_reason()
        command = [python or default_python(script.parent)]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            command += ["--master_port", str(free_port())]
        self.command = [*command, str(script), *flags, f"--port={port}"]
        descriptor, log = tempfile.mkstemp(prefix=f"{backend}_host_", suffix=".log")
        self.log = Path(log)
        environment = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **os.environ}
        self._guard = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *self.command],
            stdin=subprocess.PIPE,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            cwd=script.parent,
            env=environment,
            start_new_session=True,
        )
        os.close(descriptor)

    @property
    def pid(self) -> int:
        """Of the guard, which leads the host's process group."""
        return self._guard.pid

    def alive(self) -> bool:
        return self._guard.poll() is None

    def wait_until_ready(
        self,
        check: Callable[[], None] = lambda: None,
        on_loading: Callable[[dict[str, Any]], None] = lambda health: None,
        interval: float = 0.25,
    ) -> None:
        """Wait for the model to be loaded.

        Args:
            check: called every `interval` seconds; what it raises ends the host and is raised here.
            on_loading: called with the host's /health as often, once it answers.

        Raises:
            HostError: the host ended; with the line of its log that says why.
        """
        try:
            while True:
                if not self.alive():
                    raise HostError(self.end_reason())
                check()
                with contextlib.suppress(HostError):
                    if self.host.ready():
                        return
                    on_loading(self.host.health())
                time.sleep(interval)
        except BaseException:
            self.stop()
            raise

    def end_reason(self) -> str:
        """The line of the log that says why the host ended."""
        lines = self.log.read_text(errors="replace").splitlines()
        for mark in ("error: ", "cannot load: ", " ERROR ", "Error: "):
            found = [line for line in lines if mark in line and "torch.distributed.elastic" not in line]
            if found:
                return found[0].strip()
        return f"the host ended with exit code {self._guard.poll()}; its log is {self.log}"

    def stop(self) -> None:
        """End the host as Ctrl-C would, wait for all its processes, and leave none."""
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            self._guard.stdin.close()
        try:
            self._guard.wait(END_SECONDS + 5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
        if self._guard.returncode == 0:
            self.log.unlink(missing_ok=True)


def default_python(project: Path) -> str:
    """The interpreter of the project's own virtual environment, where it has one."""
    own = project / ".venv" / "bin" / "python"
    return str(own) if own.is_file() else sys.executable


def guard(command: list[str]) -> int:
    """Run a command until it ends, or until standard input closes or SIGTERM; then nothing of it is left.

    Returns the command's exit code; 0 where it was ended.
    """
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.set())
    # A handler, unlike SIG_IGN, is not inherited: the host gets Ctrl-C, the guard outlives it.
    signal.signal(signal.SIGINT, lambda *_: None)
    host = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    code: int | None = None
    while code is None and not asked_to_end.is_set():
        if select.select([sys.stdin], [], [], 0.1)[0] and not os.read(sys.stdin.fileno(), 1):
            break
        code = host.poll()
    if code is None:
        os.killpg(0, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            host.wait(END_SECONDS)
        code = 0
    if host.poll() is None:
        os.killpg(0, signal.SIGKILL)
    return code


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
