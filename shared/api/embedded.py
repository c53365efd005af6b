"""Texts inside picture files: written into PNG, JPEG and WebP, and read.

PNG has both as text chunks, `parameters` and `multigpu_diffusion`. JPEG and WebP have them in EXIF: the text
as UserComment, as A1111 writes it (through piexif); the body as ImageDescription, which takes ASCII, with
Software to tell whose it is. Imports no torch.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo, putchunk

from shared.api.codecs import IMAGE_INPUTS

KEY = "multigpu_diffusion"
PARAMETERS = "parameters"
_IHDR_END = 33  # bytes of a PNG's signature and its first chunk
_UNICODE = b"UNICODE\0"  # EXIF's name of the encoding, in front of a UserComment
_BROKEN_EXIF = (SyntaxError, struct.error, ValueError, TypeError, KeyError, OSError)


@dataclass(frozen=True)
class Metadata:
    """The two texts of one file."""

    parameters: str
    body: str  # JSON in ASCII

    def in_png(self, file: bytes) -> bytes:
        """A PNG with the texts before its pixels."""
        info, out = PngInfo(), io.BytesIO()
        for name, text in ((PARAMETERS, self.parameters), (KEY, self.body)):
            if text:
                info.add_text(name, text)
        out.write(file[:_IHDR_END])
        for kind, data, _ in info.chunks:
            putchunk(out, kind, data)
        out.write(memoryview(file)[_IHDR_END:])
        return out.getvalue()

    def exif(self) -> bytes:
        """The texts as EXIF with its head, big endian as piexif's: readers differ on the comment's order."""
        exif = Image.Exif()
        exif.endian = ">"
        if self.body:
            exif[Base.ImageDescription], exif[Base.Software] = self.body, KEY
        if self.parameters:
            comment = _UNICODE + self.parameters.encode("utf-16-be")
            exif.get_ifd(IFD.Exif)[Base.UserComment] = comment
        return exif.tobytes()


def read(file: bytes) -> tuple[str, dict[str, str]]:
    """A1111's infotext of a checked picture, "" where it has none, and the file's other texts by name."""
    with Image.open(io.BytesIO(file), formats=IMAGE_INPUTS) as image:
        if image.format == "PNG":
            image.load()  # its text chunks may follow its pixels
        items = {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}
        try:
            exif = image.getexif()
            comment, body = exif.get_ifd(IFD.Exif).get(Base.UserComment), exif.get(Base.ImageDescription)
            ours = exif.get(Base.Software) == KEY
        except _BROKEN_EXIF:
            comment, body, ours = None, None, False
    if ours and isinstance(body, str):
        items[KEY] = body
    info = items.pop(PARAMETERS, "")
    return _comment_text(comment) or info, items


def _comment_text(comment: Any) -> str:
    if not isinstance(comment, bytes):
        return comment if isinstance(comment, str) else ""
    if comment.startswith(_UNICODE):
        return comment[len(_UNICODE) :].decode("utf-16-be", "replace")
    for prefix in (b"ASCII\0\0\0", bytes(8)):
        comment = comment.removeprefix(prefix)
    return comment.decode("utf-8", "ignore").strip("\0")
