"""Which published page holds which run of tokens, so that a prompt finds its longest prefix that is cached already."""

from __future__ import annotations

from collections.abc import Sequence as Run

_Key = tuple[object, tuple[int, ...]]


class PrefixIndex:
    """A radix tree over page-sized runs of tokens; a node is the page itself.

    An edge is the entry (parent page, run) -> page, one dictionary for the whole tree: tokens are compared, never only
    hashed, and a step down costs well below a microsecond. Trees of different salts share nothing. A page stands in the
    tree at most once.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page: dict[_Key, int] = {}
        self._key: dict[int, _Key] = {}

    def __len__(self) -> int:
        return len(self._key)

    def __contains__(self, page: int) -> bool:
        return page in self._key

    def child(self, parent: int | None, salt: int, tokens: Run[int], index: int) -> tuple[_Key, int | None]:
        """Key of run number `index` of `tokens` below page `parent` (None: the root of `salt`), its page or None."""
        first = index * self._page_size
        key = ((salt,) if parent is None else parent, tuple(tokens[first : first + self._page_size]))
        return key, self._page.get(key)

    def match(self, tokens: Run[int], salt: int, limit: int) -> list[int]:
        """Pages of the longest known prefix of `tokens`, at most `limit` of them."""
        pages: list[int] = []
        parent = None
        for index in range(limit):
            _, parent = self.child(parent, salt, tokens, index)
            if parent is None:
                break
            pages.append(parent)
        return pages

    def add(self, key: _Key, page: int) -> None:
        self._page[key] = page
        self._key[page] = key

    def remove(self, page: int) -> None:
        del self._page[self._key.pop(page)]
