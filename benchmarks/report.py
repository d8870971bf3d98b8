"""Makes the tables in `benchmarks/README.md`, and the plots, from records.

python -m benchmarks.report benchmarks/results/mine.jsonl
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
from collections.abc import Sequence

from benchmarks import plots, record
from benchmarks.restore import table as restores
from benchmarks.tables import (
    Records,
    cell,
    machines,
    markdown,
    peer_title,
    quantity,
    ratio,
    workloads_of,
)

_HERE = pathlib.Path(__file__).parent
_OURS, _STOCK, _BEST = "lazy", "stock_default", "stock_best"
_COLUMNS = (_STOCK, _BEST, _OURS)

_STEPS = {
    "added_loop": "added loop time per checkpoint",
    "save": "time inside `save()`",
    "added_cpu": "added CPU seconds per checkpoint",
    "step_after_save": "first step after `save()`",
    "step_during_save_median": "step during a save, median",
    "step_during_save_max": "step during a save, longest",
    "step_otherwise_median": "step otherwise, median",
    "steps_overlapped": "steps until committed",
    "tail": "tail after the loop",
    "loop": "the whole loop",
    "first_save": "first `save()` of a handler",
}
METRICS: dict[str, dict[str, str]] = {
    "stall": _STEPS,
    "throughput": {
        "enqueued": "to enqueued",
        "staged": "to staged",
        "durable": "to durable",
        "committed": "to committed",
        "cpu": "CPU seconds",
        "restore": "restore",
        "disk": "on disk",
        "files": "files",
    },
    "memory": {
        "state": "the state itself",
        "budget": "host budget",
        "peak": "peak above the state",
        "growth": "growth, from the middle or the 5th save to the last",
        "kept_first": "kept after the first save",
        "kept": "kept after the last save",
        "in_use": "the same, without what malloc keeps to reuse",
        "device_peak": "peak of device memory above the state",
    },
    "scale": {
        "first_save": "first `save()`",
        "later_save": "later `save()`",
        "later_committed": "later, to committed",
        "later_cpu": "later, CPU seconds",
    },
    "pods": {
        "save": "time inside `save()`, slowest process",
        "committed": "to committed",
        "cpu": "CPU seconds of all processes",
    },
    "exchanges": {
        "added_loop": "added loop time per save",
        "save": "time inside `save()`, slowest process",
        "ten_steps": "ten steps without a save",
        "added_cpu": "added CPU seconds per save, all trainers",
        "node_cpu": "CPU seconds per save, all nodes",
        "node_cpu_for_gb": "CPU seconds of nodes for a GB that is sent",
        "tail": "from the last step to the end of copy and exchange",
        "exchange": "an exchange, slowest process",
        "sent": "sent per save, each process",
    },
    "gpu": _STEPS,
}
_NO_RATIO = {"state", "budget", "growth", "in_use", "files"} | {
    *("loop", "steps_overlapped", "tail", "step_otherwise_median"),
}
_CEILINGS = {
    "durable_write": "durable write, 1 thread, one fsync",
    "durable_write_threads": "durable write, 4 threads, an fsync for 64 MiB",
    "durable_write_direct": "durable write, O_DIRECT, 4 threads",
    "read": "read from storage",
    "memcpy": "memcpy",
    "dispatch": "dispatch of an empty jitted function over the tree",
}


def compared(
    records: Records, part: str, rows: Sequence[tuple[str, str, str]], peers: Sequence[str]
) -> str:
    """A table with a column for each peer, and two that compare us with stock Orbax.

    Args:
        records: everything.
        part: the part.
        rows: for each row its label, workload and metric.
        peers: the columns; who has no value in any row gets none.
    """
    shown = [p for p in peers if any((part, w, p, m) in records for _, w, m in rows)]
    against = [p for p in (_STOCK, _BEST) if p in shown and _OURS in shown]
    header = ["", *(peer_title(p) for p in shown)]
    header += [f"lazy vs {peer_title(p)}" for p in against]
    lines = []
    for label, workload, metric in rows:
        found = {p: records.get((part, workload, p, metric)) for p in shown}
        if not any(found.values()):
            continue
        ratios = [ratio(found[_OURS], found[p]) if metric not in _NO_RATIO else "" for p in against]
        lines.append([label, *(cell(found[p]) for p in shown), *ratios])
    return markdown(header, lines)


def _peers_of(records: Records, part: str) -> list[str]:
    """Those of every run first, then variants in the order in which they were measured."""
    others = dict.fromkeys(p for found, _, p, _ in records if found == part and p != "raw")
    return [*_COLUMNS, *(p for p in others if p not in _COLUMNS)]


def by_workload(records: Records, part: str) -> str:
    """A table for each workload, with a row for each metric."""
    text = []
    for workload in workloads_of(records, part):
        rows = [(title, workload, metric) for metric, title in METRICS[part].items()]
        text.append(f"**{workload}**\n\n{compared(records, part, rows, _peers_of(records, part))}")
        if part == "throughput":
            text.append(_ceilings(records, workload))
    return "\n".join(text)


def _ceilings(records: Records, workload: str) -> str:
    """What the machine could do, and how near to it each peer comes."""
    raw = {m: records.get(("throughput", workload, "raw", m)) for m in (*_CEILINGS, "state")}
    n_bytes = raw["state"]["median"] if raw["state"] else 0
    rows = []
    for metric, title in _CEILINGS.items():
        if (found := raw[metric]) is not None:
            rate = quantity(n_bytes / found["median"], "bytes/s") if metric != "dispatch" else ""
            rows.append([title, cell(found), rate])
    written = [raw[m]["median"] for m in raw if m.startswith("durable_write") and raw[m]]
    for peer in _peers_of(records, "throughput"):
        committed = records.get(("throughput", workload, peer, "committed"))
        if committed and written:
            times = f"{committed['median'] / min(written):.2f}x the fastest durable write"
            rate = quantity(n_bytes / committed["median"], "bytes/s")
            rows.append([f"{peer_title(peer)}, to committed", times, rate])
    return markdown([f"ceilings, {quantity(n_bytes, 'bytes')}", "time", "rate"], rows)


def by_metric(records: Records, part: str) -> str:
    """A table for each metric, with a row for each workload."""
    text = []
    for metric, title in METRICS[part].items():
        rows = [(workload, workload, metric) for workload in workloads_of(records, part)]
        text.append(f"**{title}**\n\n{compared(records, part, rows, _peers_of(records, part))}")
    return "\n".join(text)


def _gpu(records: Records) -> str:
    """The comparison of peers and of modes, then everything else as it is."""
    text = ""
    for workload in ("fused_step", "modes"):
        rows = [(title, workload, metric) for metric, title in _STEPS.items()]
        rows.append(("mode", workload, "mode"))
        table = compared(records, "gpu", rows, _peers_of(records, "gpu"))
        text += f"**{workload}**\n\n{table}\n"
    others = [
        [workload, peer_title(peer), metric.replace("_", " "), cell(found)]
        for (part, workload, peer, metric), found in records.items()
        if part == "gpu" and workload not in ("fused_step", "modes")
    ]
    return f"{text}\n{markdown(['measurement', 'peer', 'metric', ''], others)}"


def tables(records: Records) -> dict[str, str]:
    """The text for each part that was measured."""
    made = {}
    for part in METRICS:
        if workloads_of(records, part):
            body = {"scale": by_metric, "gpu": lambda r, _: _gpu(r)}.get(part, by_workload)
            made[part] = f"{machines(records, part)}\n{body(records, part)}"
    if workloads_of(records, restores.PART):
        made[restores.PART] = restores.section(records)
    return made


def write_into(readme: pathlib.Path, sections: dict[str, str]) -> None:
    """Replaces what is between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: there are no such markers.
    """
    text = readme.read_text(encoding="utf-8")
    for name, section in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, s=section: f"{m[1]}\n{s}\n{m[2]}", text, flags=re.DOTALL
        )
        if not count:
            raise ValueError(f"{readme} has no <!-- {name} --> ... <!-- /{name} -->")
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("records", type=pathlib.Path, nargs="+")
    parser.add_argument("--readme", type=pathlib.Path, default=_HERE / "README.md")
    parser.add_argument("--plots", type=pathlib.Path, default=_HERE / "results")
    arguments = parser.parse_args()
    records: Records = {
        (found["part"], found["workload"], found["peer"], found["metric"]): found
        for path in arguments.records
        for found in record.read(path)
    }
    sections = tables(records)
    images = plots.draw(records, arguments.plots)
    if images:
        places = [os.path.relpath(image, arguments.readme.parent) for image in images]
        sections["plots"] = "\n\n".join(f"![{p.stem}]({at})" for p, at in zip(images, places))
    write_into(arguments.readme, sections)
    print(f"{arguments.readme}: {', '.join(sections)}")


if __name__ == "__main__":
    main()
