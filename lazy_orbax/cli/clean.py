"""`clean RUN`: what killed saves and exports left."""

from __future__ import annotations

import dataclasses

import click

from lazy_orbax.cli.output import as_json, finish


@click.command()
@click.argument("run")
@click.option("--remove", is_flag=True, help="Remove it. Else nothing is removed.")
@click.option(
    "--quiet-minutes",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Keep what was written to within so many minutes.",
)
@as_json
def command(run: str, remove: bool, quiet_minutes: float, as_json: bool) -> int:
    """Find what killed saves and exports left in RUN, never published; and memory.

    It says what it would remove, and removes it only with --remove.
    """
    from lazy_orbax.inspection.clean import clean
    from lazy_orbax.tiers.kept_listing import left_in_memory

    report = clean(run, dry_run=not remove, quiet_s=60 * quiet_minutes)
    left = left_in_memory(report.path, dry_run=not remove, quiet_s=60 * quiet_minutes)
    report = dataclasses.replace(report, directories=(*report.directories, *left))
    return finish(report, as_json=as_json)
