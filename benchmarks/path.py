"""The path of one launch and of one request through the project's files: which files, and how many changes.

python benchmarks/path.py [--root ANOTHER_CHECKOUT]    one CPU rank on the demo checkpoint, two steps

Counted are calls of the project's functions by file, in each thread; a change is a call from a file into
another one than that of the call before. Imports and functions without a file of the project do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

PORT = 6123


class Count:
    """Files and changes of file since `start`."""

    def __init__(self, root: Path) -> None:
        self.prefixes = (str(root / "shared") + os.sep, *(str(p) for p in root.glob("*_host.py")))
        self.cut = len(str(root)) + 1
        self.files: Counter[str] = Counter()
        self.changes = 0
        self._last = threading.local()

    def start(self) -> None:
        self.files, self.changes, self._last = Counter(), 0, threading.local()

    def event(self, frame: FrameType, event: str, argument: Any) -> None:
        """For sys.setprofile."""
        if event != "call":
            return
        code = frame.f_code
        if not code.co_filename.startswith(self.prefixes) or code.co_name == "<module>":
            return
        name = code.co_filename[self.cut :]
        if name != getattr(self._last, "name", name):
            self.changes += 1
        self._last.name = name
        self.files[name] += 1

    def row(self, what: str) -> str:
        return f"| {what} | {len(self.files)} | {self.changes} |"


def ask(count: Count) -> None:
    """Wait until the host is ready, send one request, print both counts and end the process."""
    address = f"http://127.0.0.1:{PORT}"
    while True:
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(f"{address}/initialize") as answer:
                if answer.status == 200:
                    break
        except OSError:
            continue
    time.sleep(1)
    print("| of | files | changes of file |\n|---|---|---|")
    print(count.row("a launch"), sorted(count.files))
    body = json.dumps({"positive": "a red circle", "steps": 2, "seed": 7, "output_format": "png"}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{address}/generate", body, headers)).read()
    count.start()
    urllib.request.urlopen(urllib.request.Request(f"{address}/generate", body, headers)).read()
    print(count.row("a request"), sorted(count.files), flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root: Path = parser.parse_args().root.resolve()
    count = Count(root)
    os.chdir(root)
    sys.path.insert(0, str(root))
    flags = ["--type=sd1", f"--checkpoint={root / 'demo' / 'checkpoint'}", "--device=cpu", f"--port={PORT}"]
    sys.argv = ["asyncdiff_host.py", *flags, "--width=64", "--height=64"]
    threading.Thread(target=ask, args=(count,), daemon=True).start()
    threading.setprofile(count.event)
    sys.setprofile(count.event)
    runpy.run_path(str(root / "asyncdiff_host.py"), run_name="__main__")


if __name__ == "__main__":
    main()
