"""`merge OUT SOURCE...`: a linear combination of checkpoints."""

from __future__ import annotations

import click

from lazy_orbax.cli.output import as_json, finish, progress


@click.command()
@click.argument("out")
@click.argument("source", nargs=-1, required=True)
@click.option(
    "--schedule",
    default="uniform",
    show_default=True,
    help="uniform, linear, cosine, 1-sqrt, or ema:BETA.",
)
@click.option("--coefficients", help="Numbers with commas between, one for each SOURCE.")
@click.option("--others", type=int, help="Number of the SOURCE to take integers and keys from.")
@click.option("--dtype", help="Of the averaged leaves. [default: that of the sources]")
@click.option(
    "--accumulator",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="What is added up in.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare what is read with its digests.")
@as_json
def command(
    out: str, source: tuple[str, ...], coefficients: str | None, as_json: bool, **keywords: object
) -> int:
    """Write to OUT, a new step, the combination of each SOURCE: items or steps, oldest first."""
    from lazy_orbax.combine.merge import merge

    schedule = keywords.pop("schedule")
    keywords["verify"] = not keywords.pop("no_verify")
    how = schedule if coefficients is None else coefficients.split(",")
    with progress("merge") as tell:
        merged = merge(source, how, out, on_progress=tell, **keywords)  # type: ignore[arg-type]
    return finish(merged, as_json=as_json)
