"""Encoded chunks, decoded from memory."""

import itertools

import numpy as np
import pytest
import tensorstore as ts

import lazy_orbax.restore.decoder
from lazy_orbax.integrity import digest
from lazy_orbax.integrity.array_format import format_of
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import chunk_reads
from lazy_orbax.restore.chunk import Chunk, Target
from lazy_orbax.restore.decoder import Decoder, decode
from lazy_orbax.restore.reader import Reader
from lazy_orbax.restore.source import Directory
from lazy_orbax.storage.places import place_of
from lazy_orbax.trust.ocdbt_nodes import Extent

WHOLE = np.arange(50 * 48, dtype=np.float32).reshape(50, 48)
BOXES = (Box((0, 0), (20, 48)), Box((20, 0), (30, 30)))
METADATA = {
    "zarr": {"chunks": [16, 48], "compressor": {"id": "zstd", "level": 1}},
    "zarr3": {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [16, 48]}},
        "codecs": [{"name": "bytes"}, {"name": "zstd"}],
    },
}


@pytest.fixture(params=METADATA)
def saved(request, tmp_path):
    """Two leaves in a directory: how they are stored, and their chunks."""
    driver, found = request.param, []
    for leaf, values in {"leaf": WHOLE, "other": -WHOLE}.items():
        path = tmp_path / leaf
        spec = {"driver": driver, "kvstore": f"file://{path}/", "metadata": METADATA[driver]}
        ts.open(spec, dtype=ts.float32, shape=WHOLE.shape, create=True).result()[:] = values
        name = ".zarray" if driver == "zarr" else "zarr.json"
        form = format_of((path / name).read_bytes(), zarr3=driver == "zarr3")
        targets = [Target(np.zeros(box.shape, np.float32), None) for box in BOXES]
        for read in chunk_reads(form.shape, form.chunk, 4, BOXES):
            wanted = digest.digest_of(np.ascontiguousarray(values[read.box.index]))
            found.append(Chunk(leaf, form, read, targets, wanted))
    return found


def stored(tmp_path, chunk):
    return tmp_path / chunk.leaf / chunk.format.key(chunk.read.position)


def assert_read(chunks):
    for leaf, values in {"leaf": WHOLE, "other": -WHOLE}.items():
        targets = next(chunk.targets for chunk in chunks if chunk.leaf == leaf)
        for box, target in zip(BOXES, targets, strict=True):
            np.testing.assert_array_equal(target.array, values[box.index])


def test_chunks_of_several_leaves_go_where_they_are_wanted(saved, tmp_path):
    assert not saved[0].format.is_plain
    mixed = list(itertools.chain(saved[::2], saved[1::2]))
    assert decode([(chunk, stored(tmp_path, chunk).read_bytes()) for chunk in mixed]) == []
    assert_read(saved)


def neighbours(tmp_path, chunks):
    """Puts chunks into a file, one after the other."""
    content, found = b"", []
    for chunk in chunks:
        value = stored(tmp_path, chunk).read_bytes()
        found.append((chunk, Extent("file", len(content), len(value))))
        content += value
    (tmp_path / "file").write_bytes(content)
    return found


def never(chunks):
    raise AssertionError(chunks)


def test_neighbours_in_a_file_are_read_at_once_and_decoded(saved, tmp_path):
    source = Directory(str(tmp_path))
    reader = Reader(source)
    try:
        started = reader.start_encoded(neighbours(tmp_path, saved), decode, never)
        wrong = [one.result() for one in started]
    finally:
        reader.close()
    assert wrong == [[]]
    assert source.requests == 1
    assert_read(saved)


def test_a_large_chunk_is_read_and_decoded_in_one_go(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(Directory, "large_bytes", 1)
    monkeypatch.setattr(Directory, "run_bytes", 1)
    reader = Reader(source := Directory(str(tmp_path)))
    decoder = Decoder(place_of(str(tmp_path)), in_database=False)
    try:
        started = reader.start_encoded(neighbours(tmp_path, saved), never, decoder.read)
        assert not any(one.result() for one in started)
    finally:
        reader.close()
    assert (source.requests, decoder.requests) == (0, len(saved))
    assert_read(saved)


@pytest.mark.parametrize("most_bytes", [1, 2 * 16 * 48 * 4])
def test_more_chunks_than_are_decoded_at_once(saved, tmp_path, monkeypatch, most_bytes):
    monkeypatch.setattr(lazy_orbax.restore.decoder, "_STACK_BYTES", most_bytes)
    assert decode([(chunk, stored(tmp_path, chunk).read_bytes()) for chunk in saved]) == []
    assert_read(saved)


def in_place(chunk):
    """The same chunk, of which the whole leaf is wanted as it is."""
    target = np.zeros(WHOLE.shape, np.float32)
    reads = chunk_reads(WHOLE.shape, chunk.format.chunk, 4, (Box((0, 0), WHOLE.shape),))
    read = next(read for read in reads if read.position == chunk.read.position)
    memory = memoryview(target).cast("B")
    return chunk._replace(read=read, targets=[Target(target, memory)])


def test_chunks_that_go_to_their_places_as_they_are_are_compared_there(saved, tmp_path):
    decoder = Decoder(place_of(str(tmp_path)), in_database=False)
    chunks = [in_place(chunk) for chunk in saved]
    assert decoder.read(chunks) == []
    for chunk in chunks:
        whole = WHOLE if chunk.leaf == "leaf" else -WHOLE
        index = chunk.read.box.index
        np.testing.assert_array_equal(chunk.targets[0].array[index], whole[index])
    others = [chunk._replace(digest=chunk.digest ^ 1) for chunk in chunks]
    assert decoder.read(others) == [chunk.piece for chunk in others]


def test_they_are_read_where_nobody_knows_where_they_lie(saved, tmp_path):
    decoder = Decoder(place_of(str(tmp_path)), in_database=False)
    assert decoder.read(saved) == []
    assert decoder.requests == len(saved)
    assert_read(saved)


def test_another_chunk_than_was_saved_is_a_wrong_piece(saved, tmp_path):
    first, second = saved[:2]
    swapped = [
        (first, stored(tmp_path, second).read_bytes()),
        (second, stored(tmp_path, second).read_bytes()),
    ]
    assert [piece.box for piece in decode(swapped)] == [first.read.box]


@pytest.mark.parametrize("content", [b"", b"no frame", b"\x28\xb5\x2f\xfd"])
def test_what_cannot_be_decoded_is_an_error(saved, content):
    with pytest.raises(ValueError, match="(?i)error"):
        decode([(saved[0], content)])
