"""shared.pipeline.preview: what is shown of the latents; nothing is computed while nobody watches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict

import shared.pipeline.preview
from shared.api.jobs import GenerationJob
from shared.api.queue import PREVIEW_SECONDS, JobQueue
from shared.api.requests import COMMON_FIELDS, GenerateRequest
from shared.models import MODELS
from shared.pipeline.preview import Previewer, fit_projection, picture_latents, project
from shared.ranks.groups import World
from tests.httphost import config_of, picture
from tests.pool import RankPool

CPU = torch.device("cpu")


class LinearVae:
    """Encodes colours by one matrix, eight pixels to a latent."""

    dtype = torch.float32

    def __init__(self, channels: int = 4, **config: Any) -> None:
        self.matrix = torch.randn(channels, 3, generator=torch.Generator().manual_seed(3))
        given = {"scaling_factor": 0.5, "shift_factor": None, "latent_channels": channels} | config
        self.config = FrozenDict(given)

    def encode(self, pixels: torch.Tensor) -> Any:
        z = torch.einsum("cr,brhw->bchw", self.matrix, F.avg_pool2d(pixels, 8)) + 0.3
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """As a pipeline has them, [1, channels, h / 8, w / 8]."""
        z, config = self.encode(pixels).latent_dist.mode(), self.config
        if getattr(config, "latents_mean", None):
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            return (z - mean) / std * config.scaling_factor
        return (z - (config.shift_factor or 0)) * config.scaling_factor


def pixels_of(height: int = 32, width: int = 64) -> torch.Tensor:
    colours = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(5)) - 0.5
    return F.interpolate(colours, size=(height, width))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"channels": 16, "shift_factor": 0.1, "scaling_factor": 0.3},
        {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.5, 2.5, 3.0]},
    ],
)
def test_the_projection_finds_the_colours_of_a_linear_vae(config: dict[str, Any]) -> None:
    vae = LinearVae(**config)
    picture = pixels_of()
    shown = project(vae.latents(picture)[0], fit_projection(vae, CPU))
    wanted = ((F.avg_pool2d(picture, 8)[0].permute(1, 2, 0) + 1) * 127.5).to(torch.uint8)
    assert shown.shape == (4, 8, 3) and shown.dtype == torch.uint8
    assert (shown.int() - wanted.int()).abs().max() <= 2


def test_a_vae_that_overflows_in_half_precision_is_upcast_for_it_alone() -> None:
    vae = LinearVae(force_upcast=True)
    latents = vae.latents(pixels_of())[0]
    exact = project(latents, fit_projection(vae, CPU))
    vae.dtype = torch.float16
    seen = []

    def to(dtype: torch.dtype) -> None:
        vae.dtype = dtype
        seen.append(dtype)

    vae.to = to  # type: ignore[attr-defined]
    shown = project(latents, fit_projection(vae, CPU))
    assert (shown.int() - exact.int()).abs().max() <= 1
    assert seen == [torch.float32, torch.float16]


def test_a_vae_that_gives_no_numbers_is_refused() -> None:
    vae = LinearVae()
    vae.matrix[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        fit_projection(vae, CPU)


def test_large_latents_are_averaged_down_and_noisy_ones_scaled() -> None:
    projection = fit_projection(LinearVae(), CPU)
    noise = torch.randn(4, 300, 100, generator=torch.Generator().manual_seed(1))
    assert project(noise, projection).shape == (100, 34, 3)
    small = noise[:, :64, :64] / noise[:, :64, :64].std()
    assert torch.equal(project(small * 14, projection), project(small, projection))


def test_every_layout_gives_the_picture_of_the_middle_frame() -> None:
    picture = torch.arange(4.0 * 6 * 8).view(4, 6, 8)
    packed = torch.zeros(1, 3 * 4, 16)
    for c in range(4):
        for y in range(6):
            for x in range(8):
                packed[0, (y // 2) * 4 + x // 2, c * 4 + (y % 2) * 2 + x % 2] = picture[c, y, x]
    frames = torch.stack([picture - 1000, picture - 500, picture, picture + 500, picture + 1000])
    laid_out = {
        "nchw": picture[None],
        "ncfhw": frames.transpose(0, 1)[None],
        "nfchw": frames[None],
        "packed": packed,
        "tokens": frames.permute(0, 2, 3, 1).reshape(1, -1, 4),
    }
    for layout, latents in laid_out.items():
        assert torch.equal(picture_latents(latents, layout, (6, 8)), picture), layout
    assert {spec.latent_layout for spec in MODELS.values()} == set(laid_out)


def previewer(type: str = "sd1", steps: int = 3) -> tuple[Previewer, JobQueue, GenerationJob]:
    pipe = SimpleNamespace(vae=LinearVae(), vae_scale_factor=8, scheduler=SimpleNamespace())
    queue = JobQueue(1)
    request = GenerateRequest(width=64, height=32, steps=steps).filled(config_of())
    queue.submit(GenerationJob(request))
    job = queue.take(0)
    assert isinstance(job, GenerationJob)
    made = Previewer(pipe, MODELS[type], queue, CPU)
    made.begin(request)
    return made, queue, job


def test_nothing_is_computed_unless_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    made, queue, job = previewer()
    latents = torch.zeros(1, 4, 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(shared.pipeline.preview, "project", lambda *_: pytest.fail("computed for nobody"))
        made.after_step(1, (latents,), latents)
    assert job.preview is None
    queue.watchers = 1
    made.after_step(2, (latents,), latents)
    assert job.preview is not None
    assert (job.preview.step, job.preview.width, job.preview.height) == (2, 8, 4)
    assert len(job.preview.rgb) == 8 * 4 * 3
    made.after_step(3, (latents,), latents)
    assert job.preview.step == 2, f"a second preview within {PREVIEW_SECONDS} s"


def test_what_is_shown_is_the_end_that_the_step_heads_for() -> None:
    made, queue, job = previewer()
    queue.watchers = 1
    picture = pixels_of()
    clean = made.pipe.vae.latents(picture)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    made.after_step(1, (clean + 9 * noise, clean), noise)
    assert job.preview is not None
    expected = project(clean[0], made.projection).numpy().tobytes()
    assert job.preview.rgb == expected
    # A flow's latents say themselves where they go: x = (1 - sigma) clean + sigma noise.
    made, queue, job = previewer("sd3")
    queue.watchers = 1
    made.pipe.scheduler = SimpleNamespace(sigmas=torch.tensor([1.0, 0.5, 0.0]), step_index=1)
    made.after_step(1, ((clean + noise) / 2,), noise - clean)
    assert job.preview is not None
    shown = torch.frombuffer(bytearray(job.preview.rgb), dtype=torch.uint8)
    wanted = torch.frombuffer(bytearray(expected), dtype=torch.uint8)
    assert (shown.int() - wanted.int()).abs().max() <= 1


def test_a_part_of_a_picture_is_not_shown() -> None:
    made, queue, job = previewer()
    queue.watchers = 1
    part = torch.zeros(1, 4, 2, 8)
    made.after_step(1, (part,), part)
    assert job.preview is None


# One type of each layout, of each family of schedulers, and the one whose size is its input's.
TYPES = ("ad", "flux", "ltx2", "sd1", "sd3", "sdup", "svd", "wan")


def previews_of_tiny_checkpoints() -> dict[str, Any]:
    """On one rank: type -> (width, height) of each preview of a tiny checkpoint's picture."""
    from shared.pipeline.engine import PipelineEngine
    from tests import tiny

    group = torch.distributed.group.WORLD
    assert group is not None
    world = World(0, 1, 0, CPU, group, group, group)
    found: dict[str, Any] = {}
    for name in TYPES:
        config = tiny.config(name, width=64, height=64)
        engine = PipelineEngine(tiny.load(name), config, world)
        queue = JobQueue(1)
        queue.watchers = 1
        shown: list[tuple[int, int]] = []
        queue.show_preview = lambda step, w, h, rgb, to=shown: to.append((w, h))  # type: ignore[method-assign,misc]
        engine.preview_to(queue)
        asked = {
            "steps": 2,
            "seed": 1,
            "output_format": "latent",
            "positive": "a",
            "frames": 2 * MODELS[name].frames_factor + 1,
            "image": picture(),
            "strength": 1.0,  # all of the steps
        }
        taken: dict[str, Any] = {k: v for k, v in asked.items() if k in MODELS[name].fields | COMMON_FIELDS}
        request = GenerateRequest.model_construct(None, **taken)
        with mock.patch("shared.api.queue.PREVIEW_SECONDS", 0.0):
            engine.generate(request.filled(config), lambda step, steps: None)
            found[name] = list(shown)
            if name == "ltx2":  # the only frame is the picture: nothing to show, and no error
                alone = GenerateRequest.model_construct(None, **(taken | {"frames": 1}))
                engine.generate(alone.filled(config), lambda step, steps: None)
                assert shown == found[name]
    return found


def test_every_kind_of_type_shows_previews(pool: RankPool) -> None:
    assert {MODELS[t].latent_layout for t in TYPES} == {spec.latent_layout for spec in MODELS.values()}
    [shown] = pool.run(previews_of_tiny_checkpoints, 1)
    assert set(shown) == set(TYPES)
    for name, sizes in shown.items():
        assert len(sizes) >= 2 and len(set(sizes)) == 1, f"{name}: {sizes}"
        assert 1 <= sizes[0][0] == sizes[0][1] <= 64, f"{name}: {sizes}"
