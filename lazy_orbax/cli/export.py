"""`export STEP OUT`: a checkpoint as safetensors."""

from __future__ import annotations

import json
import pathlib

import click

from lazy_orbax.cli.output import as_json, finish, progress


@click.command()
@click.argument("step")
@click.argument("out")
@click.option(
    "--rules",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="A JSON file of rules that name the tensors.",
)
@click.option("--dtype", help="Cast floating-point tensors, for example to bfloat16.")
@click.option(
    "--max-shard-bytes",
    type=click.IntRange(1),
    default=5 * 10**9,
    show_default=True,
    help="Most bytes of tensors in a file.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@as_json
def command(  # noqa: PLR0913 - One for each option.
    step: str,
    out: str,
    rules: pathlib.Path | None,
    dtype: str | None,
    max_shard_bytes: int,
    dry_run: bool,
    as_json: bool,
) -> int:
    r"""Write STEP, an item or the newest step of a run, to the new directory OUT.

    RULES is a list of those of lazy_orbax.transforms, such as [["select", "params\..*"],
    ["rename", "params\.(.*)", "model.\1"]].
    """
    from lazy_orbax.combine.export import export
    from lazy_orbax.plan.transforms.rules_as_json import map_of

    try:
        chosen = map_of(json.loads(rules.read_bytes())) if rules is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{rules}: {error}") from error
    keywords = {"map": chosen, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    with progress("export") as tell:
        found = export(step, out, dry_run=dry_run, on_progress=tell, **keywords)
    return finish(found, as_json=as_json)
