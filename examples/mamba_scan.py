"""A Mamba layer on stretto's scan ops: read a prompt, decode token by token, verify drafts, and keep only those accepted.

python examples/mamba_scan.py
"""

from __future__ import annotations

import torch
from stretto.ops import scan
from torch import Tensor

CHANNELS, STATES, RANK = 256, 16, 16
torch.manual_seed(0)
conv_weight, conv_bias = torch.randn(CHANNELS, 4) / 2, torch.zeros(CHANNELS)
to_rates, to_dt = torch.randn(CHANNELS, RANK + 2 * STATES) / 16, torch.randn(RANK, CHANNELS) / 4
A, D, dt_bias = -torch.arange(1, STATES + 1).float().expand(CHANNELS, STATES), torch.ones(CHANNELS), torch.full((CHANNELS,), -4.0)


def rates(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dt, B, C) of rows; one group of channels."""
    dt, b, c = (x @ to_rates).split([RANK, STATES, STATES], 1)
    return dt @ to_dt, b[:, None], c[:, None]


def step(x: Tensor, z: Tensor, window: Tensor, state: Tensor, **rows: object) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer over rows that continue the sequence; also what `keep` needs to advance the states later."""
    v = scan.causal_conv1d_step(x, window, conv_weight, conv_bias, "silu", **rows)
    dt, b, c = rates(v)
    return scan.selective_scan_step(state, v, dt, A, b, c, D, z, dt_bias, True, **rows), (x, v, dt, b)


def keep(n: int, inputs: tuple[Tensor, ...], window: Tensor, state: Tensor) -> None:
    """Advance the states by the first n of the verified rows."""
    x, v, dt, b = inputs
    taken, count = torch.arange(len(x), dtype=torch.int32)[None], torch.tensor([n], dtype=torch.int32)
    scan.causal_conv1d_replay(window, x, taken, count)
    scan.selective_scan_replay(state, v, dt, A, b, taken, count, dt_bias, True)


x, z = torch.randn(108, CHANNELS), torch.randn(108, CHANNELS)

# The prompt: 100 tokens at once.
v, window = scan.causal_conv1d(x[:100], conv_weight, conv_bias, "silu")
dt, b, c = rates(v)
y, state = scan.selective_scan(v, dt, A, b, c, D, z[:100], dt_bias, True)

# Eight more, one by one.
plain_window, plain_state = window.clone(), state.clone()
plain = torch.cat([step(x[t : t + 1], z[t : t + 1], plain_window, plain_state)[0] for t in range(100, 108)])

# The same as drafts: eight rows verified at once without touching the states, five accepted, the rest thrown away.
drafts = torch.tensor([0, 8], dtype=torch.int32)
verified, inputs = step(x[100:], z[100:], window, state, cu_seqlens=drafts, update=False)
keep(5, inputs, window, state)
rest = torch.cat([step(x[t : t + 1], z[t : t + 1], window, state)[0] for t in range(105, 108)])

assert torch.allclose(torch.cat([verified[:5], rest]), plain, atol=1e-5)  # equal bits, but for torch's matrix products in rates()
print(f"8 tokens decoded, and verified as drafts: largest difference {(torch.cat([verified[:5], rest]) - plain).abs().max():.1e}")
