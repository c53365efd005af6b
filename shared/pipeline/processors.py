"""Processors that prepare pictures for vision-language models, without torchvision: Pillow does it then."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def picture_processor(folder: Path, name: str, tokenizer: Any = None) -> Any:
    """A processor of text and pictures. It has no part for videos, which transformers needs torchvision for.

    Args:
        folder: of the processor's files.
        name: its class in transformers.
        tokenizer: in place of the folder's.

    Raises:
        OSError, ValueError: files that are missing or broken.
    """
    import transformers

    cls = getattr(transformers, name)
    parts = [part for part in cls.get_attributes() if part != "video_processor"]
    # With the class's own name, as files and diffusers know it.
    own = {"get_attributes": classmethod(lambda _: parts), "__module__": cls.__module__}
    alone: Any = type(name, (cls,), own)
    if tokenizer is None:
        return alone.from_pretrained(folder, local_files_only=True)
    images = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return alone(image_processor=images, tokenizer=tokenizer)
