"""Medians and spreads of interleaved samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """Of paired samples: median, and the smallest and largest pair."""

    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """How many times faster ours was: peer's seconds over ours, round by round, so that a slow moment of the machine cancels.

    Raises: ValueError where the numbers of rounds differ or are zero.
    """
    if len(ours) != len(peer) or not ours:
        raise ValueError(f"paired_ratio: peer: {len(peer)} samples, expected as many as ours, {len(ours)}, and at least one")
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names in an order that starts one later each turn: no engine always runs first, or always after the same one."""
    at = turn % len(names) if names else 0
    return [*names[at:], *names[:at]]
