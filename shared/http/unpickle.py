"""Reads pickles of PIL pictures and torch tensors without ever calling what they name.

This is no `pickle.Unpickler` with a list of forbidden things: it is a small interpreter that only builds
plain data. A global is a name to it, looked up in a fixed table; there is no attribute, no class, no import,
no code to run.
Imports no torch.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.api.codecs import MAX_IMAGE_PIXELS

MAX_OPCODES = 20_000  # a picture or a tensor takes some hundred
MAX_BYTES = 256 << 20  # that one pickle may grow to; references may name the same bytes many times
# Storage class -> (safetensors' name, bytes of an element).
STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
}
MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"})


class ForbiddenPickleError(ValueError):
    """The pickle holds something else than a picture or a tensor."""


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Picture:
    """State of a PIL image: [info, mode, size, palette, pixels, ...]."""

    state: Any = None

    def png(self) -> bytes:
        """The picture as PNG. Raises ForbiddenPickleError."""
        from PIL import Image

        match self.state:
            case [_, str(mode), (int(width), int(height)), palette, bytes(pixels), *_] if mode in MODES:
                pass
            case _:
                raise ForbiddenPickleError("is not a picture that PIL could have pickled")
        if width < 1 or height < 1 or width * height > MAX_IMAGE_PIXELS:
            raise ForbiddenPickleError(f"has {width}x{height} pixels")
        try:
            image = Image.frombytes(mode, (width, height), pixels)
            if mode == "P" and palette:
                image.putpalette(bytes(palette))
            out = io.BytesIO()
            image.convert("RGBA" if mode in ("LA", "RGBA") else "RGB").save(out, "PNG", compress_level=1)
        except (ValueError, TypeError) as error:
            raise ForbiddenPickleError(f"is a broken picture ({error})") from None
        return out.getvalue()


@dataclass
class Tensor:
    """A dense tensor: `dtype` in safetensors' words, `data` its elements in order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class _Storage:
    dtype: str
    item: int
    data: bytes


class _Inert:
    """Something harmless inside a picture's `info`, which nobody reads."""


def unpickle(data: bytes) -> Any:
    """Plain data with `Picture` and `Tensor` where the pickle has them.

    Raises:
        ForbiddenPickleError: it names anything else, or is no pickle.
    """
    stream = io.BytesIO(data)
    return _Machine().run(stream)


_PICTURE_MODULES = re.compile(r"PIL\.(Image|\w+ImagePlugin)")
_INERT = frozenset({"PIL.TiffImagePlugin.IFDRational", "PIL.PngImagePlugin.iTXt", "fractions.Fraction"})
_RECONSTRUCTORS = frozenset({"copyreg._reconstructor", "copy_reg._reconstructor"})
_OBJECTS = frozenset({"builtins.object", "__builtin__.object"})
_CALLS = frozenset(
    {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage._load_from_bytes",
        "collections.OrderedDict",
        "_codecs.encode",
    }
)


def _is_picture(name: _Global) -> bool:
    return bool(_PICTURE_MODULES.fullmatch(name.module)) and (
        name.name == "Image" or re.fullmatch(r"\w+ImageFile", name.name) is not None
    )


_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_CONSTANTS = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


@dataclass
class _Machine:
    """The pickle machine: a stack and a memo. `storages` admits the names that torch.save writes."""

    storages: bool = False
    left: int = MAX_BYTES
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, stream: io.BytesIO) -> Any:
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                count += 1
                if count > MAX_OPCODES:
                    raise ForbiddenPickleError(f"has more than {MAX_OPCODES} opcodes")
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except ForbiddenPickleError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError) as error:
            raise ForbiddenPickleError(f"is not a valid pickle ({type(error).__name__})") from None
        raise ForbiddenPickleError("is an incomplete pickle")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ForbiddenPickleError("is not a valid pickle (a mark where a value must be)")
        return value

    def pop_to_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ForbiddenPickleError("is not a valid pickle (a mark is missing)")
        values = self.stack[position + 1 :]
        del self.stack[position:]
        return values

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("LIST", "TUPLE"):
            values = self.pop_to_mark()
            stack.append(values if name == "LIST" else tuple(values))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            values = [self.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(values)))
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            self.top(list).extend(values)
        elif name == "DICT":
            stack.append(self.pairs(self.pop_to_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark()
            self.top(dict).update(self.pairs(values))
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(self.admit(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(self.admit(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self.pop(), self.pop()
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            state = self.pop()
            if isinstance(stack[-1], Picture) and stack[-1].state is None:
                stack[-1].state = state
            elif not isinstance(stack[-1], _Inert):
                raise ForbiddenPickleError("sets the state of something that is not a picture")
        elif name == "BINPERSID" and self.storages:
            stack.append(("persistent", self.pop()))
        else:
            raise ForbiddenPickleError(f"has the opcode {name}, which neither a picture nor a tensor needs")

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ForbiddenPickleError(f"is not a valid pickle (a {kind.__name__} is missing)")
        return self.stack[-1]

    @staticmethod
    def pairs(values: list[Any]) -> dict[Any, Any]:
        keys = values[::2]
        # Other keys could be nested so deep that hashing them overflows the C stack.
        if len(values) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise ForbiddenPickleError("has a dictionary with keys that are neither text nor numbers")
        return dict(zip(keys, values[1::2], strict=True))

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ForbiddenPickleError(f"grows to more than {MAX_BYTES >> 20} MiB")

    def admit(self, module: Any, name: Any) -> _Global:
        found = _Global(module, name) if isinstance(module, str) and isinstance(name, str) else None
        text = str(found)
        if found is not None and (
            _is_picture(found)
            or text in _CALLS | _INERT | _RECONSTRUCTORS | _OBJECTS
            or (self.storages and module == "torch" and name in STORAGES)
        ):
            return found
        raise ForbiddenPickleError(f"names {text[:100]}; only PIL pictures and torch tensors are admitted")

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise ForbiddenPickleError("calls something that is not a name")
        name = str(function)
        if name in _RECONSTRUCTORS:
            cls, base, state = arguments
            if isinstance(cls, _Global) and str(base) in _OBJECTS and state is None:
                return self.call(cls, ())
        elif _is_picture(function) and not arguments:
            return Picture()
        elif name in _INERT:
            return _Inert()
        elif name == "_codecs.encode" and arguments[1:] == ("latin1",) and isinstance(arguments[0], str):
            self.spend(len(arguments[0]))
            return arguments[0].encode("latin1")
        elif name == "collections.OrderedDict" and not arguments:
            return {}
        elif name == "torch.storage._load_from_bytes" and len(arguments) == 1:
            self.spend(len(arguments[0]))
            return _storage(arguments[0])
        elif name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], Tensor):
            return arguments[0]
        elif name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            if isinstance(storage, _Storage) and all(type(n) is int and n >= 0 for n in shape):
                self.spend(math.prod(shape) * storage.item)
                return _tensor(storage, offset, shape, strides)
        raise ForbiddenPickleError(f"calls {name} as neither a picture nor a tensor does")


def _storage(data: Any) -> _Storage:
    """One storage as torch.save writes it in its old format: five pickles, then the elements."""
    if not isinstance(data, bytes):
        raise ForbiddenPickleError("has a tensor without bytes")
    stream = io.BytesIO(data)
    _, _, system, stored, keys = (_Machine(storages=True).run(stream) for _ in range(5))
    match stored, keys:
        case ("persistent", ("storage", _Global("torch", kind), str(key), str(), int(count), None)), [
            str(listed)
        ] if key == listed:
            dtype, item = STORAGES[kind]
        case _:
            raise ForbiddenPickleError("has a tensor whose storage torch did not write")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ForbiddenPickleError("has a tensor of a big-endian machine")
    length = int.from_bytes(stream.read(8), "little")
    elements = stream.read()
    if length != count or len(elements) != count * item:
        raise ForbiddenPickleError("has a tensor that is cut off")
    return _Storage(dtype, item, elements)


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
    """A view of a storage, made contiguous."""
    sizes = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(size) is not int or not 0 <= size < 2**40 for size in sizes):
        raise ForbiddenPickleError("has a tensor whose shape is wrong")
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if count and last >= len(storage.data) // storage.item:
        raise ForbiddenPickleError("has a tensor that is larger than its storage")
    if not count:
        return Tensor(storage.dtype, tuple(shape), b"")
    flat = np.frombuffer(storage.data, dtype=f"u{storage.item}")[offset:]
    view = np.lib.stride_tricks.as_strided(flat, shape, [stride * storage.item for stride in strides])
    return Tensor(storage.dtype, tuple(shape), view.tobytes())
