"""The description of one model type, and the reasons for which types refuse flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from shared.models.costs import StepCost
from shared.models.files import FileKind, FilePart
from shared.models.tokens import TokenPlan


def refusals(*groups: Mapping[str, str]) -> Mapping[str, str]:
    """Merge groups of reasons."""
    merged: dict[str, str] = {}
    for group in groups:
        merged.update(group)
    return MappingProxyType(merged)


Layout = Literal["nchw", "ncfhw", "nfchw", "tokens"]
"""Of latents; tokens are [batch, frames x height x width, channels]."""
Kind = Literal["image", "inpaint", "fill"]
"""What is made of a picture: another one (image to image), a part of it anew (inpainting), or a part of it
anew by a checkpoint that was trained for it, whose denoiser sees the mask and the rest of the picture."""


@dataclass(frozen=True)
class Start:
    """One of diffusers' pipelines that start from a picture."""

    pipeline: str
    kind: Kind
    # Its default; None: it starts from noise, and the model looks at the picture. With a mask its ControlNet
    # does, and paints what is masked.
    strength: float | None
    begins: bool = False  # of these, whether the picture is the first frame of a video
    control: bool = False  # whether it is the one with a ControlNet
    ip_adapter: bool = True  # whether it takes an IP-Adapter
    image: str = "image"  # its argument for the picture
    frames: bool = False  # whether that is a list, the frames of a video
    sized: bool = True  # whether it takes a size; else the picture's is taken
    mask: str = "mask_image"  # its argument for the mask
    # Its argument for the control image; None: its ControlNet sees the picture and the mask.
    control_image: str | None = "control_image"
    # The setting of its ControlNet that is the denoiser's `in_channels` where it was not trained for it.
    control_inputs: str | None = None
    # Or the one that is above 0 where it was, and then paints masks only.
    control_extra: str | None = None
    most_pixels: int | None = None  # of a picture, which it makes smaller where it has more
    # How many times as wide as high pictures to look at may be, from and to; others are stretched to that.
    aspects: tuple[float, float] | None = None
    most: int = 1  # pictures that it takes beside each other, if they are no frames
    arguments: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))  # its further ones

    @property
    def refers(self) -> bool:
        """Whether the picture is one that the model looks at, and the loaded pipeline takes it."""
        return self.strength is None and self.kind == "image" and not self.begins


@dataclass(frozen=True)
class Chat:
    """A conversation that the tokenizer's template makes of a prompt."""

    settings: Mapping[str, object]  # of the template
    system: str | None = None  # the pipeline's message of the system; contents are lists then


@dataclass(frozen=True)
class ModelSpec:
    """Everything about one model type.

    `fields` are the request fields it supports beyond the common ones; `refuses` maps a launch flag to the
    reason why this type does not support it on any backend.
    """

    name: str
    title: str
    pipeline: str  # diffusers class names are strings, resolved by shared.pipeline.loading
    denoiser: Literal["unet", "transformer"]
    output: Literal["image", "video"]
    width: int
    height: int
    steps: int
    cfg: float
    least_steps: int = 1  # with fewer its schedule is not a number
    cfg_field: str = "guidance_scale"
    cfg_offset: float = 0.0  # what the pipeline's scale adds to ours, with which 1 is no guidance
    without_guidance: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Arguments of the pipeline that switch off its other kinds of guidance, where the scale is at most 1."""
    first_cfg_field: str | None = None  # of the first frame, where guidance grows from it to the last one's
    size_multiple: int = 8
    batch_pixels: int = 0  # of all pictures in one call of the pipeline; 0: each picture has its own call
    control_draws: bool = False  # whether control pictures are encoded with noise of the global state
    factor_setting: str = "vae_scale_factor"  # the pipeline's attribute: pixels a side of one latent
    area_field: str | None = None  # of the pipeline, if it takes width and height only as an aspect
    # Where no size is asked for beside a picture to look at, or to begin with, the sides are multiples of
    # this, with the last picture's aspect and the launch's area; 0: the size is the picture's own, or that of
    # the launch.
    aspect_multiple: int = 0
    edit_pixels: int = 0  # of an edit at most, where no size is asked for; 0: the picture's own
    # What a call of its denoiser needs while it runs, in maps: one number for each channel of its first
    # level (a transformer's width) at each of the latents (tokens). Counted at full size, without scores of
    # attention; and what DistriFusion keeps of other patches.
    step_maps: float = 17.0
    # Where its models' feed-forward layers differ in width: the setting that has it, and the maps beside two
    # of that width. Then `step_maps` is of attention, and the larger of the two counts.
    wide_maps: tuple[str, float] | None = None
    stale_maps: float = 0.0
    text_tokens: int = 0  # beside the picture's in each block
    size_scale: int = 1  # output pixels per pixel of the size that the pipeline is given (x4 upscaler: 4)
    frames: int | None = None
    frames_factor: int = 1  # frames of one latent frame; the first frame has a latent of its own
    fps: int = 8
    fps_field: str | None = None  # the pipeline's argument for it, if it changes the video
    sound: tuple[str, str] | None = None  # component and its setting with the sound's samples per second
    frames_limit: tuple[str, str] | None = None  # component and its setting that bounds the frames
    text_encoders: tuple[str, ...] = ()
    picture_processor: str | None = None  # the component that prepares pictures for its text encoder
    encoders_capturable: bool = True  # whether CUDA graphs can hold them
    encoder_names: tuple[str, ...] = ()  # what LoRAs from ComfyUI call them
    tokenizers: tuple[str, ...] = ()
    # What `image` of a request is: nothing, an input of the model, what the picture starts from, or what a
    # video begins with where it is given.
    image: Literal["none", "needed", "start", "begins"] = "none"
    sized_by_picture: bool = False  # whether its pipeline takes no size, but makes one of its picture's
    starts: tuple[Start, ...] = ()
    unpacked_layout: Layout = "nchw"  # of latents that are not packed
    pooled_embeds: bool = False
    attends_to_prompt: bool = False  # whether it takes its prompt by cross-attention of UNets' blocks
    prompt_chunks: bool = False  # whether its denoiser accepts a prompt of any length, in CLIP's chunks
    text_only: tuple[str, ...] = ()  # those that are part of a processor of pictures, which is not needed
    sized_tokenizers: tuple[str, ...] = ()  # those that read `max_sequence_length` tokens
    chat: Chat | None = None  # the conversation that prompts are put into
    most_tokens: int = 0  # that these may read, where that is more than usual
    whole_prompts: bool = False  # whether none is truncated; those of more than `most_tokens` are refused
    embeds_setting: str = "cross_attention_dim"  # of the denoiser: how wide embeddings are
    embeds_mask: bool = False  # whether embeddings come with an attention mask
    read_tokens: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """How many tokens of a tokenizer are read, where neither it nor an argument says it."""
    quoted_tokenizers: tuple[str, ...] = ()  # those that read only what is in quotes
    channels_setting: str | None = None  # what its VAE calls its latent channels, where that is not usual
    scale_setting: str | None = None  # and the pixels a side of one latent, where it has such a setting
    video_scale: int = 8  # these, of a video's VAE whose configuration does not say
    statistics: Literal["config", "buffers"] = "config"  # where its VAE has those of its latents, if it does
    decodes_upcast: bool = False  # whether its pipeline decodes in fp32 if its VAE overflows in fp16
    vae_kind: Literal["image", "video"] = "image"  # what its VAE takes; of a video's, a picture is one frame
    scheduler_family: Literal["discrete", "video", "flow", "flow_flux", "flow_sigmas", "flow_video"] = (
        "discrete"
    )
    fields: frozenset[str] = frozenset()
    refiner_pipeline: str | None = None  # for a second denoiser, which takes over near the end
    refiner_config: str | None = None  # folder under configs/ of its single files
    refiner_start: float = 1.0  # the fraction of the schedule from which it runs, where a launch has one
    control_net_class: str | None = None
    control_net_pipeline: str | None = None
    control_net_shares: bool = False  # whether it runs layers of the denoiser
    one_control_net: bool = False  # whether its pipeline takes no more than one
    control_image_field: str = "image"  # the ControlNet pipeline's argument for the control image
    ip_adapter_encoder: Literal["clip", "siglip"] | None = None
    ip_adapter_negative: bool = False  # whether its pipelines take a picture for the negative branch
    ip_adapter_takes: Literal["one", "several"] = "several"  # adapters and pictures
    compel_class: str | None = None  # compel's wrapper for its text encoders
    tokens: TokenPlan | None = None  # of its transformer; UNets have none
    step_cost: StepCost | None = None  # of its UNet, where it is known
    # Layers at the ends of the denoiser, a few percent of its weights, that are not quantized: rounding is
    # most visible there.
    kept: tuple[str, ...] = ("conv_in", "conv_out", "time_*", "add_embedding*", "class_embedding*")
    # Large layers of its blocks that take the prompt's tokens only: with so few rows, 8 bits do not gain.
    few_rows: tuple[str, ...] = ()
    # What else than the picture's places the layers of its blocks take, by patterns of their names: one row
    # of a branch (time, modulation), the prompt's tokens, or those behind the picture's.
    one_row: tuple[str, ...] = ("*norm*.linear", "*_mod.*", "*adaLN*", "*time_emb_proj")
    prompt_rows: tuple[str, ...] = ("*context*", "*.add_*", "*.to_add_out", "*txt_*", "*.attn2.to_[kv]")
    joined_rows: tuple[str, ...] = ("single_transformer_blocks.*",)
    own_names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What its authors call the denoiser's layers, by parts of diffusers' names; LoRAs use both."""
    joined_names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """What other files call layers of a block, and which of diffusers' these are, in the order of outputs."""
    lora_parts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """A word in the name of a LoRA's file -> which of several denoisers it is for."""
    lora_loader: Literal["pipeline", "peft"] = "pipeline"
    single_file_config: str | None = None  # folder under configs/, to load a single file offline
    # Prefix of the tensors' names of each text encoder in single files.
    single_file_encoders: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    # Further components that single files may hold.
    single_file_parts: Mapping[str, FilePart] = field(default_factory=lambda: MappingProxyType({}))
    # Settings of the denoiser that differ between single files of the type and show in their tensors.
    single_file_settings: Literal["input_channels", "guidance_embeds", "mmdit_blocks", "zero_cond_t"] = (
        "input_channels"
    )
    # What denoisers with other input channels are: (times the type's, and so many more) -> the model.
    other_inputs: Mapping[tuple[int, int], str] = field(default_factory=lambda: MappingProxyType({}))
    # Whose layout the VAE has there, diffusers' class's or Wan's; or that it is not read from there.
    single_file_vae: Literal["own", "wan", "beside"] = "own"
    # What single files of the type predict, where neither a key nor a shape says it.
    single_file_predicts: Literal["one_kind", "noise_or_velocity"] = "one_kind"
    # Entries of model_index.json that make the checkpoint another model, and which.
    other_settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    negative_embeds_only: bool = False  # whether its pipeline takes a negative prompt only as embeddings
    packages: tuple[str, ...] = ()  # that its pipeline needs and diffusers does not ask for
    unguided: bool = False  # whether its pipeline ignores the scale of guidance
    # Fields that differ where model_index.json has this entry or names this class, by its name.
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    puts_frames_back: bool = False  # whether given frames replace the latents of theirs after the last step
    other_classes: frozenset[str] = frozenset()  # of other types' checkpoints that it loads too
    single_file_inputs: int = 1  # of the denoiser's first layer, for each of its input channels
    single_file_tokenizer: str = "google/t5-v1_1-xxl"  # in the Hugging Face cache, if it is not CLIP's
    optional_parts: frozenset[str] = frozenset()  # components without which the type runs
    pipeline_defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def of_checkpoint(self, index: Mapping[str, Any]) -> ModelSpec:
        """The type as a checkpoint with this model_index.json has it."""
        for entry, changes in self.variants.items():
            given = index.get(entry)
            if index.get("_class_name") == entry or (given and given != [None, None]):
                return replace(self, **changes)
        return self

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that denoise, each for a part of the schedule; most checkpoints have one."""
        return (self.denoiser, *(self.tokens.further if self.tokens else ()))

    @property
    def guidance_branches(self) -> int:
        """How many guidance branches one step computes."""
        return 2 if self.tokens is None else self.tokens.branches

    @property
    def latent_layout(self) -> Layout | Literal["packed"]:
        """The layout of the pipeline's latents."""
        return "packed" if self.packed else self.unpacked_layout

    @property
    def latent_setting(self) -> str:
        """What its VAE's configuration calls the number of latent channels."""
        return self.channels_setting or ("latent_channels" if self.vae_kind == "image" else "z_dim")

    def latent_pixels(self, vae: Mapping[str, Any]) -> int:
        """Pixels a side of one latent, by the VAE's configuration."""
        if (told := vae.get(self.scale_setting or "")) is not None:
            return int(told)
        if self.vae_kind == "video":
            return self.video_scale
        return 2 ** (len(vae.get("block_out_channels") or (0,) * 4) - 1)

    @property
    def decodes_in_patches(self) -> bool:
        """Whether ranks can share its VAE's decoder in patches, and its weights."""
        return self.vae_kind == "image"

    @property
    def packed(self) -> bool:
        """Whether latents are tokens of 2 x 2 latents each."""
        return self.tokens is not None and self.tokens.packed

    @property
    def squares(self) -> bool:
        """Whether the pipeline gets such latents as squares that it packs itself."""
        return self.tokens is not None and self.tokens.squares

    @property
    def predicts_flow(self) -> bool:
        """Whether the denoiser predicts flow: noise less picture (rectified flow, arXiv 2209.03003)."""
        return self.tokens is not None and self.tokens.flow

    def start(self, kind: Kind, control: bool) -> Start | None:
        """diffusers' pipeline for this, with or without a ControlNet; None where it has none."""
        return next((s for s in self.starts if (s.kind, s.control) == (kind, control)), None)

    @property
    def most_pictures(self) -> int:
        """How many pictures to look at it takes, without a mask."""
        return max((start.most for start in self.starts), default=1)

    @property
    def image_pipeline(self) -> str:
        """The class whose `strength` is ours with `latent`."""
        found = (
            s for s in self.starts if not (s.kind == "fill" or s.control or s.frames or s.strength is None)
        )
        start = next(found, None)
        usual = "FluxImg2ImgPipeline" if self.predicts_flow else "StableDiffusionImg2ImgPipeline"
        return usual if start is None else start.pipeline

    @property
    def refers(self) -> bool:
        """Whether it was trained to look at pictures beside its prompt."""
        return any(start.refers for start in self.starts)

    @property
    def begins(self) -> bool:
        """Whether a picture is what its videos begin with."""
        return self.output == "video" and self.image in ("needed", "begins")

    @property
    def index_classes(self) -> frozenset[str]:
        """The classes that model_index.json of its checkpoints names."""
        fill = (start.pipeline for start in self.starts if start.kind == "fill")
        return self.other_classes.union({self.pipeline}, fill)

    def fill_channels(self, inputs: int) -> int | None:
        """The denoiser's input channels in checkpoints trained for inpainting; `inputs` are the others'.

        They also see the latents of the picture without what is masked, and the mask: of a UNet at the
        latents' size, else a channel for each of the 8 x 8 pixels of a latent.
        """
        if all(start.kind != "fill" for start in self.starts):
            return None
        return 2 * inputs + (4 * 64 if self.packed else 1)

    def latent_shape(self, channels: int, height: int, width: int, frames: int) -> tuple[int, ...]:
        """The shape of the latents of one picture or video; height and width in latents before packing."""
        frames = (frames - 1) // self.frames_factor + 1
        return {
            "nchw": (1, channels, height, width),
            "ncfhw": (1, channels, frames, height, width),
            "nfchw": (1, frames, channels, height, width),
            "tokens": (1, frames * height * width, channels),
            "packed": (1, (height // 2) * (width // 2), channels * 4),
        }[self.latent_layout]


@dataclass(frozen=True)
class Family:
    """The content of one file of this folder: its types, and how to recognise files of such models."""

    rows: tuple[ModelSpec, ...]
    files: tuple[FileKind, ...] = ()
    # Classes in model_index.json that share components with a type here but are another model.
    other_pipelines: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


BATCH_PIXELS = 4 * 512 * 512
"""For types with two guidance branches: smaller pictures leave a GPU idle, larger ones gain little."""

PROMPTS = frozenset({"positive", "negative", "prompt_syntax"})
EMBEDS = frozenset({"positive_embeds", "negative_embeds"})
CONTROL = frozenset({"control_image", "control_image_scale", "controlnet_scale"})
IP = frozenset({"ip_image", "ip_image_scale", "ip_adapter_scale"})
IMAGE = frozenset({"image", "image_scale"})
INPAINT = IMAGE | {"mask"}
SIZE = frozenset({"width", "height"})
SCHEDULE = frozenset({"sigmas", "timesteps"})
PARTIAL = frozenset({"strength", "denoise", "denoising_start", "denoising_end", "add_noise"})
VIDEO = frozenset({"frames", "decode_chunk_size", "fps"})
LORA = frozenset({"lora_scales"})
REFINER = frozenset({"refiner_start"})
RESCALE = frozenset({"guidance_rescale"})

SD_FIELDS = PROMPTS | EMBEDS | CONTROL | IP | SIZE | SCHEDULE | PARTIAL | LORA | {"clip_skip", "latent"}

# {types} stands for the types that do not refuse the flag; the registry fills it in.
NO_MOTION = {
    flag: "only AnimateDiff (type ad) has motion modules"
    for flag in ("motion_module", "motion_adapter", "motion_adapter_lora")
}
NO_GGUF = "diffusers has no GGUF loader for this denoiser; types with one: {types}"
NO_CONTROL = "this host has no ControlNet pipeline for it; types with one: {types}"
NO_IP = "diffusers has no IP-Adapter for it; types with one: {types}"
NO_EMBEDDINGS = (
    "textual inversion is for CLIP, and its prompts are not read by CLIP alone; types with it: {types}"
)
NO_COMPEL = "compel does not support its text encoders; types with it: {types}"
PROMPT_ONLY = NO_MOTION | {
    "control_net": NO_CONTROL,
    "ip_adapter": NO_IP,
    "compel": NO_COMPEL,
    "embeddings_dir": NO_EMBEDDINGS,
}
"""For types that read prompts with T5 or a language model, and have no adapters of pictures."""
