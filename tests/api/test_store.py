"""The store of jobs, in memory and in a folder, and what it writes."""

from __future__ import annotations

import base64
import errno
import io
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import shared.api.store
from shared.api.faults import FieldProblem
from shared.api.folder import SMALL, FolderError, StateFolder
from shared.api.jobs import JobError, Order, SecondPass
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.retouch import Paste, Retouched
from shared.api.store import JobRecord, JobStore
from shared.api.stored import StoredError, dump_order, load_order, slim
from tests.httphost import picture

LATENT = safetensors.numpy.save({"latent": np.arange(4, dtype=np.float32)})
FULL = GenerateRequest.model_validate(
    {
        "positive": 'a "cat"\n\u2603',
        "image": picture(size=(16, 24)),
        "control_image": [picture(), picture("JPEG")],
        "sigmas": safetensors.numpy.save({"sigmas": np.ones(2, np.float32)}),
        "seed": 2**64 - 1,
        "cfg": 7.0,
        "lora_scales": {"a": 0.1},
        "scheduler": {"scheduler": "ddim", "eta": 0.5},
        "controlnet_scale": [0.5, 1.0],
        "strength": None,
    }
)


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    shape = (size[1], size[0], *((3,) if mode == "RGB" else ()))
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, shape, np.uint8), mode)


def orders() -> list[Order]:
    second = SecondPass(
        GenerateRequest(latent=base64.b64encode(LATENT).decode(), strength=0.7),  # type: ignore[arg-type]
        "Latent",
        "bilinear",
        False,
        "sd",
        (512, 768),
    )
    paste = Paste(noise("RGB", (33, 20)), noise("L", (33, 20)), (1, 2, 17, 18))
    return [
        Order(FULL),
        Order(GenerateRequest(seed=3), second),
        Order(FULL, None, Retouched({"Mask blur": 4}, paste)),
        Order(FULL, None, Retouched({"Resize mode": "Crop and resize"}, Paste(paste.picture, paste.mask))),
        Order(FULL, second, Retouched()),
    ]


@pytest.mark.parametrize("order", orders())
def test_an_order_comes_back_as_it_was(order: Order) -> None:
    read = load_order(dump_order(order))
    assert read.request == order.request and read.second == order.second
    assert read.request.model_fields_set == order.request.model_fields_set
    assert (read.retouched is None) == (order.retouched is None)
    if order.retouched is not None and read.retouched is not None:
        assert read.retouched.told == order.retouched.told
        if (paste := order.retouched.paste) is not None:
            painted, again = noise("RGB", (16, 16)), read.retouched.paste
            assert again is not None and again.box == paste.box
            if paste.box is not None:
                assert again(painted).tobytes() == paste(painted).tobytes()
            assert again.mask.tobytes() == paste.mask.tobytes() and again.mask.mode == "L"


def test_a_slim_order_has_all_but_pictures_and_tensors() -> None:
    request = slim(orders()[0]).request
    assert (request.image, request.control_image, request.sigmas) == (None, None, None)
    assert request == FULL.model_copy(update={"image": None, "control_image": None, "sigmas": None})
    assert len(dump_order(slim(orders()[2]))) < 600


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"request": {"later_field": 1}}', "later_field"),
        (b'{"request": {"steps": "many"}}', "steps"),
        (b"{}", "request"),
        (b"[]", "cannot be read"),
        (b"nothing", "cannot be read"),
        (b'{"request": {}, "second": {"later": 1}}', "cannot be read"),
    ],
)
def test_what_another_version_wrote_is_told_in_words(data: bytes, words: str) -> None:
    with pytest.raises(StoredError, match=words):
        load_order(data)


def record(id: str, order: Order | None = None, **more: Any) -> JobRecord:
    return JobRecord(id=id, route="POST /generate", digest="d", order=order or orders()[0], **more)


def replies() -> list[Reply]:
    seconds = {"total": 1.5, "denoise": 1.0, "decode": 0.5}
    return [
        Reply([b"one", b"two"], "png", 7, 8, 16, 2, seconds, b"latent", fps=8, warnings=["w"], infotext="i"),
        Reply([b"three"], "png", 8, 8, 16, 2, seconds),
    ]


def test_a_folder_gives_back_what_was_accepted_and_made(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    store = JobStore(folder)
    kept: dict[str, Any] = {
        "client": "1.2.3.4",
        "launch": "sd1",
        "warnings": ["cut"],
        "prompt": "a cat",
        "seed": 5,
    }
    done, failed, waiting, running = (record(id, **kept) for id in ("done", "failed", "waiting", "running"))
    for one in (done, failed, waiting, running):
        assert store.add(one) is None
    assert store.add(record("done")) is done
    for one in (done, failed, running):
        store.begin(one)
    store.finish(done, None, replies())
    store.finish(failed, JobError(422, "no", [FieldProblem("steps", "too many")]), [])
    folder.close()

    folder = StateFolder(tmp_path / "state")
    store = JobStore(folder)
    assert [one.id for one in store.all()] == ["running", "waiting", "failed", "done"]
    read = {one.id: one for one in store.all()}
    for name, value in {**kept, "route": "POST /generate", "digest": "d", "accepted": done.accepted}.items():
        assert getattr(read["done"], name) == value
    assert [one.id for one in store.unfinished()] == ["waiting", "running"]
    assert (read["waiting"].attempts, read["running"].attempts) == (0, 1)
    assert store.order(read["waiting"]).request == FULL
    assert store.replies(read["done"]) == replies() and read["done"].state == "done"
    assert store.order(read["done"]).request == slim(orders()[0]).request
    error = read["failed"].error
    assert error is not None and (error.status, str(error)) == (422, "no")
    assert [(p.field, p.problem) for p in error.problems] == [("steps", "too many")]
    assert read["done"].finished == done.finished and read["done"].began == done.began
    store.forget(read["done"])
    with pytest.raises(KeyError):
        store.replies(read["done"])
    folder.close()


def test_what_is_large_lies_in_files_which_go_with_the_job(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    store = JobStore(folder)
    out = io.BytesIO()
    noise("RGB", (256, 256)).save(out, "PNG")
    large = Order(GenerateRequest.model_validate({"image": out.getvalue()}))
    kept = record("large", large)
    store.add(kept)
    files = tmp_path / "files"
    assert [file.name for file in files.iterdir()] == ["large.order"]
    assert load_order(folder.order("large")).request == large.request
    made = [Reply([b"one", b"two" * SMALL], "png", 7, 8, 16, 2)]
    store.finish(kept, None, made)
    assert [file.name for file in files.iterdir()] == ["large.made"]
    assert store.replies(kept) == made
    assert stat.S_IMODE((files / "large.made").stat().st_mode) == 0o600
    (files / "other.made").write_bytes(b"of a host that ended between two writes")
    (files / "large.made.new").write_bytes(b"as well")  # of the version before this one
    folder.close()
    folder = StateFolder(tmp_path)
    assert [file.name for file in files.iterdir()] == ["large.made"]
    JobStore(folder).forget(kept)
    assert not list(files.iterdir()) and not folder.rows()
    folder.close()


def test_what_is_small_waits_for_the_disk_once_and_an_attempt_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StateFolder(tmp_path)
    store = JobStore(folder)
    waits: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd, name=name: waits.append(name))

    def commits(act: Callable[[], object]) -> list[str]:
        """Of each change, whether SQLite waited for the disk."""
        traced, found = ["FULL"], []

        def trace(text: str) -> None:
            if (at := text.partition("synchronous=")[2]) != "":
                traced.append(at)
            elif not text.startswith("SELECT"):
                found.append(traced[-1])

        folder._db.set_trace_callback(trace)
        act()
        folder._db.set_trace_callback(None)
        return found

    kept = record("kept")
    assert commits(lambda: store.add(kept)) == ["FULL"]
    assert commits(lambda: store.begin(kept)) == ["NORMAL"]
    assert commits(lambda: store.finish(kept, None, replies())) == ["FULL"]
    assert folder._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert not list((tmp_path / "files").iterdir()) and store.replies(kept) == replies()
    folder.close()
    assert waits == ["fdatasync"]  # of the attempt, which nobody waited for


def test_a_folder_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    store = JobStore(folder := StateFolder(tmp_path))
    for id in ("done", "waiting"):
        store.add(record(id))
    made = [Reply([b"one" * SMALL], "png", 7, 8, 16, 2)]
    store.finish(store.unfinished()[0], None, made)
    folder.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("ALTER TABLE jobs DROP COLUMN files")
        db.execute("PRAGMA user_version=1")
    db.close()
    store = JobStore(folder := StateFolder(tmp_path))
    waiting, done = store.all()
    assert store.replies(done) == made and waiting.state == "queued"
    store.finish(waiting, None, replies())
    assert store.replies(waiting) == replies()
    folder.close()
    StateFolder(tmp_path).close()


def test_a_folder_is_its_owners_and_one_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.api.folder.LOCK_SECONDS", 0.2)
    folder = StateFolder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    for file in ("jobs.sqlite", "jobs.sqlite-wal", "lock"):
        assert stat.S_IMODE((tmp_path / "a" / "b" / file).stat().st_mode) == 0o600
    with pytest.raises(FolderError, match="used by another host"):
        StateFolder(tmp_path / "a" / "b")
    folder.close()
    StateFolder(tmp_path / "a" / "b").close()


def test_a_folder_of_another_version_or_a_broken_one_is_told(tmp_path: Path) -> None:
    StateFolder(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version=3")
    db.close()
    with pytest.raises(FolderError, match="another version: 3"):
        StateFolder(tmp_path)
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(FolderError, match=r"jobs\.sqlite cannot be read"):
        StateFolder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot be written"):
        StateFolder(tmp_path / "file")


def test_a_folder_without_a_log_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnNetwork(sqlite3.Connection):
        def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
            return super().execute(sql.replace("=WAL", "=DELETE"), *more)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **more: connect(*a, factory=OnNetwork, **more))
    with pytest.raises(FolderError, match="must be on a local disk"):
        StateFolder(tmp_path)
    monkeypatch.undo()
    StateFolder(tmp_path).close()


def test_a_row_that_cannot_be_read_is_a_failed_job(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.add("odd", b"not JSON", b"{}")
    read = JobStore(folder).get("odd")
    assert read is not None and read.state == "failed" and "cannot read" in str(read.error)
    folder.close()


@pytest.mark.parametrize("in_folder", [False, True])
def test_finished_jobs_are_kept_for_a_time_and_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folder: bool
) -> None:
    folder = StateFolder(tmp_path) if in_folder else None
    monkeypatch.setattr(shared.api.store, "LEAST_BYTES", 100)
    store = JobStore(folder, max_age=1000, max_bytes=2 * (100 + 6))
    for id in ("first", "second", "third", "fourth"):
        store.add(record(id))
    for id in ("second", "first", "third"):  # the one that finished first goes first
        kept = store.get(id)
        assert kept is not None
        store.finish(kept, None, [Reply([b"abcdef"], "png", 1, 8, 8, 1)])
    assert [one.id for one in store.all()] == ["fourth", "third", "first"]
    third = store.get("third")
    assert third is not None and store.replies(third)[0].output == [b"abcdef"]
    large = store.get("fourth")
    assert large is not None
    store.finish(large, None, [Reply([b"x" * 1000], "png", 1, 8, 8, 1)])
    assert [one.id for one in store.all()] == ["fourth"]  # larger than all that is kept, but the last
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 999)
    assert store.get("fourth") is large
    monkeypatch.setattr(time, "time", lambda: now + 1001)
    assert store.get("fourth") is None and store.all() == []
    if folder is not None:
        assert not list((tmp_path / "files").iterdir())
        folder.close()


def test_no_room_refuses_a_job_and_keeps_an_answer_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StateFolder(tmp_path)
    store = JobStore(folder)
    kept = record("kept")
    store.add(kept)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shared.api.folder.SMALL", 0)
    monkeypatch.setattr(folder, "_write", full)
    store.finish(kept, None, replies())
    assert kept.state == "done" and store.replies(kept) == replies()
    assert [row.ended for row in folder.rows()] == [None]  # so that it is made again after a restart
    with pytest.raises(OSError, match="No space"):
        store.add(record("refused"))
    assert store.get("refused") is None
    folder.close()
