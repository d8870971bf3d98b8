"""What a save puts on disk, asked of Orbax's own builders once, when the plan is made.

Everything is kept for a stand-in of the directory; a save only puts its own directory there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorstore as ts

from lazy_orbax import _paths
from lazy_orbax._orbax import multihost, on_disk
from lazy_orbax._orbax.records import Settings, TreeInfo
from lazy_orbax._orbax.symbols import ocp
from lazy_orbax.errors import TreeError, summarize
from lazy_orbax.integrity import digest_file
from lazy_orbax.plan.shards import Leaf
from lazy_orbax.plan.slabs import Plan

_RESERVED = (
    _paths.TREE,
    _paths.SHARDINGS,
    _paths.STRINGS,
    _paths.ARRAY_METADATAS,
    digest_file.DIRECTORY,
)
# Orbax wants one B-tree node for a whole checkpoint, for fast reading. That holds for the tree that
# readers see, which it merges at the end. In the tree that a process writes, slab by slab, every
# flush would write that one node again: time and bytes would grow with the square of the leaves.
# Unless type handlers of the user's write into the same tree: all who do must say the same.
_NODE_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """How one leaf is stored.

    Attributes:
        kvstore: index into `Format.kvstores`.
        prefix: its path in that key-value store, with a slash at the end.
        spec: TensorStore's spec, complete but for the key-value store.
        cast_from: the dtype of the pieces where it is not the dtype on disk, else `None`.
        metadata_key: name of its Zarr metadata file.
        metadata: content of that file.
    """

    kvstore: int
    prefix: str
    spec: ts.Spec
    cast_from: str | None
    metadata_key: str
    metadata: bytes


@dataclasses.dataclass(frozen=True)
class Format:
    """What a save puts on disk.

    Attributes:
        leaves: one for each leaf of the plan.
        kvstores: JSON specs of the key-value stores that hold them.
        directory: JSON spec of the item's directory.
        files: small files beside the arrays that this process writes, by name.
        tree_metadata: content of `_METADATA`, or `None` where another process writes it.
        is_primary: whether this process writes what is written once.
        digests: what the digests of all its saves have in common.
    """

    leaves: tuple[StoredLeaf, ...]
    kvstores: tuple[str, ...]
    directory: str
    files: dict[str, bytes]
    tree_metadata: dict[str, Any] | None
    is_primary: bool
    digests: digest_file.DigestTemplate

    @functools.cached_property
    def own_directories(self) -> tuple[str, ...]:
        """Names of the directories in the item's that only this process writes to."""
        pattern = rf"{re.escape(_paths.PROCESS_DIRECTORY)}[^/\"]*"
        return tuple(re.findall(pattern, " ".join(self.kvstores)))

    @functools.cached_property
    def _tree_metadata_bytes(self) -> bytes:
        return json.dumps(self.tree_metadata).encode()

    def metadata_files(self, custom_metadata: Any) -> dict[str, bytes]:
        """Returns every small file of a save."""
        if self.tree_metadata is None:
            return self.files
        content = self._tree_metadata_bytes
        if custom_metadata is not None:
            tree = {**self.tree_metadata, "custom_metadata": custom_metadata}
            content = json.dumps(tree).encode()
        return {**self.files, _paths.TREE: content}


def make_format(
    settings: Settings,
    tree: TreeInfo,
    plan: Plan,
    key_metadata: dict[int, dict[str, str]],
) -> Format:
    """Asks Orbax how the leaves of a plan are stored.

    Args:
        settings: how the handler saves.
        tree: Orbax's view of the whole tree.
        plan: the plan.
        key_metadata: by position, what is stored beside the data of a typed PRNG key.

    Raises:
        TreeError: some leaf cannot be stored.
    """
    stored: list[StoredLeaf] = []
    array_metadatas, write_shapes, problems = [], {}, []
    specs, parts = on_disk.ArraySpecs(), _Stored(tree.directory)
    leaves = plan.leaves
    for leaf, layout in zip(leaves, plan.layouts, strict=True):
        info = tree.leaves[leaf.position]
        try:
            spec, metadata = specs.of(
                info,
                shape=leaf.shape,
                write_shape=layout.write_shape,
                dtype=leaf.dtype,
                sharding=leaf.sharding,
                ext_metadata=key_metadata.get(leaf.position),
            )
            stored.append(parts.of(leaf.name, spec))
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            remedy = "; save it as another dtype" if "Unsupported data type" in str(error) else ""
            problems.append(f"{leaf.keypath}: {leaf.dtype}{list(leaf.shape)}: {error}{remedy}")
            continue
        if leaf.sharding is not None:
            array_metadatas.append(metadata)
            if on_disk.stores_array_metadata(info.type_handler):
                write_shapes[leaf.name] = metadata.write_shape
    if problems:
        raise TreeError(f"These leaves cannot be stored:{summarize(problems)}")
    primary_host = settings.primary_host
    is_primary = multihost.is_primary_host(primary_host)
    kvstores = parts.kvstores
    return Format(
        tuple(stored),
        tuple(kvstores if _is_shared(tree) else map(_with_small_nodes, kvstores)),
        json.dumps(on_disk.directory_kvstore_spec(tree.directory)),
        _small_files(tree, leaves, array_metadatas, is_primary),
        on_disk.tree_metadata(settings, tree, write_shapes) if is_primary else None,
        is_primary,
        _digest_template(tree, plan, stored, primary_host),
    )


def _digest_template(
    tree: TreeInfo, plan: Plan, stored: Sequence[StoredLeaf], primary_host: int | None
) -> digest_file.DigestTemplate:
    process = multihost.process_index()
    mine = {leaf.position for leaf in plan.leaves}
    others = [
        leaf.name
        for position, leaf in enumerate(tree.leaves)
        if position not in mine and not leaf.info.skip_deserialize
    ]
    return digest_file.DigestTemplate(
        plan,
        tuple(str(getattr(leaf.spec.dtype, "name", "")) for leaf in stored),
        use_ocdbt=any(leaf.info.is_ocdbt_checkpoint for leaf in tree.leaves),
        driver=stored[0].spec.to_json()["driver"] if stored else "zarr",
        process=process,
        # Without a primary host each process has a directory of its own.
        processes=(
            (process,) if primary_host is None else tuple(sorted(plan.processes | {primary_host}))
        ),
        others=tuple(others),
    )


class _Stored:
    """Splits TensorStore's specs into what is a leaf's own and what it shares."""

    def __init__(self, directory: str):
        self.kvstores: dict[str, int] = {}
        self._directory = directory
        self._alike: dict[int, tuple[dict[str, Any], StoredLeaf]] = {}
        self._samples: dict[str, _Sample] = {}

    def of(self, name: str, spec: dict[str, Any]) -> StoredLeaf:
        """Returns how a leaf is stored. Those that have one spec share what is made of it."""
        if name and not name.strip("/"):
            raise ValueError(f"the name {name!r} is nothing but a separator; rename it")
        if (found := self._alike.get(id(spec))) is None:
            found = self._alike[id(spec)] = (spec, self._split(spec))
        if spec.get("base", spec)["kvstore"]["driver"] != "ocdbt":
            _check_path(name)
        prefix = name if name.endswith("/") or not name else f"{name}/"
        return dataclasses.replace(found[1], prefix=prefix)

    def _split(self, spec: dict[str, Any]) -> StoredLeaf:
        cast_from = None
        if spec["driver"] == "cast":
            cast_from, spec = spec["dtype"], spec["base"]
            ts.dtype(cast_from)  # Raises where it cannot be cast at all.
        kvstore = dict(spec["kvstore"])
        if kvstore["driver"] == "ocdbt":
            kvstore.pop("path", None)
        else:
            kvstore = on_disk.directory_kvstore_spec(self._directory)
        own = {key: value for key, value in spec.items() if key != "kvstore"}
        place = self.kvstores.setdefault(json.dumps(kvstore), len(self.kvstores))
        text = json.dumps(own)
        if text not in self._samples:
            self._samples[text] = _sample(own)
        sample = self._samples[text]
        return StoredLeaf(place, "", sample.spec, cast_from, *sample[1:])


def _is_shared(tree: TreeInfo) -> bool:
    """Whether type handlers of the user's may write into the databases that we write."""
    strings = ocp.type_handlers.StringHandler  # It writes a file of its own.
    return any(
        leaf.route == "other" and type(leaf.type_handler) is not strings for leaf in tree.leaves
    )


def _with_small_nodes(kvstore: str) -> str:
    """Returns the spec of a key-value store with B-tree nodes of `_NODE_BYTES`."""
    spec = json.loads(kvstore)
    if "config" in spec:
        spec["config"]["max_decoded_node_bytes"] = _NODE_BYTES
    return json.dumps(spec)


class _Sample(NamedTuple):
    """What TensorStore makes of a spec, for all the leaves that look alike."""

    spec: ts.Spec
    metadata_key: str
    metadata: bytes


def _sample(own: dict[str, Any]) -> _Sample:
    """Creates an array in memory, to see its metadata."""
    array = ts.open(
        {**own, "kvstore": {"driver": "memory"}}, create=True, context=ts.Context()
    ).result()
    kvstore = array.kvstore
    assert kvstore is not None
    (key,) = [key.decode() for key in kvstore.list().result()]
    return _Sample(ts.Spec(own), key, kvstore.read(key).result().value)


def _check_path(name: str) -> None:
    """Refuses a name that, as a path, would leave the directory."""
    parts = name.removesuffix("/").split("/")
    odd = name and any(p in ("", ".", "..") or len(p.encode()) > 255 for p in parts)
    if odd or "\0" in name or "\\" in name or parts[0] in _RESERVED:
        raise ValueError(f"the name {name!r} cannot be a directory there; use OCDBT or rename it")


def _small_files(
    tree: TreeInfo, leaves: Sequence[Leaf], array_metadatas: Sequence[Any], is_primary: bool
) -> dict[str, bytes]:
    """Returns `_sharding` and `array_metadatas/process_N`."""
    arrays = [leaf for leaf in leaves if leaf.sharding is not None]
    if not arrays:
        return {}
    files = {}
    type_handler = tree.leaves[arrays[0].position].type_handler
    shardings = [(leaf.name, leaf.sharding) for leaf in arrays if leaf.sharding is not None]
    if is_primary and (content := on_disk.sharding_file(type_handler, shardings)) is not None:
        files[_paths.SHARDINGS] = content
    if (content := on_disk.array_metadatas_file(type_handler, array_metadatas)) is not None:
        files[f"{_paths.ARRAY_METADATAS}/process_{multihost.process_index()}"] = content
    return files
