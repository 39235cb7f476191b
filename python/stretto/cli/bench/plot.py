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
    runs = result["runs"]
    figure, panels = _figure(len(runs))
    for axes, run in zip(panels, runs, strict=True):
        _roof(axes, run)
        _points(axes, run)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="Gop/s", title=f"{run['threads']} thread(s)")
        axes.legend(fontsize="small", loc="lower right")
        axes.grid(True, which="both", alpha=0.2)
    figure.suptitle(f"{Path(str(result['model'])).stem} on {result['machine']['cpu']}", fontsize="medium")
    figure.savefig(target, dpi=120)


def draw_ops(result: Mapping[str, Any], target: Path) -> None:
    """Write a PNG of `bench ops`: one mark an op and shape, filled for ours, hollow for its fastest peer.

    Raises: ImportError where matplotlib is missing.
    """
    figure, panels = _figure(len(result["ceilings"]))
    families = sorted({e["family"] for e in result["entries"]})
    for axes, limits in zip(panels, result["ceilings"], strict=True):
        bandwidth = limits.get("copy_gb_per_s") or limits["read_gb_per_s"]
        peaks = {k.removesuffix("_gflops").removesuffix("_gops"): v for k, v in limits.items() if v and k.endswith(("_gflops", "_gops"))}
        for name, peak in peaks.items():
            intensities = [2.0**i for i in range(-6, 13)]
            axes.plot(intensities, [min(peak, x * bandwidth) for x in intensities], linewidth=1, label=f"{name} {peak:.0f} G/s, {bandwidth:.0f} GB/s")
        for i, family in enumerate(families):
            entries = [e for e in result["entries"] if e["family"] == family and e["flops"] and e["threads"] == limits.get("threads")]
            intensity = [e["flops"] / e["bytes"] for e in entries]
            axes.plot(intensity, [e["gflops"] for e in entries], "o", color=f"C{i}", label=family)
            for e, x in zip(entries, intensity, strict=True):
                if e["peers"]:
                    axes.plot(x, e["flops"] / min(e["peers"].values()) / 1e3, "o", mfc="none", color=f"C{i}")
        axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="Gop/s", title=_panel_title(limits))
        axes.legend(fontsize="small", loc="lower right")
        axes.grid(True, which="both", alpha=0.2)
    figure.savefig(target, dpi=120)


def _panel_title(limits: Mapping[str, Any]) -> str:
    return str(limits.get("device") or f"{limits['threads']} thread(s)")


def _figure(panels: int) -> tuple[Any, Any]:
    """A figure and its axes, side by side."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("bench: plot: matplotlib is not installed; `pip install matplotlib`, or leave --plot away") from error
    figure = Figure(figsize=(6.5 * panels, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


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
