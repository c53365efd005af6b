"""OpenAI's video API, through the openai SDK where that can say it."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from shared.api.codecs import MAX_FRAMES
from shared.api.warned import collecting_warnings
from shared.http.videos import frames_of
from shared.models import MODELS
from tests.httphost import FakeHost, config_of, picture, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost(config_of("ad", motion_adapter="/models/m")) as host:
        yield host


def client(host: FakeHost) -> Any:
    return openai.OpenAI(base_url=f"{host.url}/v1", api_key="none", max_retries=0, timeout=20)


def test_a_video_with_the_sdk(host: FakeHost) -> None:
    videos = client(host).videos
    made = videos.create_and_poll(
        prompt="a cat",
        model="sora-2",
        seconds="2",
        size="64x32",
        extra_body={"steps": 4, "cfg": 2.5, "seed": 7},
    )
    [seen] = host.seen
    asked = (seen.positive, seen.width, seen.height, seen.frames, seen.steps, seen.cfg, seen.seed)
    assert asked == ("a cat", 64, 32, 16, 4, 2.5, 7) and seen.output_format == "mp4"
    assert (made.status, made.progress, made.object, made.prompt) == ("completed", 100, "video", "a cat")
    assert (made.seconds, made.size, made.model, made.error) == ("2", "64x32", host.config.model_id, None)
    assert made.completed_at >= made.created_at > 1e9 and made.expires_at > made.completed_at
    content = videos.download_content(made.id)
    assert (
        content.content == b"\0\0\0\x18ftypmp42" and content.response.headers["Content-Type"] == "video/mp4"
    )
    assert host.get(f"/jobs/{made.id}/output").content == content.content
    assert videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        videos.retrieve(made.id)


def test_a_video_that_waits_runs_and_is_cancelled(host: FakeHost) -> None:
    videos = client(host).videos
    first = videos.create(prompt="hold")
    wait_for(lambda: host.queue.generation)
    second = videos.create(prompt="x")
    assert (videos.retrieve(first.id).status, second.status) == ("in_progress", "queued")
    with pytest.raises(openai.ConflictError, match="is in_progress, not completed"):
        videos.download_content(first.id)
    assert videos.delete(first.id).deleted
    wait_for(lambda: videos.retrieve(second.id).status == "completed")
    ended = videos.retrieve(first.id)
    assert ended.status == "failed" and ended.error.code == "cancelled"
    failed = videos.create_and_poll(prompt="fail", extra_body={"steps": 3})
    assert failed.status == "failed" and failed.error.message == "rank 1: out of memory"
    with pytest.raises(openai.ConflictError, match="not completed: rank 1: out of memory"):
        videos.download_content(failed.id)


def test_videos_are_listed_by_pages(host: FakeHost) -> None:
    videos = client(host).videos
    host.generate({"positive": "no video of this API", "output_format": "mp4"})
    ids = [videos.create(prompt=str(n)).id for n in range(5)]
    assert [v.id for v in videos.list()] == ids[::-1]
    assert [v.id for v in videos.list(order="asc")] == ids
    page = videos.list(limit=2)
    assert [v.id for v in page.data] == ids[:2:-1] and page.has_more and page.last_id == ids[3]
    assert [v.id for v in videos.list(limit=2, after=ids[3]).data] == [ids[2], ids[1]]
    assert [v.id for v in videos.list(limit=2)] == ids[::-1]  # the SDK goes on from page to page
    for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "nothing"}):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(query))}: must be"):
            videos.list(**query)


def test_a_reference_starts_the_video_as_file_and_in_json() -> None:
    with FakeHost(config_of("svd")) as host:
        start = picture(size=(16, 16))
        made = client(host).videos.create_and_poll(
            prompt="ignored", input_reference=("a.png", start), seconds="2"
        )
        assert host.seen[0].image == start and host.seen[0].positive is None
        assert (host.seen[0].frames, host.seen[0].fps, made.seconds, made.prompt) == (14, 7, "2", None)
        address = "data:image/png;base64," + base64.b64encode(start).decode()
        answer = host.post(
            "/v1/videos", json={"prompt": "x", "input_reference": {"image_url": address}, "fps": 5}
        )
        assert answer.status_code == 200 and answer.json()["seconds"] == "2.8"
        wait_for(lambda: len(host.seen) == 2)
        assert host.seen[1].image == start
        for reference in ({"file_id": "file-1"}, {"image_url": "http://example.com/a.png"}):
            answer = host.post("/v1/videos", json={"input_reference": reference})
            assert answer.status_code == 400
            told = 'input_reference: must be a picture\'s file, or {"image_url": "data:…"}'
            assert told in answer.json()["error"]["message"]
        answer = host.post("/v1/videos", json={"prompt": "x"})
        assert answer.status_code == 422 and answer.json()["error"]["param"] == "input_reference"


def test_faults_have_openais_names_and_come_together(host: FakeHost) -> None:
    videos = client(host).videos
    with pytest.raises(openai.BadRequestError) as caught:
        videos.create(prompt="x", size="big", seconds="0", extra_body={"steps": 0, "n": 2})
    body: Any = caught.value.response.json()
    assert {e["field"] for e in body["errors"]} == {"size", "seconds", "steps", "n"}
    with pytest.raises(openai.BadRequestError, match="seconds: give seconds or frames, not both"):
        videos.create(prompt="x", seconds="2", extra_body={"frames": 9})
    with pytest.raises(openai.UnprocessableEntityError) as large:
        videos.create(prompt="x", seconds="20", size="4096x4096", extra_body={"steps": 100})
    body = large.value.response.json()
    assert body["errors"][0]["field"] == "steps" and "max_pixel_steps" in body["error"]["message"]
    answer = host.get("/v1/videos/nothing/content")
    assert answer.status_code == 404
    made = videos.create_and_poll(prompt="x")
    with pytest.raises(openai.BadRequestError, match="variant: must be video on this host, got 'thumbnail'"):
        videos.download_content(made.id, variant="thumbnail")
    assert not [seen for seen in host.seen if seen.positive != "x"]


def test_a_host_of_pictures_says_so() -> None:
    with FakeHost(config_of("sd1")) as host:
        videos = client(host).videos
        told = "type sd1 makes pictures, not videos: ask /v1/images/generations"
        for call in (
            lambda: videos.create(prompt="x"),
            lambda: videos.list(),
            lambda: videos.retrieve("a"),
            lambda: videos.delete("a"),
        ):
            with pytest.raises(openai.UnprocessableEntityError, match=told):
                call()


def test_seconds_are_the_nearest_frames_that_the_type_makes() -> None:
    for type, seconds, fps, frames, told in (
        ("wan", "4", 16, 65, "a multiple of 4, and 1 more: 65 are made, 4.06 s"),
        ("wan", 5.0625, 16, 81, ""),
        ("wan", "0.01", 16, 1, "are 0.16 frames"),
        ("svd", 2, 7, 14, ""),
        ("ad", "1.3", 8, 10, "1.3 s at 8 frames per second are 10.4 frames: 10 are made, 1.25 s"),
    ):
        with collecting_warnings() as warned:
            assert frames_of(seconds, fps, MODELS[type]) == frames
        assert len(warned) == bool(told) and all(told in text for text in warned)
    for wrong in ("long", "nan", "inf", -1, 0, True, [4], str(MAX_FRAMES)):
        with pytest.raises(ValueError, match="must be a number above 0, at most"):
            frames_of(wrong, 8, MODELS["ad"])


def test_what_seconds_became_is_told(host: FakeHost) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = client(host).videos.create(prompt="x", seconds="1.3")
    assert made.seconds == "1.25" and "10 are made" in made.model_dump()["warnings"][0]
