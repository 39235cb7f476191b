"""Logits against transformers in float32 on the file's own weights, dequantised: how far packed weights and our arithmetic move the distribution.

python -m bench.e2e.divergence MODEL [--positions 2000] [--out FILE]
Packed: mean Kullback-Leibler divergence over positions of Python's language reference. Weights in float32: largest error of a logit, relative to
the range of the logits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import stretto
import torch
from stretto.cli.bench import machine
from stretto.models.loading.find import resolve
from stretto.models.loading.open import open_model
from stretto.models.loading.weights import dequantize

from bench.e2e.texts import documentation

PIECE = 500


def oracle(path: Path) -> Any:
    """transformers' Llama with the file's weights in float32; q and k rows go from interleaved pairs to halves."""
    import transformers

    config, source, _ = open_model(path)
    if config.architecture != "llama" or config.rope_order != "interleaved":
        raise NotImplementedError(
            f"divergence: {config.architecture} with rope order {config.rope_order}; GGUF files of the llama family are compared"
        )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, max_position_embeddings=config.context_length,
    )).eval()  # fmt: skip

    def weight(name: str) -> torch.Tensor:
        return torch.from_numpy(dequantize(source.get(name)))

    def halves(name: str, heads: int) -> torch.Tensor:
        return weight(name).unflatten(0, (heads, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    state = {"model.embed_tokens.weight": weight("embed"), "lm_head.weight": weight("embed"), "model.norm.weight": weight("final_norm")}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        state |= {
            theirs + "input_layernorm.weight": weight(ours + "attn_norm"),
            theirs + "post_attention_layernorm.weight": weight(ours + "mlp_norm"),
            theirs + "self_attn.q_proj.weight": halves(ours + "q", config.num_heads),
            theirs + "self_attn.k_proj.weight": halves(ours + "k", config.num_kv_heads),
            theirs + "self_attn.v_proj.weight": weight(ours + "v"),
            theirs + "self_attn.o_proj.weight": weight(ours + "o"),
        }
        state |= {theirs + f"mlp.{n}_proj.weight": weight(ours + n) for n in ("gate", "up", "down")}
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def compare(packed: stretto.LLM, exact: stretto.LLM, model: Any, ids: list[int]) -> dict[str, float]:
    """kl, same_argmax: of `packed` against `model`, means over positions. relative_error: of `exact`, largest over all."""
    kl, same, error = 0.0, 0, 0.0
    for start in range(0, len(ids), PIECE):
        piece = ids[start : start + PIECE]
        want = model(torch.tensor([piece])).logits[0]
        log_want, log_got = (torch.log_softmax(logits.double(), -1) for logits in (want, packed.logits(piece)))
        kl += (log_want.exp() * (log_want - log_got)).sum().item()
        same += (log_want.argmax(-1) == log_got.argmax(-1)).sum().item()
        error = max(error, ((exact.logits(piece) - want).abs().max() / (want.max() - want.min())).item())
    return {"kl": kl / len(ids), "same_argmax": same / len(ids), "relative_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=resolve, help="path or known name")
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    packed, exact = stretto.load(options.model), stretto.load(options.model, dtype="f32", kv_dtype="f32")
    ids = packed.encode(documentation()[: 10 * options.positions])[: options.positions]
    document = {
        "kind": "divergence", "model": options.model.name, "positions": len(ids),
        "command": " ".join(["python -m bench.e2e.divergence", *sys.argv[1:]]), "machine": machine.describe(),
    } | compare(packed, exact, oracle(options.model), ids)  # fmt: skip
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
