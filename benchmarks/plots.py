"""Pictures of one save: its moments, and the steps that ran meanwhile."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks.stall import MOMENTS

_COLORS = {
    "none": "#999999",
    "floor": "#66ccee",
    "stock_default": "#cc3311",
    "stock_best": "#ee7733",
    "lazy": "#0077bb",
}
_VARIANT_COLORS = (
    *("#009988", "#aa3377", "#ddaa33", "#332288", "#117733", "#88ccee", "#882255", "#999933"),
    *("#44aa99", "#cc6677", "#6699cc", "#994455"),
)
_MOMENT_COLORS = {"enqueued": "#cc3311", "staged": "#ee9955", "durable": "#88bbdd"} | {
    "committed": "#bbbbbb"
}
_MEANINGS = {
    "enqueued": "save(): training waits",
    "staged": "copy to the host",
    "durable": "write",
    "committed": "until committed",
}
_BEFORE_S = 0.5


def colors(names: Iterable[str]) -> dict[str, str]:
    """Returns a color for each peer: its own, or the next that no peer before it has."""
    variants = itertools.cycle(_VARIANT_COLORS)
    return {name: _COLORS.get(name) or next(variants) for name in names}


def draw(records: dict[tuple[str, str, str, str], dict[str, Any]], directory: Any) -> list[Any]:
    """Draws what the records of `stall` allow. Returns the images, none without matplotlib."""
    traces: dict[str, dict[str, Any]] = {}
    for (_, workload, peer, metric), found in records.items():
        if metric == "trace" and found["trace"]:
            traces.setdefault(workload, {})[peer] = found["trace"]
    if not traces:
        return []
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _timelines(traces, directory / "timeline.png"),
        _steps(traces, directory / "steps.png"),
    ]


def _figure(rows: int, row_height: float) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, 1, figsize=(10, row_height * rows), squeeze=False, layout="constrained"
    )
    return figure, list(axes[:, 0])


def _saved(figure: Any, path: pathlib.Path) -> pathlib.Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _last_save(trace: dict[str, Any]) -> tuple[float, float]:
    """When the last save of the loop began, in the loop, and how long `save()` took."""
    return tuple(trace["saves"][-1]) if trace["saves"] else (0.0, 0.0)


def _moments(trace: dict[str, Any]) -> dict[str, float]:
    """The moments of the last save. Stock Orbax shows only the first and, by step, the last."""
    if trace["moments"]:
        return trace["moments"][-1]
    begin_s, save_s = _last_save(trace)
    overlapped = [s + took for s, took, in_flight in trace["steps"] if in_flight and s > begin_s]
    return {"enqueued": save_s, "committed": max([save_s, *(end - begin_s for end in overlapped)])}


def _timelines(traces: dict[str, dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """One bar for each peer: its save above, the steps that ran meanwhile below."""
    figure, axes = _figure(len(traces), 2.6)
    for axis, (workload, peers) in zip(axes, traces.items()):
        shown = [name for name in peers if name != "none" and peers[name]["saves"]]
        until_s = 0.0
        for row, name in enumerate(shown):
            moments, start_s = _moments(peers[name]), 0.0
            for moment in MOMENTS:
                if (end_s := moments.get(moment)) is not None:
                    axis.barh(
                        row - 0.18, max(0.0, end_s - start_s), 0.34, start_s,
                        color=_MOMENT_COLORS[moment],
                        label=_MEANINGS[moment],
                    )  # fmt: skip
                    start_s = max(start_s, end_s)
            until_s = max(until_s, start_s)
            begin_s, _ = _last_save(peers[name])
            spans = [(s - begin_s, took) for s, took, _ in peers[name]["steps"] if s >= begin_s]
            axis.broken_barh(spans, (row + 0.06, 0.26), color="#55aa77", edgecolor="white")
        axis.set(title=workload, xlabel="seconds since save() was called; green: training steps")
        axis.set_xlim(0, 1.15 * until_s or 1)
        axis.set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown])
        axis.invert_yaxis()
    found = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels())}
    labels = [label for label in _MEANINGS.values() if label in found]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1)
    return _saved(figure, path)


def _steps(traces: dict[str, dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """The time of each step around a save; a cross is the time inside `save()`."""
    figure, axes = _figure(len(traces), 3.0)
    color_of = colors(dict.fromkeys(name for peers in traces.values() for name in peers))
    for axis, (workload, peers) in zip(axes, traces.items()):
        for name, trace in peers.items():
            begin_s, save_s = _last_save(trace)
            if name == "none":
                begin_s = _last_save(next(iter(t for t in peers.values() if t["saves"])))[0]
            near = [s for s in trace["steps"] if s[0] - begin_s > -_BEFORE_S]
            times_s = [s - begin_s for s, _, _ in near]
            took_ms = [1e3 * took for _, took, _ in near]
            if name != "none":  # No line across the save.
                first = next((i for i, s in enumerate(times_s) if s >= 0), len(near))
                times_s.insert(first, 0.0)
                took_ms.insert(first, float("nan"))
            label = name.replace("_", " ")
            axis.plot(times_s, took_ms, marker=".", color=color_of[name], label=label)
            if save_s:
                axis.plot([0], [1e3 * save_s], marker="x", markersize=9, color=color_of[name])
        axis.set(title=workload, xlabel="seconds since save() was called", yscale="log")
        axis.set_ylabel("ms: step, or save() (x)")
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _saved(figure, path)
