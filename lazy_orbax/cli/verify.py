"""`verify PATH...`: compares checkpoints with their digests."""

from __future__ import annotations

import click

from lazy_orbax.cli.main import FOUND, OK
from lazy_orbax.cli.output import as_json, progress, write, write_json
from lazy_orbax.view.text import visible


@click.command()
@click.argument("path", nargs=-1, required=True)
@as_json
def command(path: tuple[str, ...], as_json: bool) -> int:
    """Read each PATH and compare its bytes with the digests that were saved with it.

    A path is an item, a step or a run.
    """
    from lazy_orbax.integrity.verify import verify

    reports = []
    for one in path:
        with progress(f"verify {visible(one)}") as tell:
            reports.append(verify(one, on_progress=tell))
        if not as_json:  # One may take long: the first is told of at once.
            write(reports[-1].blocks())
    if as_json:
        write_json(reports)
    return OK if all(report.ok for report in reports) else FOUND
