"""`du RUN`: what a run costs."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish


@click.command()
@click.argument("run")
@as_json
def command(run: str, as_json: bool) -> int:
    """Say what each step of RUN takes, and which leaves never change.

    The column "again" has the bytes of leaves that are as they were in the step before.
    """
    from lazy_orbax.inspection.du import du

    return finish(du(run), as_json=as_json)
