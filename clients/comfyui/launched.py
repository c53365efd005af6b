"""Hosts that this ComfyUI has launched: one for each launching node, kept between prompts."""

from __future__ import annotations

import atexit
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .host import Host, HostError, HostProcess

log = logging.getLogger(__name__)

LAUNCHES = "MultiGPUDiffusionLaunchHost"  # the class of launching nodes in a prompt
# With these a host keeps LoRAs fused into its weights, so that a new scale needs a new host.
_FUSING = ("--quantize_to", "--compile_unet", "--compile_text_encoder", "--parallelism=tensor")
_ADAPTER_SCALES = {"control_net": "controlnet_scale", "ip_adapter": "ip_adapter_scale"}


@dataclass(frozen=True)
class Handle:
    """What the host nodes give to the samplers.

    `scales` are request fields: scales of LoRAs, ControlNet and IP-Adapter other than the host's own.
    """

    host: Host
    type: str
    scales: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """What a launching node asks for. Two launches with the same `key` are served by one process."""

    project: str
    backend: str
    type: str
    checkpoint: str
    ranks: int
    python: str = ""
    flags: tuple[str, ...] = ()
    features: dict[str, Any] = field(default_factory=dict)

    def command_flags(self) -> list[str]:
        """All flags of the host; the user's own flags come last and take precedence."""
        # LoRAs are chosen here and change by their paths while the host runs (`Running.adopt`).
        flags = [f"--type={self.type}", f"--checkpoint={self.checkpoint}", "--allow_lora_paths"]
        for name, value in self.features.items():
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return [*flags, *self.flags]

    @property
    def fuses(self) -> bool:
        """Whether the host fuses its LoRAs, so that they cannot change while it runs."""
        return any(flag.startswith(_FUSING) for flag in self.command_flags())

    def live(self) -> dict[str, Any]:
        """Scales that requests can set: not those of fused LoRAs, nor of several ControlNets."""
        scales: dict[str, Any] = {}
        if (loras := self.features.get("lora")) and not self.fuses:
            scales["lora_scales"] = dict(loras)
        for feature, name in _ADAPTER_SCALES.items():
            given = self.features.get(feature, {})
            if len(given) == 1:
                scales[name] = next(iter(given.values()))
        return scales

    @property
    def key(self) -> str:
        """The settings whose change needs another process."""
        features = dict(self.features)
        if not self.fuses:
            features.pop("lora", None)
        for feature in _ADAPTER_SCALES:
            if len(features.get(feature, {})) == 1:
                features[feature] = list(features[feature])
        parts = (self.project, self.backend, self.type, self.checkpoint, self.ranks, self.python)
        return json.dumps([*parts, self.flags, features], sort_keys=True)


@dataclass
class Running:
    """A launched host: what it was launched with, and the scales that it has by itself now."""

    launch: Launch
    process: HostProcess
    scales: dict[str, Any]
    asked: str = ""  # the launching node's inputs, down to the last link

    def adopt(self, launch: Launch) -> None:
        """Add and remove LoRAs while it runs. Raises HostError where it refuses."""
        wanted = launch.live().get("lora_scales", {})
        loras = self.scales.setdefault("lora_scales", {})
        for path in [p for p in loras if p not in wanted]:
            self.process.host.change_lora("DELETE", {"path": path})
            del loras[path]
        for path in [p for p in wanted if p not in loras]:
            self.process.host.change_lora("POST", {"path": path, "scale": wanted[path]})
            loras[path] = wanted[path]

    def handle(self, launch: Launch) -> Handle:
        """For the samplers, with the scales that differ from the host's own."""
        scales = {name: value for name, value in launch.live().items() if value != self.scales.get(name)}
        return Handle(self.process.host, launch.type, scales)


def asked_by(node: str, prompt: Mapping[str, Any]) -> str:
    """All that a node of a prompt depends on; equal where ComfyUI's cache takes one node for another."""

    def resolved(value: Any) -> Any:
        linked = isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt
        return [asked_by(str(value[0]), prompt), value[1]] if linked else value

    one = prompt[node]
    inputs = {name: resolved(value) for name, value in one["inputs"].items()}
    return json.dumps([one["class_type"], inputs], sort_keys=True)


class LaunchedHosts:
    """The processes, by the id of the node that launched them."""

    def __init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._deaths = 0
        self._lock = threading.RLock()

    def deaths(self) -> int:
        """How many hosts have ended by themselves; a node whose host is among them launches again."""
        with self._lock:
            for node, running in list(self._running.items()):
                if not running.process.alive():
                    del self._running[node]
                    self._deaths += 1
            return self._deaths

    def pids(self) -> dict[str, int]:
        """Process groups of the running hosts by node."""
        with self._lock:
            return {node: running.process.pid for node, running in self._running.items()}

    def launch(
        self,
        node: str,
        launch: Launch,
        prompt: Mapping[str, Any],
        check: Callable[[], None],
        on_loading: Callable[[dict[str, Any]], None] = lambda health: None,
    ) -> Handle:
        """The node's host: the running one where nothing has changed that needs another, else a new one.

        Args:
            prompt: all nodes by id; hosts that none of them launches are ended, they hold memory.
            check: called while the host loads; what it raises ends the host.
            on_loading: called with its /health meanwhile.

        Raises:
            HostError: the host ended while loading; with its message.
        """
        with self._lock:
            self.deaths()
            self._settle(prompt)
            running = self._running.get(node)
            asked = asked_by(node, prompt) if node in prompt else ""
            if running is not None and running.launch.key == launch.key:
                running.asked = asked
                try:
                    running.adopt(launch)
                    return running.handle(launch)
                except HostError as error:
                    log.info(
                        "the host cannot change its LoRAs while it runs; starting another one: %s", error
                    )
            self.stop(node)
            flags = launch.command_flags()
            process = HostProcess(launch.project, launch.backend, launch.ranks, flags, launch.python)
            log.info(
                "starting %s_host.py on %d ranks; its log: %s", launch.backend, launch.ranks, process.log
            )
            self._running[node] = Running(launch, process, launch.live(), asked)
            try:
                process.wait_until_ready(check, on_loading)
            except BaseException:
                del self._running[node]
                raise
            return self._running[node].handle(launch)

    def _settle(self, prompt: Mapping[str, Any]) -> None:
        """Give each host to the node that needs it now, as ComfyUI's cache does; end those without one."""
        nodes = {n: asked_by(n, prompt) for n, one in prompt.items() if one["class_type"] == LAUNCHES}
        hosts, self._running = self._running, {}
        left = {}
        for node, running in hosts.items():
            same = [n for n, asked in nodes.items() if asked == running.asked and n not in self._running]
            if same:
                self._running[node if node in same else same[0]] = running
            else:
                left[node] = running
        for node, running in left.items():
            if node in nodes and node not in self._running:
                self._running[node] = running  # the node may go on with it
            else:
                running.process.stop()

    def stop(self, node: str) -> None:
        """End a node's host and wait for its end."""
        with self._lock:
            running = self._running.pop(node, None)
            if running is not None:
                running.process.stop()

    def stop_all(self) -> None:
        for node in list(self._running):
            self.stop(node)


HOSTS = LaunchedHosts()
atexit.register(HOSTS.stop_all)
