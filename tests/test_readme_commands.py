"""The READMEs' and the manual's commands and code work.

Curl lines and Python blocks run against a real host. Launches are parsed by torchrun's and the host's own
parsers; `make`, `pip` and scripts are looked up. A command that nobody here knows is a failure.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from shared.backends import BACKENDS
from shared.launch.parser import parse_config
from tests.test_host import ROOT, Launch

READMES = ["README.md", "docs/USING.md", "clients/comfyui/README.md", "clients/localai/README.md"]
COMMANDS = ("curl", "torchrun", "python", "python3", "pip", "make", "ln", "local-ai")
ADDRESS = re.compile(r"(localhost|127\.0\.0\.1):6000")
ELLIPSIS = {"…", "..."}


@dataclass(frozen=True)
class Snippet:
    """Code of a README: its `language` ("sh" for commands) and its folder."""

    folder: Path
    language: str
    text: str


def _snippets(name: str) -> list[Snippet]:
    """Fenced and indented blocks, and commands in the text."""
    folder, text = (ROOT / name).parent, (ROOT / name).read_text()
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [Snippet(folder, language or "sh", code) for language, code in fence.findall(text)]
    text = fence.sub("", text)
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    spans = [span for span in spans if span.split()[0] in COMMANDS and len(span.split()) > 1]
    return found + [Snippet(folder, "sh", code) for code in [*blocks, *spans]]


def commands(text: str) -> list[list[str]]:
    """The words of each command: continued lines joined, prompts and comments gone."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]
    return [words for words in found if words]


SNIPPETS = [snippet for name in READMES for snippet in _snippets(name)]
SHELL = [(s.folder, words) for s in SNIPPETS if s.language in ("sh", "bash") for words in commands(s.text)]
CODE = [s for s in SNIPPETS if s.language not in ("sh", "bash")]


def _id(value: object) -> str:
    return " ".join(value)[:60] if isinstance(value, list) else getattr(value, "name", "")


@pytest.mark.parametrize(("folder", "words"), SHELL, ids=_id)
def test_a_command_works(
    folder: Path,
    words: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = Path(words[0]).name
    assert program in COMMANDS, f"{words}: teach this test what it is"
    if program == "curl":
        _curl(words, request.getfixturevalue("demo_host"), tmp_path)
    elif program == "make":
        _make(words[1:])
    elif program in ("torchrun", "python", "python3"):
        _launch(folder, words, tmp_path, monkeypatch)
    elif program == "pip":
        for file in (words[i + 1] for i, word in enumerate(words) if word == "-r"):
            assert (folder / file).is_file(), file
    else:  # other people's programs, on our files
        inside = [word.split("clients/", 1)[1] for word in words if "clients/" in word]
        assert inside and all((ROOT / "clients" / path).exists() for path in inside), words


def _curl(words: list[str], host: Launch, folder: Path) -> None:
    assert any(ADDRESS.search(word) for word in words), f"{words}: asks another address than localhost:6000"
    words = [ADDRESS.sub(f"127.0.0.1:{host.port}", word) for word in words]
    for name in re.findall(r"@([\w.-]+\.(?:png|jpe?g|webp))", " ".join(words)):
        Image.new("RGB", (64, 64), "blue").save(folder / name)
    options = ["-sS", "--fail-with-body", "--max-time", "120"]
    done = subprocess.run([*words, *options], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for index, word in enumerate(words):
        if word in ("-o", "--output"):
            with Image.open(folder / words[index + 1]) as image:
                image.load()


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name = re.escape(word.split("=")[0])
        assert re.search(rf"^{name} \?=" if "=" in word else rf"^{name}:", makefile, re.MULTILINE), word


def _launch(folder: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags are parsed as on that many ranks. Paths under /models stand for anybody's."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    ranks = 1
    if Path(words[0]).name == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args([*words[1:at], "script.py"])
        ranks = int(options.nproc_per_node) * int(options.nnodes.split(":")[-1])
    elif words[1] == "-m":  # venv, or a module of the project
        module = ROOT / (words[2].replace(".", "/") + ".py")
        assert words[2] == "venv" or module.is_file(), words[2]
    if at is None:
        return
    script = folder / words[at] if (folder / words[at]).is_file() else ROOT / words[at]
    assert script.is_file(), words[at]
    flags = words[at + 1 :]
    if not script.name.endswith("_host.py") or ELLIPSIS & set(flags) or "--help" in flags:
        return
    for path in re.findall(r"/models/[\w./-]+", " ".join(flags)):
        local = tmp_path / path.lstrip("/")
        if local.suffix:
            local.parent.mkdir(parents=True, exist_ok=True)
            local.touch()
        else:
            local.mkdir(parents=True, exist_ok=True)
            (local / "model_index.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    flags = [flag.replace("/models/", f"{tmp_path}/models/") for flag in flags]
    config = parse_config(BACKENDS[script.name.removesuffix("_host.py")], BACKENDS, flags)
    assert config.type


@pytest.mark.parametrize("snippet", CODE, ids=lambda s: s.text.strip().splitlines()[0][:60])
def test_a_code_block_works(
    snippet: Snippet, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if snippet.language == "python":
        monkeypatch.chdir(tmp_path)
        host: Launch = request.getfixturevalue("demo_host")
        code = ADDRESS.sub(f"127.0.0.1:{host.port}", snippet.text)
        exec(compile(code, "README", "exec"), {"__name__": "__main__"})
    elif snippet.language == "json":
        json.loads(snippet.text)
    elif snippet.language in ("yaml", "yml"):
        yaml.safe_load(snippet.text)
    else:
        assert snippet.language == "text", f"{snippet.language}: teach this test what it is"


def test_the_readmes_commands_are_found() -> None:
    assert {"curl", "torchrun", "pip", "make"} <= {Path(words[0]).name for _, words in SHELL}
