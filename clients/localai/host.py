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
EVENT_SECONDS = 30.0  # without data in GET /events, which sends something every 10 s
LORA_SECONDS = 600.0  # for a host to add or remove a LoRA, which waits in its queue


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
        self._parts = parts

    def _connection(self, timeout: float | None) -> http.client.HTTPConnection:
        https = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=timeout)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, name: str = ""
    ) -> tuple[int, bytes]:
        headers = {"Accept": "application/json"} | ({"X-Request-Id": name} if name else {})
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

    def progress(self) -> float:
        """Of whichever request runs, 0 to 100."""
        status, data = self.call("GET", "/progress")
        return float(data) if status == 200 else 0.0

    def generate(
        self,
        body: dict[str, Any],
        check: Callable[[], None] = lambda: None,
        interval: float = 0.2,
        id: str = "",
    ) -> dict[str, Any]:
        """POST /generate.

        Args:
            body: the request; keys whose value is None are left out.
            check: called every `interval` seconds on the calling thread; what it raises cancels this request
                and no other, and is raised here.
            id: by which the host's events name it, 8 to 64 letters and digits; drawn where there is none.

        Raises:
            HostError: with the host's message.
        """
        answers: list[tuple[int, bytes]] = []
        failures: list[HostError] = []
        id = id or secrets.token_hex(8)
        connection = self._connection(QUICK_SECONDS)
        try:
            connection.connect()  # here, so that there is a socket to hang up
        except OSError as error:
            raise self._no_answer(error) from None
        connection.sock.settimeout(None)

        def post() -> None:
            try:
                given = {name: value for name, value in body.items() if value is not None}
                answers.append(self._send(connection, "POST", "/generate", given, id))
            except HostError as error:
                failures.append(error)

        worker = threading.Thread(target=post, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(interval)
                check()
        except BaseException:
            # By its id, so that no other request ends; if that fails, the disconnect cancels it too.
            with contextlib.suppress(HostError):
                self.call("POST", f"/cancel?id={id}")
            _hang_up(connection.sock)
            worker.join(QUICK_SECONDS)
            raise
        finally:
            connection.close()
        if failures:
            raise failures[0]
        status, data = answers[0]
        if status != 200:
            raise HostError(_message(data, status), status)
        return _object(data)


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
