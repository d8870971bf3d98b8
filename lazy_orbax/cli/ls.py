"""`ls RUN`: the steps of a run."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish


@click.command()
@click.argument("run")
@as_json
def command(run: str, as_json: bool) -> int:
    """List the steps of RUN: age, size, items, whether committed, digests, and who wrote them.

    If RUN holds runs, or checkpoints that are of no run, they are listed.
    """
    from lazy_orbax.inspection.ls import ls

    return finish(ls(run), as_json=as_json)
