"""What a step costs by its number of rows, on this machine, with this model, at the present contexts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

WIDTHS = (1, 2, 4, 8, 16)
"""Measured widths; a CPU's steps grow on a line beyond them."""

FALL, RISE = 0.5, 0.1
"""Shares of a step's surprise that move the curve. Noise only adds time: a quick step is believed sooner than a slow one."""

CLIP = 2.0
"""One step counts as at most this many times what was expected."""

PROBE_SHARE = 1 / 200
"""Share of the time that may go into steps made only to keep the curve true."""


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a step by its number of rows."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: int) -> float:
        """Seconds of a step over `rows` rows: between measured points on a line, beyond them along the last one."""
        if rows <= self.rows[0] or len(self.rows) == 1:
            return self.seconds[0] * max(rows, 1)
        i, share = self.place(rows)
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])

    def place(self, rows: int) -> tuple[int, float]:
        """The point at or above `rows` (the last one beyond them), and how far on the way from the point before it `rows` lies."""
        i = next((i for i in range(1, len(self.rows)) if rows <= self.rows[i]), len(self.rows) - 1)
        return i, (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])

    def relative(self) -> dict[int, float]:
        """c(N) = t(N rows) / t(1 row) at the measured widths."""
        return {r: s / self.seconds[0] for r, s in zip(self.rows, self.seconds, strict=True)}


class CostMeter:
    """Keeps a cost curve true without stopping anybody for it.

    It is measured once, at the first use, with about thirty steps' time. Then every decoding step corrects it, since both the contexts and who
    else uses the machine change; and now and then one step is made only to look at the width that was not seen for longest, so that a
    measurement taken at a bad moment does not last.
    """

    def __init__(self) -> None:
        self._rows: tuple[int, ...] = ()
        self._seconds: list[float] = []
        self._seen: list[float] = []  # when each width was last observed
        self._next_probe = 0.0
        self._learns = True

    @property
    def curve(self) -> CostCurve | None:
        """None until something was measured."""
        return CostCurve(self._rows, tuple(self._seconds)) if self._rows else None

    def assume(self, curve: CostCurve) -> None:
        """Take this curve and learn nothing more."""
        self._rows, self._seconds, self._learns = curve.rows, list(curve.seconds), False

    @property
    def due(self) -> bool:
        """Whether `refresh` would measure something now."""
        return self._learns and time.monotonic() >= self._next_probe

    def refresh(self, step: Callable[[int], float], limit: int) -> None:
        """Measure what is due with `step(rows) -> seconds`, of at most `limit` rows. An exception of `step` leaves the curve as it was."""
        if not self.due:
            return
        start = time.monotonic()
        widths = tuple(w for w in WIDTHS if w <= limit)
        if len(self._rows) < len(widths):  # for the first time, or until now by a request near the end of its context
            seconds = [min(step(w), step(w)) for w in widths]
            # A step of fewer rows takes no longer: what says otherwise is noise.
            self._rows, self._seconds, self._seen = widths, [min(seconds[i:]) for i in range(len(widths))], [start] * len(widths)
        else:
            i = min(range(len(widths)), key=lambda i: self._seen[i])
            self.observe(widths[i], step(widths[i]))
        self._next_probe = time.monotonic() + (time.monotonic() - start) / PROBE_SHARE

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`: the points beside it move, each by its share."""
        if not self._learns or not self._rows:
            return
        curve = CostCurve(self._rows, tuple(self._seconds))
        ratio = min(max(seconds / curve(rows), 1 / CLIP), CLIP)
        move = (ratio - 1) * (FALL if ratio < 1 else RISE)
        i, share = curve.place(rows) if rows > self._rows[0] and len(self._rows) > 1 else (0, 1.0)
        for point, weight in ((i - 1, 1 - share), (i, min(share, 1.0))):
            if weight > 0:
                self._seconds[point] *= 1 + move * weight
            if weight > 0.5:
                self._seen[point] = time.monotonic()
