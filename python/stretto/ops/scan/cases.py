"""Inputs of the scan family for tests and benches: shapes and rates as trained models have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stretto.ops._check import FLOATS
from stretto.ops.table import BadCase, Case, Make

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ring_rows:
    """Small integer tensors of a call: bounds of sequences, and rows to replay."""

    @staticmethod
    def cu(*lengths: int) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @staticmethod
    def ragged() -> tuple[Tensor, Tensor]:
        """Of 8 inputs; what lies behind n is not read."""
        rows = torch.tensor([[5, 0, 3, 2, 6], [1, 4, -7, 99, 8], [7, 7, 7, 7, 7]], dtype=torch.int32)
        return rows, torch.tensor([5, 2, 0], dtype=torch.int32)

    @staticmethod
    def bench() -> tuple[Tensor, Tensor]:
        return torch.arange(64, dtype=torch.int32).view(8, 8), torch.arange(1, 9, dtype=torch.int32)

    @staticmethod
    def bad(inputs: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(fragment of the message, rows, n) of two sequences."""
        n = torch.tensor([1, 2], dtype=torch.int32)
        for row in (-1, inputs, inputs + 1, 2**31 - 1, -(2**31)):
            yield f"rows: {row} at 1, 1", torch.tensor([[0, 1], [0, row]], dtype=torch.int32), n
        for count in (-1, 3, 2**31 - 1, -(2**31)):
            yield f"n: {count} at 1", torch.zeros(2, 2, dtype=torch.int32), torch.tensor([0, count], dtype=torch.int32)


def selective_case(make: Make, tokens: int, channels: int, states: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(u, dt, A, B, C, D, z, dt_bias): A around -1 .. -states, steps of 0.001 to 0.1 and some longer ones, as Mamba is initialised."""
    u, dt, z = (make.randn(tokens, channels, dtype=dtype) for _ in range(3))
    b, c = (make.randn(tokens, groups, states, dtype=dtype) for _ in range(2))
    rates = -torch.arange(1, states + 1).float() * (1 + 0.1 * make.randn(channels, states).abs())
    return u, dt, rates, b, c, make.randn(channels), z, make.randn(channels) - 4


def selective_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:

        def case(
            name: str, *sizes: Unpack[tuple[int, int, int, int]], cu: Tensor | None = None, h0: Tensor | None = None, dtype: torch.dtype = dtype
        ) -> Case:
            return Case(f"{name}-{dtype}", (*selective_case(make, *sizes, dtype), True, h0, cu))

        yield case("ragged", 9, 34, 16, 2, cu=ring_rows.cu(5, 1, 3), h0=make.randn(3, 34, 16))
        yield case("long", 200, 80, 16, 1, cu=ring_rows.cu(129, 71))
        yield case("groups-of-16", 70, 64, 16, 4)
        yield case("odd", 7, 15, 5, 3, h0=make.randn(1, 5, 15).mT)
        yield case("many-states", 5, 18, 37, 2)
        yield case("empty-sequences", 4, 16, 16, 1, cu=ring_rows.cu(0, 4, 0), h0=make.randn(3, 16, 16))
        yield case("nothing", 0, 16, 16, 1, cu=ring_rows.cu(0, 0), h0=make.randn(2, 16, 16))
        u, dt, rates, b, c, d, z, bias = selective_case(make, 12, 20, 16, 2, dtype)
        batch = [t.view(3, 4, *t.shape[1:]) for t in (u, dt, b, c, z)]
        yield Case(f"batch-{dtype}", (batch[0], batch[1], rates, batch[2], batch[3], d, batch[4], bias, True, make.randn(3, 20, 16)))
        yield Case(f"bare-{dtype}", (u, dt.abs() * 0.1, rates, b, c))
        yield Case(f"strided-{dtype}", (u.t().contiguous().t(), dt, rates.t().contiguous().t(), b.mT.contiguous().mT, c, d, z, bias, True))
        yield Case(f"growing-{dtype}", (u, dt, -0.1 * rates, b, c, d, None, bias, True))
        yield Case(f"far-{dtype}", (u, 40 * dt.abs(), rates, b, c, d, z, None, False))


def selective_bad(make: Make) -> Iterator[BadCase]:
    op = "selective_scan"
    u, dt, a, b, c, d, z, bias = selective_case(make, 6, 8, 4, 2, torch.float32)
    yield BadCase("rank", (u[0], dt, a, b, c), f"{op}: u: shape [8]")
    yield BadCase("dtype", (u.double(), dt, a, b, c), f"{op}: u: float64")
    yield BadCase("mixed", (u, dt.half(), a, b, c), f"{op}: dt: float16")
    yield BadCase("rates-dtype", (u, dt, a.bfloat16(), b, c), f"{op}: A: bfloat16")
    yield BadCase("rates", (u, dt, a[:7], b, c), f"{op}: A: shape [7, 4]")
    yield BadCase("groups", (u, dt, a, make.randn(6, 3, 4), make.randn(6, 3, 4)), f"{op}: B: 3 groups")
    yield BadCase("no-groups", (u, dt, a, b[:, :0], c[:, :0]), f"{op}: B: 0 groups")
    yield BadCase("no-states", (u, dt, a[:, :0], b[..., :0], c[..., :0]), f"{op}: A: 0 states")
    yield BadCase("C", (u, dt, a, b, c[:, :1]), f"{op}: C: shape [6, 1, 4]")
    yield BadCase("state-dtype", (u, dt, a, b, c, d, z, bias, True, make.randn(1, 8, 4, dtype=torch.bfloat16)), f"{op}: h0: bfloat16")
    yield BadCase("state", (u, dt, a, b, c, d, z, bias, True, make.randn(2, 8, 4)), f"{op}: h0: shape [2, 8, 4]")
    for bounds in ([0, 4, 3, 6], [1, 6], [0, 5], [0, 7], [0, -1, 6], [0, 2**31 - 1, 6], []):
        cu = torch.tensor(bounds, dtype=torch.int32)
        yield BadCase(f"cu{bounds}", (u, dt, a, b, c, d, z, bias, True, None, cu), f"{op}: cu_seqlens: ")


def selective_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, channels, length in [("Mamba-130M", 1536, 1024), ("Mamba-2.8B", 5120, 512)]:
            u, dt, a, b, c, d, z, bias = selective_case(make, length, channels, 16, 1, dtype)
            yield Case(f"{name} 1 x {length} {dtype}", (u[None], dt[None], a, b[None], c[None], d, z[None], bias, True))


def ssd_case(make: Make, tokens: int, heads: int, dim: int, states: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(x, dt, A, B, C, D, z, dt_bias): A from -1 to -16, steps of 0.001 to 0.1 and some longer ones, as Mamba-2 is initialised."""
    x, z = (make.randn(tokens, heads, dim, dtype=dtype) for _ in range(2))
    b, c = (make.randn(tokens, groups, states, dtype=dtype) for _ in range(2))
    rates = -1 - 15 * torch.rand(heads, generator=make.generator)
    return x, make.randn(tokens, heads, dtype=dtype), rates, b, c, make.randn(heads), z, make.randn(heads) - 4


def ssd_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:

        def case(
            name: str, *sizes: Unpack[tuple[int, int, int, int, int]], cu: Tensor | None = None, h0: Tensor | None = None, chunk: int = 64,
            dtype: torch.dtype = dtype,
        ) -> Case:  # fmt: skip
            return Case(f"{name}-{dtype}", (*ssd_case(make, *sizes, dtype), True, h0, cu, chunk))

        yield case("ragged", 29, 4, 6, 16, 2, cu=ring_rows.cu(19, 1, 9), h0=make.randn(3, 4, 6, 16), chunk=8)
        yield case("long", 150, 5, 64, 32, 1, cu=ring_rows.cu(103, 47))
        yield case("one-row-chunks", 20, 2, 16, 16, 2, chunk=1)
        yield case("one-chunk", 70, 3, 33, 20, 1, h0=make.randn(1, 3, 33, 20), chunk=256)
        yield case("odd", 23, 6, 5, 7, 3, h0=make.randn(1, 6, 7, 5).mT, chunk=5)
        yield case("empty-sequences", 4, 2, 16, 16, 1, cu=ring_rows.cu(0, 4, 0), h0=make.randn(3, 2, 16, 16))
        yield case("nothing", 0, 2, 16, 16, 1, cu=ring_rows.cu(0, 0), h0=make.randn(2, 2, 16, 16))
        x, dt, rates, b, c, d, z, bias = ssd_case(make, 34, 4, 20, 16, 2, dtype)
        batch = [t.view(2, 17, *t.shape[1:]) for t in (x, dt, b, c, z)]
        yield Case(f"batch-{dtype}", (batch[0], batch[1], rates, batch[2], batch[3], d, batch[4], bias, True, make.randn(2, 4, 20, 16), None, 16))
        yield Case(f"bare-{dtype}", (x, dt.abs() * 0.1, rates, b, c))
        yield Case(f"strided-{dtype}", (x.mT.contiguous().mT, dt.t().contiguous().t(), rates, b.mT.contiguous().mT, c, d, z, bias, True))
        yield Case(f"growing-{dtype}", (x, dt, -0.02 * rates, b, c, d, None, bias, True))
        yield Case(f"far-{dtype}", (x, 40 * dt.abs(), rates, b, c, d, z))


def ssd_bad(make: Make) -> Iterator[BadCase]:
    op = "ssd"
    x, dt, a, b, c, d, z, bias = ssd_case(make, 6, 4, 5, 7, 2, torch.float32)
    yield BadCase("rank", (x[0], dt, a, b, c), f"{op}: x: shape [4, 5]")
    yield BadCase("dtype", (x.double(), dt, a, b, c), f"{op}: x: float64")
    yield BadCase("mixed", (x, dt.half(), a, b, c), f"{op}: dt: float16")
    yield BadCase("rates-dtype", (x, dt, a.bfloat16(), b, c), f"{op}: A: bfloat16")
    yield BadCase("rates", (x, dt, a[:3], b, c), f"{op}: A: shape [3]")
    yield BadCase("groups", (x, dt, a, make.randn(6, 3, 7), make.randn(6, 3, 7)), f"{op}: B: 3 groups")
    yield BadCase("no-states", (x, dt, a, b[..., :0], c[..., :0]), f"{op}: B: 0 states")
    yield BadCase("C", (x, dt, a, b, c[:, :1]), f"{op}: C: shape [6, 1, 7]")
    yield BadCase("state-dtype", (x, dt, a, b, c, d, z, bias, True, make.randn(1, 4, 5, 7, dtype=torch.bfloat16)), f"{op}: h0: bfloat16")
    yield BadCase("state", (x, dt, a, b, c, d, z, bias, True, make.randn(2, 4, 5, 7)), f"{op}: h0: shape [2, 4, 5, 7]")
    for chunk in (0, -1):
        yield BadCase(f"chunk{chunk}", (x, dt, a, b, c, d, z, bias, True, None, None, chunk), f"{op}: chunk: {chunk}")
    for bounds in ([0, 4, 3, 6], [1, 6], [0, 5], [0, 7], [0, -1, 6], [0, 2**31 - 1, 6], []):
        cu = torch.tensor(bounds, dtype=torch.int32)
        yield BadCase(f"cu{bounds}", (x, dt, a, b, c, d, z, bias, True, None, cu), f"{op}: cu_seqlens: ")


def ssd_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, heads in [("Mamba2-130M", 24), ("Mamba2-2.7B", 80)]:
            x, dt, a, b, c, d, z, bias = ssd_case(make, 512, heads, 64, 128, 1, dtype)
            yield Case(f"{name} 1 x 512 {dtype}", (x[None], dt[None], a, b[None], c[None], d, z[None], bias, True))
