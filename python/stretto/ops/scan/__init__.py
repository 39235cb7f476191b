"""Recurrences over sequences: the causal convolution and the state space models of Mamba, as sequences, as steps and as replays.

Sequences are packed `[tokens, ...]` with `cu_seqlens` [batch + 1] int32, or a batch `[batch, length, ...]`. States are float32.
"""

from stretto.ops.scan.backward import causal_conv1d_backward, selective_scan_backward, ssd_backward
from stretto.ops.scan.conv1d import causal_conv1d, causal_conv1d_replay, causal_conv1d_step
from stretto.ops.scan.mamba1 import selective_scan, selective_scan_replay, selective_scan_step
from stretto.ops.scan.mamba2 import ssd, ssd_replay, ssd_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_replay",
    "causal_conv1d_step",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_replay",
    "selective_scan_step",
    "ssd",
    "ssd_backward",
    "ssd_replay",
    "ssd_step",
]
