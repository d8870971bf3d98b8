"""`html RUN`: one page about a run."""

from __future__ import annotations

import sys

import click

from lazy_orbax.cli.output import as_json, write_json


@click.command()
@click.argument("run")
@click.option("-o", "--output", type=click.Path(dir_okay=False, writable=True), default="-")
@click.option("--verify", is_flag=True, help="Read all of it, and compare it with its digests.")
@as_json
def command(run: str, output: str, verify: bool, as_json: bool) -> int:
    """Write one HTML page about RUN, or a step or an item: it needs no network and no script.

    It goes to standard output unless a file is given. With --json, JSON holds the page.
    """
    from lazy_orbax.inspection.html import html

    page = html(run, verify=verify)
    if output != "-":
        with open(output, "w", encoding="utf-8") as file:
            file.write(page)
    if as_json:
        write_json({"path": run, "output": output, "page": page if output == "-" else None})
    elif output == "-":
        sys.stdout.write(page)
    return 0
