"""Chunks from files to where they go: whole, scattered, in parts; and files that lie."""

import numpy as np
import pytest

from lazy_orbax.errors import MalformedCheckpointError
from lazy_orbax.integrity import digest
from lazy_orbax.integrity.array_format import ArrayFormat
from lazy_orbax.plan.boxes import Box
from lazy_orbax.plan.reads import chunk_reads
from lazy_orbax.restore.chunk import Chunk, Target
from lazy_orbax.restore.memory import aligned
from lazy_orbax.restore.reader import Reader
from lazy_orbax.restore.source import Directory
from lazy_orbax.trust.ocdbt_nodes import Extent


def form_of(shape, chunk, dtype=np.float32, tail=b""):
    return ArrayFormat("zarr", {}, shape, chunk, np.dtype(dtype), is_plain=True, tail=tail)


def target_of(box, dtype=np.float32, *, in_one_piece=True):
    n_bytes = int(np.prod(box.shape)) * np.dtype(dtype).itemsize
    memory = aligned(n_bytes)
    array = memory.view(dtype).reshape(box.shape)
    return Target(array, memoryview(memory) if in_one_piece else None)


def read(  # noqa: PLR0913 - Most tests give a few of them.
    tmp_path, whole, form, boxes, *, targets=None, content=None, digests=True, change=None
):
    """Writes an array in chunks, one after the other, and reads boxes of it."""
    reads = chunk_reads(form.shape, form.chunk, form.dtype.itemsize, tuple(boxes))
    targets = targets or [target_of(box, form.dtype) for box in boxes]
    stored, chunks = b"", []
    for one in reads:
        padded = np.zeros(form.chunk, form.dtype)
        padded[tuple(slice(n) for n in one.box.shape)] = whole[one.box.index]
        known = digest.digest_of(np.ascontiguousarray(whole[one.box.index])) if digests else None
        bytes_of_one = padded.tobytes() + form.tail
        extent = Extent("file", len(stored), len(bytes_of_one))
        chunks.append((Chunk("leaf", form, one, targets, known), extent))
        stored += bytes_of_one
    stored = stored if content is None else content(stored)
    (tmp_path / "file").write_bytes(stored)
    chunks = change(chunks) if change is not None else chunks
    source = Directory(str(tmp_path))
    reader = Reader(source)
    try:
        wrong = [piece for future in reader.start(chunks) for piece in future.result()]
    finally:
        reader.close()
    return [target.array for target in targets], wrong, source


WHOLE = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)


@pytest.mark.parametrize("chunk", [(64, 48), (16, 48), (64, 12), (10, 7)])
@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (64, 48))],
        [Box((0, 0), (32, 48)), Box((32, 0), (32, 48))],
        [Box((0, 12 * i), (64, 12)) for i in range(4)],
        [Box((5, 3), (20, 30)), Box((10, 0), (3, 48))],
    ],
)
@pytest.mark.parametrize("tail", [b"", b"an index"])
def test_boxes_are_what_was_stored(tmp_path, chunk, boxes, tail):
    found, wrong, source = read(tmp_path, WHOLE, form_of((64, 48), chunk, tail=tail), boxes)
    assert not wrong
    assert source.requests == 1
    for box, array in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(array, WHOLE[box.index])


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2048, 1500))],
        [Box((0, 750 * i), (2048, 750)) for i in range(2)],
        [Box((0, 0), (1300, 1500)), Box((1300, 0), (748, 1500))],
        [Box((2 * i, 0), (2, 1500)) for i in range(1024)],
    ],
)
@pytest.mark.parametrize("chunk", [(2048, 1500), (1100, 1500)])
def test_a_large_chunk_comes_in_parts(tmp_path, boxes, chunk):
    whole = np.random.default_rng(0).standard_normal((2048, 1500)).astype(np.float32)
    found, wrong, source = read(tmp_path, whole, form_of(whole.shape, chunk, tail=b"12"), boxes)
    assert not wrong
    assert source.requests > 10
    for box, array in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(array, whole[box.index])


@pytest.mark.parametrize("n_rows", [64, 2**13])
def test_parts_of_a_chunk_are_read_where_they_go(tmp_path, n_rows):
    whole = np.arange(n_rows * 192, dtype=np.float32).reshape(n_rows, 192)
    boxes = [Box((n_rows // 4 * i, 0), (n_rows // 4, 192)) for i in range(4)]
    targets = [target_of(box)._replace(array=None) for box in boxes]  # Nothing is copied there.
    form = form_of(whole.shape, whole.shape)
    _, wrong, _ = read(tmp_path, whole, form, boxes, targets=targets)
    assert not wrong
    for box, target in zip(boxes, targets, strict=True):
        assert bytes(target.memory) == whole[box.index].tobytes()


def test_a_part_that_is_cast_is_copied_and_so_are_the_others(tmp_path):
    boxes = [Box((0, 0), (32, 48)), Box((32, 0), (32, 48))]
    targets = [target_of(boxes[0]), target_of(boxes[1], np.float16, in_one_piece=False)]
    found, wrong, _ = read(tmp_path, WHOLE, form_of((64, 48), (64, 48)), boxes, targets=targets)
    assert not wrong
    np.testing.assert_array_equal(found[0], WHOLE[:32])
    np.testing.assert_array_equal(found[1], WHOLE[32:].astype(np.float16))


def test_a_chunk_may_go_to_more_places_than_the_system_fills_at_once(tmp_path):
    whole = np.arange(5000, dtype=np.float32).reshape(2500, 2)
    boxes = [Box((i, 0), (1, 2)) for i in range(2500)]
    found, wrong, source = read(tmp_path, whole, form_of((2500, 2), (2500, 2)), boxes)
    assert not wrong
    assert source.requests == 1
    np.testing.assert_array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_what_is_wanted_in_another_dtype_is_cast(tmp_path, in_one_piece):
    box = Box((0, 0), (64, 48))
    target = target_of(box, np.float16, in_one_piece=False)
    found, wrong, _ = read(tmp_path, WHOLE, form_of((64, 48), (16, 48)), [box], targets=[target])
    assert not wrong
    np.testing.assert_array_equal(found[0], WHOLE.astype(np.float16))


@pytest.mark.parametrize("chunk", [(64, 48), (16, 48), (10, 48), (64, 12)])
@pytest.mark.parametrize("at", [0, 1000, -20])
def test_a_changed_byte_is_a_wrong_piece(tmp_path, chunk, at):
    def flip(stored):
        changed = bytearray(stored)
        changed[at] ^= 8
        return bytes(changed)

    boxes = [Box((0, 0), (32, 48)), Box((32, 0), (32, 48))]
    form = form_of((64, 48), chunk)
    _, wrong, _ = read(tmp_path, WHOLE, form, boxes, content=flip)
    is_padding = chunk == (10, 48) and at == -20  # It is beyond the end of the array.
    assert len(wrong) == (0 if is_padding else 1)
    _, wrong, _ = read(tmp_path, WHOLE, form, boxes, content=flip, digests=False)
    assert not wrong


def test_a_changed_byte_of_a_large_chunk_is_a_wrong_piece(tmp_path):
    whole = np.zeros((2048, 1500), np.float32)
    halves = [Box((1024 * i, 0), (1024, 1500)) for i in range(2)]
    for boxes in ([Box((0, 0), whole.shape)], [Box((0, 0), (2048, 700))], halves):
        form = form_of(whole.shape, whole.shape)
        _, wrong, _ = read(tmp_path, whole, form, boxes, content=lambda s: s[:-1] + b"\1")
        assert [piece.leaf for piece in wrong] == ["leaf"]


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="file ends before byte"):
        read(
            tmp_path,
            WHOLE,
            form_of((64, 48), (16, 48)),
            [Box((0, 0), (64, 48))],
            content=lambda s: s[:-1],
        )


def test_another_index_than_the_only_right_one_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found an index"):
        read(
            tmp_path,
            WHOLE,
            form_of((64, 48), (64, 48), tail=b"right"),
            [Box((0, 0), (64, 48))],
            content=lambda s: s[:-1] + b"!",
        )


def test_values_on_top_of_each_other_are_refused(tmp_path):
    def moved(chunks):
        (first, extent), (second, other), *rest = chunks
        return [(first, extent), (second, other._replace(offset=other.offset - 1)), *rest]

    with pytest.raises(MalformedCheckpointError, match="values beside each other"):
        read(
            tmp_path,
            WHOLE,
            form_of((64, 48), (16, 48)),
            [Box((0, 0), (64, 48))],
            change=moved,
        )


@pytest.mark.parametrize("n_bytes", [0, 5, 10**12])
def test_a_value_of_another_length_is_refused_before_memory_is_taken(tmp_path, n_bytes):
    def changed(chunks):
        return [(chunk, extent._replace(length=n_bytes)) for chunk, extent in chunks]

    with pytest.raises(MalformedCheckpointError, match=f"found {n_bytes} bytes, wanted 12288"):
        read(
            tmp_path,
            WHOLE,
            form_of((64, 48), (64, 48)),
            [Box((0, 0), (64, 48))],
            change=changed,
        )
