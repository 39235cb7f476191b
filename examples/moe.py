"""One mixture-of-experts layer on rows sorted by expert, and experts placed on devices where their tokens are."""

from __future__ import annotations

import torch
from stretto.ops import moe, quant

TOKENS, HIDDEN, WIDTH, EXPERTS, K, VOCAB = 512, 128, 256, 16, 2, 100


def packed(*shape: int, gate: bool = False) -> quant.PackedWeight:
    rows = [torch.randn(*shape).div(shape[1] ** 0.5).view(torch.uint8) for _ in range(2 if gate else 1)]
    return quant.pack(rows, "F32", shape[1], interleave=gate)


def main() -> None:
    torch.manual_seed(0)
    gate_up = moe.pack_experts([packed(WIDTH, HIDDEN, gate=True) for _ in range(EXPERTS)])
    down = moe.pack_experts([packed(HIDDEN, WIDTH) for _ in range(EXPERTS)])
    ids = torch.randint(0, VOCAB, (TOKENS,), dtype=torch.int32)
    x = torch.randn(VOCAB, HIDDEN)[ids] + 0.3 * torch.randn(TOKENS, HIDDEN)  # tokens of one id look alike, so they choose alike
    router = torch.randn(HIDDEN, EXPERTS)

    weights, experts = moe.topk_route(x @ router, K)
    order = moe.sort_by_expert(experts, EXPERTS)
    y = moe.unpermute(moe.expert_mlp(moe.permute(x, order.pairs, K), order.offsets, gate_up, down), order.rows, weights)
    print(f"{TOKENS} tokens through {K} of {EXPERTS} experts: {list(y.shape)}, busiest expert {int(order.counts.max())} rows")

    profile = moe.count_routes(torch.zeros(VOCAB, EXPERTS, dtype=torch.int32), ids, experts)
    placed = moe.place_experts(profile, devices=4)
    plan = moe.plan_dispatch(experts, placed.expert_device, 4, source_of=placed.token_device[ids.long()], num_sources=4)
    stay = int(plan.counts.diagonal().sum())
    print(f"placed by token id: {placed.local:.0%} of the visits are local; {stay} of {int(plan.counts.sum())} rows stay on their device")


if __name__ == "__main__":
    main()
