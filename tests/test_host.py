"""shared.host: whole processes under torchrun, with an engine that obeys orders; how they end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from shared.api.status import HostStatus
from shared.host import meanwhile, warm_up
from shared.launch.errors import LoadError
from tests import tiny
from tests.fake_host import FakeEngine
from tests.httphost import config_of
from tests.seldom import seldom

ROOT = Path(__file__).resolve().parent.parent
FAKE = "tests/fake_host.py"
DEMO_CHECKPOINT = ROOT / "demo" / "checkpoint"
DEMO_STEPS = 4  # of the shared host (conftest.demo_host), all of them exact

# Below those that the system hands out, and of each worker of pytest-xdist its own: no port is given twice.
PORTS = 12000 + 4000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
NUMBERS = itertools.count(random.randrange(4000))

alone = pytest.mark.alone  # tests that hold a host to a few seconds


def free_port() -> int:
    while True:
        port = PORTS + next(NUMBERS) % 4000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(p) for p in listed.split()]


@pytest.mark.parametrize("needed", [True, False])
def test_work_is_done_while_the_block_runs_and_over_after_it(needed: bool) -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(30)
        time.sleep(0.1)
        ended.set()

    with meanwhile(work, needed):
        assert begun.wait(30 if needed else 0.2) == needed and not ended.is_set()
        may_end.set()
    assert ended.is_set() == needed


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children_cpu() -> float:
    """Seconds of a core that the ended children took: other processes do not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for a condition; how long it took. Fails the test when it does not come true in time."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not so after {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


class Launch:
    """A host under torchrun (or plain python with ranks=0), its output in a file."""

    def __init__(
        self, folder: Path, ranks: int, *flags: str, script: str = FAKE, torchrun: tuple[str, ...] = ()
    ) -> None:
        (folder / "model_index.json").write_text("{}")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            launcher += ["--master_port", str(free_port()), *torchrun]
        command = [*launcher, script, "--type=sd1", f"--checkpoint={folder}", f"--port={self.port}", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ready(self, seconds: float = 90) -> Launch:
        def initialized() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return requests.get(f"{self.url}/initialize", timeout=5).status_code == 200
            except (requests.ConnectionError, requests.Timeout):
                return False

        until(initialized, seconds)
        return self

    def post(self, timeout: float = 60.0, **order: Any) -> requests.Response:
        body = {"positive": json.dumps(order), "steps": order.pop("steps", 3)}
        return requests.post(f"{self.url}/generate", json=body, timeout=timeout)

    def ask(self, body: dict[str, Any]) -> str:
        """The picture of this body, as its answer has it."""
        answer = requests.post(f"{self.url}/generate", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["output"])

    def post_later(self, **order: Any) -> tuple[threading.Thread, list[requests.Response]]:
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.post(**order)))
        thread.start()
        until(lambda: requests.get(f"{self.url}/progress", timeout=5).text not in ("0", "0.0"), 10)
        return thread, answers

    def end(self) -> None:
        if self.process.poll() is None:
            # Ranks have sessions of their own, and one that a test has stopped does not end by itself.
            for pid in [*children(self.process.pid), self.process.pid]:
                with contextlib.suppress(ProcessLookupError):  # one may end in this moment
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    made: list[Launch] = []

    def start(ranks: int, *flags: str, **options: Any) -> Launch:
        made.append(Launch(tmp_path, ranks, *flags, **options))
        return made[-1]

    yield start
    for one in made:
        one.end()


def own_traceback(log: str) -> bool:
    """Whether a traceback goes through the project's own files; torchrun prints one of its own on Ctrl-C."""
    return any("/shared/" in part or "fake_host" in part for part in log.split("Traceback")[1:])


@alone
@pytest.mark.slow
def test_a_worker_killed_in_a_generation(launch: Callable[..., Launch]) -> None:
    host = launch(2).ready()
    assert host.post(sleep=0.01).status_code == 200
    workers = children(host.process.pid)
    _, answers = host.post_later(sleep=0.2, steps=100)
    os.kill(workers[1], signal.SIGKILL)
    until(lambda: bool(answers), 10)
    assert answers[0].status_code == 500
    assert answers[0].json()["output"] is None and answers[0].headers["X-Request-Id"]
    until(lambda: host.process.poll() is not None, 15)
    assert host.process.returncode != 0
    assert not any(map(alive, workers))


@alone
def test_killed_ranks_are_started_again_and_lose_no_job(
    launch: Callable[..., Launch], tmp_path: Path
) -> None:
    """What they draw then is what would have been drawn: ranks/test_state_dir.py."""

    def job(id: str) -> dict[str, Any]:
        found: dict[str, Any] = requests.get(f"{host.url}/jobs/{id}?wait=20", timeout=30).json()
        return found

    host = launch(2, f"--state_dir={tmp_path / 'state'}", torchrun=("--max-restarts=3",)).ready()
    answers = [host.post(steps=1)]
    for victim in (1, 0):
        waiting = host.post_later(sleep=0.1, steps=15)[1] if victim else []
        if victim:
            later = {"Prefer": "respond-async", "X-Request-Id": "waiting-1"}
            requests.post(f"{host.url}/generate", json={"steps": 3}, headers=later, timeout=5)
            seed = requests.get(f"{host.url}/jobs/waiting-1", timeout=5).json()["seed"]
        old = children(host.process.pid)
        os.kill(old[victim], signal.SIGKILL)
        until(lambda old=old: not any(map(alive, old)), 10)  # type: ignore[misc]
        log = host.log.read_text()  # rank 0 says who died, not that the launcher stops it
        assert "rank 1 died" in log and "SIGTERM was received" not in log
        if victim:
            until(lambda waiting=waiting: bool(waiting), 10)  # type: ignore[misc]
            assert waiting[0].status_code == 503 and waiting[0].json()["output"] is None  # ask again
            cut_off = waiting[0].headers["X-Request-Id"]
        answers.append(host.ready().post(steps=1))
        if victim:
            assert job(cut_off)["state"] == "done" == job("waiting-1")["state"]
            assert job("waiting-1")["answer"]["seed"] == seed
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["output"] for answer in answers}) == 1


@alone
@pytest.mark.parametrize("victim", seldom(("rank 1", "rank 0", "the launcher"), ("rank 1",)))
def test_who_is_stopped_while_idle_is_noticed(launch: Callable[..., Launch], victim: str) -> None:
    host = launch(2, "--collective_timeout=6").ready()
    workers = children(host.process.pid)
    pids = {"rank 0": workers[0], "rank 1": workers[1], "the launcher": host.process.pid}
    os.kill(pids[victim], signal.SIGSTOP)
    answers: list[requests.Response] = []
    if victim != "rank 0":
        asked = threading.Thread(target=lambda: answers.append(host.post(sleep=0.1, steps=100)))
        asked.start()
    until(
        lambda: not any(map(alive, workers)), 10
    )  # the stopped one too: the launcher would wait 30 s for it
    assert f"{victim} has been stopped" in host.log.read_text()
    if victim != "rank 0":
        asked.join(5)
        assert answers[0].status_code == 500 and f"{victim} has been stopped" in answers[0].text


@alone
@pytest.mark.slow
def test_a_rank_that_is_stopped_while_loading_is_noticed(launch: Callable[..., Launch]) -> None:
    host = launch(2, "--collective_timeout=6")
    until(lambda: len(children(host.process.pid)) == 2, 20)
    workers = children(host.process.pid)
    until(lambda: "serving" in host.log.read_text(), 20)
    os.kill(workers[1], signal.SIGSTOP)
    until(lambda: not any(map(alive, workers)), 10)
    assert "rank 1 has been stopped" in host.log.read_text()


@alone
def test_the_launcher_killed_leaves_no_orphans(launch: Callable[..., Launch]) -> None:
    host = launch(2).ready()
    workers = children(host.process.pid)
    assert len(workers) == 2
    os.kill(host.process.pid, signal.SIGKILL)
    host.process.wait()
    until(lambda: not any(map(alive, workers)), 5)


@alone
def test_ctrl_c_ends_all_ranks_in_time_and_without_a_traceback(launch: Callable[..., Launch]) -> None:
    host = launch(2).ready()
    workers = children(host.process.pid)
    _, answers = host.post_later(sleep=0.2, steps=100)
    os.killpg(host.process.pid, signal.SIGINT)
    assert until(lambda: not any(map(alive, workers)), 5) < 5
    until(lambda: bool(answers), 5)
    assert answers[0].status_code == 503
    host.process.wait(20)
    assert not own_traceback(host.log.read_text())


@alone
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_first_signal_lets_the_picture_be_finished_and_keeps_what_waits(
    launch: Callable[..., Launch], tmp_path: Path, number: int
) -> None:
    state = f"--state_dir={tmp_path / 'state'}"
    host = launch(2, state).ready()
    _, answers = host.post_later(sleep=0.2, steps=15)
    for id in ("waiting-one", "waiting-two"):
        body, headers = {"positive": "{}", "steps": 3}, {"Prefer": "respond-async", "X-Request-Id": id}
        accepted = requests.post(f"{host.url}/generate", json=body, headers=headers, timeout=5)
        assert accepted.status_code == 202
    host.process.send_signal(number)
    until(lambda: requests.get(f"{host.url}/health", timeout=5).json()["state"] == "stopping", 2)
    assert requests.get(f"{host.url}/health", timeout=5).status_code == 200
    for answer in (host.post(), requests.get(f"{host.url}/ready", timeout=5)):
        assert answer.status_code == 503 and answer.headers["Retry-After"]
    drained = {job["id"]: job["state"] for job in requests.get(f"{host.url}/jobs", timeout=5).json()["jobs"]}
    [running] = set(drained) - {"waiting-one", "waiting-two"}
    assert drained["waiting-one"] == drained["waiting-two"] == "queued"
    until(lambda: bool(answers), 10)
    assert answers[0].status_code == 200
    host.process.wait(10)
    assert "died" not in host.log.read_text() and not own_traceback(host.log.read_text())
    again = launch(2, state).ready()
    for id in (running, "waiting-one", "waiting-two"):
        job = requests.get(f"{again.url}/jobs/{id}?wait=20", timeout=30).json()
        assert job["state"] == "done" and job["answer"]["output"], job


@alone
@pytest.mark.parametrize("again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_grace_ends_and_a_second_signal_ends_it_sooner(
    launch: Callable[..., Launch], again: bool
) -> None:
    host = launch(2, *([] if again else ["--stop_grace=1"])).ready()
    _, answers = host.post_later(sleep=0.1, steps=500)
    host.process.send_signal(signal.SIGTERM)
    if again:
        time.sleep(0.5)
        host.process.send_signal(signal.SIGTERM)
    until(lambda: bool(answers), 5)
    assert answers[0].status_code == 503 and answers[0].headers["Retry-After"]
    until(lambda: host.process.poll() is not None, 10)


def stops() -> list[Any]:
    """Each rank in each state."""
    states = ("loading", "idle", "busy", "longer than the grace")
    return seldom([(state, rank) for state in states for rank in (0, 1)], [("busy", 0)])


@alone
@pytest.mark.parametrize(("state", "stopped"), stops())
def test_a_rank_that_gets_a_signal_alone_ends_all_for_good(
    launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch, state: str, stopped: int
) -> None:
    monkeypatch.setenv("FAKE_LOAD_SECONDS", "60" if state == "loading" else "0")
    grace = 1 if state == "longer than the grace" else 20
    host = launch(2, f"--stop_grace={grace}", torchrun=("--max-restarts=3",))
    if state == "loading":
        until(lambda: "serving" in host.log.read_text(), 60)
        answers = None
    else:
        steps = 15 if grace == 20 else 600
        answers = host.ready() and state != "idle" and host.post_later(sleep=0.1, steps=steps)[1]
    ranks = children(host.process.pid)
    os.kill(ranks[stopped], signal.SIGTERM)
    until(lambda: host.process.poll() is not None, 15)
    assert host.process.returncode == 0, host.log.read_text()
    assert not any(map(alive, ranks)) and "Traceback" not in host.log.read_text()
    if answers:
        assert answers[0].status_code == (200 if state == "busy" else 503)


@alone
@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_machines_stop_together(launch: Callable[..., Launch], stopped: int) -> None:
    meet = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=x")
    hosts = [launch(1, torchrun=(*meet, "--max-restarts=3")) for _ in range(2)]
    until(lambda: "ready after" in hosts[0].log.read_text(), 60)
    ranks = {
        int(Path(f"/proc/{pid}/environ").read_text().split("\0RANK=")[1].split("\0")[0]): pid
        for host in hosts
        for pid in children(host.process.pid)
    }
    os.kill(ranks[stopped], signal.SIGTERM)
    until(lambda: all(host.process.poll() is not None for host in hosts), 15)
    assert [host.process.returncode for host in hosts] == [0, 0], hosts[0].log.read_text()


@alone
@pytest.mark.slow
def test_a_rank_that_gets_two_signals_ends_all_at_once(launch: Callable[..., Launch]) -> None:
    host = launch(2, torchrun=("--max-restarts=3",)).ready()
    _, answers = host.post_later(sleep=0.1, steps=500)
    worker = children(host.process.pid)[1]
    for _ in range(2):
        os.kill(worker, signal.SIGTERM)
        time.sleep(0.5)
    until(lambda: host.process.poll() is not None, 5)
    assert host.process.returncode == 0, host.log.read_text()
    assert answers[0].status_code == 503 and answers[0].headers["Retry-After"]


@alone
def test_ctrl_c_without_torchrun_exits_130(launch: Callable[..., Launch]) -> None:
    host = launch(0).ready()
    assert host.post(sleep=0.01).status_code == 200
    assert requests.get(f"{host.url}/health", timeout=5).json()["plan"]["diffusers"] is False
    os.kill(host.process.pid, signal.SIGINT)
    assert host.process.wait(5) == 130
    assert "Traceback" not in host.log.read_text()


@alone
def test_other_ranks_let_rank_0_say_a_usage_error_first() -> None:
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "asyncdiff_host.py"), "--stride=3"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    # torchrun ends it as soon as rank 0 has ended, and here nobody does.
    ended, left = start(), start()
    time.sleep(2)
    assert ended.poll() is None
    ended.terminate()
    assert ended.communicate(timeout=5)[1] == "" and ended.returncode == 2
    assert left.communicate(timeout=20)[1].startswith("[rank 1] asyncdiff_host.py: error: --stride")
    assert left.returncode == 2


@pytest.mark.parametrize(
    "ranks, prefix", [pytest.param("0 1", "", marks=pytest.mark.slow), ("1", "[rank 1] ")]
)
def test_a_load_that_fails_says_why_once(
    launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch, ranks: str, prefix: str
) -> None:
    monkeypatch.setenv("FAKE_LOAD_FAILS", ranks)
    host = launch(2)
    until(lambda: host.process.poll() is not None, 40)
    lines = [line for line in host.log.read_text().splitlines() if "cannot load: " in line]
    assert len(lines) == 1 and f"ERROR {prefix}cannot load: no weights" in lines[0]


def test_a_rank_that_hangs_breaks_the_host_in_time(launch: Callable[..., Launch]) -> None:
    host = launch(2, "--collective_timeout=2").ready()
    answer = host.post(rank=1, step=2, do="hang")
    assert answer.status_code == 500
    until(lambda: host.process.poll() is not None, 30)
    assert host.process.returncode != 0


@pytest.mark.slow
def test_an_error_inside_a_collective_breaks_the_host_in_time(launch: Callable[..., Launch]) -> None:
    host = launch(2, "--collective_timeout=2").ready()
    answer = host.post(rank=1, step=2, do="raise_in_step")
    assert answer.status_code == 500 and "broken inside a step" in answer.json()["message"]
    until(lambda: host.process.poll() is not None, 30)
    assert host.process.returncode != 0


def test_a_usage_error_ends_every_rank_with_one_line(launch: Callable[..., Launch]) -> None:
    host = launch(2, "--stride=3")
    host.process.wait(30)
    lines = [line for line in host.log.read_text().splitlines() if "error: --stride" in line]
    assert lines == ["asyncdiff_host.py: error: --stride: must be at most 2; got '3'"]
    assert host.process.returncode == 1  # torchrun's own
    assert re.search(r"exitcode *: 2", host.log.read_text())


def test_a_port_in_use_is_a_usage_error(launch: Callable[..., Launch]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host = launch(0, f"--port={taken.getsockname()[1]}")
        assert host.process.wait(10) == 2
    assert "--port: cannot serve" in host.log.read_text()


@pytest.mark.parametrize("name", seldom(("a..b", "nobody.invalid", "203.0.113.5"), ("nobody.invalid",)))
def test_a_host_that_is_not_here_is_a_usage_error(launch: Callable[..., Launch], name: str) -> None:
    host = launch(0, f"--host={name}")
    assert host.process.wait(20) == 2
    [line] = host.log.read_text().splitlines()
    assert f"error: --host: must be a name or an address of this machine; got '{name}'" in line


@pytest.mark.slow
def test_one_stage_leaves_flags_without_effect(launch: Callable[..., Launch]) -> None:
    host = launch(0, "--time_shift").ready()
    assert host.log.read_text().count("WARNING --time_shift has no effect: there is one stage") == 1


@pytest.mark.parametrize("backend", ["asyncdiff", "distrifuser", "xdit"])
def test_help_and_usage_errors_are_instant(backend: str) -> None:
    script = str(ROOT / f"{backend}_host.py")
    for arguments, code in ((["--help"], 0), (["--bogus"], 2), (["--type=sd1"], 2)):
        best, tries = 9.0, 0
        while best >= 0.5 and tries < 5:
            began, tries = children_cpu(), tries + 1
            done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
            best = min(best, children_cpu() - began)
            assert done.returncode == code
        assert best < 0.5, f"{arguments} took {best:.2f} s of a core"
        if code:
            assert done.stderr.count("\n") == 1 and "error: --" in done.stderr


def test_a_size_that_fails_ends_the_start() -> None:
    config = config_of(width=64, height=64, sizes=((32, 64), (24, 64)))
    status = HostStatus(config.backend, config.type, 1)
    with pytest.raises(LoadError, match=r"^--sizes: 24x64 fails: no room for it$"):
        warm_up(FakeEngine(tiny.world()), config, status)
    assert status.message == "warming up at 24x64, size 3 of 3"
