"""A smaller ONNX file of the same graph, bit for bit: constants once, and as few bytes as their values need.

The exporter writes the index tables and distances of a fixed grid as constants, again wherever they occur, in wide
types. A runtime widens them once, when it loads the graph.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

WORTH = 512  # bytes; below, a node costs as much as it saves
TYPES = {
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
}


def without_ballast(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shrink a model in place, and return it; every output stays what it was."""
    graph = model.graph
    for node in graph.node:  # where each came from in Python
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.value_info[:]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    constants = _once(graph, constants)
    del graph.initializer[:]
    widening: list[NodeProto] = []
    for name, array in constants.items():
        narrow, nodes = _narrowed(name, array)
        graph.initializer.extend(numpy_helper.from_array(part, key) for key, part in narrow.items())
        widening += nodes
    computed = list(graph.node)
    del graph.node[:]
    graph.node.extend([*widening, *computed])
    return model


def _once(graph: onnx.GraphProto, constants: dict[str, NDArray]) -> dict[str, NDArray]:
    """Constants that are equal become one, in all nodes that read them."""
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    names = {name: first.setdefault((a.dtype.str, a.shape, a.tobytes()), name) for name, a in constants.items()}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return {name: constants[name] for name in first.values()}


def _narrowed(name: str, array: NDArray) -> tuple[dict[str, NDArray], list[NodeProto]]:
    """A constant in fewer bytes, and the nodes that make it what it was."""
    if array.nbytes < WORTH:
        return {name: array}, []
    if np.all(array == array.flat[0]):
        value, shape = f"{name}:value", f"{name}:shape"
        parts = {value: array.reshape(-1)[0], shape: np.array(array.shape)}
        return parts, [helper.make_node("Expand", [value, shape], [name])]
    if array.dtype not in TYPES:
        return {name: array}, []
    small = _smallest(array)
    if small is not None:
        return {f"{name}:small": small}, [helper.make_node("Cast", [f"{name}:small"], [name], to=TYPES[array.dtype])]
    values, places = np.unique(array, return_inverse=True)
    if len(values) > 256:
        return {name: array}, []
    parts = {f"{name}:values": values, f"{name}:places": places.reshape(array.shape).astype(np.uint8)}
    index = f"{name}:index"
    widen = helper.make_node("Cast", [f"{name}:places"], [index], to=TensorProto.INT32)
    return parts, [widen, helper.make_node("Gather", [f"{name}:values", index], [name])]


def _smallest(array: NDArray) -> NDArray | None:
    """The same numbers as small integers, or None where they are none."""
    for kind in (np.uint8, np.int16, np.int32):
        limits = np.iinfo(kind)
        if array.dtype.itemsize > np.dtype(kind).itemsize and limits.min <= array.min() and array.max() <= limits.max:
            small = array.astype(kind)
            if np.array_equal(small, array) and not np.signbit(array[array == 0]).any():
                return small
    return None
