"""Tiny random checkpoints of every model type, made on first use and kept in a cache folder.

    pipe = tiny.load("sdxl")                        # a fresh diffusers pipeline, fp32, CPU, quiet
    picture = tiny.run(pipe, "sdxl", steps=4)       # float array, images or frames first

Weights are random but seeded, nothing is fetched, a checkpoint is 1 to 11 MB. UNets have two levels of two
layers, transformers four or more blocks of four heads: enough to cut in four. Default size: 64 x 64 pixels
(latents 8 x 8). LoRAs, ControlNets and the like: `tiny_extras`; single files and GGUF: `tiny_original`.
"""

from __future__ import annotations

import copy
import functools
import getpass
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from shared.backends import BACKENDS
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.pipeline import engine
from shared.pipeline.loading import load_pipeline
from shared.pipeline.processors import picture_processor
from shared.ranks.groups import World

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
BOS_ID, EOS_ID = 512, 513
# The sizes to which Kontext and Qwen-Image-Edit bring what they look at, but of sixteenths of the sides, for
# short tests.
pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [
    (width // 16, height // 16) for width, height in pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
]
for pipeline in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
    pipeline.calculate_dimensions = functools.partial(
        lambda usual, area, aspect: usual(area / 16**2, aspect), pipeline.calculate_dimensions
    )
# Of the tokens of a picture, which are many and masked where there is none; attention over 729 takes long.
diffusers.HunyuanVideo15Pipeline.vision_num_semantic_tokens = property(lambda self: 16, lambda *_: None)
# Each change of a LoRA looks through all that was imported for garbage: a second, of each rank.
engine.freeze_heap = lambda: None
ASCII = [chr(code) for code in range(33, 127)]
PIXELS = 64


@functools.cache
def _key() -> str:
    """Of the text of tests/tiny*.py and the library versions: a change there makes new files."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("tiny*.py")))
    versions = "".join(version(package) for package in ("torch", "diffusers", "transformers"))
    return hashlib.sha256(text + versions.encode()).hexdigest()[:12]


def cached(name: str, make: Callable[[Path], None], suffix: str = "") -> Path:
    """The path `<cache>/<name><suffix>`, filled by `make(path)` when it is not there yet.

    Several processes may ask at once: each builds aside, the first to rename wins.
    """
    root = Path(os.environ.get("TINY_CACHE") or tempfile.gettempdir()) / f"tiny-{getpass.getuser()}-{_key()}"
    target = root / f"{name}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=root))
        try:
            # transformers writes nothing on ranks other than 0, and here any rank may be the first.
            with mock.patch("torch.distributed.is_initialized", return_value=False):
                make(aside / target.name)
            os.rename(aside / target.name, target)
        except OSError:
            if not target.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def seeded(seed: int, make: Callable[[], torch.nn.Module]) -> Any:
    """`make()` with its random initialisation fixed and the global random state left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def byte_letters() -> list[str]:
    """The letters that stand for bytes in byte-level tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def clip_tokenizer(pad: str = EOS) -> Any:
    """Byte-level CLIP tokenizer without merges: one token a byte, the last of a word with `</w>`."""
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), BOS, EOS]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], pad_token=pad, model_max_length=77
    )


def t5_tokenizer(length: int = 512) -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in ASCII)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def bert_tokenizer() -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ASCII, *("##" + c for c in ASCII)]
    return transformers.BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}, model_max_length=77)


def clip_text(width: int = 32, projection: int | None = None, act: str = "quick_gelu", seed: int = 1) -> Any:
    # eos_token_id must be the tokenizer's own: the pooled output is read at its first position.
    config = transformers.CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=projection or width, hidden_act=act,
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(seed, lambda: cls(config))


def t5_text(width: int = 32, kind: str = "T5", seed: int = 2) -> Any:
    """`kind` is T5 or UMT5."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return seeded(seed, lambda: getattr(transformers, f"{kind}EncoderModel")(config))


def clip_vision(image: int = 32, patch: int = 8) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=3, num_attention_heads=4,
        image_size=image, patch_size=patch,
    )  # fmt: skip
    return seeded(3, lambda: transformers.CLIPVisionModelWithProjection(config))


def image_processor(size: int = 32) -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


def vae(
    latent: int = 4, levels: int = 4, scaling: float = 0.18215, shift: float | None = None, seed: int = 4
) -> Any:
    """`levels` 4 makes latents an eighth of the picture. With a shift there are no quantization layers."""
    return seeded(
        seed,
        lambda: diffusers.AutoencoderKL(
            latent_channels=latent, block_out_channels=(8, *[16] * (levels - 1)), norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1, sample_size=PIXELS, scaling_factor=scaling, shift_factor=shift,
            use_quant_conv=shift is None, use_post_quant_conv=shift is None,
        ),
    )  # fmt: skip


def video_vae(kind: str, seed: int) -> Any:
    """AutoencoderKLWan or AutoencoderKLQwenImage; latents are an eighth of the picture."""
    channels = 4
    # Single files of Qwen-Image's are read in the shape that the published one has.
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2} if "Qwen" in kind else {}
    return seeded(seed, lambda: getattr(diffusers, kind)(
        base_dim=8, z_dim=channels, **({"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1} | shape),
        temperal_downsample=[False, True, True], latents_mean=[0.1 * (i - 1) for i in range(channels)],
        latents_std=[1.5 + 0.25 * i for i in range(channels)],
    ))  # fmt: skip


def unet(seed: int = 5, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64),
        "layers_per_block": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
        "attention_head_dim": 4, "norm_num_groups": 8,
    }  # fmt: skip
    return seeded(seed, lambda: diffusers.UNet2DConditionModel(**(settings | changes)))


def v_ddim() -> Any:
    return diffusers.DDIMScheduler(
        prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1, clip_sample=False, **BETAS
    )


def sd1_parts() -> dict[str, Any]:
    return {"vae": vae(), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "unet": unet(),
            "feature_extractor": image_processor(), "image_encoder": None}  # fmt: skip


def make_sd1() -> Any:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    return diffusers.StableDiffusionPipeline(
        **sd1_parts(), scheduler=scheduler, safety_checker=None, requires_safety_checker=False
    )


def make_sd2() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(act="gelu"), tokenizer=clip_tokenizer("!"), scheduler=v_ddim(),
        unet=unet(attention_head_dim=[4, 8], use_linear_projection=True), safety_checker=None,
        feature_extractor=image_processor(), image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip


def make_sdxl() -> Any:
    # The loader of single files tells the two text encoders apart by width, so the second one is wider.
    denoiser = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32 + 64,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=[2, 4],
        use_linear_projection=True, transformer_layers_per_block=[1, 2], addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 64,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling=0.13025), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=denoiser,
        text_encoder_2=clip_text(64, projection=64, act="gelu"), tokenizer_2=clip_tokenizer("!"),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **BETAS),
        image_encoder=None, feature_extractor=image_processor(), add_watermarker=False,
    )  # fmt: skip


def make_sd3() -> Any:
    # joint_attention_dim is T5's width; the CLIP widths add up to at most that, the projections to pooled.
    # Single files hold no projection for the first encoder: it is the identity, as in the real model.
    first = clip_text(projection=32)
    torch.nn.init.eye_(first.text_projection.weight)
    denoiser = seeded(6, lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=96, pooled_projection_dim=96,
        pos_embed_max_size=32,
    ))  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=denoiser, vae=vae(16, scaling=1.5305, shift=0.0609),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=first, tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(64, projection=64, act="gelu", seed=21), tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5_text(96), tokenizer_3=t5_tokenizer(), image_encoder=None, feature_extractor=None,
    )  # fmt: skip


def make_sdup() -> Any:
    denoiser = unet(
        in_channels=7, num_class_embeds=1000, use_linear_projection=True, only_cross_attention=(True, False)
    )
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae(levels=3, scaling=0.08333), text_encoder=clip_text(act="gelu"), tokenizer=clip_tokenizer("!"),
        unet=denoiser, low_res_scheduler=diffusers.DDPMScheduler(**BETAS), scheduler=v_ddim(),
        safety_checker=None, feature_extractor=None, watermarker=None, max_noise_level=350,
    )  # fmt: skip


def make_svd() -> Any:
    # Group norm has 32 groups here whatever is asked, so every width is a multiple of 32.
    denoiser = seeded(7, lambda: diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=(4, 4), addition_time_embed_dim=32, projection_class_embeddings_input_dim=96,
        num_frames=4,
    ))  # fmt: skip
    decoder = seeded(4, lambda: diffusers.AutoencoderKLTemporalDecoder(
        latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1, sample_size=PIXELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
    ))  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        vae=decoder, image_encoder=clip_vision(224, 32), unet=denoiser,
        feature_extractor=image_processor(224),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_spacing="leading", timestep_type="continuous",
            steps_offset=1, use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, **BETAS,
        ),
    )  # fmt: skip


def motion_adapter(seed: int = 8) -> Any:
    return seeded(seed, lambda: diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=2, motion_norm_num_groups=8,
        motion_num_attention_heads=4, motion_max_seq_length=32, use_motion_mid_block=True,
    ))  # fmt: skip


def make_ad() -> Any:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    return diffusers.AnimateDiffPipeline(**sd1_parts(), motion_adapter=motion_adapter(), scheduler=scheduler)


def make_flux() -> Any:
    # The three rotary widths add up to the head width; in_channels is four times the VAE's latent channels.
    denoiser = seeded(9, lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ))  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(4, scaling=0.3611, shift=0.1159), text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(), transformer=denoiser, image_encoder=None,
        feature_extractor=None,
    )  # fmt: skip


def make_kontext() -> Any:
    parts = make_flux().components
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.FluxKontextPipeline(**parts)


def make_chroma() -> Any:
    # As FLUX's; approximator_num_channels is four times the 16 that its timestep embeddings have.
    denoiser = seeded(14, lambda: diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=64,
        approximator_hidden_dim=32, approximator_layers=2,
    ))  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True),
        vae=vae(4, scaling=0.3611, shift=0.1159), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        transformer=denoiser, image_encoder=None, feature_extractor=None,
    )  # fmt: skip


def make_hy() -> Any:
    bert = seeded(10, lambda: transformers.BertModel(transformers.BertConfig(
        vocab_size=5 + 2 * len(ASCII), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=77,
    )))  # fmt: skip
    # The number of layers is even and at least 4: the second half pops what the first half pushed.
    denoiser = seeded(11, lambda: diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=8, patch_size=2, attention_head_dim=8, num_attention_heads=4, mlp_ratio=2.0,
        in_channels=4, hidden_size=32, activation_fn="gelu-approximate", cross_attention_dim=32,
        cross_attention_dim_t5=32, pooled_projection_dim=32, text_len=77, text_len_t5=256,
        use_style_cond_and_image_meta_size=False,
    ))  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        vae=vae(scaling=0.13025), text_encoder=bert, tokenizer=bert_tokenizer(), transformer=denoiser,
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(256), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction",
            steps_offset=1,
        ),
    )  # fmt: skip


def make_pixart(pipeline: Any, tokens: int, seed: int) -> Any:
    denoiser = seeded(seed, lambda: diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, cross_attention_dim=32, caption_channels=32, attention_bias=True,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=False,
    ))  # fmt: skip
    return pipeline(
        tokenizer=t5_tokenizer(tokens), text_encoder=t5_text(), vae=vae(scaling=0.13025),
        transformer=denoiser, scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def make_qwen() -> Any:
    from tests import tiny_qwen  # which builds on this file

    return tiny_qwen.make_qwen()


def make_qwenedit() -> Any:
    from tests import tiny_qwen

    return tiny_qwen.make_qwenedit()


def make_zimage() -> Any:
    from tests import tiny_qwen

    return tiny_qwen.make_zimage()


def make_flux2() -> Any:
    from tests import tiny_flux2

    return tiny_flux2.make_flux2()


def make_wan() -> Any:
    from tests import tiny_wan

    return tiny_wan.make_wan()


def make_hv15() -> Any:
    from tests import tiny_hv15

    return tiny_hv15.make_hv15()


def make_wani2v() -> Any:
    from tests import tiny_wan

    return tiny_wan.make_wani2v()


def make_ltx2() -> Any:
    from tests import tiny_ltx2

    return tiny_ltx2.make_ltx2()


BUILDERS: dict[str, Callable[[], Any]] = {
    "ad": make_ad, "sd1": make_sd1, "sd2": make_sd2, "sdxl": make_sdxl, "sd3": make_sd3, "sdup": make_sdup,
    "svd": make_svd, "flux": make_flux, "kontext": make_kontext, "flux2": make_flux2, "chroma": make_chroma,
    "hy": make_hy, "qwen": make_qwen, "qwenedit": make_qwenedit, "wan": make_wan, "wani2v": make_wani2v,
    "hv15": make_hv15, "zimage": make_zimage, "ltx2": make_ltx2,
    "pixa": lambda: make_pixart(diffusers.PixArtAlphaPipeline, 120, 12),
    "pixs": lambda: make_pixart(diffusers.PixArtSigmaPipeline, 300, 13),
}  # fmt: skip


def checkpoint(name: str) -> Path:
    """The diffusers folder of type `name`, fp32."""
    return cached(name, lambda path: BUILDERS[name]().save_pretrained(path))


def load(name: str, **components: Any) -> Any:
    """A fresh pipeline of type `name`: CPU, fp32, no progress bar. A copy takes half as long as the files."""
    return from_files(name, **components) if components else copy.deepcopy(_kept(name))


@functools.cache
def _kept(name: str) -> Any:
    return from_files(name)


def from_files(name: str, **components: Any) -> Any:
    """As `load`, but from its folder: compel mistakes tokenizers that were copied."""
    folder = checkpoint(name)
    parts = own_parts(name, folder) | components
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_parts(name: str, folder: Path) -> dict[str, Any]:
    """What diffusers does not load without torchvision."""
    part = MODELS[name].picture_processor
    return {} if part is None else {part: picture_processor(folder / part, "Qwen2VLProcessor")}


def world(device: str = "cpu") -> World:
    """One rank alone, without process groups."""
    groups: Any = (None, None, None)
    return World(0, 1, 0, torch.device(device), *groups)


_kept_here = tempfile.TemporaryDirectory(prefix="kept-", ignore_cleanup_errors=True)


def config(name: str, **flags: Any) -> HostConfig:
    """A launch of the tiny checkpoint of this type, on the first host that serves it."""
    backend = next(key for key, spec in BACKENDS.items() if name in spec.types)
    files = {"checkpoint": str(checkpoint(name)), "cache_dir": _kept_here.name}
    return HostConfig(backend=backend, type=name, **(files | flags))


def host(name: str, **flags: Any) -> Any:
    """The pipeline that a host loads for these flags, on the CPU."""
    launch = config(name, **flags)
    needs = BACKENDS[launch.backend].needs(launch, 1)
    return load_pipeline(MODELS[name], launch, torch.device("cpu"), needs, quiet=True)


def picture(size: int = PIXELS, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture, the same for the same seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def call_args(
    name: str, steps: int = 2, seed: int = 0, size: int = PIXELS, frames: int = 4
) -> dict[str, Any]:
    """Arguments for `pipe(**call_args(...))`. `size` is that of the output (svd, ad: of each frame)."""
    args: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
    }
    if name != "svd":
        args |= {"prompt": "a small red cat", "guidance_scale": 5.0}
    if name == "sdup":
        args |= {"image": picture(size // 4)}
    else:
        args |= {"height": size, "width": size}
    if name == "svd":
        args |= {"decode_chunk_size": 2}
    if name in ("svd", "wani2v", "qwenedit"):
        args |= {"image": picture(size)}
    if name in ("svd", "ad"):
        args |= {"num_frames": frames}
    if name == "hv15":
        del args["guidance_scale"]
    if name in ("wan", "wani2v", "hv15"):
        args |= {"num_frames": frames + 1}
    if name == "ltx2":
        args |= {"num_frames": 2 * frames + 1, "frame_rate": 24.0, "max_sequence_length": 32}
    if name in ("qwen", "qwenedit"):
        args |= {"negative_prompt": " ", "true_cfg_scale": args.pop("guidance_scale")}
    if name in ("hy", "pixa", "pixs"):
        args |= {"use_resolution_binning": False}
    if name in ("pixa", "pixs"):
        args |= {"clean_caption": False}
    if name == "kontext":
        args |= {"image": picture(size), "max_area": size * size}
    if name == "flux2":
        args |= {"max_sequence_length": 64}
    if name in ("sd3", "flux", "kontext", "chroma"):
        args |= {"max_sequence_length": 32}
    return args


def run(pipe: Any, name: str, **changes: Any) -> np.ndarray:
    """One call of `pipe`; `changes` go to `call_args` where it knows them, else to the pipeline.

    Returns float32 in 0..1 of shape [1, height, width, 3], or [1, frames, height, width, 3] for videos.
    """
    known = {key: changes.pop(key) for key in ("steps", "seed", "size", "frames") if key in changes}
    result = pipe(**(call_args(name, **known) | changes))
    return np.asarray(result.images if hasattr(result, "images") else result.frames)
