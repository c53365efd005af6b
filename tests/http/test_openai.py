"""OpenAI's image API, through the openai SDK where that can say it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests
from PIL import Image

from tests.httphost import FakeHost, config_of, picture, wait_for


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with FakeHost(config_of(checkpoint="/models/demo.safetensors")) as host:
        yield host


def client(host: FakeHost, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{host.url}/v1", api_key=key, max_retries=0, timeout=20)


def test_generate_with_the_sdk(host: FakeHost) -> None:
    answer = client(host).images.generate(
        prompt="a red circle", model="dall-e-3", size="64x32", quality="hd", user="me", style="vivid"
    )
    assert answer.data is not None and answer.created > 1e9
    assert base64.b64decode(answer.data[0].b64_json or "") == picture()
    [seen] = host.seen
    assert (seen.positive, seen.width, seen.height, seen.output_format) == ("a red circle", 64, 32, "png")
    assert answer.model_dump()["warnings"] == [
        "model: the only one here is 'demo', which is used; got 'dall-e-3'",
        "quality: has no effect on this host; got 'hd'",
        "style: has no effect on this host; got 'vivid'",
    ]


def test_openai_s_own_defaults_are_no_news(host: FakeHost) -> None:
    answer = client(host).images.generate(
        prompt="x", model="demo", quality="auto", output_compression=100, moderation="low"
    )
    assert "warnings" not in answer.model_dump()


def test_own_fields_through_extra_body_and_several_pictures(host: FakeHost) -> None:
    answer = client(host).images.generate(
        prompt="x",
        n=3,
        size="auto",
        output_format="jpeg",
        extra_body={"steps": 4, "seed": 2**64 - 2, "cfg": 2},
    )
    assert answer.data is not None
    assert [base64.b64decode(d.b64_json or "") for d in answer.data] == [picture("JPEG")] * 3
    assert [r.seed for r in host.seen] == [2**64 - 2, 2**64 - 1, 0]
    assert [d.model_dump()["seed"] for d in answer.data] == [r.seed for r in host.seen]
    assert {(r.steps, r.cfg, r.width) for r in host.seen} == {(4, 2, 512)}


def test_edit_with_the_sdk() -> None:
    with FakeHost(config_of("sdup")) as host:
        answer = client(host).images.edit(
            image=picture(size=(16, 16)), prompt="sharper", extra_body={"steps": 2, "seed": 5}
        )
        assert answer.data is not None and answer.data[0].b64_json
        [seen] = host.seen
        assert (seen.image, seen.positive, seen.steps, seen.seed) == (picture(size=(16, 16)), "sharper", 2, 5)


def rgba(size: tuple[int, int], clear: tuple[int, int, int, int] | None = None) -> bytes:
    """A red picture, transparent in the box."""
    image, out = Image.new("RGBA", size, (255, 0, 0, 255)), io.BytesIO()
    if clear is not None:
        image.paste((0, 255, 0, 0), clear)
    image.save(out, "PNG")
    return out.getvalue()


def test_edit_paints_what_is_transparent_in_the_mask(host: FakeHost) -> None:
    answer = client(host).images.edit(
        image=picture(size=(64, 48)),
        mask=rgba((64, 48), (8, 16, 24, 32)),
        prompt="a hat",
        n=2,
        size="auto",
        quality="high",
        input_fidelity="high",
        extra_body={"steps": 4, "seed": 5, "strength": 0.5},
    )
    assert answer.data is not None and len(answer.data) == 2
    assert [seen.seed for seen in host.seen] == [5, 6]
    seen = host.seen[0]
    assert (seen.width, seen.height, seen.strength, seen.positive) == (64, 48, 0.5, "a hat")
    assert seen.image == picture(size=(64, 48)) and seen.mask is not None
    mask = Image.open(io.BytesIO(seen.mask))
    expected = Image.new("L", (64, 48))
    expected.paste(255, (8, 16, 24, 32))
    assert mask.mode == "L" and mask.tobytes() == expected.tobytes()
    client(host).images.edit(image=picture(size=(64, 48)), prompt="a hat", size="128x256")
    assert (host.seen[-1].width, host.seen[-1].height, host.seen[-1].mask) == (128, 256, None)


def test_an_edit_of_what_the_model_looks_at_has_no_strength() -> None:
    seen = picture(size=(72, 104))
    with FakeHost(config_of("kontext", backend="xdit")) as host:
        client(host).images.edit(image=seen, prompt="a hat")
        with pytest.raises(openai.BadRequestError, match="strength: below 1 needs an image with a mask"):
            client(host).images.edit(image=seen, prompt="a hat", extra_body={"strength": 0.5})
        with pytest.raises(openai.BadRequestError, match="image: must be one picture for type kontext"):
            client(host).images.edit(image=[seen, seen], prompt="a hat")
        mask = rgba((72, 104), (8, 16, 24, 32))
        client(host).images.edit(image=seen, mask=mask, prompt="a hat", extra_body={"strength": 0.5})
    assert [(r.image, r.width, r.height, r.strength) for r in host.seen] == [
        (seen, 64, 96, None),
        (seen, 64, 96, 0.5),
    ]


def test_an_edit_may_be_of_several_pictures() -> None:
    seen = [picture(size=(72, 104)), picture(size=(200, 100))]
    with FakeHost(config_of("qwenedit", backend="xdit")) as host:
        client(host).images.edit(image=seen, prompt="the hat of Picture 2 on Picture 1")
        with pytest.raises(openai.BadRequestError, match="image: must be at most 8 pictures"):
            client(host).images.edit(image=seen * 5, prompt="a hat")
    # As many pixels as the launch's size, in the last picture's aspect.
    assert [(r.image, r.width, r.height, r.strength) for r in host.seen] == [(seen, 1440, 736, None)]


def test_an_opaque_mask_would_paint_nothing(host: FakeHost) -> None:
    for mask in (rgba((64, 64)), picture(size=(64, 64))):
        with pytest.raises(openai.BadRequestError, match="mask: must be transparent where the picture"):
            client(host).images.edit(image=picture(size=(64, 64)), mask=mask, prompt="a hat")
    with pytest.raises(openai.BadRequestError, match="mask: is not a picture"):
        client(host).images.edit(image=picture(size=(64, 64)), mask=b"text", prompt="a hat")
    with (
        FakeHost(config_of("sdup")) as upscaler,
        pytest.raises(openai.UnprocessableEntityError, match="does not support mask"),
    ):
        client(upscaler).images.edit(image=picture(), mask=rgba((8, 8), (0, 0, 4, 4)), prompt="a")
    with (
        FakeHost(config_of("sdup")) as upscaler,
        pytest.raises(openai.BadRequestError, match="image: is not a picture"),
    ):
        client(upscaler).images.edit(image=b"text", mask=rgba((8, 8), (0, 0, 4, 4)), prompt="a")
    assert not host.seen


def test_a_transparent_picture_without_a_mask_is_painted_whole_and_that_is_said(host: FakeHost) -> None:
    answer = client(host).images.edit(image=rgba((64, 64), (0, 0, 9, 9)), prompt="a hat")
    told = "image: what is transparent in it counts only in a mask; the whole picture is painted"
    left_out = "image: is transparent in part, which is left out: the colours beneath it are seen"
    assert answer.model_dump()["warnings"] == [told, left_out] and host.seen[0].mask is None


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_edit_as_open_webui_sends_it(host: FakeHost, name: str) -> None:
    """Its routers/images.py: one picture as `image`, a list of them as `image[]`."""
    form = {"model": "demo", "prompt": "a hat", "n": "1", "size": "64x32", "response_format": "b64_json"}
    files = [(name, ("5c2f.png", picture(size=(64, 32)), "image/png"))]
    key = {"Authorization": "Bearer none"}
    answer = host.post("/v1/images/edits", headers=key, files=files, data=form)
    assert answer.status_code == 200, answer.text
    assert [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]] == [picture()]
    seen = host.seen[0]
    assert (seen.positive, seen.width, seen.height) == ("a hat", 64, 32) and seen.image == files[0][1][1]


def test_edit_of_a_type_without_a_prompt_makes_a_video() -> None:
    with FakeHost(config_of("svd")) as host:
        answer = client(host).images.edit(image=[picture()], prompt="ignored", extra_body={"frames": 4})
        assert answer.data is not None
        assert base64.b64decode(answer.data[0].b64_json or "") == picture("WEBP", frames=2)
        assert host.seen[0].positive is None and host.seen[0].frames == 4


def test_models(host: FakeHost) -> None:
    [model] = client(host).models.list().data
    assert (model.id, model.owned_by) == ("demo", "asyncdiff")
    assert client(host).models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="the only one is 'demo'"):
        client(host).models.retrieve("other")


@pytest.mark.parametrize(
    ("body", "status", "fields", "words"),
    [
        ({"prompt": 5}, 400, {"prompt"}, "string"),
        ({"prompt": "a", "n": 0, "size": "big", "steps": -1}, 400, {"n", "size", "steps"}, "1 to 10, got 0"),
        ({"prompt": "a", "n": True}, 400, {"n"}, "got True"),
        ({"prompt": "a", "size": "70x64"}, 400, {"size"}, "multiple of 8"),
        ({"prompt": "a", "response_format": "url"}, 400, {"response_format"}, "b64_json"),
        ({"prompt": "a", "stream": True, "mask": "x"}, 400, {"stream", "mask"}, "false"),
        ({"prompt": "a", "background": "transparent"}, 400, {"background"}, "auto or opaque"),
        ({"prompt": "a", "nonsense": 1}, 400, {"nonsense"}, "unknown field"),
        ({"prompt": "a", "frames": 3}, 422, {"frames"}, "does not support frames"),
        ({"prompt": "a", "output_format": "gif"}, 422, {"output_format"}, "png, jpeg, webp"),
    ],
)
def test_faults_in_openais_form(
    host: FakeHost, body: dict[str, Any], status: int, fields: set[str], words: str
) -> None:
    answer = requests.post(f"{host.url}/v1/images/generations", json=body, timeout=20)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] in fields and words in error["message"]
    assert {e["field"] for e in answer.json()["errors"]} == fields
    assert answer.headers["X-Request-Id"] and not host.seen


def test_errors_become_the_sdks_own(host: FakeHost) -> None:
    sdk = client(host)
    with pytest.raises(openai.BadRequestError, match="multiple of 8"):
        sdk.images.generate(prompt="a", size="70x70")
    with (
        FakeHost(config_of("hy", backend="xdit")) as hy,
        pytest.raises(openai.UnprocessableEntityError, match="does not support image"),
    ):
        client(hy).images.edit(image=picture(), prompt="a")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        sdk.images.generate(prompt="fail")
    host.status.state = "loading"
    with pytest.raises(openai.InternalServerError, match="loading") as caught:
        sdk.images.generate(prompt="a")
    assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"]


def test_the_sdk_does_not_repeat_a_failure(host: FakeHost) -> None:
    with pytest.raises(openai.InternalServerError):
        client(host).with_options(max_retries=2).images.generate(prompt="fail")
    assert len(host.seen) == 1


def test_the_key(host: FakeHost) -> None:
    with FakeHost(config_of(api_key="secret")) as locked:
        with pytest.raises(openai.AuthenticationError, match="api_key"):
            client(locked, "wrong").images.generate(prompt="a")
        assert client(locked, "secret").images.generate(prompt="a").data


def test_other_faults_of_http(host: FakeHost) -> None:
    base = f"{host.url}/v1/images"
    for answer, status in (
        (requests.post(f"{base}/generations", data="x=1", timeout=5), 415),
        (requests.post(f"{base}/edits", json={}, timeout=5), 415),
        (requests.post(f"{base}/variations", files={"image": picture()}, timeout=5), 422),
        (requests.get(f"{base}/generations", timeout=5), 405),
        (requests.post(f"{base}/generations", json=[], timeout=5), 400),
        (requests.post(f"{base}/edits", files={"image": b"text"}, data={"n": "x"}, timeout=5), 400),
    ):
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    files = [("image[]", ("a.png", picture())), ("image[]", ("b.png", picture()))]
    answer = requests.post(f"{base}/edits", files=files, data={"prompt": "a"}, timeout=5)
    assert answer.status_code == 400 and "must be one picture for type sd1, got 2" in answer.text


def part(disposition: bytes, content: bytes = b"x") -> bytes:
    return b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n" + content + b"\r\n"


IMAGE = part(b'form-data; name="image"; filename="a.png"', picture())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (part(b'form-data; name="prompt"') + b"--b--", "image"),
        (IMAGE + part(b"form-data") + b"--b--", "no name"),
        (IMAGE + part(b'form-data; name="') + b"--b--", "no name"),
        (IMAGE + part(b"") + b"--b--", "no name"),
        (IMAGE + part(b'form-data; name="\xff"') + b"--b--", "not valid multipart"),
        (IMAGE + part(b'form-data; name="prompt"', b"\xff") + b"--b--", "UTF-8"),
        (IMAGE + part(b'form-data; name="prompt"') * 2 + b"--b--", "once, got 2"),
        (IMAGE + b"--b\r\nX: y\r\n\r\nx\r\n--b--", "not valid multipart"),
        (IMAGE[:-4], "not valid multipart"),
        (b"", "not valid multipart"),
    ],
)
def test_a_broken_form_is_no_empty_form(body: bytes, said: str) -> None:
    with FakeHost(config_of("sdup")) as host:
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = requests.post(f"{host.url}/v1/images/edits", data=body, headers=form, timeout=5)
        assert answer.status_code == 400 and said in answer.text, answer.text
        fine = requests.post(f"{host.url}/v1/images/edits", files={"image": picture()}, timeout=5)
        assert fine.status_code == 200, fine.text


def test_a_client_that_leaves_stops_all_of_its_pictures(host: FakeHost) -> None:
    with pytest.raises(requests.Timeout):
        body = {"prompt": "slow", "n": 5, "steps": 20}
        requests.post(f"{host.url}/v1/images/generations", json=body, timeout=0.3)
    wait_for(lambda: host.queue.running is None and len(host.queue) == 0)
    assert len(host.seen) == 1


def test_a_field_given_by_both_names_is_told(host: FakeHost) -> None:
    body = {"prompt": "a cat", "positive": "a dog", "n": 1, "pictures": 2, "size": "64x32", "width": 128}
    answer = client(host).images.generate(prompt="a cat", n=1, size="64x32", extra_body=body)
    assert {
        "positive: has no effect, as prompt is given too",
        "pictures: has no effect, as n is given too",
        "width: has no effect, as size is given too",
    } <= set(answer.model_dump()["warnings"])
    [seen] = host.seen
    assert (seen.positive, seen.width, seen.height) == ("a cat", 64, 32)
