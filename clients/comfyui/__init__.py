"""multigpu diffusion for ComfyUI: nodes that make pictures and videos on several GPUs, through hosts.

The nodes call hosts over HTTP and compute nothing. Copy or link this folder into ComfyUI's `custom_nodes`.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES
from .samplers import SAMPLERS


class MultiGPUDiffusion(ComfyExtension):
    """The node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*NODES, *SAMPLERS]


async def comfy_entrypoint() -> MultiGPUDiffusion:
    """Called by ComfyUI when it loads the pack."""
    return MultiGPUDiffusion()
