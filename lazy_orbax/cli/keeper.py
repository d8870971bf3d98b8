"""`keeper`: the snapshots in memory, and the process that looks after them."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish


@click.command()
@click.option("--directory", help="The keeper's directory. Default: this user's in /dev/shm.")
@click.option("--start", is_flag=True, help="Start a keeper, if there is none.")
@click.option("--stop", "ends", is_flag=True, help="End the keeper. Its snapshots stay.")
@click.option("--discard", is_flag=True, help="With --stop: remove the snapshots too.")
@click.option("--limit-bytes", type=click.IntRange(2**20), help="With --start: most bytes.")
@click.option(
    "--linger-minutes",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="With --start: how long it keeps snapshots for nobody.",
)
@as_json
def command(  # noqa: PLR0913 - Each is an option.
    directory: str | None,
    start: bool,
    ends: bool,
    discard: bool,
    limit_bytes: int | None,
    linger_minutes: float,
    as_json: bool,
) -> int:
    """List the snapshots in memory, and who keeps them."""
    from lazy_orbax._machine import memory_bytes
    from lazy_orbax.errors import OptionError
    from lazy_orbax.tiers import keeper_link, kept_listing
    from lazy_orbax.tiers.keeper_process import KeeperSettings
    from lazy_orbax.tiers.shelf import place_for

    if (start and ends) or (discard and not ends):
        raise OptionError("Give either --start, or --stop; --discard goes with --stop.")
    if start:
        settings = KeeperSettings(
            directory=place_for(directory),
            limit_bytes=limit_bytes or memory_bytes() // 2,
            linger_s=60 * linger_minutes,
        )
        keeper_link.start(settings)
    if ends:
        kept_listing.stop(directory, discard=discard)
    return finish(kept_listing.kept(directory), as_json=as_json)
