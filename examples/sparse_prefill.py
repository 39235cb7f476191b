"""Sparse prefill at the head shapes of Qwen2.5-7B: `python examples/sparse_prefill.py [tokens]`.

Finds the lines that matter from the last 64 queries, attends along them, and measures what was kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from stretto.ops import attention, rope
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
VERTICALS, SLASHES = 200, 300

T = TypeVar("T")


def rotated(tokens: int, heads: int, seed: int) -> Tensor:
    """Random vectors around a mean of their head, rotated by position: queries and keys of trained models look like this, and draw slashes."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, 1, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(7)).repeat_interleave(heads // KV_HEADS, 2)
    x = torch.randn(1, tokens, heads, HEAD_DIM, generator=generator) + 1.2 * mean
    cosine, sine = rope.table(torch.arange(tokens), HEAD_DIM, 1e6)[:, None].chunk(2, -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2).bfloat16()


def timed(what: str, run: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = run()
    print(f"{what:24} {time.perf_counter() - start:6.2f} s")
    return result


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    q, k = rotated(tokens, HEADS, 0), rotated(tokens, KV_HEADS, 1)
    k[:, :4] *= 2  # the first tokens draw attention
    v = torch.randn(1, tokens, KV_HEADS, HEAD_DIM).bfloat16()
    lists = timed("index", lambda: attention.vertical_slash_index(q, k, VERTICALS, SLASHES))
    out, lse = timed("sparse prefill", lambda: attention.sparse_prefill(q, k, v, *lists))
    want, dense_lse = timed("dense prefill", lambda: attention.dense(q, k, v, causal=True))
    kept = (lse - dense_lse).exp()
    error = (out - want).float().norm() / want.float().norm()
    print(f"attention kept: mean {kept.mean():.3f}, lowest head {kept.mean((0, 1)).min():.3f}; relative error of the output {error:.3f}")


if __name__ == "__main__":
    main()
