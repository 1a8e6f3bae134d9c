"""Writes an ONNX file: a graph is built node by node, then serialised. Source: onnx.proto3, protobuf's wire format.

Only what a transformer encoder needs. Weights are kept as they are given, packed 4-bit ones included.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FLOAT, INT32, INT64 = 1, 6, 7  # of TensorProto.DataType, as `Cast` takes them
TYPES = {"float32": FLOAT, "uint8": 2, "int8": 3, "int32": INT32, "int64": INT64, "float16": 10}
IR_VERSION, OPSET, CONTRIB = 8, 17, "com.microsoft"


class Input(NamedTuple):
    """An input or output of the graph; a name in `shape` stands for a size that is not known."""

    name: str
    type: int
    shape: tuple[str | int, ...]


class Graph:
    """`constant` and `node` give the name by which later nodes take their value."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []

    def constant(self, values: Array) -> str:
        name = f"constant_{len(self._constants)}"
        dims = b"".join(_number(1, size) for size in values.shape)
        raw = np.ascontiguousarray(values).tobytes()
        self._constants.append(dims + _number(2, TYPES[values.dtype.name]) + _bytes(8, name) + _bytes(9, raw))
        return name

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, "f4"))

    def node(self, operator: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """`inputs`: "" leaves an optional one out. `output`: its name, when another reads it by that."""
        output = output or f"{operator}_{len(self._nodes)}"
        said = b"".join(_bytes(1, one) for one in inputs) + _bytes(2, output) + _bytes(3, output) + _bytes(4, operator)
        said += b"".join(_bytes(5, _attribute(name, value)) for name, value in attributes.items()) + _bytes(7, domain)
        self._nodes.append(said)
        return output

    def serialise(self, name: str, inputs: Sequence[Input], outputs: Sequence[Input]) -> bytes:
        """-> a ModelProto."""
        graph = b"".join(_bytes(1, node) for node in self._nodes) + _bytes(2, name)
        graph += b"".join(_bytes(5, constant) for constant in self._constants)
        graph += b"".join(_bytes(11, _value(one)) for one in inputs)
        graph += b"".join(_bytes(12, _value(one)) for one in outputs)
        operators = [_bytes(1, "") + _number(2, OPSET), _bytes(1, CONTRIB) + _number(2, 1)]
        return _number(1, IR_VERSION) + _bytes(7, graph) + b"".join(_bytes(8, one) for one in operators)


def _value(one: Input) -> bytes:
    """-> a ValueInfoProto."""
    sizes = [_bytes(2, size) if isinstance(size, str) else _number(1, size) for size in one.shape]
    tensor = _number(1, one.type) + _bytes(2, b"".join(_bytes(1, size) for size in sizes))
    return _bytes(1, one.name) + _bytes(2, _bytes(1, tensor))


def _attribute(name: str, value: float | int | Sequence[int]) -> bytes:
    """-> an AttributeProto of type FLOAT, INT or INTS."""
    if isinstance(value, float):
        return _bytes(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)
    if isinstance(value, int):
        return _bytes(1, name) + _number(3, value) + _number(20, 2)
    return _bytes(1, name) + b"".join(_number(8, one) for one in value) + _number(20, 7)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return _varint(field << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    """Negative values as 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
