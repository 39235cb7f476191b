"""A real model: SmolLM2-135M-Instruct in Q4_1 against transformers in float32 on the dequantised weights."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import stretto
import torch
from stretto.models.loading import find
from stretto.models.loading.open import open_model
from stretto.models.loading.weights import dequantize

pytestmark = pytest.mark.slow


def docs(characters: int) -> str:
    """Real English text that every Python carries: the language reference behind help()."""
    return "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))[:characters]


@pytest.fixture(scope="module")
def llm():
    return stretto.load("smollm2-135m", threads=2)


@pytest.fixture(scope="module")
def oracle():
    """transformers' Llama with the file's weights dequantised to float32; q and k rows go from interleaved pairs to halves."""
    transformers = pytest.importorskip("transformers")
    config, source, _ = open_model(Path(find.resolve("smollm2-135m")))
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


def test_divergence_from_the_dequantised_model(llm, oracle):
    ids = llm.tokenizer.encode(docs(20000))[:2000]
    total, agree = 0.0, 0
    for start in range(0, len(ids), 500):
        piece = ids[start : start + 500]
        with torch.no_grad():
            want = torch.log_softmax(oracle(torch.tensor([piece])).logits[0], -1)
        got = torch.log_softmax(llm.logits(piece), -1)
        total += (want.exp() * (want - got)).sum().item()
        agree += (want.argmax(-1) == got.argmax(-1)).sum().item()
    assert total / len(ids) <= 0.01
    assert agree / len(ids) >= 0.95


def test_float32_weights_agree_to_rounding(oracle):
    exact = stretto.load("smollm2-135m", dtype="f32", kv_dtype="f32")
    ids = exact.tokenizer.encode(docs(2000))[:300]
    with torch.no_grad():
        want = oracle(torch.tensor([ids])).logits[0]
    got = exact.logits(ids)
    assert (got - want).abs().max() <= 1e-3 * (want.max() - want.min())


QUESTIONS = [
    "Write one sentence about the sea.",
    "Repeat this list twice, one item a line: apple, pear, plum, cherry, grape.",
    "Rewrite in upper case: the quick brown fox jumps over the lazy dog.",
    "What is the capital of France?",
]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 3}], ids=["greedy", "sampled"])
def test_identity_with_every_proposer(llm, options):
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    plain = [llm.generate(c, max_tokens=48, decode="off", **options).tokens for c in chats]
    for decode in ("ngram", "trie", "auto"):
        assert [r.tokens for r in llm.generate(chats, max_tokens=48, decode=decode, **options)] == plain


def test_answers(llm):
    assert "Paris" in llm.generate([{"role": "user", "content": "What is the capital of France?"}], max_tokens=24).text
