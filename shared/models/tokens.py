"""Token plans: where a transformer's tokens are, how attention joins them, which methods fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from shared.models.caches import Cache, CacheSettings, LeftOut, Modulated

Stream = Literal["picture", "text"]


@dataclass(frozen=True)
class Site:
    """A place where a model holds tokens, or something for each of them (positions, masks).

    What is there is a tensor or a tuple of tensors (cosines and sines), all of them with the same tokens.
    """

    name: str
    """Path of a module in the model, or the name of an argument of the model's forward or of its blocks'."""
    at: Literal["input", "output", "argument", "blocks"]
    """An input of the module, its output, the model's argument, or the keyword argument of each block."""
    dim: int = 1
    """The dimension of the tokens."""
    of: tuple[Stream, ...] = ("picture",)
    """Whose tokens, in this order."""
    each: bool = False
    """Whether it is a tuple with one item for each of `of`, not one tensor over all of them."""
    place: int = 0
    """Which of the module's positional inputs."""
    optional: bool = False
    """Whether some checkpoints have None there, or nothing for each token."""


@dataclass(frozen=True)
class Padding:
    """Which arguments of a block, by position, are text with padding behind it and its mask [batch, text]."""

    text: int
    mask: int


@dataclass(frozen=True)
class Section:
    """Blocks in a row with a sequence of their own, which is whole in front of them and behind them."""

    blocks: str
    """The module list; the first input of its first block is cut [batch, tokens, channels]."""
    positions: tuple[int, ...] = ()
    """Places of those arguments of each block that have something for each token [batch, tokens, ...]."""
    end: str | None = None
    """The module whose output is gathered; None: the last of the blocks."""


@dataclass(frozen=True)
class Beside:
    """Blocks whose feed-forward layer works beside attention: one product takes both, attention's first."""

    blocks: str
    """The module list."""
    activation: str
    """What ends the feed-forward layer in a block."""
    product: str
    """The linear layer over [batch, tokens, attention's channels and then the activation's]."""


@dataclass(frozen=True)
class StagePlan:
    """How PipeFusion cuts a transformer into stages."""

    returns: tuple[Stream, ...] = ("picture",)
    """What a block returns, in this order."""
    equal: bool = False
    """Whether skip connections join the first blocks to the last, so that stages must be equal."""
    one_patch: str | None = None
    """Why a picture in one patch cannot be shared as a sequence as well; None: it can."""
    sized_text: bool = False
    """Whether stages send text of `max_sequence_length` tokens, whatever length embeddings have."""
    kept_text: str | None = None
    """Where xfuser's stages keep each block's text of the first patch for the others; None: they do not."""
    unpacked: frozenset[str] = frozenset()
    """Pipelines that unpack their latents also where these are what they return."""
    inputs: bool = False
    """Whether xfuser's pipeline leaves out the second guidance branch and the pictures to look at."""
    unshared: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Settings of a checkpoint with which stages cannot share a sequence as well, and why."""


@dataclass(frozen=True)
class TokenPlan:
    """One class of transformers, or of the ControlNets made of their blocks."""

    name: str
    """The class in diffusers."""
    title: str
    """Its common name."""
    blocks: tuple[str, ...]
    """The module lists of the blocks that repeat."""
    attention: tuple[str, ...]
    """What a block calls its self-attention; some blocks may lack some of them."""
    fused: tuple[str, ...] = ()
    """Those of `blocks` whose attention has one projection for queries, keys and values."""
    picture: tuple[Site, ...] = ()
    """The inputs of the picture's tokens."""
    text: tuple[Site, ...] = ()
    """The inputs of the text's tokens, if they take part in self-attention."""
    positions: tuple[Site, ...] = ()
    """The inputs of positions and masks."""
    sections: tuple[Section, ...] = ()
    """In place of these inputs, where each list of blocks has a sequence of its own."""
    whole: bool = False
    """Whether every rank computes all of it, whoever shares the sequence (a ControlNet)."""
    heads: str = "num_attention_heads"
    """What its configuration calls the number of attention heads."""
    width: str | None = None
    """What it calls the channels of a token; None: they are heads x attention_head_dim."""
    side: str = "patch_size"
    """What it calls the latents of a token, a side; packed latents are 2 a side."""
    table: str | None = None
    """What it calls the tokens a side that it has positions for; None: it computes them for any size."""
    unguided: bool = False
    """Whether its most used checkpoints work without guidance, so that no rank is given to it unasked."""
    capturable: bool = True
    """Whether a CUDA graph can hold it: it moves nothing between the CPU and the GPU."""
    uncapturable: tuple[str, ...] = ()
    """Settings of a checkpoint with which none can."""
    counted: tuple[str, str] | None = None
    """A module, and the argument that tells it how many tokens of text there are."""
    joined: tuple[Stream, ...] = ("picture",)
    """Whose tokens self-attention sees, in this order; so do blocks of one stream. Blocks for the picture's
    tokens only may lie between."""
    output: str | None = "proj_out"
    """The last module that has tokens, [batch, picture's tokens, channels]; None: residuals stay in parts."""
    guidance: Literal["batch", "calls", "embedded"] = "batch"
    """Both guidance branches in one batch, each in a call of its own, or one branch, which may have the scale
    as an input."""
    one_branch: tuple[str, ...] = ()
    """Settings of the pipeline or the transformer with which a checkpoint has only one guidance branch."""
    scale: str = "guidance_scale"
    """The pipeline's argument that turns guidance in two calls on where it is above 1."""
    guider: str | None = None
    """The pipeline's component that guides, in place of such an argument."""
    padding: Padding | None = None
    """Padded text that takes no part in attention, and is left out; None: all text takes part."""
    flow: bool = False
    """Whether it predicts flow: noise less picture."""
    packed: bool = False
    """Whether the pipeline's latents are tokens of 2 x 2 latents [batch, tokens, 4 x channels]."""
    squares: bool = False
    """Of these, whether the pipeline gets latents as squares of 2 x 2 [batch, 4 x channels, h / 2, w / 2],
    which it packs itself, and whether the VAE has the statistics of such squares."""
    adapter: Literal["call", "keys"] | None = None
    """An IP-Adapter's tokens: in a further call of attention in the layer, or as keys behind the others."""
    everywhere: tuple[str, ...] = ()
    """What a block calls attention from other tokens, which every rank has, to the picture's."""
    beside: Beside | None = None
    """Blocks with a feed-forward layer beside attention, if there are any."""
    skipped: str | None = None
    """The argument of self-attention that says that it is left out: each token keeps its own value."""
    tensor: tuple[str, ...] = ()
    """What a block calls the feed-forward layers that tensor parallelism divides."""
    left_out: tuple[LeftOut, ...] = ()
    """The blocks that step caches leave out, in order."""
    modulated: Modulated | None = None
    """For TeaCache; None: nobody has measured its polynomial."""
    mag_ratios: tuple[float, ...] = ()
    """For MagCache, of the checkpoint that is used most; none: they must be given."""
    further: tuple[str, ...] = ()
    """Components that are transformers of this class too, each for a part of the schedule."""
    stages: StagePlan | None = None
    """For PipeFusion; None: xfuser has none of it."""
    control_net: TokenPlan | None = None
    """The ControlNet's, whose residuals it adds."""

    @property
    def branches(self) -> int:
        """Guidance branches of one step, in one call or in two: 1 or 2."""
        return 1 if self.guidance == "embedded" else 2

    def channels(self, settings: Mapping[str, Any]) -> int:
        """Of a token, by the transformer's configuration; 0 if that does not say."""
        if self.width is not None:
            return int(settings.get(self.width) or 0)
        return int(settings.get(self.heads) or 0) * int(settings.get("attention_head_dim") or 0)

    def head_channels(self, settings: Mapping[str, Any]) -> int:
        """Channels of an attention head."""
        return self.channels(settings) // int(settings[self.heads])

    @property
    def caches(self) -> frozenset[Cache]:
        """The step caches that fit."""
        if not self.left_out:
            return frozenset()
        known: set[Cache] = {"fbcache", "magcache", "taylorseer", "mask"}
        return frozenset(known | ({"teacache"} if self.modulated else set()))

    def cache_problem(self, settings: CacheSettings) -> str | None:
        """Why a step cache with these settings does not fit, or None."""
        if settings.cache not in self.caches:
            fitting = ", ".join(sorted(self.caches)) or "none"
            return f"does not fit {self.title}; those that do are {fitting}"
        if settings.cache == "magcache" and not (
            settings.mag_ratios or self.mag_ratios or settings.calibrate
        ):
            return (
                f"needs mag_ratios, which are not known for {self.title}: a launch with "
                '{"cache": "magcache", "calibrate": true} tells them in its answers'
            )
        return None
