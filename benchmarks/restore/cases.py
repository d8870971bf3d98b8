"""What is restored, into what, and by whom. Nothing here imports JAX: plain reads need none."""

from __future__ import annotations

import dataclasses

STOCK = ("stock_default", "stock_best")
RAW = ("raw_1", "raw_4", "raw_direct_1", "raw_direct_4")
"""Plain reads of the files, by so many threads, through the page cache or past it."""
LAZY = ("lazy", "lazy_unverified")
EXTRA = ("stock_of_lazy", "lazy_files", "lazy_zarr3")
TRANSFORMED = "lazy_transformed"
"""lazy_orbax, into another tree: see `benchmarks.restore.transformed`."""
PEERS = (*STOCK, *LAZY, *RAW, *EXTRA, TRANSFORMED)

STEP = 0
"""The step that is saved and restored."""

_WRITERS = dict.fromkeys(("lazy_unverified", "stock_of_lazy", TRANSFORMED), "lazy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A state of float32 leaves that look alike, saved in rows over all devices.

    Attributes:
        leaves: how many, by size.
        side: rows and columns of each, by size.
        layers: how many such arrays are stacked in a leaf; 0 is none.
        in_bucket: whether it is saved to `gs://`.
    """

    leaves: dict[str, int]
    side: dict[str, int]
    layers: int = 0
    in_bucket: bool = False

    def shape(self, size: str) -> tuple[int, ...]:
        return (*((self.layers,) if self.layers else ()), self.side[size], self.side[size])


def _workload(leaves: int, side: int, *, layers: int = 0, in_bucket: bool = False) -> Workload:
    # Not less for tiny ones: a chunk of 1 KiB or less is kept in OCDBT's nodes, and is no read.
    return Workload(
        leaves={"full": leaves, "small": max(2, leaves // 10), "tiny": min(5, leaves)},
        side={"full": side, "small": side, "tiny": 64},
        layers=layers,
        in_bucket=in_bucket,
    )


WORKLOADS = {
    "many": _workload(1000, 256),
    "many5k": _workload(5000, 128),
    "many20k": _workload(20_000, 64),
    "large": _workload(16, 4096),
    "scanned": _workload(12, 512, layers=24),
    "bucket": _workload(200, 256, in_bucket=True),
}

TARGETS = {
    "same": "as it was saved: rows over all devices",
    "axis_1": "columns over all devices",
    "grid": "rows over two halves of the devices, columns within each",
    "replicated": "all of it on each device",
    "one_device": "all of it on one device",
    "part": "rows over half of the devices",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Restores that are compared.

    Attributes:
        workload: a name from `WORKLOADS`.
        peers: who restores, unless the user says otherwise.
        targets: names from `TARGETS`; with several, each is compared by itself.
        dtype: of what is wanted.
        writer: who wrote what all of them read; if empty, each reads what it wrote itself, and
            plain reads what lazy_orbax wrote.
    """

    workload: str
    peers: tuple[str, ...] = (*STOCK, "lazy", *RAW)
    targets: tuple[str, ...] = ("same",)
    dtype: str = "float32"
    writer: str = ""

    def writer_for(self, peer: str) -> str:
        """Who wrote what this peer reads."""
        return self.writer or _WRITERS.get(peer, "lazy" if peer in RAW else peer)


_OTHER_TARGETS = tuple(name for name in TARGETS if name != "same")
_RESTORERS = (*STOCK, "lazy")
_ZSTD = ("stock_default", "lazy", *RAW)

CASES = {
    "small": Case(workload="many", peers=(*STOCK, *LAZY, *RAW)),
    "many5k": Case(workload="many5k"),
    "many20k": Case(workload="many20k"),
    "large": Case(workload="large", peers=(*STOCK, *LAZY, *RAW)),
    "resharded": Case(workload="many", peers=_RESTORERS, targets=_OTHER_TARGETS),
    "resharded_large": Case(workload="large", peers=_RESTORERS, targets=_OTHER_TARGETS),
    "cast": Case(workload="many", peers=_RESTORERS, dtype="bfloat16"),
    "cast_large": Case(workload="large", peers=_RESTORERS, dtype="bfloat16"),
    "stock_zstd": Case(workload="many", peers=_ZSTD, writer="stock_default"),
    "stock_zstd_large": Case(workload="large", peers=_ZSTD, writer="stock_default"),
    "transformed": Case(workload="scanned", peers=("stock_default", "lazy", TRANSFORMED)),
    "gs": Case(workload="bucket", peers=_RESTORERS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: a case, with one of its targets.

    Attributes:
        name: as in the records.
        case: the case.
        target: a name from `TARGETS`.
        peers: who restores.
    """

    name: str
    case: Case
    target: str
    peers: tuple[str, ...]


def rows_of(names: tuple[str, ...], peers: tuple[str, ...]) -> list[Row]:
    """Returns the comparisons of these cases, by these peers, or by the case's own if empty."""
    found = []
    for name in names:
        case = CASES[name]
        taking_part = tuple(peer for peer in peers or case.peers if _fits(peer, case))
        for target in case.targets if taking_part else ():
            full = name if len(case.targets) == 1 else f"{name}/{target}"
            found.append(Row(name=full, case=case, target=target, peers=taking_part))
    return found


def _fits(peer: str, case: Case) -> bool:
    """Whether a peer can take part: an object is no file, and some read only what they wrote."""
    if WORKLOADS[case.workload].in_bucket and peer in RAW:
        return False
    if peer == TRANSFORMED and not WORKLOADS[case.workload].layers:
        return False
    return not case.writer or peer in ("stock_default", *LAZY, *RAW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """What a fresh process is told that writes one state.

    Attributes:
        workload: a name from `WORKLOADS`.
        size: `full`, `small` or `tiny`.
        digests: the file that gets the digests of the values.
        paths: for each writer the directory or address of its manager.
    """

    workload: str
    size: str
    digests: str
    paths: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a fresh process is told that restores.

    Attributes:
        workload: a name from `WORKLOADS`.
        size: `full`, `small` or `tiny`.
        digests: the file with the digests of what was saved.
        path: the manager's directory or address.
        peer: who restores.
        target: a name from `TARGETS`.
        dtype: of what is wanted.
        restores: how many, one after the other.
    """

    workload: str
    size: str
    digests: str
    path: str
    peer: str
    target: str
    dtype: str
    restores: int
