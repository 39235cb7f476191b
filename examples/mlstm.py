"""mLSTM without a model: a prompt in two pieces, then guesses that are checked, and the accepted ones kept. Every line of output compares bits."""

import torch
from stretto.ops.mlstm import mlstm, mlstm_replay, mlstm_step

heads, dk, dv, cap = 8, 256, 512, 15.0  # xLSTM-7B's cell
gen = torch.Generator().manual_seed(0)


def rows(tokens: int) -> list[torch.Tensor]:
    """q, k, v and the two gates, as a layer's projections give them."""
    q, k, v = (torch.randn(tokens, heads, width, generator=gen).bfloat16() for width in (dk, dk, dv))
    return [q, k, v, torch.randn(tokens, heads, generator=gen) - 10, torch.randn(tokens, heads, generator=gen) + 4]


# A prompt: whole, and cut where it suits the scheduler.
prompt = rows(200)
h, *whole = mlstm(*prompt, gate_cap=cap)
_, *state = mlstm(*(x[:77] for x in prompt), gate_cap=cap)
tail, *state = mlstm(*(x[77:] for x in prompt), *state, gate_cap=cap)
print("cut after 77 of 200 tokens: same bits:", torch.equal(h[77:], tail) and all(map(torch.equal, whole, state)))

# Four guesses in one call. The state is read and stays as it is.
C, n, m = state  # [slots, heads, ...]: one slot here, one a request in a server
slot, cu_seqlens, guesses = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32), rows(4)
checked = mlstm_step(*guesses, C, n, m, slot, cu_seqlens, gate_cap=cap, update=False)

# The first two are accepted: the state takes them. Plain decoding would have come to the same.
plain = [x.clone() for x in (C, n, m)]
mlstm_replay(*guesses[1:], C, n, m, slot, torch.tensor([2], dtype=torch.int32), cu_seqlens, gate_cap=cap)
steps = torch.cat([mlstm_step(*(x[t : t + 1] for x in guesses), *plain, slot, gate_cap=cap) for t in range(2)])
print("2 of 4 guesses kept: same bits:", torch.equal(steps, checked[:2]) and all(map(torch.equal, plain, (C, n, m))))
