"""`timeline RUN`: where the time of saves and restores went."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish


@click.command()
@click.argument("run")
@click.option("--trace", type=click.Path(dir_okay=False), help="Write a trace for Perfetto.")
@click.option("--png", type=click.Path(dir_okay=False), help="Draw the saves. Needs matplotlib.")
@as_json
def command(run: str, trace: str | None, png: str | None, as_json: bool) -> int:
    """Say where the time of saves and restores of RUN went.

    It reads RUN.timeline.jsonl, which lazy_orbax.timeline_file writes. RUN may be such a file.
    """
    from lazy_orbax.inspection.timeline import timeline, write_picture, write_trace

    found = timeline(run)
    if trace:
        write_trace(found, trace)
    if png:
        write_picture(found, png)
    return finish(found, as_json=as_json)
