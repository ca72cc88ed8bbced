"""Reads the few opcodes that CIFAR's Python batches consist of; nothing in the file is ever executed.

A pickle is a program. Here it is listed by `pickletools`, and only opcodes that build numbers, texts, lists, tuples and
dictionaries are followed, and the one call that stands for an array of bytes; any other ends the reading.
"""

import pickletools
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

MAX_BYTES = 1 << 28

_ARRAY = "array"
_DTYPE = "dtype"
_NAMES = {
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy ndarray": "ndarray",
    "numpy dtype": _DTYPE,
    "_codecs encode": "encode",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}
_INTEGERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"})
_STRINGS = frozenset({"BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE"})
_VALUES = _INTEGERS | _STRINGS | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Mark:
    """Where a run of values on the stack begins."""


class _Name:
    """One of the allowed names."""

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning


class _Bytes:
    """An array to be: its shape and content come with the state that follows."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None


def read_plain_pickle(data: bytes) -> dict[str, Any]:
    """The dictionary in a pickle (protocols 1 to 4) of plain values and arrays of bytes, its keys as text.

    Raises:
        ValueError: More than 256 MiB, a damaged file, or anything else in it.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    try:
        value = _Reader().read(data)
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}, not a dictionary")
        return {_text(key): item.array if isinstance(item, _Bytes) else item for key, item in value.items()}
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged: {error}") from None


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._follow(opcode.name, argument)
        raise ValueError("no end")

    def _follow(self, opcode: str, argument: Any) -> None:
        if opcode in _VALUES:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if opcode == "MEMOIZE" else argument] = self.stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode in _TUPLES:
            self.stack[-_TUPLES[opcode] :] = [tuple(self.stack[-_TUPLES[opcode] :])]
        elif opcode not in ("PROTO", "FRAME"):
            self._build(opcode, argument)

    def _build(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "MARK":
                stack.append(_Mark())
            case "TUPLE":
                stack.append(tuple(self._run()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = self._run()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = self._run()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument if opcode == "GLOBAL" else " ".join(reversed([_text(stack.pop()), _text(stack.pop())]))
                if name not in _NAMES:
                    raise ValueError(f"it asks for '{name}', which no CIFAR file needs")
                stack.append(_Name(_NAMES[name]))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_call(name, arguments))
            case "BUILD":
                _fill(stack[-2], stack.pop())
            case _:
                raise ValueError(f"opcode {opcode}, which no CIFAR file needs")

    def _run(self) -> list[Any]:
        """The values above the last mark, taken off the stack with it."""
        start = len(self.stack) - 1
        while not isinstance(self.stack[start], _Mark):
            start -= 1
            if start < 0:
                raise ValueError("damaged: no mark")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values


def _call(name: _Name, arguments: tuple[Any, ...]) -> Any:
    """What the allowed names stand for when called."""
    if name.meaning == _ARRAY:
        return _Bytes()
    if name.meaning == _DTYPE:
        if _text(arguments[0]) not in ("u1", "|u1", "uint8"):
            raise ValueError(f"an array of '{_text(arguments[0])}', not of bytes")
        return _Name("bytes")
    if name.meaning == "encode":
        return arguments[0].encode("latin-1")
    raise ValueError(f"a call of {name.meaning}")


def _fill(target: Any, state: tuple[Any, ...]) -> None:
    """Give an array its shape and content; what a type of bytes says of itself is known."""
    if isinstance(target, _Bytes):
        _, shape, dtype, fortran, content = state
        raw = content.encode("latin-1") if isinstance(content, str) else bytes(content)
        if not isinstance(dtype, _Name) or dtype.meaning != "bytes" or fortran or prod(shape) != len(raw):
            raise ValueError("an array that is not plain bytes")
        target.array = np.frombuffer(raw, np.uint8).reshape(shape)
    elif not isinstance(target, _Name):
        raise ValueError("damaged: state for a plain value")


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
