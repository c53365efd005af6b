"""Which layers of a pipeline the names in a LoRA file mean.

Names: diffusers', PEFT's, kohya's and LyCORIS' (flattened module names), ComfyUI's (`diffusion_model.`,
`text_encoders.clip_l.`), and those of a model's authors (the original SD and SDXL blocks, BFL's flux names),
which diffusers' own conversion of LoRAs translates, for every format.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import nn

from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, model_of, parts_of
from shared.pipeline.lora_file import Update, numbers, updates
from shared.pipeline.lora_layers import fits, outputs_of, shape_of

log = logging.getLogger("host")

OTHER_NAMES = {
    "self_attn.to_q": "self_attn.q_proj", "self_attn.to_k": "self_attn.k_proj",
    "self_attn.to_v": "self_attn.v_proj", "self_attn.to_out": "self_attn.out_proj",
    ".temporal_transformer.": ".", "attention_blocks.0": "attn1", "attention_blocks.1": "attn2",
}  # fmt: skip
WRAPPERS = re.compile(r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|lycoris_)+")
KOHYA = re.compile(r"lora_(?P<part>unet|transformer|te\d?|text_encoder(?:_\d)?)[_.](?P<rest>.+)$")
COMFY = re.compile(r"(?:text_encoders\.)?(?P<part>[a-z0-9_]+)\.(?:transformer\.)?(?P<rest>.+)$")
NUMBERED_ENCODERS = ("clip_l", "clip_g", "t5xxl")
"""kohya's lora_te1, lora_te2 and lora_te3, in types that have them."""
CONVERSION_ERRORS = (
    AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""Of diffusers' conversions, which expect the sizes of the released models."""

Layers = Mapping[str, Mapping[str, nn.Module]]
Matched = dict[str, dict[str, Update]]


def match_layers(
    pipe: Pipeline, spec: ModelSpec, tensors: Mapping[str, torch.Tensor]
) -> tuple[Matched, list[str]]:
    """Which layers of the pipeline a LoRA's tensors belong to.

    Returns:
        updates per component attribute and module name, and the names in the file that fit no layer.
    Raises LoraError.
    """
    tensors = numbers(tensors)
    found = updates(tensors)
    places = _Places(pipe, spec)
    matched, unmatched = places.resolve(found)
    if unmatched and hasattr(pipe, "lora_state_dict"):
        more, unmatched = _translated(pipe, spec, places, {name: found[name] for name in unmatched})
        for part, layers in more.items():
            matched.setdefault(part, {}).update(layers)
        lora = all(update.plain or not update.tensors for update in found.values())
        if unmatched and lora and (whole := _converted(pipe, spec, tensors)) is not None:
            again, left = places.resolve(whole)
            if sum(map(len, again.values())) > sum(map(len, matched.values())):
                matched, unmatched = again, left
    return matched, [name for name in unmatched if name not in found or not found[name].is_nothing]


class _Places:
    """The layers of a pipeline that LoRAs can adapt, by the names that files have for them."""

    def __init__(self, pipe: Pipeline, spec: ModelSpec) -> None:
        self.spec = spec
        self.layers: Layers = {
            part: _adaptable(module)
            for part, module in parts_of(pipe, (*spec.denoisers, *spec.text_encoders)).items()
        }
        self.flat = {
            part: {name.replace(".", "_"): name for name in known} for part, known in self.layers.items()
        }
        for name in self.layers[spec.denoiser] if spec.own_names else ():
            self.flat[spec.denoiser].setdefault(self._own(name).replace(".", "_"), name)
        self.joined: dict[str, list[str]] = {}
        """Layers of the denoiser that files have as one, by its flattened name, in the order of outputs."""
        for theirs, ours in spec.joined_names.items():
            for name in self.layers[spec.denoiser]:
                if name.endswith(f".{ours[0]}"):
                    block = name.removesuffix(ours[0])
                    flat = f"{self._own(block)}{theirs}".replace(".", "_")
                    self.joined[flat] = [f"{block}{one}" for one in ours]

    def _own(self, name: str) -> str:
        """What the authors call a layer of the denoiser."""
        for ours, own in self.spec.own_names.items():
            name = name.replace(ours, own)
        return name

    def resolve(self, found: Mapping[str, Update]) -> tuple[Matched, list[str]]:
        """The updates by component and module name, and the names without a layer that they fit."""
        matched: Matched = {}
        unmatched = []
        for name, update in found.items():
            place = self.place(name)
            if place and fits(self.layers[place[0]][place[1]], update):
                matched.setdefault(place[0], {})[place[1]] = update
            elif parts := self._parts(name, update):
                matched.setdefault(self.spec.denoiser, {}).update(parts)
            else:
                unmatched.append(name)
        return matched, unmatched

    def _parts(self, name: str, update: Update) -> dict[str, Update]:
        """The updates of the layers that a file joins; none where one does not fit."""
        part, rest = self.component(name)
        names = self.joined.get(rest.replace(".", "_"), []) if part == self.spec.denoiser else []
        shape, known = shape_of(update), self.layers[self.spec.denoiser]
        if not names or shape is None:
            return {}
        sizes = [outputs_of(known[one]) for one in names]
        if sum(sizes) != shape[0]:
            return {}
        rows = torch.arange(shape[0]).split(sizes)
        parts = {
            one: update if len(names) == 1 else update.part(own) for one, own in zip(names, rows, strict=True)
        }
        return parts if all(fits(known[one], piece) for one, piece in parts.items()) else {}

    def place(self, name: str) -> tuple[str, str] | None:
        """(component, module name) of a layer name of any format."""
        part, rest = self.component(name)
        for theirs, ours in OTHER_NAMES.items():
            rest = rest.replace(theirs, ours)
        known, flat = self.layers.get(part, {}), self.flat.get(part, {})
        for tried in (rest, f"{rest}.0", f"text_model.{rest}", rest.removeprefix("text_model.")):
            if tried in known:
                return part, tried
        rest = rest.replace(".", "_")
        for tried in (rest, f"text_model_{rest}", rest.removeprefix("text_model_")):
            if tried in flat:
                return part, flat[tried]
        return None

    def component(self, name: str) -> tuple[str, str]:
        """The component that a name is of, and the rest of the name."""
        denoiser = self.spec.denoiser
        if wrapper := WRAPPERS.match(name):
            name = name[wrapper.end() :]
        if found := KOHYA.match(name):
            label = found["part"]
            if label in ("unet", "transformer"):
                return denoiser, found["rest"]
            return self._numbered(int(label[-1]) if label[-1].isdigit() else 1), found["rest"]
        if (found := COMFY.match(name)) and found["part"] in self.spec.encoder_names:
            return self._named(found["part"]), found["rest"]
        part, _, rest = name.partition(".")
        if part not in self.layers:
            part, rest = denoiser, name.removeprefix("unet.").removeprefix("transformer.")
        rest = rest.replace(".processor.", ".").replace(".to_out_lora", ".to_out.0_lora")
        return part, rest.removesuffix("_lora")

    def _named(self, encoder: str) -> str:
        return self.spec.text_encoders[self.spec.encoder_names.index(encoder)]

    def _numbered(self, number: int) -> str:
        name = NUMBERED_ENCODERS[number - 1] if 1 <= number <= len(NUMBERED_ENCODERS) else ""
        if name in self.spec.encoder_names:
            return self._named(name)
        return "text_encoder" if number == 1 else f"text_encoder_{number}"


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can wrap: not those whose parent reads their weights past their forward."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        direct = isinstance(parent, nn.MultiheadAttention) or type(parent).__name__.endswith("AttentionPool")
        owner = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        inside = isinstance(parent, LoraLayer) or isinstance(owner, LoraLayer)
        if isinstance(module, nn.Linear | nn.Conv2d | LoraLayer) and not direct and not inside:
            found[name] = module
    return found


def _translated(
    pipe: Pipeline, spec: ModelSpec, places: _Places, found: Mapping[str, Update]
) -> tuple[Matched, list[str]]:
    """Resolve names of the model's authors, in any format, by what diffusers makes of LoRAs of these names.

    Each layer is stood for by a LoRA of rank 1 whose tensors say which layer and which outputs they are of.
    """
    names: list[str] = []
    probes: list[dict[str, torch.Tensor]] = []
    for name, update in found.items():
        part, rest = places.component(name)
        shape = shape_of(update)
        if part == spec.denoiser and shape is not None:
            flat = f"lora_unet_{rest.replace('.', '_')}"
            down, up = torch.full((1, shape[1]), float(len(names))), torch.arange(float(shape[0]))[:, None]
            names.append(name)
            probes.append({f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up})
    answers = _converted(pipe, spec, {key: t for probe in probes for key, t in probe.items()})
    if answers is None:  # one name that diffusers does not know spoils all
        each = [_converted(pipe, spec, probe) or {} for probe in probes]
        answers = {name: update for answer in each for name, update in answer.items()}
    parts: dict[str, list[tuple[str, Update]]] = {}
    for theirs, answer in answers.items():
        if answer.plain:
            source = names[int(answer.tensors["down"].flatten()[0])]
            rows = answer.tensors["up"].flatten().long()
            whole = torch.equal(rows, torch.arange(shape_of(found[source])[0]))  # type: ignore[index]
            parts.setdefault(source, []).append(
                (theirs, found[source] if whole else found[source].part(rows))
            )
    matched: Matched = {}
    unmatched = [name for name in found if name not in parts]
    for source, pieces in parts.items():
        fitting, left = places.resolve(dict(pieces))
        if left:
            unmatched.append(source)
            continue
        for part, layers in fitting.items():
            matched.setdefault(part, {}).update(layers)
    return matched, unmatched


def _converted(
    pipe: Pipeline, spec: ModelSpec, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Update] | None:
    """The updates after diffusers' own conversion of other formats, or None where it cannot convert it."""
    config = model_of(pipe, spec.denoiser).config
    try:
        result = type(pipe).lora_state_dict(dict(tensors), unet_config=config)
        state, alphas = result if isinstance(result, tuple) else (result, None)
        return updates(state, alphas)
    except CONVERSION_ERRORS as error:
        log.debug("diffusers cannot convert this LoRA either: %s", error)
        return None


def sample(names: list[str]) -> str:
    """Some of the names, for a message."""
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
