"""Attention over grids of video tokens: full, windows, tiles, causal in time, in the network's own layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, check_tensors, dtype_as, rows_contiguous
from stretto.ops.attention.prefill import check_attention, empty_result, torch_sdpa
from stretto.ops.table import BadCase, Case, Cost, Make, register

AXES = ("frames", "rows", "columns")


def attention3d(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], window: Sequence[int] | None = None, stride: Sequence[int] = (1, 1, 1),
    causal: bool = False, scale: float | None = None, softcap: float | None = None, frames: Tensor | None = None, rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a (frames, rows, columns) grid of tokens, without a permute pass.

    Along each axis a query sees exactly `window` keys around it; at borders the window moves inwards. Queries of the same run of `stride`
    share the window of the run's middle: stride 1 is neighbourhood attention, stride = window blocks, and sliding tiles of size s with k
    tiles (k odd) are window k * s with stride s. Window (0, 1, 1) is temporal attention, place by place.

    Args:
        q: [batch, frames * rows * columns, heads, head_dim], float32 / float16 / bfloat16; every stride but the last is free.
        k, v: [batch, key frames * rows * columns, kv_heads, head_dim] of q's dtype. There may be more frames of keys than of queries: the
            queries are the last frames, those before them are a cache.
        grid: (frames, rows, columns) of the queries. window, stride: along each axis; window 0 or None: all keys.
        causal: a query sees no later frames; its time window reaches back from the end of its run.
        scale, softcap: as for `dense`.
        frames: [batch, n] int32: k and v are a pool [1, slots * rows * columns, kv_heads, head_dim], and entry b's frame f is slot
            frames[b, f]. A ring buffer, a fork, and dropped frames are changes of this table alone.
        rope: [key frames * rows * columns, head_dim] float32, cosines of the pairs (2 i, 2 i + 1), then sines, as from rope3d_table: rotates
            queries and keys as they are loaded, by their places in time order; k stays un-rotated.
    Returns: (out, lse) as from `dense`. Full attention has the bits of `dense`. With windows a row's bits depend on its query, the keys it
        sees and the grid, not on the batch, other heads or threads.
    Raises: ValueError naming the argument and axis.
    Source: arXiv 2204.07143, 2502.04507. Reference: ops.ref.attention.attention3d. Bound by compute; temporal attention by memory.
    """
    if needs_dispatch(q, k, v, rope):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.attention3d(
            q, k, v, list(grid), None if window is None else list(window), list(stride), causal, scale, softcap, frames, rope
        )
        return result
    return _attention3d(q, k, v, grid, window, stride, causal, scale, softcap, frames, rope)


def _attention3d(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], window: Sequence[int] | None = None, stride: Sequence[int] = (1, 1, 1),
    causal: bool = False, scale: float | None = None, softcap: float | None = None, frames: Tensor | None = None, rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "attention.attention3d"
    if frames is None:
        scale = check_attention(op, q, k, v, scale, softcap, rope=(rope, "keys head_dim", F32))
    else:
        check_tensors(op, q=(q, "batch rows heads head_dim", FLOATS), frames=(frames, "batch _", I32), k=(k, "1 _ _ _", dtype_as(q)))
        check_tensors(op, q=(q, "_ rows heads head_dim", FLOATS), rope=(rope, "_ head_dim", F32))
        scale = check_attention(op, q[:1], k, v, scale, softcap)
    window = (0, 0, 0) if window is None else window
    for name, sizes in (("grid", grid), ("window", window), ("stride", stride)):
        check(len(sizes) == 3, f"{op}: {name}: {list(sizes)}, expected three sizes")
    check(min(grid) >= 0 and grid[0] * grid[1] * grid[2] == q.shape[1], f"{op}: grid: {list(grid)}, expected the {q.shape[1]} rows of q")
    place = grid[1] * grid[2]
    if frames is not None:
        key_frames = frames.shape[1]
        check(place == 0 or k.shape[1] % place == 0, f"{op}: k: {k.shape[1]} rows, expected whole frames of {place}")
        check(rope is None or rope.shape[0] == key_frames * place, f"{op}: rope: expected {key_frames * place} rows")
    else:
        check(k.shape[1] % place == 0 if place else k.shape[1] == 0, f"{op}: k: {k.shape[1]} rows, expected whole frames of {place}")
        key_frames = k.shape[1] // place if place else grid[0]
    check(key_frames >= grid[0], f"{op}: k: {key_frames} frames, expected at least the {grid[0]} of grid")
    for axis, n, w, s in zip(AXES, (key_frames, grid[1], grid[2]), window, stride, strict=True):
        check(0 <= w <= n, f"{op}: window: {w} along {axis}, expected at most {n}, or 0 for all")
        check(s >= 1 and (w == 0 or s <= w), f"{op}: stride: {s} along {axis}, expected 1 to the window {w}")
    check(rope is None or q.shape[3] % 2 == 0, f"{op}: rope: head_dim {q.shape[3]}, expected an even one")
    if _backend.use_reference("attention3d", q):
        return ref.attention.attention3d(q, k, v, grid, window, stride, causal, scale, softcap, frames, rope)
    out, lse = empty_result(q)
    _backend._C.attention3d(  # type: ignore[union-attr]
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), list(grid), key_frames, list(window), list(stride), causal, scale,
        softcap or 0.0, None if frames is None else frames.contiguous(), None if rope is None else rope.contiguous(), out, lse,
    )  # fmt: skip
    return out, lse


def rope3d_table(grid: Sequence[int], dims: Sequence[int], theta: float = 10000.0, first_frame: int = 0) -> Tensor:
    """Cosines and sines for attention3d: the pairs of a head are shared out over the axes.

    Args:
        grid: (frames, rows, columns) of the keys. dims: how many dimensions of the head turn with each axis, even; their sum is head_dim.
        theta: base of the frequencies. first_frame: number of the grid's first frame.
    Returns: [frames * rows * columns, sum(dims)] float32, cosines, then sines; computed in float64.
    Raises: ValueError naming the argument.
    """
    check(len(grid) == 3 and len(dims) == 3, f"attention.rope3d_table: grid, dims: {list(grid)}, {list(dims)}, expected three sizes each")
    check(all(d >= 0 and d % 2 == 0 for d in dims), f"attention.rope3d_table: dims: {list(dims)}, expected even numbers")
    angles = []
    for axis, (n, d) in enumerate(zip(grid, dims, strict=True)):
        position = torch.arange(n, dtype=torch.float64) + (first_frame if axis == 0 else 0)
        angle = position[:, None] * theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / max(d, 1))
        shape = [1, 1, 1, d // 2]
        shape[axis] = n
        angles.append(angle.reshape(shape).expand(*grid, d // 2))
    angle = torch.cat(angles, -1).reshape(-1, sum(dims) // 2)
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def make_grid(
    make: Make, batch: int, grid: tuple[int, int, int], heads: int, kv_heads: int, head_dim: int, key_frames: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, list[int]]:  # fmt: skip
    """Random (q, k, v, grid)."""
    place = grid[1] * grid[2]
    rows, keys = grid[0] * place, (key_frames or grid[0]) * place
    q = make.randn(batch, rows, heads, head_dim, dtype=dtype)
    k, v = (make.randn(batch, keys, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v, list(grid)


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        yield Case(f"full-{dtype}", make_grid(make, 2, (3, 4, 5), 2, 2, 64, dtype=dtype))
        yield Case(f"window-{dtype}", (*make_grid(make, 1, (4, 7, 19), 2, 2, 72, dtype=dtype), [3, 4, 5]))
    for window, stride in [([1, 3, 3], [1, 2, 3]), ([2, 6, 7], [2, 3, 1]), ([0, 1, 1], [1, 1, 1]), ([5, 0, 3], [1, 1, 1]), ([4, 6, 0], [4, 2, 1])]:
        for causal in (False, True):
            yield Case(f"{window}-{stride}-{causal}", (*make_grid(make, 1, (5, 6, 7), 2, 1, 32), window, stride, causal))
    yield Case("frame-causal", (*make_grid(make, 1, (3, 5, 5), 3, 1, 32, key_frames=7), None, [1, 1, 1], True))
    yield Case("grouped-heads", (*make_grid(make, 1, (2, 5, 20), 100, 1, 16), [1, 5, 6]))
    yield Case(
        "rope",
        (*make_grid(make, 1, (2, 3, 4), 2, 2, 24, key_frames=4), [0, 3, 3], [1, 1, 1], True, None, 9.0, None, rope3d_table((4, 3, 4), (8, 8, 8))),
    )
    q, _k, _v, grid = make_grid(make, 3, (1, 4, 4), 2, 2, 32)
    pool = [make.randn(1, 6 * 16, 2, 32) for _ in range(2)]
    frames = torch.tensor([[0, 1, 5], [0, 2, 4], [3, 3, 3]], dtype=torch.int32)
    yield Case("pool", (q, *pool, grid, [2, 3, 3], [1, 1, 1], True, None, None, frames, rope3d_table((3, 4, 4), (16, 8, 8))))
    yield Case("empty", make_grid(make, 1, (0, 4, 4), 2, 2, 32))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    q, k, v, grid = make_grid(make, 1, (2, 3, 4), 2, 2, 16)
    op = "attention.attention3d"
    yield BadCase("grid", (q, k, v, [2, 3, 5]), f"{op}: grid: [2, 3, 5]")
    yield BadCase("sizes", (q, k, v, grid, [1, 2]), f"{op}: window: [1, 2], expected three")
    yield BadCase("window", (q, k, v, grid, [1, 4, 4]), f"{op}: window: 4 along rows")
    yield BadCase("stride", (q, k, v, grid, [1, 3, 2], [1, 1, 3]), f"{op}: stride: 3 along columns")
    yield BadCase("frames-of-k", (q, k[:, :12], v[:, :12], grid), f"{op}: k: 1 frames")
    yield BadCase("part-of-a-frame", (q, k[:, :17], v[:, :17], grid), f"{op}: k: 17 rows")
    yield BadCase("rope", (q, k, v, grid), f"{op}: rope: shape", {"rope": torch.zeros(5, 16)})
    for bad in (-1, 2, 2**31 - 1, -(2**31)):
        yield BadCase(f"slot{bad}", (q, k, v, grid), f"{op}: frames: {bad} at 1", {"frames": torch.tensor([[0, bad]], dtype=torch.int32)})


def _cost(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], window: Sequence[int] | None = None, stride: Sequence[int] = (1, 1, 1),
    causal: bool = False, scale: float | None = None, softcap: float | None = None, frames: Tensor | None = None, rope: Tensor | None = None,
) -> Cost:  # fmt: skip
    key_frames = k.shape[1] // (grid[1] * grid[2]) if frames is None else frames.shape[1]
    pairs = q.shape[0]
    for n, m, w, s, c in zip(grid, (key_frames, grid[1], grid[2]), window or (0, 0, 0), stride, (causal, False, False), strict=True):
        pairs *= int(ref.attention.seen_along(n, m, w, s, c).sum())
    return Cost(2 * q.nbytes + k.nbytes + v.nbytes, 4 * pairs * q.shape[2] * q.shape[3])


def _bench_cases(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"video (8,16,16) x 8 x 64 full {dtype}", make_grid(make, 1, (8, 16, 16), 8, 8, 64, dtype=dtype))
        yield Case(f"video (8,16,16) x 8 x 64 window (4,6,7) {dtype}", (*make_grid(make, 1, (8, 16, 16), 8, 8, 64, dtype=dtype), [4, 6, 7]))
        yield Case(f"video (8,16,16) x 8 x 64 tiles (6,6,4) of (2,2,4) {dtype}",
                   (*make_grid(make, 1, (8, 16, 16), 8, 8, 64, dtype=dtype), [6, 6, 4], [2, 2, 4]))  # fmt: skip
    yield Case("STDiT temporal 8 of 33 frames, 256 places, 16 x 72",
               (*make_grid(make, 2, (8, 16, 16), 16, 16, 72, key_frames=33), [0, 1, 1], [1, 1, 1], True))  # fmt: skip


def _sees(grid: Sequence[int], window: Sequence[int], stride: Sequence[int], causal: bool, key_frames: int) -> Tensor:
    return ref.attention.grid_sees(grid, key_frames, window, stride, causal)[None, None]


def _flex(q: Tensor, k: Tensor, v: Tensor, grid: list[int], window: list[int], stride: Sequence[int] = (1, 1, 1), causal: bool = False) -> Tensor:
    from stretto.ops.attention.peers import flex

    key_frames = k.shape[1] // (grid[1] * grid[2])
    return flex((*grid, *window, *stride, causal, key_frames), lambda: _sees(grid, window, stride, causal, key_frames), q, k, v)


def _masked(q: Tensor, k: Tensor, v: Tensor, grid: list[int], window: list[int], stride: Sequence[int] = (1, 1, 1), causal: bool = False) -> Tensor:
    from stretto.ops.attention.peers import sdpa_masked

    key_frames = k.shape[1] // (grid[1] * grid[2])
    return sdpa_masked((*grid, *window, *stride, causal, key_frames, q.dtype), lambda: _sees(grid, window, stride, causal, key_frames), q, k, v)


def _temporal_sdpa(q: Tensor, k: Tensor, v: Tensor, grid: list[int], window: list[int], stride: Sequence[int], causal: bool) -> Tensor:
    """torch as these models call it: places become batch entries by a copy, then SDPA with a mask."""
    if window[1:] != [1, 1]:
        raise NotImplementedError("temporal attention only")
    place = grid[1] * grid[2]
    q, k, v = (x.unflatten(1, (-1, place)).transpose(1, 2).flatten(0, 1).transpose(1, 2).contiguous() for x in (q, k, v))
    mask = ref.attention.dense_sees(q.shape[2], k.shape[2], causal, None)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


register(
    "attention3d(Tensor q, Tensor k, Tensor v, SymInt[] grid, SymInt[]? window=None, SymInt[] stride=[1, 1, 1], bool causal=False, "
    "float? scale=None, float? softcap=None, Tensor? frames=None, Tensor? rope=None) -> (Tensor, Tensor)",
    _attention3d,
    function=attention3d,
    reference=ref.attention.attention3d,
    fake=lambda q, *_, **__: empty_result(q),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=_cost,
    bound="compute",
    tolerance=4.0,  # as dense_attention
    peers={
        "torch sdpa": lambda q, k, v, grid: torch_sdpa(q, k, v),
        "FlexAttention compiled": _flex,
        "masked torch sdpa": _masked,
        "torch permute and sdpa": _temporal_sdpa,
    },
    source="arXiv 2204.07143, 2502.04507",
)
