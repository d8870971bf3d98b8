"""What an export wrote, or would write: a record to read."""

from __future__ import annotations

import dataclasses

from lazy_orbax.view.blocks import Block, Column, Lines, Table
from lazy_orbax.view.text import counted, size_of
from lazy_orbax.view.viewed import Viewed

_COLUMNS = (
    Column("tensor"),
    Column("dtype"),
    Column("shape"),
    Column("size", is_number=True),
    Column("file"),
    Column("from"),
)


@dataclasses.dataclass(frozen=True)
class ExportedTensor:
    """A tensor.

    Attributes:
        name: what it is called in the files.
        dtype: its dtype.
        shape: its shape.
        n_bytes: how many bytes it has.
        file: which file it is in.
        origins: the stored leaves that it was made of.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    file: str
    origins: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exported(Viewed):
    """What `export` wrote.

    Attributes:
        step: the item that was read.
        out: the directory that has the files.
        dry_run: whether nothing was read or written.
        files: bytes of each file, by its name.
        tensors: what is in them.
        dropped: the stored leaves that rules dropped.
        left_out: what is stored and is no array.
        n_bytes: bytes of all tensors.
        verified: whether what was read is, by the digests of the save, what was saved.
    """

    step: str
    out: str
    dry_run: bool
    files: dict[str, int]
    tensors: tuple[ExportedTensor, ...]
    dropped: tuple[str, ...]
    left_out: tuple[str, ...]
    n_bytes: int
    verified: bool

    def blocks(self) -> tuple[Block, ...]:
        """Returns what there is to see."""
        rows = tuple(
            (t.name, t.dtype, str(list(t.shape)), size_of(t.n_bytes), t.file, _brief(t.origins))
            for t in self.tensors
        )
        done = "would be written" if self.dry_run else "written"
        counts = ", ".join(
            (
                counted(len(self.tensors), "tensor"),
                size_of(self.n_bytes),
                counted(len(self.files), "file"),
            )
        )
        lines = [f"{counts} {done} to {self.out}"]
        if not self.verified and not self.dry_run:
            lines.append("The step has no digests: nobody knows whether this is what was saved.")
        lines += [f"dropped: {', '.join(self.dropped)}"] if self.dropped else []
        lines += [f"no array, left out: {', '.join(self.left_out)}"] if self.left_out else []
        return Table(_COLUMNS, rows, self.step), Lines(tuple(lines))


def _brief(origins: tuple[str, ...]) -> str:
    if len(origins) < 3:
        return ", ".join(origins)
    return f"{origins[0]} ... {origins[-1]} ({len(origins)} leaves)"
