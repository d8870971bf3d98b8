"""Merges, searches and exports checkpoints nobody trusts, and compares with the valid ones."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from equipment.trees import all_bits

import lazy_orbax

FACTORS = (0.25, 0.75)


class Combiner:
    """Does each thing that takes several checkpoints, or makes something else of one."""

    def __init__(self, root: pathlib.Path, names: list[str]):
        self._root = root
        self.valid = {
            name: {way: do() for way, do in self.ways(root / name, name).items()} for name in names
        }

    def ways(self, directory: pathlib.Path, name: str) -> dict[str, Any]:
        """Returns what is done with a checkpoint. Each returns something to compare."""
        valid, out = self._root / name, directory.with_name(f"{directory.name}-out")
        return {
            "merge": lambda: _merged([directory, valid], out),
            "merge as second": lambda: _merged([valid, directory], out),
            "copy": lambda: _merged([valid, directory], out, others=1),
            "export": lambda: _exported(directory, out),
            "search": lambda: _searched([valid, directory]),
        }


def _merged(sources: list[pathlib.Path], out: pathlib.Path, **keywords: Any) -> Any:
    try:
        lazy_orbax.merge(sources, FACTORS, out, host_bytes=2**20, **keywords)
        return all_bits(lazy_orbax.load(out))
    finally:
        assert not list(out.parent.glob(f"{out.name}.*")), "something temporary is left"
        shutil.rmtree(out, ignore_errors=True)


def _exported(directory: pathlib.Path, out: pathlib.Path) -> Any:
    try:
        lazy_orbax.export(directory, out, host_bytes=2**20)
        return {file.name: file.read_bytes() for file in sorted(out.iterdir())}
    finally:
        assert not list(out.parent.glob(f".{out.name}.*")), "something temporary is left"
        shutil.rmtree(out, ignore_errors=True)


def _searched(sources: list[pathlib.Path]) -> Any:
    def score(tree: Any) -> float:
        floats = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
        return float(sum(np.abs(leaf.astype(np.float64)).sum() for leaf in floats))

    found = lazy_orbax.search(score, sources, 2)
    return found.coefficients, found.score


def _is_float(leaf: Any) -> bool:
    return jax.numpy.issubdtype(getattr(leaf, "dtype", int), jax.numpy.floating)
