"""From the command line, the YAML file and the environment to a checked HostConfig.

Imports no torch, so that `--help` and a usage error answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import Field, replace
from pathlib import Path
from typing import Any, NoReturn

from shared.launch.backend import Backend
from shared.launch.checks import check_config, check_type
from shared.launch.errors import UsageError
from shared.launch.flags import HostConfig
from shared.launch.logs import finish, one_line, world_from_environment
from shared.launch.wording import shown

EXIT_USAGE = 2
API_KEY_VARIABLE = "MULTIGPU_DIFFUSION_API_KEY"
RANK_0_SECONDS = 5.0  # how long rank 0 may take to report an error that all ranks have


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser(backend: Backend) -> argparse.ArgumentParser:
    """The argparse parser of one host: flags in groups, each with default, unit and choices."""
    parser = _Parser(
        prog=backend.script,
        description=f"{backend.title}. Types: {', '.join(backend.types)}.",
        epilog=f"Example: torchrun --nproc_per_node=2 {backend.script} --type={backend.types[0]} "
        "--checkpoint=/models/x",
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with any of these flags; the command line takes precedence",
    )
    for f in backend.config_flags:
        meta = f.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        names = [f"--{name}" for name in (f.name, *meta["aliases"])]
        text = meta["help"]
        if meta["choices"]:
            text += f"; one of {', '.join(meta['choices'])}"
        if f.name == "type":
            text += f"; one of {', '.join(backend.types)}"
        if meta["parse"] is not None and f.default not in (None, ""):
            text += f" (default: {f.default})"
        text = text.replace("%", "%%")
        if meta["parse"] is None:
            group.add_argument(*names, dest=f.name, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            action = "append" if meta["several"] else "store"
            group.add_argument(
                *names,
                dest=f.name,
                default=argparse.SUPPRESS,
                help=text,
                metavar=f.name.upper(),
                action=action,
            )
    return parser


Backends = Mapping[str, Backend]


def parse_config(backend: Backend, backends: Backends, argv: Sequence[str] | None = None) -> HostConfig:
    """Parse and check the command line of one host.

    Args:
        backends: all of them, to name another one that serves a type or has a flag.

    Raises:
        UsageError: naming the flag, what was given and what is allowed.
    """
    parser = build_parser(backend)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(_unknown(backend, backends, unknown[0].split("=")[0]))
    given = vars(known)
    config_file = given.pop("config", None)
    values = {**({} if config_file is None else _read_yaml(backend, backends, config_file)), **given}
    by_name = {f.name: f for f in backend.config_flags}
    parsed = {name: _parse_value(by_name[name], value) for name, value in values.items()}
    if (key := _api_key(parsed)) is not None:
        parsed["api_key"] = key
    check_type(parsed.get("type", ""), backend, backends)
    config = HostConfig(backend=backend.name, **parsed)
    if config.preset is not None:
        ranks = world_from_environment()[1]
        chosen = backend.presets(config.spec, ranks, parsed)[config.preset]
        config = replace(config, **{name: parsed.get(name, value) for name, value in chosen.items()})
    check_config(config, backend, world_from_environment()[1])
    return config


def _api_key(parsed: dict[str, Any]) -> str | None:
    """The key of the flag, of the file or of the environment."""
    if (file := parsed.get("api_key_file")) is None:
        key = parsed.get("api_key", os.environ.get(API_KEY_VARIABLE))
        if key == "":
            raise UsageError(f"{API_KEY_VARIABLE}: must be a key or unset; it is empty")
        return key
    if "api_key" in parsed:
        raise UsageError("--api_key_file: not with --api_key; give only one of them")
    try:
        key = Path(file).read_text().strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--api_key_file: cannot read {file!r}: {_problem(error)}") from None
    if not key:
        raise UsageError(f"--api_key_file: must contain the key; {file!r} is empty")
    return key


def parse_or_exit(backend: Backend, backends: Backends, argv: Sequence[str] | None = None) -> HostConfig:
    """`parse_config`; a usage error ends the process with exit code 2 and one line, from rank 0 only."""
    try:
        return parse_config(backend, backends, argv)
    except UsageError as error:
        exit_usage(backend, error)


def exit_usage(backend: Backend, error: Exception) -> NoReturn:
    """End this rank with exit code 2; only rank 0 says why, in one line.

    torchrun ends all ranks of a machine with the first one, so the others wait for rank 0. A rank that still
    runs after that has an error that rank 0 does not have (a file missing on this machine) and reports it.
    """
    rank = world_from_environment()[0]
    if rank > 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_USAGE))
        time.sleep(RANK_0_SECONDS)
    print(usage_line(backend, error), file=sys.stderr, flush=True)
    finish()
    os._exit(EXIT_USAGE)


def usage_line(backend: Backend, error: Exception) -> str:
    """What a rank says of a usage error."""
    rank = world_from_environment()[0]
    who = f"[rank {rank}] " if rank > 0 else ""
    return one_line(f"{who}{backend.script}: error: {error}")


def _unknown(backend: Backend, backends: Backends, flag: str) -> str:
    names = [f.name for f in backend.config_flags]
    if not flag.startswith("-"):
        return f"{flag!r} is not a flag; every argument is --name=value (see --help)"
    name = flag.lstrip("-")
    if elsewhere := [b.script for b in backends.values() if name in b.flags]:
        return f"--{name}: a flag of {' and '.join(elsewhere)}, not of {backend.script}"
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    hint = f"did you mean --{near[0]}? " if near else ""
    return f"--{name}: unknown flag; {hint}--help lists all of them"


def _read_yaml(backend: Backend, backends: Backends, path: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).expanduser().read_text())
    except (yaml.YAMLError, *_UNREADABLE) as error:
        raise UsageError(f"--config: cannot read {path!r}: {_problem(error)}") from None
    if data is None:  # an empty file
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"--config: {path!r} must contain `flag: value` lines; got {type(data).__name__}")
    flags = backend.config_flags
    aliases = {alias: f.name for f in flags for alias in f.metadata["aliases"]}
    names = {f.name for f in flags}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = aliases.get(str(key), str(key))
        if name not in names:
            raise UsageError(f"--config {path}: {_unknown(backend, backends, '--' + str(key))}")
        if value is not None:
            values[name] = value
    return values


_UNREADABLE = (OSError, ValueError, LookupError, AttributeError, RecursionError)
"""What YAML's constructors raise beside YAMLError, such as ValueError for the date 2024-13-13."""


def _problem(error: Exception) -> str:
    """The error of a file in one line, of YAML with its line number."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    told = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
    lines = str(told).splitlines()
    mark = getattr(error, "problem_mark", None)
    return (f"line {mark.line + 1}: " if mark else "") + (lines[0] if lines else type(error).__name__)


def _parse_value(f: Field[Any], value: Any) -> Any:
    meta = f.metadata
    if meta["parse"] is None:
        if not isinstance(value, bool):
            raise UsageError(f"--{f.name}: must be true or false; got {value!r}")
        return value
    try:
        parsed = meta["parse"](value)
    except ValueError as error:
        raise UsageError(f"--{f.name}: must be {error}; got {shown(value, 100)}") from None
    if meta["path"]:
        homed = os.path.expanduser
        if isinstance(parsed, dict):
            parsed = {homed(k): v for k, v in parsed.items()}
        else:
            parsed = tuple(map(homed, parsed)) if meta["several"] else homed(parsed)
    if meta["choices"] and parsed not in meta["choices"]:
        raise UsageError(f"--{f.name}: must be one of {', '.join(meta['choices'])}; got {shown(value, 100)}")
    if parsed == "auto":
        return parsed
    if meta["least"] is not None and parsed < meta["least"]:
        raise UsageError(f"--{f.name}: must be at least {meta['least']}; got {shown(value, 100)}")
    if meta["most"] is not None and parsed > meta["most"]:
        raise UsageError(f"--{f.name}: must be at most {meta['most']}; got {shown(value, 100)}")
    return parsed
