"""`diff A B`: how two checkpoints differ."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish, progress


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--stats", is_flag=True, help="Read what differs and say how far it is apart.")
@as_json
def command(a: str, b: str, stats: bool, as_json: bool) -> int:
    """Compare A with B: items, steps, or the newest steps of runs.

    Structures are compared first, then values by their digests. The exit status is 1 unless both
    are known to be the same.
    """
    from lazy_orbax.inspection.diff import diff

    with progress("diff") as tell:
        found = diff(a, b, stats=stats, on_progress=tell)
    return finish(found, as_json=as_json)
