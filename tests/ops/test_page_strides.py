"""Pages that lie any distance apart, as a cache keeps them that holds a page's layers side by side: the same bits as dense ones, and nothing between
them is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stretto.ops import _backend, attention, cache, rope
from stretto.ops.attention.pages import make_paged
from stretto.ops.table import Make
from torch import Tensor

from tests.oracle import copies, same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def apart(dense: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same values with as much memory again behind each step of `dim`, and that memory, which holds 77."""
    pool = torch.full((*dense.shape[: dim + 1], 2, *dense.shape[dim + 1 :]), 77, dtype=dense.dtype)
    pool.select(dim + 1, 0).copy_(dense)
    return pool.select(dim + 1, 0), pool.select(dim + 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [7, 64])
def test_attention(isa: str, dtype: torch.dtype, page_size: int):
    args = make_paged(Make(), [(37, 1), (5, 19), (290, 3)], dtype=dtype, page_size=page_size)
    want = attention.paged(*args)
    args = list(args)
    for i in [1, 2, 11, 12] if dtype == torch.int8 else [1, 2]:
        args[i] = apart(args[i], 0)[0]
    assert same_bits(attention.paged(*args), want)


@pytest.mark.cuda_kernels("rope_append")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_append(isa: str, dtype: torch.dtype):
    make = Make()
    qkv, positions = make.randn(9, 5 * 32), make.randint(0, 40, 9)
    slots = torch.randperm(4 * 7, generator=make.generator)[:9].to(torch.int32)
    table = rope.table(torch.arange(40), 32, 10000.0)
    pages: dict[str, Any] = {
        "k_pages": make.randint(0, 50, 4, 1, 32, 7, dtype=torch.int8).to(dtype),
        "v_pages": make.randint(0, 50, 4, 1, 7, 32, dtype=torch.int8).to(dtype),
    }
    if dtype == torch.int8:
        pages |= {"k_scales": make.randn(4, 1, 7), "v_scales": make.randn(4, 1, 7)}
    strided = {name: apart(t, 0) for name, t in copies(pages).items()}
    heads = {"num_heads": 3, "num_kv_heads": 1, "order": "half"}
    rope.append(qkv.clone(), positions, slots, table, **pages, **heads)
    rope.append(qkv.clone(), positions, slots, table, **{name: view for name, (view, _) in strided.items()}, **heads)
    for name, (view, between) in strided.items():
        assert same_bits(view.contiguous(), pages[name]), name
        assert bool((between == 77).all()), name


@pytest.mark.cuda_kernels("copy_pages", "move_rows")
@pytest.mark.parametrize("move", [cache.copy_pages, cache.move_rows])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pages_first", [False, True])
def test_moves(isa: str, move: Any, dtype: torch.dtype, pages_first: bool):
    make = Make()
    tensors = [make.randint(0, 50, 3, 5, 2, 8, 4).to(dtype), make.randint(0, 50, 3, 5, 2, 4, 8).to(dtype)]
    scales = [make.randn(3, 5, 2, 4) for _ in range(2 * (dtype == torch.int8))]
    ids = torch.tensor([4, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    strided = [apart(t.transpose(0, 1).contiguous() if pages_first else t, 1) for t in copies([*tensors, *scales])]
    views = [view.transpose(0, 1) if pages_first else view for view, _ in strided]
    move(*tensors, *ids, *scales)
    move(*views[:2], *ids, *views[2:])
    for view, (_, between), want in zip(views, strided, [*tensors, *scales], strict=True):
        assert same_bits(view.contiguous(), want)
        assert bool((between == 77).all())
