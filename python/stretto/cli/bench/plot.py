"""The roofline picture of a result file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any


def draw(result: Mapping[str, Any], target: Path) -> None:
    """Write a PNG: what the machine allows for each ratio of operations to bytes, and where our measurements stand.

    Raises: ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("bench: plot: matplotlib is not installed; `pip install matplotlib`, or leave --plot away") from error
    runs = result["runs"]
    figure = Figure(figsize=(6.5 * len(runs), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        _roof(axes, run)
        _points(axes, run)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="Gop/s", title=f"{run['threads']} thread(s)")
        axes.legend(fontsize="small", loc="lower right")
        axes.grid(True, which="both", alpha=0.2)
    figure.suptitle(f"{Path(str(result['model'])).stem} on {result['machine']['cpu']}", fontsize="medium")
    figure.savefig(target, dpi=120)


def _roof(axes: Any, run: Mapping[str, Any]) -> None:
    limits = run["ceilings"]
    peaks = [("int8", limits["int8_gops"]), ("f32", limits["f32_gflops"])]
    for name, peak in ((n, p) for n, p in peaks if p):
        intensities = [0.5 * 2**i for i in range(14)]
        roof = [min(peak, x * limits["read_gb_per_s"]) for x in intensities]
        axes.plot(intensities, roof, label=f"{name} {peak:.0f} Gop/s, memory {limits['read_gb_per_s']:.1f} GB/s", linewidth=1)


def _points(axes: Any, run: Mapping[str, Any]) -> None:
    markers = {"decode": "o", "prefill": "s", "batch": "^", "step_cost": "."}
    for what, marker in markers.items():
        chosen = [m for m in run["measurements"] if m["what"] == what]
        if not chosen:
            continue
        intensity = [m["roofline"]["operations"] / m["roofline"]["bytes"] for m in chosen]
        axes.plot(intensity, [m["roofline"]["gops"] for m in chosen], marker, label=f"stretto, {what.replace('_', ' ')}")
        best = [_best_peer(m) for m in chosen]
        if all(best):
            axes.plot(intensity, [m["roofline"]["operations"] / s / 1e9 for m, s in zip(chosen, best, strict=True)], marker, mfc="none", color="gray")


def _best_peer(measurement: Mapping[str, Any]) -> float | None:
    """Median seconds of the fastest peer: hollow grey marks."""
    times = [median(e["seconds"]) for name, e in measurement["engines"].items() if name != "stretto"]
    return min(times, default=None)
