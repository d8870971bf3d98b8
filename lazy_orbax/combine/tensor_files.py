"""The safetensors format: a header of JSON that says where each tensor lies, then the tensors.

The library of that name describes it (github.com/huggingface/safetensors). Its own writer wants all
tensors in memory, so the header is made here, and whoever has the tensors puts them in their place.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lazy_orbax.plan.boxes import Shape

INDEX = "model.safetensors.index.json"
_NAMES = {
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "bfloat16": "BF16",
    "complex64": "C64",
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
}
_METADATA = "__metadata__"
_ALIGNED = 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor.

    Attributes:
        name: what it is called.
        dtype: NumPy's dtype.
        shape: its shape.
        n_bytes: how many bytes it has.
    """

    name: str
    dtype: np.dtype
    shape: Shape
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A file of tensors.

    Attributes:
        name: of the file.
        header: what it begins with.
        offsets: where each tensor starts in the file, by name.
        n_bytes: size of the file.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    n_bytes: int


def refusal_of(name: str, dtype: np.dtype) -> str:
    """Returns why the format has no such tensor; nothing if it has."""
    if name == _METADATA:
        return "found a name that the format has for itself, wanted another; rename() it"
    if dtype.name not in _NAMES:
        return f"found {dtype}, which the format does not have; cast() it, or drop() it"
    return ""


def files_of(tensors: Sequence[Tensor], max_shard_bytes: int) -> tuple[TensorFile, ...]:
    """Divides tensors into files, in their order.

    Args:
        tensors: the tensors.
        max_shard_bytes: most bytes of tensors in a file, unless one alone has more.
    """
    shards: list[list[Tensor]] = [[]]
    n_bytes = 0
    for tensor in tensors:
        if shards[-1] and n_bytes + tensor.n_bytes > max_shard_bytes:
            shards.append([])
            n_bytes = 0
        shards[-1].append(tensor)
        n_bytes += tensor.n_bytes
    if len(shards) == 1:
        return (_file("model.safetensors", shards[0]),)
    n = len(shards)
    return tuple(
        _file(f"model-{i:05d}-of-{n:05d}.safetensors", shard) for i, shard in enumerate(shards, 1)
    )


def _file(name: str, tensors: Iterable[Tensor]) -> TensorFile:
    """Places the widest dtypes first: so each tensor starts where its elements are aligned."""
    # What readers ask for, whatever has written the file.
    fields: dict[str, object] = {_METADATA: {"format": "pt"}}
    starts, end = {}, 0
    for tensor in sorted(tensors, key=lambda one: (-one.dtype.itemsize, one.name)):
        starts[tensor.name], end = end, end + tensor.n_bytes
        fields[tensor.name] = {
            "dtype": _NAMES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    header = struct.pack("<Q", len(text)) + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return TensorFile(name, header, offsets, len(header) + end)


def index_of(files: Sequence[TensorFile], n_bytes: int) -> bytes | None:
    """Returns the file that says which tensor is in which file; `None` where there is one.

    Args:
        files: the files.
        n_bytes: of all tensors.
    """
    if len(files) == 1:
        return None
    places = {name: file.name for file in files for name in file.offsets}
    content = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(content, indent=2).encode()
