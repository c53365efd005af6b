"""FLUX.1 Kontext: FLUX.1, trained to look at a picture beside the prompt that says what to change in it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models import flux
from shared.models.spec import NO_CONTROL, Family, Start, refusals

(_FLUX,) = flux.FAMILY.rows

FAMILY = Family(
    rows=(
        replace(
            _FLUX,
            name="kontext",
            title="FLUX.1 Kontext",
            pipeline="FluxKontextPipeline",
            starts=(
                Start("FluxKontextPipeline", "image", None, aspects=(672 / 1568, 1568 / 672)),
                # Else it would make a picture of one of Kontext's own sizes, whatever was asked for.
                Start(
                    "FluxKontextInpaintPipeline",
                    "inpaint",
                    1.0,
                    arguments=MappingProxyType({"_auto_resize": False}),
                ),
            ),
            tokens=replace(flux.TOKENS, stages=None, control_net=None),
            area_field="max_area",
            edit_pixels=1024 * 1024,
            scheduler_family="flow_sigmas",
            cfg=2.5,
            fields=_FLUX.fields - {"control_image", "control_image_scale", "controlnet_scale"},
            control_net_class=None,
            control_net_pipeline=None,
            refuses=refusals(_FLUX.refuses, {"control_net": NO_CONTROL}),
        ),
    ),
)
