"""GGUF files written by the gguf package, in every format the loader names, against that package's dequantiser and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stretto
import torch
from stretto.models.loading.blocks import DEQUANTIZERS, QUANTIZERS, quantize_rows
from stretto.models.loading.config import RopeScaling, config_from_gguf, config_from_hf
from stretto.models.loading.gguf import read_gguf
from stretto.models.loading.weights import WeightSource, dequantize

from tests.models.files import WORDS, hf_config

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: E402

HIDDEN, FEED, LAYERS, HEADS, KV_HEADS, HEAD = 256, 256, 2, 4, 2, 64
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3": "GEMMA3"}


def encoded(values: np.ndarray[Any, Any], fmt: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Rows in `fmt`: by the gguf package's quantiser, or any bits with moderate scales where it has none (K-quants)."""
    kind = gguf.GGMLQuantizationType[fmt]
    if fmt not in ("Q4_K", "Q5_K", "Q6_K"):
        return gguf.quants.quantize(values, kind)
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (values.size // block, nbytes), dtype=np.uint8)
    for at in (208,) if fmt == "Q6_K" else (0, 2):
        raw[:, at : at + 2] = rng.uniform(5e-5, 2e-4, (len(raw), 1)).astype("<f2").view(np.uint8)
    return raw.reshape(len(values), -1)


def written(path: Path, fmt: str, architecture: str = "llama", **keys: Any) -> Path:
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, HIDDEN), (writer.add_block_count, LAYERS), (writer.add_feed_forward_length, FEED),
        (writer.add_head_count, HEADS), (writer.add_head_count_kv, KV_HEADS), (writer.add_key_length, HEAD), (writer.add_value_length, HEAD),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0), (writer.add_vocab_size, len(WORDS)),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "gpt-2"), (writer.add_token_list, WORDS), (writer.add_token_merges, ["a b"]),
        (writer.add_token_types, [3, 3] + [1] * (len(WORDS) - 2)), (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1),
    ):  # fmt: skip
        add(value)
    if architecture == "gemma3":
        writer.add_sliding_window(40)
    for key, value in keys.items():
        getattr(writer, "add_" + key)(value)

    def vector(name: str, size: int, mean: float = 1.0) -> None:
        writer.add_tensor(name, (mean + 0.1 * rng.standard_normal(size)).astype(np.float32))

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)
        writer.add_tensor(name, encoded(values, fmt, rng), raw_dtype=gguf.GGMLQuantizationType[fmt])

    matrix("token_embd.weight", len(WORDS), HIDDEN)
    vector("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        for name, rows, columns in (
            ("attn_q", HEADS * HEAD, HIDDEN), ("attn_k", KV_HEADS * HEAD, HIDDEN), ("attn_v", KV_HEADS * HEAD, HIDDEN), ("attn_output", HIDDEN, HEADS * HEAD),
            ("ffn_gate", FEED, HIDDEN), ("ffn_up", FEED, HIDDEN), ("ffn_down", HIDDEN, FEED),
        ):  # fmt: skip
            matrix(f"{at}{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if architecture == "gemma3" else ())):
            vector(f"{at}{name}.weight", HIDDEN)
        for name in ("attn_q_norm", "attn_k_norm") if architecture in ("qwen3", "gemma3") else ():
            vector(f"{at}{name}.weight", HEAD)
        if architecture == "qwen2":
            for name, size in (("attn_q", HEADS * HEAD), ("attn_k", KV_HEADS * HEAD), ("attn_v", KV_HEADS * HEAD)):
                vector(f"{at}{name}.bias", size, 0.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference(path: Path) -> torch.Tensor:
    """Logits of transformers, which reads the file with its own reader and dequantises all of it."""
    config = load_gguf_checkpoint(str(path))["config"]
    config |= {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 40}  # keys of the file that it leaves out
    if config["model_type"] != "gemma3_text":
        config["sliding_window"] = None
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), attn_implementation="eager").eval()
    state = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    lacking = model.load_state_dict(state, strict=False)
    assert not lacking.unexpected_keys
    assert lacking.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return logits


IDS = torch.randint(0, len(WORDS), (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("fmt", DEQUANTIZERS)
def test_every_format(tmp_path, fmt):
    path = written(tmp_path / "model.gguf", fmt)
    file = read_gguf(path)
    source = WeightSource.from_gguf(file)
    source.check(config_from_gguf(file))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in ("embed", "layers.1.q", "layers.0.down", "layers.1.mlp_norm"):
        theirs = stored[source.file_name(name)]
        want = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert np.array_equal(
            dequantize(source.get(name)).view(np.uint32), np.asarray(want, np.float32).reshape(source.get(name).shape).view(np.uint32)
        )
    want = reference(path)
    spread = (want.max() - want.min()).item()
    exact = stretto.load(path, dtype="f32", kv_dtype="f32").logits(IDS)
    assert (exact - want).abs().max().item() <= 2e-4 * spread  # the promise is 1e-3
    packed = stretto.load(path, kv_dtype="f32").logits(IDS)
    if fmt in ("F32", "F16", "BF16"):
        assert (packed - want).abs().max().item() <= 2e-4 * spread
    else:  # activations have 8 bits
        assert (packed - want).square().mean().sqrt().item() <= 0.02 * spread
    divergence = torch.nn.functional.kl_div(packed.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean").item()
    assert divergence <= 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tmp_path, architecture):
    path = written(tmp_path / "model.gguf", "F16", architecture)
    want = reference(path)
    got = stretto.load(path, kv_dtype="f32").logits(IDS)
    assert (got - want).abs().max().item() <= 2e-4 * (want.max() - want.min()).item()


@pytest.mark.parametrize("fmt", QUANTIZERS)
def test_quantisers_give_the_bytes_of_the_reference(fmt):
    rng = np.random.default_rng(0)
    for scale in (1e-30, 1e-6, 1e-2, 1.0, 300.0):
        values = (rng.standard_normal((2000, 64)) * scale).astype(np.float32)
        values[::7] = 0
        values[1::7] = np.round(values[1::7] / scale * 4) / 4 * scale  # halves and ties
        assert np.array_equal(quantize_rows(values, fmt), gguf.quants.quantize(values, gguf.GGMLQuantizationType[fmt]))


@pytest.mark.parametrize("fmt", QUANTIZERS)
def test_quantisers_refuse_what_the_format_cannot_hold(fmt):
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(np.full((1, 32), np.nan, np.float32), fmt)
    with pytest.raises(ValueError, match=r"block scale .* at most 65504"):
        quantize_rows(np.linspace(-3e38, 3e38, 32, dtype=np.float32)[None], fmt)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_rows(np.ones((1, 33), np.float32), fmt)
    with pytest.raises(NotImplementedError, match=r"Q4_K.*Q8_0"):
        quantize_rows(np.ones((1, 256), np.float32), "Q4_K")
    assert not quantize_rows(np.full((1, 32), 1e-44, np.float32), fmt).any() or fmt == "Q4_0"  # a subnormal scale has no inverse


def test_rope_scaling_says_the_same_in_both_kinds_of_file(tmp_path):
    linear = written(tmp_path / "linear.gguf", "F16", rope_scaling_type=gguf.RopeScalingType.LINEAR, rope_scaling_factor=2.5)
    yarn = written(tmp_path / "yarn.gguf", "F16", rope_scaling_type=gguf.RopeScalingType.YARN, rope_scaling_factor=4.0, rope_scaling_orig_ctx_len=64)
    shared = hf_config() | {"max_position_embeddings": 256}
    for path, scaling in ((linear, {"rope_type": "linear", "factor": 2.5}),
                          (yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})):  # fmt: skip
        assert config_from_gguf(read_gguf(path)).rope_scaling == config_from_hf(shared | {"rope_scaling": scaling}).rope_scaling
    rule = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(**json.loads(json.dumps(shared | {"head_dim": HEAD, "rope_parameters": rule | {"rope_theta": 10000.0}})))
    frequency, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    factors = (plain / frequency.numpy().astype(np.float64)).astype(np.float32)
    path = tmp_path / "llama3.gguf"
    original = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer: Any, *args: Any) -> None:
        writer.add_tensor("rope_freqs.weight", factors)
        original(writer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        written(path, "F16")
    found = config_from_gguf(read_gguf(path)).rope_scaling
    assert found is not None
    assert found == RopeScaling("llama3", found.factor, 8192)
    assert found.factor == pytest.approx(8.0, rel=1e-5)
