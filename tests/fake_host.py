"""A host whose engine draws nothing: it obeys orders in the prompt, so that failures can be had on demand.

`positive` is JSON: {"sleep": seconds a step, "rank": who, "step": when, "do": what} with what = raise
(between collectives), raise_in_step (while the others are in one), hang, exit, bad_request, fill: out of
memory, {"until": count} times, or fill_in_step (while the others are in a collective).
Under torchrun it is a whole host (shared.host.serve) without weights.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from shared.api.jobs import SecondPass
    from shared.api.operations import Operation
    from shared.api.replies import Reply
    from shared.api.requests import GenerateRequest
    from shared.launch.flags import HostConfig
    from shared.ranks.groups import World
    from shared.ranks.messages import OnStep


class FakeEngine:
    """Steps through collectives on the compute group; the last rank holds the picture."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.picture = 0
        # A host imports what a pipeline needs only when its backend loads one.
        self.plan: dict[str, Any] = {"method": "fake", "diffusers": "diffusers" in sys.modules}
        self.parameters: dict[str, dict[str, int]] = {}
        self.done: list[str] = []
        self.crowded = False  # whether several pictures are drawn together

    def enlarge(self, draft: Reply, second: SecondPass) -> bytes:
        from shared.pipeline.latents import enlarged

        return enlarged(draft, second)

    def generate(self, request: GenerateRequest, on_step: OnStep) -> Reply | None:
        import torch
        import torch.distributed as dist

        from shared.api.faults import FieldProblem, RequestError
        from shared.api.replies import Reply
        from shared.api.warned import warn

        order = json.loads(request.positive) if request.positive else {}
        if order.get("do") == "bad_request":
            raise RequestError(422, [FieldProblem("positive", "the ranks refuse it")])
        if order.get("warn"):
            warn(f"of rank {self.world.rank}")
            warn("of all")
        steps = request.steps or 1
        for step in range(1, steps + 1):
            mine = order.get("rank") == self.world.rank and order.get("step") == step
            if mine and order["do"] == "raise_in_step":
                raise RuntimeError("broken inside a step")
            if mine and order["do"] == "fill_in_step":
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has more."
                )
            if mine and order["do"] == "hang":
                time.sleep(3600)
            if mine and order["do"] == "exit":
                os._exit(9)
            if self.world.size > 1:
                dist.all_reduce(torch.ones(8, device=self.world.device), group=self.world.compute)
            time.sleep(order.get("sleep", 0.0))
            if mine and order["do"] == "raise":
                raise RuntimeError("out of ideas")
            if self.crowded and order.get("no_room") == self.world.rank:
                raise torch.OutOfMemoryError("no room")
            if mine and order["do"] == "fill" and self.freed < order["until"]:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has more."
                )
            on_step(step, steps)
        self.done.append(str(request.seed))
        if self.world.rank != self.world.size - 1:
            return None
        out = io.BytesIO()
        Image.new("RGB", (request.width or 8, request.height or 8), "red").save(out, "PNG")
        seconds = {"total": 0.1, "denoise": 0.1, "decode": 0.0}
        return Reply(
            output=[out.getvalue()],
            format="png",
            seed=request.seed or 0,
            width=request.width or 8,
            height=request.height or 8,
            steps=steps,
            seconds=seconds,
        )

    @property
    def embeddings(self) -> list[dict[str, Any]]:
        return []

    def most_at_once(self, request: GenerateRequest) -> int:
        return json.loads(request.positive or "{}").get("at_once", 1)

    def generate_all(
        self, request: GenerateRequest, on_step: OnStep, pictures: int, together: bool = True
    ) -> list[Reply]:
        """With {"no_room": rank}, that rank runs out of memory where it may draw several at once."""
        if pictures > 1:
            self.done.append(f"{pictures} at once")
        self.crowded = pictures > 1 and together
        steps = request.steps or 1
        made = []
        for number in range(pictures):

            def step_of_all(step: int, _: int, number: int = number) -> None:
                on_step(number * steps + step, pictures * steps)

            made.append(self.generate(request.numbered(number), step_of_all))
        return [reply for reply in made if reply is not None]

    def warm_up(self, size: tuple[int, int] | None = None) -> None:
        """Nothing to warm; a size that is 24 wide fails."""
        if size is not None and size[0] == 24:
            raise RuntimeError("no room for it")

    def preview_to(self, queue: Any) -> None:
        """Nothing to show."""

    def add_lora(self, path: str, scale: float) -> list[str]:
        """Notes it, and fails on one rank: {"path": "missing 1"}."""
        from shared.api.faults import FieldProblem, RequestError

        if path == f"missing {self.world.rank}":
            raise RequestError(409, [FieldProblem("lora", "no such file")])
        self.done.append(path)
        return self.done

    def remove_lora(self, path: str) -> list[str]:
        """Takes it off its notes."""
        self.done.remove(path)
        return self.done

    def undo(self, operation: Operation) -> None:
        """Takes a LoRA off again."""
        self.remove_lora(operation.path)

    @property
    def freed(self) -> int:
        """How often memory was freed."""
        return sum(one.startswith("freed") for one in self.done)

    def free_memory(self, request: GenerateRequest | None) -> None:
        """Notes it, and for what."""
        self.done.append("freed" if request is None else f"freed for {request.seed}")

    def close(self) -> None:
        """Nothing to undo."""


def build_engine(config: HostConfig, world: World) -> Any:
    if str(world.rank) in os.environ.get("FAKE_LOAD_FAILS", "").split():
        from shared.launch.errors import LoadError

        raise LoadError("no weights")
    time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
    return FakeEngine(world)


if __name__ == "__main__":
    from dataclasses import replace

    from shared.backends import BACKENDS
    from shared.host import serve

    serve(replace(BACKENDS["asyncdiff"], build_engine=build_engine, plans_memory=False))
