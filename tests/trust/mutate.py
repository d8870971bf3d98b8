"""Ways to spoil a checkpoint, each a function of a random generator and a directory."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import numcodecs
import numpy as np
import tensorstore as ts
from trust import ocdbt_codec

Mutation = Callable[[random.Random, pathlib.Path], str]

_NAMES = (
    "",
    ".",
    "..",
    "../../etc",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "\u202e",
    "a" * 300,
    "_METADATA",
)
_NUMBERS = (-1, 0, 1, 2, 7, 32, 33, 255, 65536, 10**6, 2**31, 2**40, 2**62, 2**63, 10**30, 0.5)
_WORDS = (
    *(
        "jax.Array",
        "np.ndarray",
        "scalar",
        "string",
        "None",
        "Dict",
        "NamedTuple",
        "jax.random.key",
    ),
    *(
        "|O",
        "<f4",
        "<f8",
        "|V9999999",
        "<U7",
        "bfloat16",
        "float32",
        "object",
        "blosc",
        "zstd",
        "gzip",
    ),
    *("pickle", "json2", "NamedSharding", "default", "sharding_indexed", "regular", "C", "F", "/"),
)
# They stand for texts that `json.dumps` does not write.
_TEXTS = {
    "@deep lists@": "[" * 5000 + "]" * 5000,
    "@deeper lists@": "[" * 200_000 + "]" * 200_000,
    "@deep objects@": '{"a":' * 5000 + "1" + "}" * 5000,
    "@not a number@": "NaN",
    "@infinity@": "-Infinity",
    "@many digits@": "9" * 5000,
    "@beyond floats@": "1e999",
    "@half@": "[1,",
    "@twice@": '{"shape": [1], "shape": [1048576], "key": "a", "key": "b"}',
}


def _value(rng: random.Random) -> Any:
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind == 3:
        return rng.choice(_NAMES)
    if kind == 4:
        return rng.choice(_WORDS)
    if kind == 5:
        return rng.choice(list(_TEXTS))
    if kind == 6:
        return [rng.choice(_NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 33, 1000)))]
    if kind == 7:
        return {rng.choice(_NAMES): rng.choice(_NUMBERS) for _ in range(rng.randrange(3))}
    return rng.choice((None, True, False, [], {}, [[]], ""))


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Returns every container with every key in it."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _places(value[key], found)
    return found


def _parsed(value: Any) -> Any:
    """Returns the JSON in a string; `None` where there is none, or no more."""
    try:
        return json.loads(value) if isinstance(value, str) and value.startswith("{") else None
    except (ValueError, RecursionError):
        return None


def _spoil(rng: random.Random, value: Any) -> Any:
    """Returns JSON with some change; `value` is changed too."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = _places(value, [])
        if not places or rng.random() < 0.02:
            return _value(rng)
        container, key = rng.choice(places)
        action = rng.randrange(10)
        if action < 6:
            inner = container[key]
            within = _parsed(inner) if rng.random() < 0.8 else None
            container[key] = _value(rng) if within is None else text_of(_spoil(rng, within))
        elif action == 6:
            del container[key]
        elif action == 7 and isinstance(container, dict):
            container[rng.choice((*_NAMES, *_WORDS))] = container.pop(key)
        elif action == 8:
            other, place = rng.choice(places)
            container[key] = json.loads(json.dumps(other[place]))
        elif isinstance(container, list):
            container.extend(container[key : key + 1] * rng.choice((1, 40)))
        else:
            container[key] = [container[key]]
    return value


def text_of(value: Any) -> str:
    text = json.dumps(value)
    for marker, replacement in _TEXTS.items():
        text = text.replace(json.dumps(marker), replacement)
    return text


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _name(directory: pathlib.Path, file: pathlib.Path) -> str:
    return str(file.relative_to(directory))


def json_file(rng: random.Random, directory: pathlib.Path) -> str:
    """Changes fields of one of Orbax's JSON files, or of Zarr's where those are files."""
    names = ("_METADATA", "_sharding", "_strings.json", ".zarray", "zarr.json")
    files = [
        file
        for file in _files(directory)
        if file.name in names or file.parent.name == "array_metadatas"
    ]
    if not files:
        return raw_bytes(rng, directory)
    top = [file for file in files if file.name == "_METADATA"]
    file = rng.choice(top if top and rng.random() < 0.4 else files)
    text = text_of(_spoil(rng, json.loads(file.read_text())))
    file.write_text(text, errors="surrogatepass")
    return _name(directory, file)


def _database(directory: pathlib.Path) -> Any:
    spec = {"driver": "ocdbt", "base": f"file://{directory}/"}
    return ts.KvStore.open(spec).result()


def _has_database(directory: pathlib.Path) -> bool:
    return (directory / "manifest.ocdbt").is_file()


def zarr_metadata(rng: random.Random, directory: pathlib.Path) -> str:
    """Changes what an array declares, in OCDBT."""
    if not _has_database(directory):
        return json_file(rng, directory)
    database = _database(directory)
    keys = [key for key in database.list().result() if key.endswith((b".zarray", b"zarr.json"))]
    key = rng.choice(keys)
    metadata = json.loads(database[key])
    field = rng.choice(("shape", "chunks", "chunk_grid", "dtype", "compressor", "codecs", "any"))
    if field in metadata:
        spoil = _spoil if rng.random() < 0.5 else _sizes
        metadata[field] = spoil(rng, metadata[field])
    else:
        metadata = _spoil(rng, metadata)
    database[key] = text_of(metadata).encode(errors="surrogatepass")
    return key.decode()


def _sizes(rng: random.Random, value: Any) -> Any:
    """Returns a list of sizes of the same length, of any magnitude."""
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return [rng.choice(_NUMBERS[1:-1]) if rng.random() < 0.7 else one for one in value]
    return _value(rng)


def bomb(rng: random.Random, directory: pathlib.Path) -> str:
    """Puts in the place of a chunk what decodes to much more, or to something else."""
    length = rng.choice((0, 1, 2**12, 2**20, 2**28))
    data = np.zeros(length, np.uint8)
    codec = rng.choice((numcodecs.Zstd(1), numcodecs.Zlib(1), numcodecs.Blosc("lz4"), None))
    content = bytes(codec.encode(data) if codec and length else data)
    if _has_database(directory):
        database = _database(directory)
        keys = [key for key in database.list().result() if b".zarray" not in key]
        key = rng.choice(keys)
        database[key] = content
        return f"{key.decode()}: {length} bytes"
    file = rng.choice(_files(directory))
    file.write_bytes(content)
    return f"{_name(directory, file)}: {length} bytes"


def keys_of_database(rng: random.Random, directory: pathlib.Path) -> str:
    """Deletes, swaps, shortens and invents values in OCDBT."""
    if not _has_database(directory):
        return whole_files(rng, directory)
    database = _database(directory)
    keys = database.list().result()
    one, other = rng.choice(keys), rng.choice(keys)
    action = rng.choice(("delete", "swap", "shorten", "invent", "rename"))
    if action == "delete":
        del database[one]
    elif action == "swap":
        database[one], database[other] = database[other], database[one]
    elif action == "shorten":
        value = database[one]
        database[one] = value[: rng.randrange(len(value) + 1)]
    elif action == "invent":
        database[one] = rng.randbytes(rng.choice((0, 1, 100, 5000)))
    else:
        database[one + b"x"] = database[one]
        del database[one]
    return f"{action} {one.decode()}"


def database_content(rng: random.Random, directory: pathlib.Path) -> str:
    """Changes a manifest or a node, and gives it the right checksum."""
    if not _has_database(directory):
        return raw_bytes(rng, directory)
    manifest = directory / "manifest.ocdbt"
    is_manifest = rng.random() < 0.4
    if is_manifest:
        content = ocdbt_codec.content(manifest.read_bytes())
    else:
        content = ocdbt_codec.root_content(directory)
    kind = rng.choice(("bytes", "bytes", "bytes", "bomb", "blocks"))
    if kind == "bytes":
        content = _changed(rng, content)
    elif kind == "bomb":
        # A table of as many data files as zeros.
        count = rng.choice((10**4, 10**6, 2 * 10**7))
        head = content[: ocdbt_codec.config_bytes(content) if is_manifest else 1]
        content = head + ocdbt_codec.varint(count) + bytes(3 * count)
    body = ocdbt_codec.compressed(content)
    if kind == "blocks":
        body = _changed(rng, body)
    if is_manifest:
        magic = ocdbt_codec.MANIFEST_MAGIC
        manifest.write_bytes(ocdbt_codec.container(magic, body, is_compressed=True))
    else:
        node = ocdbt_codec.container(ocdbt_codec.NODE_MAGIC, body, is_compressed=True)
        ocdbt_codec.put_root(directory, node)
    return f"{kind} of the {'manifest' if is_manifest else 'root'}"


def _changed(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if not changed:
            break
        position = rng.randrange(len(changed))
        action = rng.randrange(5)
        if action == 0:
            changed[position] ^= 1 << rng.randrange(8)
        elif action == 1:
            changed[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif action == 2:
            del changed[position : position + rng.choice((1, 4, 100))]
        elif action == 3:
            changed[position:position] = rng.randbytes(rng.choice((1, 4, 100)))
        else:
            source = rng.randrange(len(changed))
            changed[position : position + 8] = changed[source : source + 8]
    return bytes(changed)


def raw_bytes(rng: random.Random, directory: pathlib.Path) -> str:
    """Changes any file's bytes, or cuts it short."""
    file = rng.choice(_files(directory))
    content = file.read_bytes()
    if rng.random() < 0.3:
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    else:
        file.write_bytes(_changed(rng, content))
    return _name(directory, file)


def whole_files(rng: random.Random, directory: pathlib.Path) -> str:
    """Deletes, swaps and empties files, and puts other things in their place."""
    file, other = rng.choice(_files(directory)), rng.choice(_files(directory))
    kinds = (
        "delete",
        "swap",
        "empty",
        "directory",
        "fifo",
        "link",
        "loop",
        "device",
        "sparse",
        "up",
    )
    kind = rng.choice(kinds)
    if kind == "swap":
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "sparse":
        os.truncate(file, rng.choice((2**20, 2**33, 2**42)))
    elif kind == "up":
        (file.parent / "up").symlink_to(directory)
    else:
        file.unlink()
        if kind == "directory":
            file.mkdir()
        elif kind == "fifo":
            os.mkfifo(file)
        elif kind == "link":
            file.symlink_to("/etc/passwd")
        elif kind == "loop":
            file.symlink_to(file.name)
        elif kind == "device":
            file.symlink_to("/dev/zero")
    return f"{kind} {_name(directory, file)}"


MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "fields of JSON": (json_file, 30),
    "declared arrays": (zarr_metadata, 20),
    "values that are bombs": (bomb, 6),
    "keys in OCDBT": (keys_of_database, 8),
    "nodes of OCDBT, right checksum": (database_content, 14),
    "bytes of files": (raw_bytes, 12),
    "whole files": (whole_files, 10),
}


def mutated(rng: random.Random, valid: pathlib.Path, directory: pathlib.Path) -> tuple[str, str]:
    """Copies a valid checkpoint and spoils the copy. Returns the kind, and what was spoiled."""
    shutil.copytree(valid, directory)
    kinds = list(MUTATIONS)
    kind = rng.choices(kinds, [MUTATIONS[one][1] for one in kinds])[0]
    return kind, MUTATIONS[kind][0](rng, directory)
