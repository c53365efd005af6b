"""Jobs that outlive their clients: /jobs, respond-async, and requests that are asked again by their id."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from shared.api.jobs import JobError
from tests.httphost import FakeHost, config_of, picture, wait_for

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost() as host:
        yield host


def id_header(id: str) -> dict[str, str]:
    return {"X-Request-Id": id}


def job(host: FakeHost, id: str, wait: float = 10) -> dict[str, Any]:
    answer = host.get(f"/jobs/{id}?wait={wait}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_job_is_listed_once_the_queue_has_it(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def submit(job: Any) -> None:
        seen.extend((host.get("/jobs").json()["jobs"], host.get(f"/jobs/{job.id}").status_code))
        raise JobError(503, "the host is stopping")

    monkeypatch.setattr(host.queue, "submit", submit)
    answer = host.generate({}, headers=ASYNC)
    assert answer.status_code == 503 and seen == [[], 404]
    assert host.get("/jobs").json()["jobs"] == []


def test_a_client_that_does_not_wait_fetches_its_answer(host: FakeHost) -> None:
    body = {"positive": "hold me", "seed": 7, "pictures": 2, "steps": 2, "return_latent": True}
    accepted = host.generate(body, headers=ASYNC)
    id = accepted.json()["id"]
    assert accepted.status_code == 202 and accepted.json() == {"message": "accepted", "id": id}
    assert accepted.headers["Location"] == f"/jobs/{id}" and accepted.headers["X-Request-Id"] == id
    assert accepted.headers["Preference-Applied"] == "respond-async"
    found = job(host, id)
    assert found["state"] == "done" and found["status"] == 200 and found["progress"] == 100
    assert (found["seed"], found["pictures"], found["prompt"]) == (7, 2, "hold me")
    assert found["answer"]["seeds"] == [7, 8] and len(found["answer"]["output"]) == 2
    assert found["answer"]["latent"] and found["error"] is None and found["message"] == "OK"
    waited = host.generate(body).json()  # the same answer as for a client that waits
    seconds = found["answer"].pop("seconds"), waited.pop("seconds")
    assert found["answer"] == waited and all(s["total"] > 0 for s in seconds)
    for n in (0, 1):
        file = host.get(f"/jobs/{id}/output?n={n}")
        assert base64.b64encode(file.content).decode() == waited["output"][n]
        assert file.headers["Content-Type"] == "image/png" and file.headers["X-Seed"] == str(7 + n)
    assert host.get(f"/jobs/{id}/output?n=2").status_code == 404
    assert host.get("/jobs").json()["jobs"][1]["id"] == id


def test_other_apis_have_no_answer_202_and_answer_whole(host: FakeHost) -> None:
    """RFC 7240: a preference that is not honoured is passed over, and none is said to be applied."""
    for path, key in (("/v1/images/generations", "data"), ("/sdapi/v1/txt2img", "images")):
        answer = host.post(path, json={"prompt": "a dog"}, headers=ASYNC)
        assert answer.status_code == 200 and len(answer.json()[key]) == 1, path
        assert "Preference-Applied" not in answer.headers and "Location" not in answer.headers


@pytest.mark.alone
def test_the_list_tells_states_places_and_waits(host: FakeHost) -> None:
    ids = [f"job-{n:05}" for n in range(3)]
    for id in ids:
        host.generate({"positive": "hold", "steps": 3}, headers=ASYNC | id_header(id))
    wait_for(lambda: host.get("/jobs?state=running").json()["jobs"])
    jobs = host.get("/jobs").json()["jobs"]
    assert [found["id"] for found in jobs] == ids[::-1]
    assert [found["state"] for found in jobs] == ["queued", "queued", "running"]
    assert [found["place"] for found in jobs] == [2, 1, None]
    assert all(found["route"] == "POST /generate" for found in jobs)
    assert all(abs(time.time() - found["accepted"]) < 10 for found in jobs)
    assert [found["id"] for found in host.get("/jobs?limit=1&state=queued").json()["jobs"]] == [ids[2]]
    assert host.get(f"/jobs/{ids[1]}/output").status_code == 409
    for query, name in (("limit=0", "limit"), ("limit=x", "limit"), ("state=lost", "state")):
        refused = host.get(f"/jobs?{query}")
        assert refused.status_code == 400 and refused.json()["errors"][0]["field"] == name
    assert host.get(f"/jobs/{ids[0]}?wait=61").status_code == 400
    began = time.monotonic()
    assert job(host, ids[2], 0.3)["state"] == "queued" and 0.3 <= time.monotonic() - began < 3
    host.go_on.set()
    assert [job(host, id)["state"] for id in ids] == ["done"] * 3
    assert host.get("/jobs/unknown-1").status_code == 404
    assert "unknown-1" in host.get("/jobs/unknown-1").json()["message"]


def test_the_end_of_a_wait_is_estimated_from_what_was_made(host: FakeHost) -> None:
    def ask(*ids: str) -> list[Any]:
        for id in ids:
            host.generate({"positive": "hold", "steps": 4}, headers=ASYNC | id_header(id))
        wait_for(lambda: job(host, ids[0], 0)["state"] == "running")
        return [job(host, id, 0)["wait_estimate"] for id in ids]

    assert ask("first-one", "second-1") == [None, None]  # nothing was made before
    time.sleep(1)
    host.go_on.set()
    assert job(host, "second-1")["wait_estimate"] is None  # it is done
    host.go_on.clear()
    held, behind = ask("held-0001", "behind-01")
    assert held >= 0.5 and behind == pytest.approx(2 * held, abs=0.11)


def test_a_failed_job_has_the_error_that_its_client_would_have_had(host: FakeHost) -> None:
    told = host.generate({"positive": "fail", "steps": 3}, headers=id_header("failing-1"))
    assert told.status_code == 500
    found = job(host, "failing-1")
    assert found["state"] == "failed" and found["status"] == 500 and found["answer"] is None
    assert found["error"]["message"] == found["message"] == told.json()["message"]
    again = host.generate({"positive": "fail", "steps": 3}, headers=id_header("failing-1"))
    assert again.status_code == 500 and again.json() == told.json() and len(host.seen) == 1


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/generate", {"positive": "a cat", "steps": 2}),
        ("/v1/images/generations", {"prompt": "a cat", "n": 2}),
        ("/sdapi/v1/txt2img", {"prompt": "a cat", "cfg_scale": 3}),
    ],
)
def test_asked_again_by_its_id_nothing_is_made_twice(host: FakeHost, route: str, body: Any) -> None:
    first = host.post(route, json=body, headers=id_header("the-same-1"))
    made = len(host.seen)
    again = host.post(route, json=body, headers=id_header("the-same-1"))
    told, repeated = first.json(), again.json()
    told.pop("created", None), repeated.pop("created", None)
    assert first.status_code == again.status_code == 200
    assert told == repeated and len(host.seen) == made  # the drawn seed too
    other = host.post(route, json=body | {"seed": 3}, headers=id_header("the-same-1"))
    assert other.status_code == 409 and "the-same-1" in other.text and len(host.seen) == made
    wrong = host.post(route, json=body | {"steps": 0}, headers=id_header("the-same-1"))
    assert wrong.status_code == 409


def test_an_id_of_another_route_is_refused(host: FakeHost) -> None:
    assert host.generate({"positive": "a cat"}, headers=id_header("one-route")).status_code == 200
    answer = host.post("/v1/images/generations", json={"positive": "a cat"}, headers=id_header("one-route"))
    assert answer.status_code == 409 and "POST /generate" in answer.json()["error"]["message"]


def test_a_form_is_known_again_whatever_its_boundary() -> None:
    with FakeHost(config_of("sdxl")) as host:
        for color, status in ((0, 200), (0, 200), (9, 409)):
            form = requests.post(
                f"{host.url}/v1/images/edits",
                data={"prompt": "a cat"},
                files={"image": ("a.png", picture(size=(64 + color, 64)), "image/png")},
                headers=id_header("form-0001"),
            )
            assert form.status_code == status, form.text
        assert len(host.seen) == 1


def test_in_another_form_by_accept_unless_it_is_another_file(host: FakeHost) -> None:
    body, headers = {"positive": "a cat"}, id_header("accepted")
    answer = host.generate(body, headers=headers).json()
    raw = host.generate(body, headers=headers | {"Accept": "image/png"})
    assert base64.b64encode(raw.content).decode() == answer["output"]
    jpeg = host.generate(body, headers=headers | {"Accept": "image/jpeg"})
    assert jpeg.status_code == 409 and "png" in jpeg.json()["message"] and len(host.seen) == 1


def test_two_at_once_with_one_id_are_one_job(host: FakeHost) -> None:
    answers: list[requests.Response] = []

    def ask() -> None:
        answers.append(host.generate({"positive": "hold", "steps": 1}, headers=id_header("at-once-1")))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: host.queue.running)
    time.sleep(0.2)
    host.go_on.set()
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [200] * 6
    assert len({answer.content for answer in answers}) == 1 and len(host.seen) == 1


def leave(host: FakeHost, headers: str) -> None:
    """Send a request and go as soon as it runs."""
    body = b'{"positive": "hold", "steps": 2}'
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    with socket.create_connection(("127.0.0.1", host.server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: host.queue.running)


def test_a_client_that_leaves_cancels_its_job_unless_it_named_it(host: FakeHost) -> None:
    leave(host, "X-Request-Id: my-own-name\r\n")
    time.sleep(0.5)
    assert job(host, "my-own-name", 0)["state"] == "running"
    host.go_on.set()
    assert job(host, "my-own-name")["state"] == "done"
    host.go_on.clear()
    leave(host, "")
    wait_for(lambda: host.get("/jobs").json()["jobs"][0]["state"] == "cancelled")


def test_delete_cancels_what_runs_or_waits_and_forgets_what_is_over(host: FakeHost) -> None:
    ids = ["running-1", "waiting-1"]
    for id in ids:
        host.generate({"positive": "hold", "steps": 2}, headers=ASYNC | id_header(id))
    wait_for(lambda: host.queue.running)
    for id in ids[::-1]:
        gone = requests.delete(f"{host.url}/jobs/{id}")
        assert gone.json() == {"message": "OK", "id": id, "cancelled": True}
        found = job(host, id)
        assert found["state"] == "cancelled" and found["status"] == 499
    assert host.generate({"positive": "hold", "steps": 2}, headers=id_header(ids[0])).status_code == 499
    for id in ids:
        assert requests.delete(f"{host.url}/jobs/{id}").json()["cancelled"] is False
        assert (
            host.get(f"/jobs/{id}").status_code == requests.delete(f"{host.url}/jobs/{id}").status_code == 404
        )
    assert host.get("/jobs").json() == {"jobs": []} and not host.steps_run


def test_what_the_queue_refuses_is_no_job(host: FakeHost) -> None:
    with FakeHost(config_of(max_queue=0)) as host:
        host.generate({"positive": "hold"}, headers=ASYNC | id_header("first-one"))
        wait_for(lambda: host.queue.running)
        refused = host.generate({"positive": "hold"}, headers=ASYNC | id_header("second-1"))
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        assert host.get("/jobs/second-1").status_code == 404
        host.go_on.set()
        assert job(host, "first-one")["state"] == "done"
        assert host.generate({"positive": "x"}, headers=id_header("second-1")).status_code == 200


def test_faults_are_told_before_anything_is_kept(host: FakeHost) -> None:
    refused = host.generate({"steps": 0}, headers=ASYNC | id_header("faulty-01"))
    assert refused.status_code == 400 and host.get("/jobs").json() == {"jobs": []}
    assert host.generate({"steps": 1}, headers=id_header("faulty-01")).status_code == 200


def test_without_a_folder_jobs_end_with_the_host(host: FakeHost) -> None:
    host.generate({"positive": "hold"}, headers=ASYNC | id_header("to-be-lost"))
    wait_for(lambda: host.queue.running)
    host.queue.close(JobError(500, "the host is ending: rank 1 died"))
    found = job(host, "to-be-lost")
    assert found["state"] == "failed" and found["message"] == "the host is ending: rank 1 died"


def test_a_job_that_nobody_waits_for_is_logged_and_counted_when_it_is_over(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"steps": 2, "seed": 7, "width": 64, "height": 64}
    with caplog.at_level("INFO", logger="host"):
        for prompt, status in (("warned", 200), ("fail", 500), ("hold", 499)):
            id = host.generate(body | {"positive": prompt}, headers=ASYNC).json()["id"]
            if prompt == "hold":
                host.post(f"/cancel?id={id}")
            assert job(host, id)["status"] == status
            wait_for(lambda id=id: sum(f"id={id}" in r.getMessage() for r in caplog.records) == 2)
            lines = [r for r in caplog.records if f"id={id}" in r.getMessage()]
            [over] = [
                r for r in lines if "status=202" not in r.getMessage()
            ]  # a fast one ends before the 202
            fields = vars(over)["fields"]
            assert fields["status"] == status and fields["route"] == "POST /generate"
            assert (fields["size"], fields["steps"], fields["seed"]) == ("64x64", 2, 7)
            assert over.levelname == ("WARNING" if status == 500 else "INFO")
            assert ("warnings" in fields, "error" in fields) == (status == 200, status != 200)
    text = host.get("/metrics").text
    outcomes = {"ok": 1, "failed": 1, "cancelled": 1, "bad_request": 0}
    for outcome, count in outcomes.items():
        assert f'diffusion_requests_total{{outcome="{outcome}"}} {count}.0' in text, outcome


def test_a_client_that_waits_again_is_told_and_nothing_is_told_twice(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="host"):
        leave(host, "X-Request-Id: left-and-back\r\n")
        wait_for(lambda: any("status=499" in r.getMessage() for r in caplog.records))
        asked = {"positive": "hold", "steps": 2}
        again = threading.Thread(
            target=host.generate, args=[asked], kwargs={"headers": id_header("left-and-back")}
        )
        again.start()
        time.sleep(0.3)
        host.go_on.set()
        again.join(20)
        wait_for(lambda: any("status=200" in r.getMessage() for r in caplog.records))
    lines = [r.getMessage() for r in caplog.records if "id=left-and-back" in r.getMessage()]
    assert [line.split()[1] for line in lines] == ["status=499", "status=200"]
    assert 'outcome="cancelled"} 0.0' in host.get("/metrics").text


def test_an_id_that_cannot_be_one_is_told(host: FakeHost) -> None:
    answer = host.generate({"steps": 1}, headers=id_header("req 1"))
    [warning] = answer.json()["warnings"]
    assert warning.startswith("X-Request-Id: must be 8 to 64 letters, digits, _ and -, got 'req 1'")
    assert answer.headers["X-Request-Id"] in warning and answer.headers["X-Warnings"] == warning
    assert "warnings" not in host.generate({"steps": 1}, headers=id_header("request-1")).json()


@pytest.mark.parametrize(("query", "bound"), [("n=-1", "0 to 1048576"), ("n=2000000", "0 to 1048576")])
def test_the_bounds_of_a_query_are_whole_numbers(host: FakeHost, query: str, bound: str) -> None:
    id = host.generate({}, headers=ASYNC).json()["id"]
    assert f"must be a whole number, {bound}; got" in host.get(f"/jobs/{id}/output?{query}").json()["message"]
