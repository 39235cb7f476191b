"""Our Llama shape against transformers on random small models of every supported architecture, weights in float32."""

from __future__ import annotations

import pytest
import torch
from stretto.cache import CacheShape, PagedCache
from stretto.engine.engine import EngineConfig
from stretto.engine.llm import LLM
from stretto.models.loading.config import read_hf_config
from stretto.models.loading.safetensors import open_safetensors
from stretto.models.loading.weights import WeightSource
from stretto.models.text.llama import LlamaModel

from tests.tiny import LetterTokenizer

transformers = pytest.importorskip("transformers")

SMALL = dict(  # noqa: C408
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, head_dim=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
          "rope_theta": 10000.0}  # fmt: skip
MODELS = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "llama-linear": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})),
    "llama-yarn": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=YARN)),
    "llama-llama3": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, rope_parameters=LLAMA3)),
    "mistral-window": lambda t: t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=33)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"} | {"hidden_size": 256})),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL, sliding_window=40, query_pre_attn_scalar=64)),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name](transformers).float().eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too, which start at 0 and 1 and would hide mistakes
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    config = read_hf_config(tmp_path)
    source = WeightSource.from_safetensors(open_safetensors(tmp_path))
    source.check(config)
    shape = CacheShape(config.num_layers, config.num_kv_heads, config.head_dim, 16, torch.float32)
    llm = LLM(LlamaModel(config, source, 256), LetterTokenizer(), PagedCache(shape, 64), EngineConfig(64, 4, 256), 2)  # type: ignore[arg-type]
    ids = torch.randint(0, 96, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    got = llm.logits(ids)
    spread = (want.max() - want.min()).item()
    assert (got - want).abs().max().item() <= 1e-3 * spread
    assert (got - want).abs().max().item() <= 2e-4 * spread, "within the promise, but worse than float32 rounding explains"
