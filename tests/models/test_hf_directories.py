"""Directories as transformers saves them, loaded the way a user does, against transformers in float32 on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stretto
import torch

from tests.models.files import WORDS, write_tokenizer

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "head_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SHARED = {key: value for key, value in SMALL.items() if key != "head_dim"}
BASE = {"rope_theta": 10000.0}
LINEAR, DYNAMIC = {"rope_type": "linear", "factor": 2.5}, {"rope_type": "dynamic", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SLIDES = {"use_sliding_window": True, "sliding_window": 21, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
GEMMA_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6, **LINEAR}}


def vlm(tie: bool) -> Any:
    """Gemma 3 with eyes: only the text part is read."""
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config={**SMALL, "sliding_window": 30, "query_pre_attn_scalar": 48}, vision_config=eyes, mm_tokens_per_image=4, image_token_index=5,
        boi_token_index=6, eoi_token_index=7, tie_word_embeddings=tie,
    ))  # fmt: skip


def kind(name: str, **fields: Any) -> Any:
    def make(tie: bool) -> Any:
        config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
        return getattr(transformers, f"{name}ForCausalLM")(config(**{**SMALL, **fields, "tie_word_embeddings": tie}))

    return make


MODELS = {
    "llama": kind("Llama"),
    "llama-dynamic": kind("Llama", rope_parameters=BASE | DYNAMIC),
    "llama-linear": kind("Llama", rope_parameters=BASE | LINEAR),
    "llama-yarn": kind("Llama", rope_parameters=BASE | YARN),
    "llama-llama3": kind("Llama", rope_parameters={"rope_theta": 500000.0, **LLAMA3}),
    "mistral": kind("Mistral", sliding_window=25, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    "mistral-all": kind("Mistral", sliding_window=None),
    "qwen2": kind("Qwen2", head_dim=16, hidden_size=64),
    "qwen2-slides": kind("Qwen2", head_dim=16, rope_parameters=BASE | YARN, **SLIDES),
    "qwen3": kind("Qwen3", rope_parameters=BASE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}),
    "gemma3": kind("Gemma3", sliding_window=19, query_pre_attn_scalar=48, rope_parameters=GEMMA_ROPE),
    "gemma3-sees": vlm,
}  # fmt: skip


def saved(directory: Path, name: str, tie: bool, dtype: torch.dtype = torch.float32, shards: str = "5GB") -> Path:
    torch.manual_seed(0)
    model = MODELS[name](tie).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too, which start at 0 and 1 and would hide mistakes; rows of tied heads stay tied
            p.add_(0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(directory, max_shard_size=shards)
    write_tokenizer(directory)
    return directory


def agrees(directory: Path, bound: float = 2e-4) -> None:
    auto = (
        transformers.AutoModelForImageTextToText if "vision_config" in (directory / "config.json").read_text() else transformers.AutoModelForCausalLM
    )
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    llm = stretto.load(directory, kv_dtype="f32", threads=2)
    ids = torch.randint(0, len(WORDS), (200,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].float()
    got = llm.logits(ids)
    spread = (want.max() - want.min()).item()
    assert (got - want).abs().max().item() <= bound * spread  # the promise is 1e-3; rounding explains less than 2e-4


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path, name, tie):
    agrees(saved(tmp_path, name, tie))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("name", ["llama-yarn", "qwen2", "qwen3", "mistral", "gemma3", "gemma3-sees"])
def test_half_weights_are_used_as_they_are(tmp_path, name, dtype):
    agrees(saved(tmp_path, name, tie=name.startswith("gemma"), dtype=dtype))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3-sees"])
def test_shards(tmp_path, name):
    directory = saved(tmp_path, name, tie=False, shards="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    agrees(directory)


@pytest.mark.parametrize("scaling", [LINEAR, DYNAMIC, YARN, LLAMA3], ids=["linear", "dynamic", "yarn", "llama3"])
def test_configuration_as_older_versions_wrote_it(tmp_path, scaling):
    """rope_theta and rope_scaling beside each other, "type" for "rope_type"."""
    directory = saved(tmp_path, "llama", tie=True)
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content.pop("rope_parameters")
    content |= {"rope_theta": 20000.0, "rope_scaling": {("type" if key == "rope_type" else key): value for key, value in scaling.items()}}
    path.write_text(json.dumps(content))
    agrees(directory)


def test_a_head_of_its_own_wins_over_the_tie_flag(tmp_path):
    """Files exist that say tied and hold another head; transformers uses the head."""
    directory = saved(tmp_path, "llama", tie=False)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    agrees(directory)
