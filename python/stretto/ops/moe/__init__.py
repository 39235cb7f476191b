"""Mixture of experts: routing, sorting tokens by expert and back, the experts' products, and who sends which token where."""

from stretto.ops.moe.dispatch import Dispatch, coactivation, count_routes, plan_dispatch
from stretto.ops.moe.experts import ExpertWeights, expert_mlp, grouped_linear, pack_experts
from stretto.ops.moe.placement import Placement, balanced_assignment, group_experts, place_experts, shuffle_rows
from stretto.ops.moe.route import topk_route
from stretto.ops.moe.rows import SortedPairs, permute, sort_by_expert, unpermute

__all__ = [
    "Dispatch",
    "ExpertWeights",
    "Placement",
    "SortedPairs",
    "balanced_assignment",
    "coactivation",
    "count_routes",
    "expert_mlp",
    "group_experts",
    "grouped_linear",
    "pack_experts",
    "permute",
    "place_experts",
    "plan_dispatch",
    "shuffle_rows",
    "sort_by_expert",
    "topk_route",
    "unpermute",
]
