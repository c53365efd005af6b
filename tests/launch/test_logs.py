"""shared.launch.logs: streams that nobody reads, and lines that nobody forges."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared.launch.logs import JsonFormatter, TextFormatter

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
WRITER = """
import os, sys, time
from shared.launch.logs import finish, guard_streams
guard_streams()
began = time.monotonic()
for n in range(3000):
    print("x" * 1000)
    os.write(2, b"y" * 200)
with open(sys.argv[1], "w") as out:
    out.write(f"{time.monotonic() - began}")
finish()
os._exit(7)
"""


def write_much(told: Path, stdout: Any) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(told)], cwd=ROOT, stdout=stdout, stderr=stdout
    )
    try:
        return process.wait(15)
    finally:
        process.kill()


@pytest.mark.parametrize("reader", ["sleeps", "gone", "full"])
def test_a_log_that_cannot_be_written_holds_nobody_up(tmp_path: Path, reader: str) -> None:
    told = tmp_path / "seconds"
    read, write = os.pipe()
    if reader == "gone":
        os.close(read)
    target = os.open("/dev/full", os.O_WRONLY) if reader == "full" else write
    assert write_much(told, target) == 7
    assert float(told.read_text()) < 5
    if reader == "sleeps":  # the launcher, which writes to the same pipe, finds room
        os.set_blocking(write, False)
        assert os.write(write, b"z" * 16384) == 16384


def test_what_a_dying_process_wrote_is_told() -> None:
    code = "from shared.launch.logs import *; guard_streams(); os.write(2, b'last words'); os.abort()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=15)
    assert done.returncode < 0 and done.stderr == b"last words"


def test_a_dropped_part_is_counted() -> None:
    read, write = os.pipe()
    code = (
        "from shared.launch.logs import *; guard_streams()\n"
        "for n in range(400): os.write(1, b'x' * 8000); time.sleep(0.001)\n"
        "time.sleep(3); os.write(1, b'late'); finish()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=write)
    os.close(write)
    time.sleep(2)
    with os.fdopen(read, "rb") as stream:
        text = stream.read()
    assert process.wait(10) == 0
    assert b"bytes of the log were dropped" in text and text.count(b"x") < 400 * 8000


@pytest.mark.parametrize("forged", ["a\n12:00:00 INFO forged", "a\r\nb", "a\x1b[2Jb", "a\u2028b", "a\x85b"])
def test_a_clients_text_forges_no_line(forged: str) -> None:
    try:
        raise ValueError(forged)
    except ValueError:
        record = logging.LogRecord("waitress", 30, "", 1, "bad header %s", (forged,), sys.exc_info())
    text = TextFormatter("%(asctime)s %(levelname)s %(message)s").format(record)
    first, *rest = text.splitlines()
    assert "bad header a" in first and all(line.startswith("    ") for line in rest)
    assert all(char == "\n" or char.isprintable() for char in text)
    assert json.loads(JsonFormatter().format(record))["message"] == f"bad header {forged}"
    assert len(JsonFormatter().format(record).splitlines()) == 1
