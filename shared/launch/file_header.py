"""What a single `.safetensors` file is, from its header and name, and where its configurations are."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shared.models import FILE_KINDS, INPUTS, MODELS, FileForm, FileKind, ModelSpec

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
DENOISER = "model.diffusion_model."
PREFIXES = (DENOISER, "unet.", "transformer.", "")  # that the denoiser's names have in single files
WEIGHTS = (".safetensors", ".bin")


class SingleFileError(ValueError):
    """A single file that cannot be loaded; the message says why."""


@dataclass(frozen=True)
class Header:
    """Names and shapes of a file's tensors, and its metadata."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def has(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.shapes)

    def has_part(self, *prefixes: str) -> bool:
        """Whether names of the denoiser begin so, with its usual prefix or without one."""
        return self.has(*(before + prefix for before in PREFIXES for prefix in prefixes))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the denoiser, with any prefix."""
        return next((self.shapes[p + name] for p in PREFIXES if p + name in self.shapes), None)

    @property
    def inputs(self) -> tuple[int, ...] | None:
        """The shape of the denoiser's first weight: [.., input channels, ..]."""
        shapes = (self.shape(name) for names in INPUTS.values() for name in names)
        return next((shape for shape in shapes if shape is not None and len(shape) > 1), None)


def read_header(file: Path, flag: str = "--checkpoint") -> Header:
    """The header of a `.safetensors` file. Raises SingleFileError."""
    try:
        with safe_open(file, framework="np") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return Header(file, shapes, opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise SingleFileError(f"{flag} {str(file)!r} cannot be read: {error}") from None


def family(header: Header) -> FileKind | None:
    """The first of `models.FILE_KINDS` that the file's tensors fit."""
    names = header.shapes
    for kind in FILE_KINDS:
        if (
            (kind.marks and header.has_part(*kind.marks))
            or any(part in name for part in kind.parts for name in names)
            or (kind.only and names and all(name.startswith(kind.only) for name in names))
        ):
            return kind
    projection = header.shape("input_blocks.1.1.proj_in.weight")
    projection = projection or header.shape("down_blocks.0.attentions.0.proj_in.weight")
    if projection is None:
        return None
    wanted = "sd2" if len(projection) == 2 else "sd1"  # a linear layer there, a convolution here
    return next(kind for kind in FILE_KINDS if kind.name == wanted)


def form_of(header: Header) -> FileForm | None:
    """The first form of the file's kind that it fits; None where it fits none, or there are none."""
    kind = family(header)
    for form in kind.forms if kind else ():
        if form.inputs != header.inputs or (form.has and not header.has_part(*form.has)):
            continue
        # Some forms have the same tensors as others.
        said = any(_word(word).search(header.file.stem) for word in form.words)
        if said or not form.words or (form.second and (_beside(header.file) / form.second).is_dir()):
            return form
    return None


def check_kind(header: Header, spec: ModelSpec) -> None:
    """Refuse a file that is not a checkpoint of this type, and say what it is.

    Raises:
        SingleFileError: the file is something else; the message says what, and which type or flag loads it.
    """
    said = f"--checkpoint {str(header.file)!r}"
    if header.has("model_ema.") and not header.has(DENOISER):
        raise SingleFileError(
            f"{said} holds only averaged weights (EMA, keys model_ema.*), which cannot be loaded"
        )
    kind = family(header)
    if kind is None:
        first = ", ".join(repr(name) for name in sorted(header.shapes)[:3]) or "none"
        raise SingleFileError(f"{said} is not a supported model; its tensors are {first} ...")
    if kind.name == "sdxl" and _is_refiner(header):
        kind = next(k for k in FILE_KINDS if "refiner" in k.title)
    types = [s.name for s in MODELS.values() if kind.name and s.single_file_config == kind.name]
    beside = _beside(header.file)
    form = form_of(header)
    if form is not None:
        title, types, hint = form.title, list(form.types), form.hint
    else:
        title, hint = kind.title, kind.hint
    if spec.name not in types:
        hint = f"--type={' or '.join(types)} loads it" if types else hint
        raise SingleFileError(f"{said} is {title}, not of type {spec.name}: {hint}")
    own = (beside / "model_index.json", beside / spec.denoiser / "config.json")
    if kind.forms and form is None and not all(file.is_file() for file in own):
        known = "; ".join(f"{f.title}: {list(f.inputs)}" for f in kind.forms if f.types)
        given = "none" if header.inputs is None else list(header.inputs)
        raise SingleFileError(
            f"{said} is {kind.title}, but of no known form: its first weight has the shape {given} "
            f"({known}); put its model_index.json and {spec.denoiser}/config.json in {str(beside)!r}"
        )
    two = form is not None and (read_index(str(header.file)) or {}).get(form.second)
    if form is not None and two and _word(form.pair[1]).search(header.file.stem):
        first, second = form.pair
        raise SingleFileError(
            f"{said} is the second of the two transformers of {form.title}, by the word {second!r} in its "
            f"name: give the first one, {first!r}, as --checkpoint; the second one is found beside it"
        )


def second_file(header: Header) -> Path | None:
    """The single file of the second denoiser, by its name; None where the first one's does not tell it."""
    form, kind = form_of(header), family(header)
    forms = [form] if form is not None else kind.forms if kind else ()
    pair = next((one.pair for one in forms if one.pair), None)
    if pair is None:
        return None
    first, second = pair

    def other(found: re.Match[str]) -> str:
        return second.upper() if found[0].isupper() else second.title() if found[0].istitle() else second

    name = _word(first).sub(other, header.file.name)
    return None if name == header.file.name else header.file.with_name(name)


def has_weights(folder: Path) -> bool:
    """Whether a component has weights in this folder, as diffusers lays them out."""
    return any(file.suffix in WEIGHTS for file in folder.glob("*"))


def files_beside(file: Path) -> list[Path]:
    """Where the rest of a single file's checkpoint is: the folder of its name, and the second denoiser's."""
    try:
        second = second_file(read_header(file))
    except SingleFileError:
        second = None
    return [_beside(file), *([second] if second is not None else [])]


def config_folder(spec: ModelSpec, file: Path, name: str) -> Path:
    """The folder in which `name` configures this component: beside the file, of its form, or of its type."""
    beside = _beside(file)
    if any((beside / name).glob("*config.json")):
        return beside
    form = _form_of_file(file)
    if form is not None and form.config and (CONFIGS / form.config / name).exists():
        return CONFIGS / form.config
    return CONFIGS / (spec.single_file_config or "")


@lru_cache(64)
def index_of(checkpoint: str) -> Any:
    """`read_index`, once for each path."""
    return read_index(checkpoint)


def read_index(checkpoint: str) -> Any:
    """model_index.json of a folder, of the one of its name beside a single file, or that of such files.

    None where there is none, or it cannot be read; the checks and the loader report that.
    """
    folder = file = Path(checkpoint)
    try:
        if file.is_file() and not (_beside(file) / "model_index.json").is_file():
            header = read_header(file)
            form, kind = form_of(header), family(header)
            folder = CONFIGS / (kind.name if kind else "")
            if form is not None:
                own = CONFIGS / form.config
                folder = own if (own / "model_index.json").is_file() else folder
                shipped: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
                return shipped | dict(form.index)
        elif file.is_file():
            folder = _beside(file)
        return json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return None


@lru_cache(64)
def position_table(
    type_name: str, checkpoint: str, control_nets: tuple[str, ...] = ()
) -> tuple[int, int] | None:
    """Tokens a side that a checkpoint and its ControlNets have positions for, and pixels a side of a token.

    None where they have them for any size, or a configuration cannot be read; the loader reports that.
    """
    spec, file = MODELS[type_name], Path(checkpoint)
    plan = spec.tokens
    if plan is None or plan.table is None:
        return None
    try:
        header = read_header(file) if file.is_file() else None
        folders = [
            (file if header is None else config_folder(spec, file, name)) / name
            for name in (spec.denoiser, "vae")
        ]
        own, vae = (json.loads((folder / "config.json").read_text()) for folder in folders)
        sides = [own[plan.table] if header is None else table_in(header) or own[plan.table]]
        for net in map(Path, control_nets):
            settings = json.loads(((net if net.is_dir() else net.parent) / "config.json").read_text())
            if settings.get("pos_embed_type", "sincos") is not None:
                sides.append(settings.get(plan.table) or sides[0])
        return min(sides), own[plan.side] * spec.latent_pixels(vae)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def table_in(header: Header) -> int | None:
    """Tokens a side that the denoiser of a single file has positions for, if it has a table of them."""
    positions = header.shape("pos_embed")
    return None if positions is None else math.isqrt(positions[1])


def input_channels(header: Header, spec: ModelSpec) -> int | None:
    """How many channels the denoiser takes."""
    shapes = (header.shape(name) for name in INPUTS[spec.denoiser])
    inputs = next((shape[1] for shape in shapes if shape is not None and len(shape) > 1), None)
    return None if inputs is None else inputs // spec.single_file_inputs


def other_inputs(spec: ModelSpec, given: int, expected: int) -> str:
    """What a denoiser with another number of input channels is."""
    kinds = {times * expected + more: what for (times, more), what in spec.other_inputs.items()}
    what = kinds.get(given, "another model")
    return f"is {what}: its denoiser takes {given} channels, that of type {spec.name} takes {expected}"


def _is_refiner(header: Header) -> bool:
    """Its time embedding is 384 x 4 wide; the base model's is 320 x 4."""
    time = header.shape("time_embed.0.weight") or header.shape("time_embedding.linear_1.weight")
    return time == (1536, 384)


def _form_of_file(file: Path) -> FileForm | None:
    try:
        state = file.stat()
    except OSError:
        return None
    return _form_of_state(file, state.st_mtime_ns, state.st_size)


@lru_cache(64)
def _form_of_state(file: Path, changed: int, size: int) -> FileForm | None:
    try:
        return form_of(read_header(file))
    except SingleFileError:
        return None


def _beside(file: Path) -> Path:
    return file.with_suffix("")


def _word(word: str) -> re.Pattern[str]:
    """Where a file's name has this word: no part of another one, but perhaps joined to `noise`."""
    return re.compile(rf"(?<![a-z]){word}(?=noise|[^a-z]|$)", re.IGNORECASE)
