"""Captured steps: Python that calls ops runs once, and its kernel calls are replayed without Python from then on."""

from __future__ import annotations

from collections.abc import Callable

from stretto.ops import _backend


class Captured:
    """A recorded sequence of kernel calls.

    The recording holds every tensor it was given, so outputs keep their place in memory. What differs from step to step must be read from small
    integer tensors (row counts, positions, page tables): the calls themselves never change. Without the native module the function runs again
    instead, with the same effect.
    """

    def __init__(self, function: Callable[[], None], record: bool = True) -> None:
        self._function = function
        self._step = _backend._C.Step() if record and _backend._C is not None else None
        if self._step is None:
            return
        self._step.start()
        try:
            function()
        finally:
            self._step.stop()

    def run(self, threads: int) -> None:
        """Make all calls in order with `threads` threads; the interpreter lock is released."""
        if self._step is None:
            self._function()
        else:
            self._step.run(threads)

    def run_timed(self, threads: int) -> list[tuple[str, float]]:
        """As run, and (op, microseconds) for each call."""
        if self._step is None:
            self._function()
            return []
        timed: list[tuple[str, float]] = self._step.run_timed(threads)
        return timed

    def __len__(self) -> int:
        return 0 if self._step is None else len(self._step)


def capture(function: Callable[[], None], record: bool = True) -> Captured:
    """Run `function` once while its kernel calls are recorded.

    Only stretto ops with given outputs may appear in it: a torch op would run now and be missing from the replay. record=False is for
    functions that hold torch ops: they run again each time.
    """
    return Captured(function, record)
