"""Every lie a Hugging Face directory can tell is refused by name: safetensors, shard index, configuration, tokenizer, template."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stretto
from stretto import ModelFileError
from stretto.models.loading.safetensors import open_safetensors

from tests.models.files import HIDDEN, WORDS, hf_config, hf_tensors, loads_within, safetensors, u64, write_hf, write_safetensors, write_sharded

Change = Callable[[Path], object]
Q = "model.layers.0.self_attn.q_proj.weight"
LAST = "model.layers.0.mlp.down_proj.weight"
HUGE = 2**63


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """A safetensors header with a change; the data stays."""

    def write(directory: Path) -> None:
        head, data = safetensors(hf_tensors())
        change(head)
        write_safetensors(directory / "model.safetensors", head, data)

    return write


def record(name: str, **fields: Any) -> Change:
    return header(lambda head: head[name].update(fields))


def text(file: str, raw: str | bytes) -> Change:
    return lambda directory: (directory / file).write_bytes(raw.encode() if isinstance(raw, str) else raw)


def raw_header(raw: bytes, data: bytes = b"", size: int | None = None) -> Change:
    return lambda directory: write_safetensors(directory / "model.safetensors", raw, data, size=size)


def edited(file: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def write(directory: Path) -> None:
        path = directory / file
        content = json.loads(path.read_text()) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content))

    return write


def config(**fields: Any) -> Change:
    return edited("config.json", lambda content: content.update(fields))


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    return edited("tokenizer.json", change)


def index(change: Callable[[dict[str, Any]], object]) -> Change:
    def write(directory: Path) -> None:
        write_sharded(directory)
        edited("model.safetensors.index.json", change)(directory)

    return write


def moved(to: str) -> Change:
    """One shard is named `to` in the index."""
    return index(lambda content: content.update(weight_map={name: to if file.startswith("model-00002") else file
                                                            for name, file in content["weight_map"].items()}))  # fmt: skip


def instead(file: str, make: Callable[[Path], object]) -> Change:
    def write(directory: Path) -> None:
        (directory / file).unlink()
        make(directory / file)

    return write


def cut(file: str, keep: int) -> Change:
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes()[:keep])


def outside(directory: Path) -> None:
    """A shard that is a link out of the directory."""
    write_sharded(directory)
    shard = directory / "model-00002-of-00002.safetensors"
    shutil.move(shard, directory.parent / "elsewhere.safetensors")
    shard.symlink_to(directory.parent / "elsewhere.safetensors")


def shadowed(directory: Path) -> None:
    """Both shards hold one tensor."""
    write_sharded(directory)
    head, data = safetensors(hf_tensors())
    write_safetensors(directory / "model-00002-of-00002.safetensors", head, data)


NESTED = b"[" * 100_000
# name: (change, what the error must say: file, field and value)
BAD: dict[str, tuple[Change, str]] = {
    # safetensors
    "empty file": (text("model.safetensors", b""), r"model\.safetensors: file size: 0"),
    "seven bytes": (text("model.safetensors", b"\0" * 7), r"model\.safetensors: file size: 7"),
    "header size 0": (text("model.safetensors", u64(0)), r"model\.safetensors: header: b''"),
    "header size 2^63": (raw_header(b"{}", size=HUGE), r"model\.safetensors: header size: 9223372036854775808"),
    "header size 2^64-1": (raw_header(b"{}", size=2**64 - 1), "header size: 18446744073709551615"),
    "header past the end": (raw_header(b"{}", size=3), "header size: 3, expected at most 2"),
    "cut in the header": (cut("model.safetensors", 300), "header size"),
    "cut in the data": (cut("model.safetensors", 40_000), "data_offsets"),
    "bytes after the data": (lambda d: (d / "model.safetensors").open("ab").write(b"x"), "data size"),
    "header is a list": (raw_header(b"[]"), "header: b'\\[\\]'"),
    "header is no JSON": (raw_header(b"{x}"), "header: not valid JSON"),
    "header not UTF-8": (raw_header(b'{"\xff": 1}'), "header: not valid JSON"),
    "header nests 100,000 deep": (raw_header(b'{"a":' + NESTED), "header"),
    "header of 4 million values": (raw_header(b'{"a":[' + b"1," * 4_000_000 + b"1]}"), "header values: 40000"),
    "tensor twice": (raw_header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'), "key 'a' occurs twice"),
    "number of 5,000 digits": (raw_header(b'{"a":' + b"9" * 5000 + b"}"), "header: not valid JSON"),
    "NaN": (raw_header(b'{"a":NaN}'), "NaN is not JSON"),
    "half a surrogate pair": (raw_header(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "header: not valid JSON: .*surrogates"),
    "record is a number": (header(lambda head: head.update({Q: 1})), "q_proj.weight': 1"),
    "record without dtype": (header(lambda head: head[Q].pop("dtype")), "q_proj.weight'"),
    "record with more": (record(Q, code="import os"), "q_proj.weight'"),
    "unknown dtype": (record(Q, dtype="F31"), "dtype: 'F31'"),
    "dtype is a list": (record(Q, dtype=["F32"]), r"dtype: \['F32'\]"),
    "shape is a number": (record(Q, shape=4096), "shape: 4096"),
    "negative dimension": (record(Q, shape=[-64, -64]), "shape"),
    "fractional dimension": (record(Q, shape=[64.0, 64]), "shape"),
    "dimension true": (record(Q, shape=[True, 4096]), "shape"),
    "dimension 2^63": (record(Q, shape=[HUGE, 64]), "shape"),
    "product of 2^64": (record(Q, shape=[2**32, 2**32]), "data_offsets.*73786976294838206464 bytes"),
    "product that wraps to the right size": (record(Q, shape=[2**61, 8, 64, 64]), "data_offsets"),
    "rank 9": (record(Q, shape=[1] * 7 + [64, 64]), "shape"),
    "offsets are text": (record(Q, data_offsets="0,1"), "data_offsets: '0,1'"),
    "one offset": (record(Q, data_offsets=[0]), "data_offsets"),
    "offsets reversed": (record(Q, data_offsets=[16384, 0]), "data_offsets"),
    "offset 2^63": (record(Q, data_offsets=[0, HUGE]), "data_offsets"),
    "offset past the end": (record(LAST, data_offsets=[2**30, 2**30 + 24576]), "data_offsets"),
    "tensors overlap": (record(Q, data_offsets=[0, 16384]), "overlap"),
    "hole between tensors": (header(lambda head: head.pop(Q)), "hole"),
    "size is not the shape's": (record(Q, shape=[64, 63]), "data_offsets.*16128 bytes"),
    "dtype is not the size's": (record(Q, dtype="F16"), "data_offsets.*8192 bytes"),
    "metadata is a list": (header(lambda head: head.update(__metadata__=["pt"])), "__metadata__"),
    "metadata of numbers": (header(lambda head: head.update(__metadata__={"a": 1})), "__metadata__"),
    "integer weights": (record(Q, dtype="I32"), "q_proj.weight type: 'I32'"),
    "weights of 8 bits": (record(Q, dtype="F8_E4M3", shape=[HIDDEN, 4 * HIDDEN]), "q_proj.weight shape"),
    "wrong shape": (record(Q, shape=[32, 128]), r"q_proj.weight shape: \(32, 128\)"),
    "vector as matrix": (record("model.norm.weight", shape=[1, HIDDEN]), "norm.weight shape"),
    "no tensors": (raw_header(b"{}"), "embed_tokens.weight"),
    "missing tensor": (header(lambda head: head.update({"model.layers.0.self_attn.q_proj.weird": head.pop(Q)})), "q_proj.weight: missing"),
    "a tensor nobody reads": (
        header(lambda head: head.update({"model.layers.0.self_attn.sinks": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
        "sinks': not part of a llama model",
    ),
    "two embeddings": (
        header(lambda head: head.update({"draft.embed_tokens.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})),
        "embed_tokens.weight",
    ),
    "a head of another shape": (
        header(lambda head: head.update({"lm_head.weight": {"dtype": "F32", "shape": [0, 64], "data_offsets": [0, 0]}})),
        r"lm_head.weight shape: \(0, 64\)",
    ),
    "a FIFO": (instead("model.safetensors", os.mkfifo), "mode: 'p.*regular file"),
    "a device": (instead("model.safetensors", lambda path: path.symlink_to("/dev/zero")), "not a link out of it"),
    "a directory": (instead("model.safetensors", Path.mkdir), "regular file"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "weights: '0 .safetensors files'"),
    # shard index
    "shard above": (moved("../elsewhere.safetensors"), r"index.json: weight_map file: '../elsewhere.safetensors'"),
    "shard at the root": (moved("/etc/passwd"), "weight_map file: '/etc/passwd'"),
    "shard is the directory": (moved("."), "weight_map file: '.'"),
    "shard with a zero byte": (moved("a\0b"), "weight_map file"),
    "shard with a backslash": (moved("..\\x"), "weight_map file"),
    "shard of a long name": (moved("x" * 5000), "weight_map file"),
    "shard missing": (moved("missing.safetensors"), "weight_map file: 'missing.safetensors'"),
    "shard without a name": (moved(""), "weight_map file: ''"),
    "shard is a number": (index(lambda content: content["weight_map"].update({Q: 2})), r"weight_map 'model.*q_proj.weight': 2"),
    "shard is a link out": (outside, "not a link out of it"),
    "shard is no safetensors file": (moved("config.json"), "config.json: header size"),
    "tensor in another shard": (
        index(lambda content: content["weight_map"].update({Q: content["weight_map"][LAST]})), "weight_map 'model.*q_proj.weight'",
    ),
    "tensor in two shards": (shadowed, "one file only|where the tensor is"),
    "tensor in no shard": (index(lambda content: content["weight_map"].update({"model.x": content["weight_map"][Q]})), "weight_map 'model.x'"),
    "tensor not in the index": (index(lambda content: content["weight_map"].pop(Q)), "weight_map 'model.*q_proj.weight': None"),
    "index without a map": (index(lambda content: content.pop("weight_map")), "weight_map: None"),
    "index with an empty map": (index(lambda content: content.update(weight_map={})), "weight_map: {}"),
    "map is a list": (index(lambda content: content.update(weight_map=[])), "weight_map: \\[\\]"),
    "index is no JSON": (text("model.safetensors.index.json", "weights"), "index.json: index: not valid JSON"),
    "index nests 100,000 deep": (text("model.safetensors.index.json", b'{"a":' + NESTED), "index.json"),
    "index is empty": (text("model.safetensors.index.json", ""), "index.json: file size: 0"),
    "index is a FIFO": (lambda directory: os.mkfifo(directory / "model.safetensors.index.json"), "index.json: mode"),
    # configuration
    "config is empty": (text("config.json", ""), "config.json: file size: 0"),
    "config is a list": (text("config.json", "[]"), "config.json: config.json: .*, expected a JSON object"),
    "config is binary": (text("config.json", b"\x80\x04"), "config.json: not valid JSON"),
    "config is UTF-16": (text("config.json", json.dumps(hf_config()).encode("utf-16")), "not valid JSON"),
    "config of 5 MB": (text("config.json", b'{"a":"' + b"x" * (5 << 20) + b'"}'), "file size: 5242"),
    "config is a FIFO": (instead("config.json", os.mkfifo), "config.json: mode"),
    "config names a key twice": (text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), "'vocab_size' occurs twice"),
    "name is half a surrogate pair": (text("config.json", '{"_name_or_path": "\\ud800"}'), "config.json: not valid JSON"),
    "no model type": (edited("config.json", lambda content: content.pop("model_type")), "model_type: missing, expected one of llama"),
    "model type is a list": (config(model_type=["llama"]), "model_type"),
    "hidden size 0": (config(hidden_size=0), "hidden_size: 0"),
    "hidden size is text": (config(hidden_size="64"), "hidden_size: '64'"),
    "hidden size is fractional": (config(hidden_size=64.5), "hidden_size: 64.5"),
    "hidden size 2^63": (config(hidden_size=HUGE), "hidden_size: 9223372036854775808"),
    "hidden size of 4,000 digits": (config(hidden_size=10**3999), "hidden_size: an integer of"),
    "hidden size true": (config(hidden_size=True), "hidden_size: True"),
    "hidden size is not the file's": (config(hidden_size=128, head_dim=64), "embed_tokens.weight shape"),
    "hidden size missing": (edited("config.json", lambda content: content.pop("hidden_size")), "hidden_size: None"),
    "2^31 layers": (config(num_hidden_layers=2**31), "num_hidden_layers: 2147483648"),
    "two layers, one there": (config(num_hidden_layers=2), "layers.1.*missing"),
    "heads do not divide": (config(num_attention_heads=3), "key-value heads|head size|shape"),
    "three key heads of four": (config(num_attention_heads=4, num_key_value_heads=3), "key-value heads: 3"),
    "head of a size no kernel takes": (config(head_dim=40), "head size: 40"),
    "vocabulary of 2^40": (config(vocab_size=2**40), "vocab_size"),
    "context 1": (config(max_position_embeddings=1), "max_position_embeddings: 1"),
    "epsilon negative": (config(rms_norm_eps=-1e-5), "rms_norm_eps: -1e-05"),
    "epsilon is NaN": (text("config.json", json.dumps(hf_config() | {"rms_norm_eps": float("nan")})), "NaN is not JSON"),
    "rope base 0": (config(rope_theta=0), "rope_theta: 0"),
    "rope base 1e999": (text("config.json", json.dumps(hf_config()).replace("10000.0", "1e999")), "rope_theta: inf"),
    "rope scaling is a list": (config(rope_scaling=[]), r"rope_scaling: \[\]"),
    "rope scaling of an unknown kind": (config(rope_scaling={"rope_type": "longrope"}), "rope_scaling.rope_type: 'longrope'"),
    "rope factor missing": (config(rope_scaling={"rope_type": "linear"}), "rope_scaling.factor: None"),
    "rope factor 0": (config(rope_scaling={"rope_type": "linear", "factor": 0}), "rope_scaling.factor: 0"),
    "yarn without a ramp": (config(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_slow": 0.0}), "beta_slow: 0.0"),
    "llama3 frequencies reversed": (
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}), "high_freq_factor: 1.0",
    ),
    "another activation": (config(hidden_act="relu"), "hidden_act: 'relu'"),
    "capped logits": (config(final_logit_softcapping=30.0), "final_logit_softcapping: 30.0"),
    "capped attention": (config(attn_logit_softcapping=50.0), "attn_logit_softcapping: 50.0"),
    "attention with bias": (config(attention_bias=True), "attention_bias: True"),
    "quantised by another library": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "end token beyond the vocabulary": (config(eos_token_id=2**20), "begin or end token: 1048576"),
    "end token negative": (config(eos_token_id=-1), "eos_token_id: -1"),
    "a million end tokens": (config(eos_token_id=[1] * 1_000_000), "eos_token_id: a list of 1000000 items|config.json values"),
    "generation end token is text": (text("generation_config.json", '{"eos_token_id": "</s>"}'), "eos_token_id: '</s>'"),
    "generation config is a list": (text("generation_config.json", "[1]"), "generation_config.json"),
    "untied without a head": (config(tie_word_embeddings=False), "lm_head.weight: missing"),
    "tie is text": (config(tie_word_embeddings="yes"), "tie_word_embeddings: 'yes'"),
    # tokenizer and template
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "tokenizer is empty": (text("tokenizer.json", ""), "tokenizer.json: file size: 0"),
    "tokenizer is no JSON": (text("tokenizer.json", "BPE"), "tokenizer.json: not a usable tokenizer"),
    "tokenizer nests 100,000 deep": (text("tokenizer.json", NESTED), "tokenizer.json: not a usable tokenizer"),
    "tokenizer without a model": (tokenizer(lambda content: content.pop("model")), "not a usable tokenizer"),
    "tokenizer of an unknown kind": (tokenizer(lambda content: content["model"].update(type="Runes")), "not a usable tokenizer"),
    "tokenizer is a FIFO": (instead("tokenizer.json", os.mkfifo), "tokenizer.json: mode"),
    "merge of unknown tokens": (tokenizer(lambda content: content["model"].update(merges=["q zz"])), "not a usable tokenizer"),
    "vocabulary is a list": (tokenizer(lambda content: content["model"].update(vocab=WORDS)), "not a usable tokenizer"),
    "empty vocabulary": (tokenizer(lambda content: (content["model"].update(vocab={}, merges=[]), content.update(added_tokens=[]))), "number of tokens: 0"),
    "token id negative": (tokenizer(lambda content: content["model"]["vocab"].update(ab=-1)), "not a usable tokenizer"),
    "decoder unknown": (tokenizer(lambda content: content.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})), "decoder: 'WordPiece'"),
    "decoder missing": (tokenizer(lambda content: content.update(decoder=None)), "decoder"),
    "rule is no regular expression": (
        tokenizer(lambda content: content.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})),
        "not a usable tokenizer",
    ),
    "tokenizer_config is a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "begin token is a number": (text("tokenizer_config.json", '{"bos_token": 1}'), "bos_token: 1"),
    "begin token is half a surrogate pair": (text("tokenizer_config.json", '{"bos_token": "\\udc80"}'), "tokenizer_config.json: .*surrogates"),
    "template is a number": (text("tokenizer_config.json", '{"chat_template": 3}'), "chat_template: 3"),
    "templates without names": (
        text("tokenizer_config.json", '{"chat_template": [{"name": ["default"], "template": 1}, {"name": "default", "template": 1}]}'),
        "chat_template: 1",
    ),
    "template not UTF-8": (text("chat_template.jinja", b"\xff"), r"chat_template.jinja: text: b'\\xff'"),
    "template is a FIFO": (lambda directory: os.mkfifo(directory / "chat_template.jinja"), "chat_template.jinja: mode"),
    "template of 2 MB": (text("chat_template.jinja", "x" * (2 << 20)), "chat_template.jinja: file size"),
}  # fmt: skip


def test_the_directory_all_others_are_made_from_is_good(tmp_path):
    single = stretto.load(write_hf(tmp_path / "one")).generate("abc", max_tokens=5, ignore_eos=True).tokens
    assert len(single) == 5
    write_sharded(write_hf(tmp_path / "two"))
    assert stretto.load(tmp_path / "two").generate("abc", max_tokens=5, ignore_eos=True).tokens == single


def test_there_are_enough():
    assert len(BAD) >= 100


@pytest.mark.parametrize("name", BAD)
def test_bad_directory(tmp_path, name):
    change, message = BAD[name]
    directory = write_hf(tmp_path / "model")
    change(directory)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=rf"(?s)model.*({message})") as caught:
            stretto.load(directory)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20  # most of it the file itself, where a hostile one is large
    finally:
        tracemalloc.stop()
    assert str(directory) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_in_little_memory_and_time(tmp_path):
    """What tracemalloc does not see (the tokenizer library, torch) is held by the limit on the whole process."""
    for number, (change, _) in enumerate(BAD.values()):
        (tmp_path / str(number)).mkdir()
        change(write_hf(tmp_path / str(number) / "model"))
    assert loads_within([tmp_path / str(number) / "model" for number in range(len(BAD))]) == ["ModelFileError"] * len(BAD)


def test_truncated_anywhere(tmp_path):
    path = write_hf(tmp_path / "model") / "model.safetensors"
    whole = path.read_bytes()
    for keep in [*range(20), *range(20, len(whole), 1009), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelFileError):
            open_safetensors(path.parent)


def test_unknown_architecture_says_which_are_known(tmp_path):
    directory = write_hf(tmp_path / "model")
    config(model_type="mammoth", auto_map={"AutoModelForCausalLM": "modeling_mammoth.Mammoth"})(directory)
    (directory / "modeling_mammoth.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(stretto.UnknownModel, match=r"config\.json: model_type: .*mammoth.*llama, mistral, qwen2, qwen3, gemma3"):
        stretto.load(directory)


def test_links_are_followed_where_a_download_cache_makes_them(tmp_path):
    """models--x/snapshots/REVISION/file -> ../../blobs/HASH; and links within the directory."""
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    write_sharded(write_hf(snapshot))
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(tmp_path / "models--x" / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert stretto.load(snapshot).generate("abc", max_tokens=1, ignore_eos=True).tokens
    directory = write_hf(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "real.bin")
    (directory / "model.safetensors").symlink_to("real.bin")
    assert stretto.load(directory).generate("abc", max_tokens=1, ignore_eos=True).tokens


def test_a_tokenizer_that_fails_on_a_text_ends_that_call(tmp_path):
    directory = write_hf(tmp_path / "model")
    tokenizer(lambda content: content.update(model={"type": "WordLevel", "vocab": {"ab": 0}, "unk_token": "[UNK]"}, added_tokens=[]))(directory)
    llm = stretto.load(directory)
    assert llm.tokenizer.encode("ab") == [0]
    with pytest.raises(ModelFileError, match=r"tokenizer fails on 'cd'.*UNK"):
        llm.generate("cd")
    with pytest.raises(ValueError, match="lone surrogates"):
        llm.tokenizer.encode("\ud800")


def test_ids_beyond_the_model_are_harmless(tmp_path):
    directory = write_hf(tmp_path / "model")
    tokenizer(lambda content: content["model"]["vocab"].update({"b": 2**32 - 1}))(directory)
    tokenizer(lambda content: content["added_tokens"].append(content["added_tokens"][0] | {"id": 2**32 - 2, "content": "<far>"}))(directory)
    llm = stretto.load(directory)
    assert llm.generate("a", max_tokens=2, ignore_eos=True).tokens
    with pytest.raises(ValueError, match="4294967295"):
        llm.generate("b")
    with pytest.raises(ValueError, match="4294967295"):
        llm.tokenizer.decode([2**32 - 1])
