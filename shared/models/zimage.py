"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.files import FileKind
from shared.models.spec import (
    CONTROL,
    INPAINT,
    LORA,
    NO_COMPEL,
    NO_EMBEDDINGS,
    NO_IP,
    NO_MOTION,
    PARTIAL,
    PROMPTS,
    SIZE,
    Chat,
    Family,
    ModelSpec,
    Start,
    refusals,
)
from shared.models.tokens import Section, Site, TokenPlan

CONTROL_NET = TokenPlan(
    name="ZImageControlNetModel",
    title="Z-Image",
    blocks=("control_noise_refiner", "control_layers"),
    attention=("attention",),
    whole=True,
    heads="n_heads",
    capturable=False,  # it writes by a mask, which waits for the GPU
    output=None,
    flow=True,
)

TOKENS = TokenPlan(
    name="ZImageTransformer2DModel",
    title="Z-Image",
    blocks=("noise_refiner", "context_refiner", "layers"),
    attention=("attention",),
    sections=(
        Section("noise_refiner", positions=(2,)),
        Section("context_refiner", positions=(2,)),
        Section("layers", positions=(2,), end="all_final_layer.2-1"),
    ),
    positions=(Site("controlnet_block_samples", "argument"),),
    heads="n_heads",
    width="dim",
    side="all_patch_size",
    unguided=True,
    output=None,
    flow=True,
    left_out=(LeftOut("layers", ("x",), "x"),),
    control_net=CONTROL_NET,
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="zimage",
            text_tokens=512,
            joined_rows=("layers.*",),
            title="Z-Image",
            pipeline="ZImagePipeline",
            image="start",
            starts=(
                Start("ZImageImg2ImgPipeline", "image", 0.6),
                Start("ZImageInpaintPipeline", "inpaint", 1.0),
                Start(
                    "ZImageControlNetInpaintPipeline",
                    "inpaint",
                    None,
                    control=True,
                    ip_adapter=False,
                    control_inputs="control_in_dim",
                ),
            ),
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1024,
            height=1024,
            # As Turbo wants it; Z-Image itself 50 steps and 5.
            steps=9,
            cfg=1.0,
            cfg_offset=-1.0,
            size_multiple=16,
            text_encoders=("text_encoder",),
            encoder_names=("qwen3_4b",),
            tokenizers=("tokenizer",),
            sized_tokenizers=("tokenizer",),
            chat=Chat(MappingProxyType({"add_generation_prompt": True, "enable_thinking": True})),
            most_tokens=1024,
            kept=("all_final_layer*", "all_x_embedder*", "cap_embedder*", "t_embedder*"),
            own_names=MappingProxyType(
                {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder"}
            ),
            scheduler_family="flow_sigmas",
            control_net_class="ZImageControlNetModel",
            control_net_pipeline="ZImageControlNetPipeline",
            control_image_field="control_image",
            control_net_shares=True,
            one_control_net=True,
            single_file_config="zimage",
            single_file_inputs=4,
            single_file_tokenizer="Qwen/Qwen3-4B",
            single_file_encoders=MappingProxyType({"text_encoder": "text_encoders.qwen3_4b.transformer."}),
            fields=PROMPTS | CONTROL | SIZE | PARTIAL | LORA | INPAINT | {"sigmas", "latent"},
            refuses=refusals(
                NO_MOTION, {"ip_adapter": NO_IP, "compel": NO_COMPEL, "embeddings_dir": NO_EMBEDDINGS}
            ),
        ),
    ),
    files=(FileKind("Z-Image", "zimage", ("cap_pad_token",)),),
)
