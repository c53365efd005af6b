"""JSON answers: the files in them become base64 while they are sent, a piece at a time."""

from __future__ import annotations

import secrets
from binascii import b2a_base64
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from flask import Response
from flask.json.provider import DefaultJSONProvider
from pydantic_core import PydanticSerializationError, to_json

from shared.api.replies import File

PIECE = 3 << 16  # bytes of a file; three make four characters, so only the last piece may be padded


class Json(DefaultJSONProvider):
    """JSON by pydantic's encoder, with files beside it.

    A picture of 3 MB would take 15 to 19 ms to become base64, a string and part of the JSON before the first
    byte could be sent. Base64 needs no escapes, and by pieces it is made while the client already reads.
    """

    sort_keys = False

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return b"".join(_pieces(*self._apart(obj))).decode()

    def response(self, *args: Any, **kwargs: Any) -> Response:
        texts, files = self._apart(self._prepare_response_obj(args, kwargs))
        response = Response(_pieces(texts, files), mimetype=self.mimetype)
        response.content_length = sum(map(len, texts)) + sum(4 * -(-len(file) // 3) for file in files)
        return response

    def _apart(self, obj: Any) -> tuple[list[bytes], list[bytes]]:
        """The JSON before, between and after the files in it, and the files."""
        files: list[bytes] = []
        mark = secrets.token_hex()

        def place(value: Any) -> Any:
            if not isinstance(value, File):
                return self.default(value)
            files.append(value.data)
            return mark

        try:
            text = to_json(obj, fallback=place)
        except PydanticSerializationError:  # half a surrogate pair, as in a path that is not UTF-8
            files.clear()
            text = super().dumps(obj, default=place).encode()
        return text.split(mark.encode()), files


def _pieces(texts: list[bytes], files: list[bytes]) -> Iterator[bytes]:
    for text, file in zip_longest(texts, files, fillvalue=b""):
        yield text
        for start in range(0, len(file), PIECE):
            yield b2a_base64(memoryview(file)[start : start + PIECE], newline=False)
