"""Start a host on a demo checkpoint, request one picture over HTTP, and end it: what `make demo` runs.

python demo/ask.py --ranks 2 --prompt "a red circle on a blue background" --out demo.png
python demo/ask.py transformer    # or student; unet is the default
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from checkpoints import CHECKPOINTS  # noqa: E402

START_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> tuple[int, str]:
    """Status and body of a GET; status 0 while no server listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_until_ready(url: str, host: subprocess.Popen[bytes]) -> float:
    """Poll /initialize; the seconds it took. Raises SystemExit when the host ends or takes too long."""
    began = time.monotonic()
    with tqdm(desc="starting", bar_format="{desc}: {elapsed}", leave=True) as bar:
        while get(f"{url}/initialize")[0] != 200:
            if host.poll() is not None:
                raise SystemExit(f"the host ended with exit code {host.returncode}; its output is above")
            if time.monotonic() - began > START_SECONDS:
                raise SystemExit(f"the host was not ready after {START_SECONDS} s")
            time.sleep(0.2)
            bar.update()
    return time.monotonic() - began


def ask(url: str, body: dict[str, object], out: Path) -> dict[str, str]:
    """POST /generate with a progress bar; writes the picture and returns the answer's headers."""
    answer: dict[str, str] = {}
    failure: list[str] = []

    def post() -> None:
        request = urllib.request.Request(
            f"{url}/generate",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "image/png"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                out.write_bytes(reply.read())
                answer.update(reply.headers)
        except urllib.error.HTTPError as error:
            failure.append(f"{error.code}: {error.read().decode()}")
        except OSError as error:
            failure.append(str(error))

    worker = threading.Thread(target=post)
    worker.start()
    with tqdm(total=100, desc="drawing", bar_format="{desc}: {percentage:3.0f}% {bar} {elapsed}") as bar:
        while worker.is_alive():
            status, text = get(f"{url}/progress")
            if status == 200:
                bar.update(max(0.0, float(text) - bar.n))
            worker.join(0.05)
        if not failure:
            bar.update(100 - bar.n)
    if failure:
        raise SystemExit(f"the host refused: {failure[0]}")
    return answer


def stop(host: subprocess.Popen[bytes]) -> None:
    """End the ranks, which exit with 0 at SIGTERM; torchrun, were it sent one, would complain."""
    ranks = Path(f"/proc/{host.pid}/task/{host.pid}/children")
    children = ranks.read_text().split() if ranks.exists() else []
    for pid in children or [str(host.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)
    try:
        host.wait(15)
    except subprocess.TimeoutExpired:
        host.kill()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=CHECKPOINTS, default="unet", help="which (default unet)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompt", default="a red circle on a blue background")
    parser.add_argument("--steps", type=int, help="default: as many as the checkpoint needs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cfg", type=float, help="default: the checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    options = parser.parse_args()

    kind = CHECKPOINTS[options.kind]
    steps, cfg = options.steps or kind.steps, kind.cfg if options.cfg is None else options.cfg
    port = free_port()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={options.ranks}"),
        *("--master_port", str(free_port())),
        str(HERE.parent / f"{kind.host}_host.py"),
        *(f"--type={kind.type}", f"--checkpoint={kind.path}", "--variant=fp32"),
        *("--width=128", "--height=128", f"--warm_up_steps={kind.warm_up}", f"--port={port}"),
    ]
    print("$ torchrun", *command[3:], flush=True)
    # torchrun warns unless the number of threads is set (the host divides the cores among the ranks itself),
    # and the progress bar here is the only one.
    host = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **os.environ})
    url = f"http://127.0.0.1:{port}"
    try:
        started = wait_until_ready(url, host)
        began = time.monotonic()
        body = {
            "positive": options.prompt,
            "steps": steps,
            "seed": options.seed,
            "cfg": cfg,
        }
        answer = ask(url, body, options.out)
        seconds = time.monotonic() - began
        plan = json.loads(get(f"{url}/health")[1])["plan"]
    finally:
        stop(host)
    shares = ", ".join(f"{stage['share']:.1%}" for stage in plan.get("stages", []))
    shared = f" shared the denoiser as {shares}" if shares else ""
    print(f"{options.ranks} ranks{shared}; ready after {started:.1f} s")
    print(f'"{options.prompt}", seed {answer.get("X-Seed")}, {steps} steps: {seconds:.1f} s')
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
