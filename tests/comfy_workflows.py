"""Writes the node pack's example workflows from its schemas: python -m tests.comfy_workflows.

ComfyUI offers files of `example_workflows` among its templates. Widgets go by position there, so that a new
widget in a schema would shift the values of files written by hand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.comfy_stub import PACK, WIDGETS, ComfyUI, install

FOLDER = PACK / "example_workflows"
Node = tuple[str, tuple[int, int], dict[str, Any]]
_LINE, _TEXT = 24, 100  # pixels of a socket or widget, and of a text of several lines
_HOST = {"backend": "asyncdiff", "ranks": 2}


def _launch(type: str, checkpoint: str, column: int, **inputs: Any) -> Node:
    return (
        "MultiGPUDiffusionLaunchHost",
        (column, 0),
        {**_HOST, "type": type, "checkpoint": checkpoint, "project": "", **inputs},
    )


# Node ids count from 1; ("node id", slot) is a link.
WORKFLOWS: dict[str, list[Node]] = {
    "pictures": [
        ("MultiGPUDiffusionAsyncDiffPlan", (0, 0), {"auto_balance": True}),
        ("MultiGPUDiffusionScheduler", (0, 1), {"scheduler": "k_dpmpp_2m"}),
        _launch("sdxl", "sdxl/", 1, plan=(1, 0)),
        (
            "MultiGPUDiffusionSampler",
            (2, 0),
            {
                "host": (3, 0),
                "scheduler": (2, 0),
                "positive": "a lighthouse on a cliff at dusk",
                "negative": "blurry",
            },
        ),
        ("SaveImage", (3, 0), {"images": (4, 0), "filename_prefix": "multigpu"}),
    ],
    "animatediff": [
        ("MultiGPUDiffusionMotionModule", (0, 0), {"motion_module": "animatediff-motion-adapter/"}),
        _launch("ad", "sd15/", 1, features=(1, 0)),
        (
            "MultiGPUDiffusionAnimateDiffSampler",
            (2, 0),
            {"host": (2, 0), "positive": "waves rolling onto a beach"},
        ),
        ("SaveAnimatedWEBP", (3, 0), {"images": (3, 0), "filename_prefix": "multigpu", "fps": 8.0}),
    ],
    "svd": [
        ("LoadImage", (0, 0), {"image": "example.png"}),
        _launch("svd", "svd/", 1),
        ("MultiGPUDiffusionSVDSampler", (2, 0), {"host": (2, 0), "image": (1, 0)}),
        ("SaveAnimatedWEBP", (3, 0), {"images": (3, 0), "filename_prefix": "multigpu", "fps": 7.0}),
    ],
    "upscaler": [
        ("LoadImage", (0, 0), {"image": "example.png"}),
        _launch("sdup", "x4-upscaler/", 1),
        ("MultiGPUDiffusionUpscaler", (2, 0), {"host": (2, 0), "image": (1, 0)}),
        ("SaveImage", (3, 0), {"images": (3, 0), "filename_prefix": "multigpu"}),
    ],
}


def workflow(comfy: ComfyUI, nodes: list[Node]) -> dict[str, Any]:
    """The file that the browser would save of these nodes."""
    links: list[list[Any]] = []
    made: list[dict[str, Any]] = []
    for number, (type, (column, row), given) in enumerate(nodes, 1):
        schema = comfy.nodes[type].define_schema()
        lines = [_TEXT if one.given.get("multiline") else _LINE for one in schema.inputs]
        inputs: list[dict[str, Any]] = []
        values: list[Any] = []
        for one in schema.ordered():
            value = given.get(one.id, one.given.get("default"))
            if one.io_type in WIDGETS:
                values.append(one.given["options"][0] if value is None else value)
                if one.given.get("control_after_generate"):
                    values.append("randomize")
                continue
            link = None
            if value is not None:
                link = len(links) + 1
                links.append([link, value[0], value[1], number, len(inputs), one.io_type])
            inputs.append({"name": one.id, "type": one.io_type, "link": link})
        unknown = set(given) - {one.id for one in schema.inputs}
        assert not unknown, f"{type}: {unknown}"
        outputs = [
            {"name": out.display_name or out.io_type, "type": out.io_type, "links": [], "slot_index": slot}
            for slot, out in enumerate(schema.outputs)
        ]
        made.append(
            {
                "id": number,
                "type": type,
                "pos": [60 + 400 * column, 60 + 260 * row],
                "size": [340, 60 + sum(lines)],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": outputs,
                "properties": {"Node name for S&R": type},
                "widgets_values": values,
            }
        )
    for id, source, slot, *_ in links:
        made[source - 1]["outputs"][slot]["links"].append(id)
    return {
        "last_node_id": len(made),
        "last_link_id": len(links),
        "nodes": made,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def texts(comfy: ComfyUI) -> dict[str, str]:
    """The content of every file by its name."""
    return {name: json.dumps(workflow(comfy, nodes), indent=1) + "\n" for name, nodes in WORKFLOWS.items()}


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as models:
        FOLDER.mkdir(exist_ok=True)
        for name, text in texts(install(patch.setitem, Path(models))).items():
            (FOLDER / f"{name}.json").write_text(text)
