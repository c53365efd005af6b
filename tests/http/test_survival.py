"""--state_dir: jobs that outlive a host without ranks. Real kills: tests/ranks/test_state_dir.py."""

from __future__ import annotations

import base64
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from shared.api.store import LEAST_BYTES, JobRecord
from shared.launch.flags import HostConfig
from tests.http.test_jobs_routes import ASYNC, id_header, job
from tests.httphost import FakeHost, config_of, picture, wait_for

pytestmark = pytest.mark.alone

FAILED = "failed"


def kept(folder: Path, **flags: Any) -> HostConfig:
    return config_of(**{"state_dir": str(folder), **flags})


def ask(host: FakeHost, id: str, **body: Any) -> None:
    answer = host.generate(body, headers=ASYNC | id_header(id))
    assert answer.status_code == 202, answer.text


def record(host: FakeHost, id: str) -> JobRecord:
    found = host.store.get(id)
    assert found is not None
    return found


def test_after_a_death_what_ran_and_what_waited_is_made_with_its_drawn_seed(tmp_path: Path) -> None:
    image = base64.b64encode(picture(size=(64, 96))).decode()
    with FakeHost(kept(tmp_path)) as host:
        ask(host, "finished", positive="a dog", seed=3)
        done = job(host, "finished")
        ask(host, "running-1", positive="hold", steps=3)
        ask(host, "waiting-1", positive="a cat", image=image, strength=0.5)
        ask(host, "waiting-2", positive="a bird", pictures=2)
        wait_for(lambda: host.queue.running)
        seeds = [job(host, id, 0)["seed"] for id in ("running-1", "waiting-1", "waiting-2")]
        wanted = [record(host, id).order for id in ("running-1", "waiting-1", "waiting-2")]
        host.die()
    with FakeHost(kept(tmp_path, width=256), state="loading") as host:
        host.go_on.set()
        assert host.generate({}).status_code == 503  # only what was kept waits
        assert [job(host, id, 0)["place"] for id in ("running-1", "waiting-1", "waiting-2")] == [1, 2, 3]
        host.status.ready()
        answers = [job(host, id) for id in ("running-1", "waiting-1", "waiting-2")]
        assert [found["state"] for found in answers] == ["done"] * 3
        assert [found["answer"]["seed"] for found in answers] == seeds
        made = host.seen[:3]
        for request, order in zip(made, wanted, strict=True):
            assert order is not None and request == order.request
        assert made[1].image == picture(size=(64, 96)) and (made[1].width, made[1].height) == (64, 96)
        assert job(host, "finished") == done and len(host.seen) == 4
        assert host.get("/jobs/finished/output").content == base64.b64decode(done["answer"]["output"])
        listed = [found["id"] for found in host.get("/jobs").json()["jobs"]]
        assert listed == ["waiting-2", "waiting-1", "running-1", "finished"]


def test_a_client_that_was_cut_off_asks_again_with_its_id(tmp_path: Path) -> None:
    body = {"positive": "hold", "steps": 2}
    with FakeHost(kept(tmp_path)) as host:
        ask(host, "cut-off-1", **body)
        wait_for(lambda: host.queue.running)
        host.die()
    with FakeHost(kept(tmp_path), state="loading") as host:
        host.go_on.set()
        threading.Timer(0.3, host.status.ready).start()
        first = host.generate(body, headers=id_header("cut-off-1"))
        assert first.status_code == 200 and first.json()["seed"] == job(host, "cut-off-1")["seed"]
        assert host.generate(body | {"steps": 3}, headers=id_header("cut-off-1")).status_code == 409
    for _ in range(2):  # and whenever the host was started again since
        with FakeHost(kept(tmp_path)) as host:
            again = host.generate(body, headers=id_header("cut-off-1"))
            assert again.json() == first.json() and not host.seen


def test_one_that_the_host_died_of_twice_is_failed_and_told_so(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with FakeHost(kept(tmp_path)) as host:
            if attempt == 1:
                ask(host, "deadly-01", positive="hold")
                ask(host, "waiting-1", positive="a cat")
            wait_for(lambda: host.queue.running)
            assert job(host, "deadly-01", 0)["state"] == "running"
            assert record(host, "deadly-01").attempts == attempt
            host.die()
    with FakeHost(kept(tmp_path)) as host:
        found = job(host, "deadly-01")
        assert found["state"] == "failed" and found["status"] == 500
        assert found["message"] == "the host ended twice while this ran"
        assert job(host, "waiting-1")["state"] == "done" and len(host.seen) == 1
        again = host.generate({"positive": "hold"}, headers=id_header("deadly-01"))
        assert again.status_code == 500 and again.json()["message"] == found["message"]


def test_an_orderly_stop_is_no_attempt_and_tells_who_waits_to_ask_again(tmp_path: Path) -> None:
    answers: list[requests.Response] = []

    def wait(host: FakeHost) -> None:
        answers.append(host.generate({"positive": "hold"}, headers=id_header("stopped-1")))

    for stop in range(3):
        with FakeHost(kept(tmp_path)) as host:
            if not stop:
                threading.Thread(target=wait, args=[host]).start()
            wait_for(lambda host=host: host.queue.running)
            assert record(host, "stopped-1").attempts == 1
    wait_for(lambda: answers)
    assert answers[0].status_code == 503 and answers[0].headers["Retry-After"]
    assert "ask again with this X-Request-Id" in answers[0].json()["message"]
    with FakeHost(kept(tmp_path)) as host:
        host.go_on.set()
        assert host.generate({"positive": "hold"}, headers=id_header("stopped-1")).status_code == 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"type": "sdxl"}, "accepted for type sd1 of x, but the host was started again with type sdxl of x"),
        ({"checkpoint": "/models/other"}, "started again with type sd1 of other"),
        ({"ip_adapter": None}, "ip_image: the host was started again without --ip_adapter"),
    ],
)
def test_one_that_the_new_launch_does_not_serve_is_failed_with_the_reason(
    tmp_path: Path, flags: dict[str, Any], words: str
) -> None:
    image = base64.b64encode(picture()).decode()
    adapter = {"ip_adapter": {"/a": 1.0}}
    with FakeHost(kept(tmp_path, **adapter)) as host:
        ask(host, "running-1", positive="hold")
        ask(host, "waiting-1", positive="a cat", ip_image=image)
        host.die()
    with FakeHost(kept(tmp_path, **adapter | flags)) as host:
        host.go_on.set()
        found = job(host, "waiting-1")
        assert found["state"] == "failed" and found["status"] == 422 and words in found["message"]


@pytest.mark.parametrize(
    ("before", "now", "made", "words"),
    [
        ("ddim", "ddim", [None, "heun"], ""),
        ("ddim", None, ["ddim", "heun"], ""),
        ("ddim", "k_euler", ["ddim", "heun"], ""),
        (None, "k_euler", [FAILED, "heun"], "was none when it was accepted and is 'k_euler' now: the check"),
        ("ddim", {"scheduler": "ddim", "eta": 0.5}, [FAILED, FAILED], "was 'ddim' when it was accepted and"),
        ({"scheduler": "ddim", "eta": 0.5}, None, [FAILED, FAILED], "its settings hold for every scheduler"),
    ],
)
def test_another_scheduler_of_the_launch_changes_no_picture(
    tmp_path: Path, before: Any, now: Any, made: list[Any], words: str
) -> None:
    with FakeHost(kept(tmp_path, scheduler=before)) as host:
        ask(host, "running-1", positive="hold")
        ask(host, "waiting-1", positive="a cat", scheduler="heun")
        host.die()
    with FakeHost(kept(tmp_path, scheduler=now)) as host:
        host.go_on.set()
        found = [job(host, id) for id in ("running-1", "waiting-1")]
        assert [one["state"] for one in found] == [FAILED if one == FAILED else "done" for one in made]
        assert [request.scheduler for request in host.seen] == [one for one in made if one != FAILED]
        assert all(words in one["message"] for one in found if one["state"] == FAILED)


def test_one_that_was_written_by_another_version_is_failed_not_a_crash(tmp_path: Path) -> None:
    with FakeHost(kept(tmp_path)) as host:
        ask(host, "running-1", positive="hold")
        ask(host, "waiting-1", positive="a cat")
        folder = host.store.folder
        assert folder is not None
        folder._db.execute(
            "UPDATE jobs SET job_order = ? WHERE id = 'waiting-1'", (b'{"request": {"new": 1}}',)
        )
        host.die()
    with FakeHost(kept(tmp_path)) as host:
        host.go_on.set()
        assert "cannot be read by this version: new" in job(host, "waiting-1")["message"]
        assert job(host, "running-1")["state"] == "done"


def test_jobs_that_were_kept_may_be_more_than_the_queue_takes(tmp_path: Path) -> None:
    ids = [f"waiting-{n}" for n in range(4)]
    with FakeHost(kept(tmp_path)) as host:
        for id in ids:
            ask(host, id, positive="hold")
        host.die()
    with FakeHost(kept(tmp_path, max_queue=1)) as host:
        wait_for(lambda: host.queue.running)
        assert [job(host, id, 0)["state"] for id in ids] == ["running", "queued", "queued", "queued"]
        gone = requests_delete(host, ids[2])
        assert gone["cancelled"] and host.generate({"positive": "x"}).status_code == 503
        host.go_on.set()
        assert [job(host, id)["state"] for id in ids] == ["done", "done", "cancelled", "done"]


def requests_delete(host: FakeHost, id: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.delete(f"{host.url}/jobs/{id}").json()
    return found


def test_flags_bound_what_is_kept(tmp_path: Path) -> None:
    size = len(picture())
    for flags in (
        {"keep_bytes": 2 * (size + LEAST_BYTES)},
        {"state_dir": str(tmp_path), "keep_bytes": 2 * (size + LEAST_BYTES)},
    ):
        with FakeHost(config_of(**flags)) as host:
            for n in range(3):
                host.generate({"positive": "a cat"}, headers=id_header(f"kept-00{n}"))
            wait_for(lambda: len(host.store.all()) == 2)
            assert [found["id"] for found in host.get("/jobs").json()["jobs"]] == ["kept-002", "kept-001"]
    with FakeHost(config_of(keep_jobs=0.3)) as host:
        host.generate({"positive": "a cat"}, headers=id_header("kept-001"))
        assert host.get("/jobs/kept-001").status_code == 200
        time.sleep(0.4)
        assert host.get("/jobs/kept-001").status_code == 404
