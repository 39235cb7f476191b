"""Sequences with their own keys and values, and every way of laying them out in pages: what attention must not notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from stretto.ops import attention, ref
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True)
class Seq:
    """Rows q [n, heads, d] behind `cached` positions; k, v [cached + n, kv_heads, d] as stored; scales [cached + n, kv_heads] with int8."""

    q: Tensor
    k: Tensor
    v: Tensor
    cached: int
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    parent: tuple[int, ...] | None = None  # of a tree: slots cached + i hold its nodes

    def rows(self, begin: int, end: int) -> Seq:
        """The causal rows of positions [begin, end), of a sequence that was given as a whole."""
        assert self.parent is None
        cut = [None if t is None else t[:end] for t in (self.k, self.v, self.k_scale, self.v_scale)]
        return Seq(self.q[begin - self.cached : end - self.cached], cut[0], cut[1], begin, cut[2], cut[3])  # type: ignore[arg-type]

    def path(self, node: int) -> tuple[list[int], Seq]:
        """The nodes from the root to `node`, and the causal sequence that has them behind the prefix."""
        assert self.parent is not None
        nodes = [node]
        while self.parent[nodes[0]] >= 0:
            nodes.insert(0, self.parent[nodes[0]])
        slots = [*range(self.cached), *(self.cached + n for n in nodes)]
        kept = [None if t is None else t[slots] for t in (self.k, self.v, self.k_scale, self.v_scale)]
        return nodes, Seq(self.q[nodes], kept[0], kept[1], self.cached, kept[2], kept[3])  # type: ignore[arg-type]


def make_seq(
    seed: int, cached: int, new: int, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.float32,
    parent: Sequence[int] | None = None, scale: float = 1.0,
) -> Seq:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    n = cached + new
    q = scale * torch.randn(new, heads, head_dim, generator=g)
    if dtype == torch.int8:
        k, v = (torch.randint(-127, 128, (n, kv_heads, head_dim), generator=g).to(dtype) for _ in range(2))
        scales = [torch.rand(n, kv_heads, generator=g) / 64 + 1e-3 for _ in range(2)]
        return Seq(q, k, v, cached, *scales, parent=None if parent is None else tuple(parent))
    k, v = (torch.randn(n, kv_heads, head_dim, generator=g).to(dtype) for _ in range(2))
    return Seq(q, k, v, cached, parent=None if parent is None else tuple(parent))


def arguments(seqs: Sequence[Seq], page_size: int = 16, seed: int = 0, window: int | None = None, softcap: float | None = None) -> dict[str, object]:
    """Keyword arguments of attention.paged: pages in random order, unused slots NaN, ids behind the used part of the table huge."""
    kv_heads, head_dim, dtype = seqs[0].k.shape[1], seqs[0].k.shape[2], seqs[0].k.dtype
    need = [-(-len(s.k) // page_size) for s in seqs]
    order = torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(seed)).int()
    poison = 77 if dtype == torch.int8 else NAN
    k_pages = torch.full((len(order), kv_heads, head_dim, page_size), poison, dtype=dtype)
    v_pages = torch.full((len(order), kv_heads, page_size, head_dim), poison, dtype=dtype)
    scales = [torch.full((len(order), kv_heads, page_size), NAN) for _ in range(2)] if dtype == torch.int8 else [None, None]
    table = torch.full((len(seqs), max(need) + 1), 2**31 - 1, dtype=torch.int32)
    masks, starts, taken = [], [], 0
    words = max([(len(s.parent) + 63) // 64 for s in seqs if s.parent is not None], default=0)
    for r, s in enumerate(seqs):
        table[r, : need[r]] = order[taken : taken + need[r]]
        taken += need[r]
        at = torch.arange(len(s.k))
        page, offset = table[r, at // page_size].long(), at % page_size
        k_pages[page, :, :, offset], v_pages[page, :, offset, :] = s.k, s.v
        for pages, values in zip(scales, (s.k_scale, s.v_scale), strict=True):
            if pages is not None:
                pages[page, :, offset] = values
        starts.append(-1 if s.parent is None else sum(len(m) for m in masks))
        if s.parent is not None:
            mask = ref.tree.ancestor_mask(torch.tensor([s.parent]), torch.tensor([len(s.parent)]))[0][0]
            masks.append(torch.nn.functional.pad(mask, (0, words - mask.shape[1])))
    ends = torch.tensor([len(s.q) for s in seqs]).cumsum(0).int()
    return {
        "q": torch.cat([s.q for s in seqs]), "k_pages": k_pages, "v_pages": v_pages, "table": table, "cu_q": torch.cat([torch.zeros(1).int(), ends]),
        "cached": torch.tensor([s.cached for s in seqs], dtype=torch.int32), "scale": head_dim**-0.5, "window": window, "softcap": softcap,
        "mask": torch.cat(masks) if masks else None, "mask_start": torch.tensor(starts, dtype=torch.int32) if masks else None,
        "k_scales": scales[0], "v_scales": scales[1],
    }  # fmt: skip


def attend(seqs: Sequence[Seq], page_size: int = 16, seed: int = 0, window: int | None = None, softcap: float | None = None) -> list[Tensor]:
    """The rows of each sequence, out of one call into an output full of NaN."""
    args = arguments(seqs, page_size, seed, window, softcap)
    out = torch.full_like(args["q"], NAN)  # type: ignore[call-overload]
    attention.paged(**args, out=out)  # type: ignore[arg-type]
    return list(out.split([len(s.q) for s in seqs]))
