"""What is stored as it lies in memory, for each form that Orbax writes, against TensorStore."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lazy_orbax.integrity.array_format import format_of, formats_of
from lazy_orbax.trust.malformed import refuse_malformed
from lazy_orbax.trust.ocdbt_nodes import Extent

DTYPES = [np.float32, np.int8, np.uint16, np.complex64, ml_dtypes.bfloat16]
DTYPES += [ml_dtypes.float8_e5m2, np.bool_, ml_dtypes.int4]


@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("use_compression", [False, True])
@pytest.mark.parametrize("use_ocdbt", [False, True])
def test_a_plain_chunk_is_its_elements_and_the_tail(
    tmp_path, use_zarr3, use_compression, use_ocdbt
):
    tree = {
        np.dtype(d).name: jax.numpy.asarray(np.arange(2000).reshape(40, 50) % 7).astype(d)
        for d in DTYPES
    }
    handler = ocp.PyTreeCheckpointHandler(
        use_zarr3=use_zarr3, use_compression=use_compression, use_ocdbt=use_ocdbt
    )
    ocp.Checkpointer(handler).save(epath.Path(tmp_path / "c"), args=ocp.args.PyTreeSave(tree))
    contents = refuse_malformed(tmp_path / "c", None)
    formats = formats_of(contents)
    assert formats.keys() == tree.keys()
    for name, form in formats.items():
        assert (form.shape, form.chunk, form.dtype.name) == ((40, 50), (40, 50), name)
        assert form.is_plain == (not use_compression and name not in ("bool", "int4"))
        value = contents.values[f"{name}/{form.key((0, 0))}"]
        if isinstance(value, Extent):
            content = (tmp_path / "c" / value.file).read_bytes()
            value = content[value.offset : value.offset + value.length]
        if form.is_plain:
            assert bytes(value) == np.asarray(tree[name]).tobytes() + form.tail


V2 = {
    "chunks": [4],
    "compressor": None,
    "dtype": "<f4",
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": [4],
    "zarr_format": 2,
}


def test_what_looks_plain_and_is_not():
    assert of_v2({}).is_plain
    for change in ({"order": "F"}, {"dtype": ">f4"}, {"compressor": {"id": "zstd"}}):
        assert not of_v2(change).is_plain
    assert of_v2({"dtype": ">f4"}).dtype == np.dtype("<f4")  # As TensorStore gives it.


def of_v2(change):
    return format_of(json.dumps({**V2, **change}).encode(), zarr3=False)


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("use_compression", [False, True])
def test_a_misspelt_member_is_never_taken_for_one_that_is_left_out(
    tmp_path, zarr3, use_compression
):
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=zarr3, use_compression=use_compression
    )
    ocp.Checkpointer(handler).save(
        epath.Path(tmp_path / "c"), args=ocp.args.PyTreeSave({"w": np.arange(1000.0)})
    )
    content = (tmp_path / "c" / "w" / ("zarr.json" if zarr3 else ".zarray")).read_bytes()
    names = re.findall(rb'"(\w+)":', content)
    assert len(names) > 7
    for name in set(names):
        if name == b"level":  # Of the compressor: for TensorStore.
            continue
        assert is_not_plain(content.replace(b'"%s":' % name, b'"x%s":' % name[1:]), zarr3), name


def is_not_plain(content, zarr3):
    try:
        return not format_of(content, zarr3=zarr3).is_plain
    except ValueError:
        return True
