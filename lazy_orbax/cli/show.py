"""`show PATH [GLOB]`: the leaves of a checkpoint."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish


@click.command()
@click.argument("path")
@click.argument("glob", required=False)
@click.option("--sort", type=click.Choice(["tree", "name", "size"]), default="tree")
@click.option("--depth", type=click.IntRange(1), help="Put together what shares so many keys.")
@as_json
def command(path: str, glob: str | None, sort: str, depth: int | None, as_json: bool) -> int:
    """Show the leaves of PATH: an item, a step, or the newest step of a run.

    GLOB chooses leaves, such as 'params/*kernel'. If it chooses one, its sharding is drawn.
    """
    from lazy_orbax.inspection.show import show

    return finish(show(path, glob, sort=sort, depth=depth), as_json=as_json)
