"""A generation that is read while it runs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from stretto.engine.request import Request
from stretto.engine.results import Delta


class Stream:
    """Iterator over the deltas of one generation; the last one carries the result.

    Leaving it early, by `close`, at the end of a `with` block, by Ctrl-C or by dropping it, ends the generation and frees its pages.
    """

    def __init__(
        self, request: Request, advance: Callable[[Request], None], cancel: Callable[[Request], None], drop: Callable[[Request], None]
    ) -> None:
        """advance: brings the request on by a step. cancel: ends it. drop: as cancel, where waiting for a lock is not allowed."""
        self._request, self._advance, self._cancel, self._drop = request, advance, cancel, drop

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        request = self._request
        while not request.deltas:
            if request.error is not None:
                raise request.error
            if request.finished:
                raise StopIteration
            try:
                self._advance(request)
            except BaseException:
                self.close()
                raise
        return request.deltas.popleft()

    def close(self) -> None:
        """End the generation if it still runs; nothing more comes."""
        self._cancel(self._request)
        self._request.deltas.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._request.finished:
            self._drop(self._request)
