"""`bench PATH`: what a storage can do."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish, progress
from lazy_orbax.view.text import visible


@click.command()
@click.argument("path")
@click.option("--mebibytes", type=click.IntRange(16), default=512, show_default=True)
@as_json
def command(path: str, mebibytes: int, as_json: bool) -> int:
    """Measure durable writes, reads and small files in PATH, as saves and restores do them.

    It writes to a directory of its own there, and removes that in the end.
    """
    from lazy_orbax.inspection.bench import bench

    with progress(f"bench {visible(path)}") as tell:
        found = bench(path, n_bytes=mebibytes * 2**20, on_progress=tell)
    return finish(found, as_json=as_json)
