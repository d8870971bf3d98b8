"""What is stored as it lies in memory, for each form that Orbax writes, against TensorStore."""

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from lazy_orbax.restore.array_format import format_of, formats_of
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


def test_what_looks_plain_and_is_not():
    plain = b'{"chunks":[4],"compressor":null,"dtype":"<f4","filters":null,"order":"C","shape":[4]}'
    assert format_of(plain, zarr3=False).is_plain
    for old, new in [(b'"C"', b'"F"'), (b"<f4", b">f4"), (b"null,", b'{"id":"zstd"},')]:
        assert not format_of(plain.replace(old, new, 1), zarr3=False).is_plain
