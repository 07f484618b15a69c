"""The picture of a migration: page states over time, and the latency of the faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from uspace_mm.demo.report import STATE_NAMES, map_states
from uspace_mm.errors import InputError, UnsupportedError

_COLOURS = ("#3a3a3a", "#2e7d32", "#c62828", "#ffd600", "#29b6f6", "#d500f9")
_ROWS = 400


def check_plot(path: Path) -> None:
    """Raise before the work is done for nothing: no matplotlib, or nowhere to put the picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "--plot needs matplotlib: `pip install 'uspace-mm[plot]'`, or leave the option out"
        ) from error
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path}: expected a name that ends in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no directory {path.absolute().parent}")


def _picture(timeline: list[tuple[float, str]], rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One row per moment, evenly spaced, of the states then."""
    times = np.array([time for time, _ in timeline])
    moments = np.linspace(times[0], times[-1], rows)
    chosen = np.clip(np.searchsorted(times, moments, side="right") - 1, 0, len(timeline) - 1)
    maps = [map_states(text) for _, text in timeline]
    bins = max(states.size for states in maps)
    return np.array([maps[i] if maps[i].size == bins else np.zeros(bins, np.uint8) for i in chosen])


def _draw_map(axes: Any, timeline: list[tuple[float, str]], size_mib: float, title: str) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    begin, end = timeline[0][0], timeline[-1][0]
    axes.imshow(
        _picture(timeline, _ROWS),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(_COLOURS),
        vmin=-0.5,
        vmax=len(_COLOURS) - 0.5,
        extent=(0, size_mib, (end - begin) * 1e3, 0),
    )
    axes.set_xlabel("address (MiB)")
    axes.set_ylabel("time (ms)")
    axes.set_title(title)
    handles = [Patch(color=colour, label=name) for colour, name in zip(_COLOURS, STATE_NAMES, strict=True)]
    axes.legend(
        handles=handles, ncols=len(handles), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False
    )


def _postcopy_only(timeline: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """From the last moment before pages were missing to the first one when none was any more."""
    missing = [bool((map_states(text) == STATE_NAMES.index("missing")).any()) for _, text in timeline]
    if True not in missing:
        return []
    first, last = missing.index(True), len(missing) - 1 - missing[::-1].index(True)
    return timeline[max(first - 1, 0) : last + 2]


def _draw_latency(axes: Any, result: dict[str, Any], histogram: list[tuple[int, int, int]]) -> None:
    axes.set_title("latency of faults at the destination")
    axes.set_xlabel("microseconds")
    axes.set_ylabel("faults")
    if not histogram:
        axes.text(0.5, 0.5, "the histogram is at the destination", ha="center", transform=axes.transAxes)
        return
    # Eight columns per decade: the buckets' own width (1/32) would be a comb.
    lows = np.array([max(low, 1) for low, _, _ in histogram], float)
    counts = np.array([count for _, _, count in histogram])
    first, last = np.floor(np.log10(lows.min()) * 8), np.floor(np.log10(lows.max()) * 8) + 1
    edges = 10 ** (np.arange(first, last + 1) / 8)
    columns, _ = np.histogram(lows, bins=edges, weights=counts)
    axes.bar(
        edges[:-1] / 1e3,
        columns,
        width=np.diff(edges) / 1e3,
        align="edge",
        color="#29b6f6",
        edgecolor="white",
    )
    axes.set_xscale("log")
    for name, colour in (("p50", "#2e7d32"), ("p99", "#ef6c00"), ("p999", "#c62828")):
        value = result[f"fault_{name}_ns"] / 1e3
        axes.axvline(value, color=colour, linestyle="--", label=f"{name} {value:,.1f} us")
    axes.legend(frameon=False)


def plot(
    path: Path,
    result: dict[str, Any],
    timeline: list[tuple[float, str]],
    histogram: list[tuple[int, int, int]],
) -> None:
    """Write the picture to `path`. `timeline`: seconds, and what ``report.page_map`` made of that moment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timeline = [(time, states) for time, states in timeline if states]
    zoom = _postcopy_only(timeline)
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 14), height_ratios=(3, 3, 2), layout="constrained")
    try:
        size_mib = result["pages_total"] * result["page_size"] / (1 << 20)
        if timeline:
            _draw_map(axes[0], timeline, size_mib, "pages of the destination")
        if zoom:
            _draw_map(axes[1], zoom, size_mib, "the same, while pages were missing")
        else:
            axes[1].set_axis_off()
        _draw_latency(axes[2], result, histogram)
        downtime = f"downtime {result['downtime_ms']:.1f} ms, {result['faults']:,} faults"
        figure.suptitle(
            f"postcopy of {size_mib:,.0f} MiB: {downtime}, {result['pages_verified']:,} pages verified"
        )
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InputError(f"--plot {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)
