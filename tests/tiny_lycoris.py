"""LyCORIS and DoRA files for the tiny checkpoints, and their formulas, written out with numpy."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests import tiny_extras

Tensors = dict[str, torch.Tensor]
KINDS = (
    "loha", "lokr", "lokr_factors", "dora", "dora_inputs", "peft_dora", "loha_dora", "lokr_dora_inputs",
    "diff", "locon", "loha_tucker", "lokr_tucker", "locon_tucker",
)  # fmt: skip
CONVOLUTIONS = ("locon", "loha_tucker", "lokr_tucker", "locon_tucker", "dora_inputs", "loha_dora", "lokr")
RANK, ALPHA = 2, 3.0


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Some of the layers: attention, and convolutions of every kernel and stride."""
    found: dict[str, nn.Module] = dict(list(tiny_extras.adapted_layers(model).items())[:20])
    convolutions = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and "time" not in name
    }
    return found | convolutions


def tensors_of(kind: str, layer: Any, generator: torch.Generator, strength: float = 0.5) -> Tensors:
    """Random tensors of one kind for a layer, by LyCORIS' names."""
    out, inner, *kernel = layer.weight.shape
    size = int(np.prod(kernel, dtype=int))
    norm = strength * float(layer.weight.detach().norm()) + 0.1

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    conv = len(kernel) > 0
    one = (1, 1) if conv else ()
    if kind.startswith("loha_tucker"):
        found: Tensors = {}
        for n in "12":
            found |= {f"hada_t{n}": rand(RANK, RANK, *kernel), f"hada_w{n}_a": rand(RANK, out),
                      f"hada_w{n}_b": rand(RANK, inner)}  # fmt: skip
        return _normed(found, kind, layer, norm)
    if kind.startswith("loha"):
        found = {"hada_w1_a": rand(out, RANK), "hada_w1_b": rand(RANK, inner * size),
                 "hada_w2_a": rand(out, RANK), "hada_w2_b": rand(RANK, inner * size)}  # fmt: skip
    elif kind.startswith("lokr"):
        a, b = (next(n for n in (4, 3, 2, 1) if side % n == 0) for side in (out, inner))
        if kind == "lokr_tucker":
            found = {"lokr_w1": rand(a, b), "lokr_t2": rand(RANK, RANK, *kernel),
                     "lokr_w2_a": rand(RANK, out // a), "lokr_w2_b": rand(RANK, inner // b)}  # fmt: skip
        elif kind == "lokr_factors":
            found = {"lokr_w1_a": rand(a, RANK), "lokr_w1_b": rand(RANK, b),
                     "lokr_w2_a": rand(out // a, RANK),
                     "lokr_w2_b": rand(RANK, inner // b * size)}  # fmt: skip
        else:
            found = {"lokr_w1": rand(a, b), "lokr_w2": rand(out // a, inner // b, *kernel)}
    elif kind == "diff":
        return _normed({"diff": rand(*layer.weight.shape)}, kind, layer, norm)
    elif kind == "locon_tucker":
        found = {"lora_down.weight": rand(RANK, inner, *one), "lora_mid.weight": rand(RANK, RANK, *kernel),
                 "lora_up.weight": rand(out, RANK, *one)}  # fmt: skip
    else:
        found = {"lora_down.weight": rand(RANK, inner, *kernel), "lora_up.weight": rand(out, RANK, *one)}
    found = _normed(found | {"alpha": torch.tensor(ALPHA)}, kind, layer, norm)
    if "dora_inputs" in kind:
        found["dora_scale"] = layer.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)[None]
        found["dora_scale"] = (found["dora_scale"] * (0.7 + 0.6 * torch.rand(inner))).reshape(1, inner, *one)
    elif kind.endswith("dora"):
        name = "lora_magnitude_vector" if kind.startswith("peft") else "dora_scale"
        scale = layer.weight.detach().flatten(1).norm(dim=1) * (0.7 + 0.6 * torch.rand(out))
        found[name] = scale if kind.startswith("peft") else scale.reshape(out, 1, *one)
    return found


def _normed(found: Tensors, kind: str, layer: Any, norm: float) -> Tensors:
    """The first tensor such that the whole change has this norm."""
    first = next(iter(found))
    made = float(np.linalg.norm(delta(found, tuple(layer.weight.shape)))) or 1.0
    return found | {first: found[first] * (norm / made)}


def delta(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """What a layer's weight of this shape changes by, before DoRA: the papers' formulas, in float64."""
    t = {key.removesuffix(".weight"): value.double().numpy() for key, value in tensors.items()}
    out, inner, *kernel = shape
    flat = (out, inner, int(np.prod(kernel, dtype=int)))
    if "diff" in t:
        return t["diff"]
    if "lora_up" in t:
        up, down = t["lora_up"].reshape(out, -1), t["lora_down"].reshape(len(t["lora_down"]), inner, -1)
        middle = t["lora_mid"].reshape(RANK, RANK, -1) if "lora_mid" in t else None
        made = np.zeros(flat)
        for k in range(flat[2]):
            made[:, :, k] = up @ (down[:, :, k] if middle is None else middle[:, :, k] @ down[:, :, 0])
        rank: float = len(down)
    elif "hada_w1_a" in t:
        halves = []
        for n in "12":
            a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
            if f"hada_t{n}" in t:
                core = t[f"hada_t{n}"].reshape(RANK, RANK, -1)
                halves.append(np.stack([a.T @ core[:, :, k] @ b for k in range(flat[2])], axis=2))
            else:
                halves.append((a @ b).reshape(flat))
        made, rank = halves[0] * halves[1], RANK
    else:
        first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        rows, columns = out // first.shape[0], inner // first.shape[1]
        if "lokr_w2" in t:
            second = t["lokr_w2"].reshape(rows, columns, -1)
        elif "lokr_t2" in t:
            core = t["lokr_t2"].reshape(RANK, RANK, -1)
            second = np.stack(
                [t["lokr_w2_a"].T @ core[:, :, k] @ t["lokr_w2_b"] for k in range(flat[2])], axis=2
            )
        else:
            second = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(rows, columns, -1)
        made = np.zeros(flat)
        for i in range(out):
            for j in range(inner):
                made[i, j] = first[i // rows, j // columns] * second[i % rows, j % columns]
        rank = ALPHA if "lokr_w2" in t else RANK  # of whole matrices alpha does not count
    return (made * (float(t.get("alpha", rank)) / rank)).reshape(shape)


def changed(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The change of a weight with DoRA's magnitudes, where the tensors have them."""
    w = weight.double().numpy()
    new = w + delta(tensors, tuple(weight.shape))
    by_outputs = new.reshape(len(new), -1)
    if "lora_magnitude_vector" in tensors or tensors.get("dora_scale", torch.zeros(1)).shape[0] == len(new):
        scale = tensors["lora_magnitude_vector" if "lora_magnitude_vector" in tensors else "dora_scale"]
        sizes = np.array([np.sqrt((row**2).sum()) for row in by_outputs])
        factor = scale.double().numpy().reshape(-1) / sizes
        new = new * factor.reshape(-1, *[1] * (w.ndim - 1))
    elif "dora_scale" in tensors:
        sizes = np.array([np.sqrt((new[:, i] ** 2).sum()) for i in range(new.shape[1])])
        factor = tensors["dora_scale"].double().numpy().reshape(-1) / sizes
        new = new * factor.reshape(1, -1, *[1] * (w.ndim - 2))
    return new - w


def mixed(
    name: str, model: nn.Module, seed: int, named: Callable[[str], str] | None = None
) -> tuple[Tensors, dict[str, Tensors]]:
    """A file in which the layers take turns with the kinds, and its tensors by layer."""
    named = named or (lambda layer: "lora_unet_" + layer.replace(".", "_"))
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()) % 1000)
    file: Tensors = {}
    by_layer: dict[str, Tensors] = {}
    for number, (layer, module) in enumerate(layers(model).items()):
        kinds = CONVOLUTIONS if isinstance(module, nn.Conv2d) else KINDS[:-4]
        found = tensors_of(kinds[(number + seed) % len(kinds)], module, generator)
        by_layer[layer] = found
        file |= {f"{named(layer)}.{key}": value.contiguous() for key, value in found.items()}
    return file, by_layer


def write(path: Path, tensors: Tensors) -> str:
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return str(path)
