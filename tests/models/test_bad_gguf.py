"""Every lie a GGUF file can tell is refused by name, before anything of the claimed size is allocated."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import stretto
from stretto import ModelFileError
from stretto.models.loading.gguf import read_gguf

from tests.models.files import (
    ARRAY,
    BOOL,
    F32,
    HIDDEN,
    STRING,
    U32,
    U64,
    WORDS,
    Gguf,
    Record,
    good_gguf,
    loads_within,
    numbers,
    string,
    strings,
    u32,
    u64,
)  # fmt: skip

Change = Callable[[Gguf], object]
K = "llama."
T = "tokenizer.ggml."


def attribute(name: str, value: object) -> Change:
    return lambda file: setattr(file, name, value)


def key(name: str, kind: int, raw: bytes) -> Change:
    return lambda file: file.set(name, kind, raw)


def number(name: str, value: int) -> Change:
    return key(name, U32, u32(value))


def without(*names: str) -> Change:
    return lambda file: file.without(*names)


def tensor(which: str, **changes: object) -> Change:
    def change(file: Gguf) -> None:
        record = file.tensor(which)
        for attr, value in changes.items():
            setattr(record, attr, value)

    return change


def extra(raw: bytes) -> Change:
    """One more key, as raw bytes."""

    def change(file: Gguf) -> None:
        file.num_keys, file.extra_keys = len(file.keys) + 1, raw

    return change


def added(record: Record) -> Change:
    return lambda file: file.tensors.append(record)


def with_words(words: list[str | bytes], types: list[int] | None = None) -> Change:
    def change(file: Gguf) -> None:
        file.set(T + "tokens", ARRAY, strings(words))
        file.set(T + "token_type", ARRAY, numbers(5, "i", types or [1] * len(words)))

    return change


HUGE = 2**63
Q = "blk.0.attn_q.weight"
# name: (change, what the error must say)
BAD: dict[str, tuple[Change, str]] = {
    "magic": (attribute("magic", b"GGML"), "magic"),
    "empty after magic": (attribute("cut", 4), "version"),
    "one byte": (attribute("cut", 1), "magic"),
    "version 0": (attribute("version", 0), "version"),
    "version 1": (attribute("version", 1), "version"),
    "version 4": (attribute("version", 4), "version"),
    "big-endian": (attribute("version", 3 << 24), "big-endian"),
    "2^63 tensors": (attribute("num_tensors", HUGE), "tensor count"),
    "2^64-1 tensors": (attribute("num_tensors", 2**64 - 1), "tensor count"),
    "more tensors than bytes": (attribute("num_tensors", 60_000), "tensor count"),
    "one tensor too many": (attribute("num_tensors", 12), "tensor 11"),
    "no tensors": (attribute("num_tensors", 0), "token_embd.weight"),
    "2^63 keys": (attribute("num_keys", HUGE), "key count"),
    "one key too many": (attribute("num_keys", 17), "tensor 0"),  # the first tensor's record happens to read as a key
    "one key too few": (attribute("num_keys", 15), "key|tensor"),
    "cut in the keys": (attribute("cut", 200), "bytes"),
    "cut in the tensor records": (attribute("cut", -120_000), "bytes|offset"),
    "cut in the data": (attribute("cut", -1000), "offset.*inside the file"),
    "key of 2^63 bytes": (extra(u64(HUGE)), "key 16 length: 9223372036854775808"),
    "key of 2^40 bytes": (extra(u64(2**40)), "key 16 length"),
    "key not UTF-8": (extra(string(b"\xff\xfe") + u32(U32) + u32(0)), "UTF-8"),
    "empty key": (extra(string("") + u32(U32) + u32(0)), "key 16"),
    "key twice": (extra(string("general.architecture") + u32(STRING) + string("llama")), "did not occur before"),
    "value type 13": (extra(string("x") + u32(13) + u64(0)), "x type: 13"),
    "value type 2^32-1": (extra(string("x") + u32(2**32 - 1)), "x type"),
    "string of 2^63 bytes": (extra(string("x") + u32(STRING) + u64(HUGE)), "x length"),
    "string past the end": (extra(string("x") + u32(STRING) + u64(15 << 20)), "x length"),
    "array of 2^63 numbers": (extra(string("x") + u32(ARRAY) + u32(U64) + u64(HUGE)), "x array count"),
    "array whose bytes overflow 64 bits": (extra(string("x") + u32(ARRAY) + u32(U64) + u64(2**61 + 1)), "x array count"),
    "array past the end": (extra(string("x") + u32(ARRAY) + u32(U64) + u64(10**6)), "x array count"),
    "array of arrays": (extra(string("x") + u32(ARRAY) + u32(ARRAY) + u64(1)), "arrays do not nest"),
    "array of unknown type": (extra(string("x") + u32(ARRAY) + u32(77) + u64(1)), "array type: 77"),
    "2^63 strings": (extra(string("x") + u32(ARRAY) + u32(STRING) + u64(HUGE)), "x array count"),
    "10 million strings": (extra(string("x") + u32(ARRAY) + u32(STRING) + u64(10**7)), "x array count"),
    "string in an array past the end": (extra(string("x") + u32(ARRAY) + u32(STRING) + u64(1) + u64(HUGE)), r"x\[0\] length"),
    "boolean 2": (extra(string("x") + u32(BOOL) + b"\x02"), "x: 2"),
    "boolean 3 in an array": (extra(string("x") + u32(ARRAY) + u32(BOOL) + u64(2) + b"\x01\x03"), "x: 3"),
    "alignment 0": (number("general.alignment", 0), "general.alignment"),
    "alignment 3": (number("general.alignment", 3), "general.alignment"),
    "alignment 2^31": (number("general.alignment", 1 << 31), "general.alignment"),
    "alignment is text": (key("general.alignment", STRING, string("32")), "general.alignment"),
    "tensor without a name": (tensor(Q, name=""), "name"),
    "tensor name of 64 KiB": (tensor(Q, name="q" * 65_536), "name length"),
    "tensor name not UTF-8": (tensor(Q, name=b"\xc3\x28"), "UTF-8"),
    "tensor twice": (tensor(Q, name="blk.0.attn_k.weight"), "did not occur before"),
    "rank 0": (tensor(Q, rank=0), "rank: 0"),
    "rank 5": (tensor(Q, rank=5), "rank: 5"),
    "rank 2^32-1": (tensor(Q, rank=2**32 - 1), "rank"),
    "dimension 0": (tensor(Q, dims=[HIDDEN, 0]), "dimension 1: 0"),
    "dimension 2^63": (tensor(Q, dims=[HIDDEN, HUGE], nbytes=4 * HIDDEN * HIDDEN), "size of shape"),
    "product of 2^64": (tensor(Q, dims=[2**32, 2**32], nbytes=4 * HIDDEN * HIDDEN), "size of shape"),
    "product that wraps to the right size": (tensor(Q, dims=[2**62, 4, HIDDEN, HIDDEN], nbytes=4 * HIDDEN * HIDDEN), "size of shape"),
    "row is not whole blocks": (tensor(Q, kind=3, dims=[HIDDEN - 1, HIDDEN]), "multiple of 32"),
    "removed type 4": (tensor(Q, kind=4), "type: 4"),
    "type 2^32-1": (tensor(Q, kind=2**32 - 1), "type"),
    "type nothing here reads": (tensor(Q, kind=19, dims=[256, 16]), "attn_q"),
    "integer weights": (tensor(Q, kind=26), "attn_q"),
    "offset not aligned": (tensor(Q, offset=36), "multiple of the alignment"),
    "offset 2^63": (tensor(Q, offset=HUGE), "offset: 9223372036854775808"),
    "offset 2^64-32": (tensor(Q, offset=2**64 - 32), "offset"),
    "offset at the end": (tensor("blk.0.ffn_down.weight", offset=200_000), "inside the file"),
    "tensors overlap": (tensor(Q, offset=32), "overlap"),
    "tensors at one place": (tensor(Q, offset=0), "overlap"),
    "missing tensor": (without(Q), "blk.0.attn_q.weight: missing"),
    "missing embedding": (without("token_embd.weight"), "token_embd.weight"),
    "wrong shape": (tensor(Q, dims=[HIDDEN, 2 * HIDDEN]), "attn_q.*shape"),
    "transposed": (tensor("blk.0.ffn_up.weight", dims=[96, HIDDEN]), "ffn_up.*shape"),
    "vector as matrix": (tensor("output_norm.weight", dims=[1, HIDDEN]), "output_norm.*shape"),
    "a tensor nobody reads": (added(Record("blk.0.attn_sinks.weight", [HIDDEN])), "attn_sinks"),
    "a layer too many": (added(Record("blk.1.attn_q.weight", [HIDDEN, HIDDEN])), "blk.1"),
    "no architecture": (without("general.architecture"), "general.architecture"),
    "architecture is a number": (number("general.architecture", 1), "general.architecture"),
    "no layers": (number(K + "block_count", 0), "block_count"),
    "2^32-1 layers": (number(K + "block_count", 2**32 - 1), "block_count"),
    "two layers, one there": (number(K + "block_count", 2), "blk.1"),
    "layer count missing": (without(K + "block_count"), "block_count"),
    "no heads": (number(K + "attention.head_count", 0), "head_count"),
    "heads do not divide": (number(K + "attention.head_count", 3), "head"),
    "more key heads than heads": (number(K + "attention.head_count_kv", 2), "key-value heads"),
    "width 0": (number(K + "embedding_length", 0), "embedding_length"),
    "width 2^31": (number(K + "embedding_length", 2**31), "embedding_length|shape"),
    "odd head": (number(K + "attention.key_length", 63), "head"),
    "context 0": (number(K + "context_length", 0), "context_length"),
    "epsilon NaN": (key(K + "attention.layer_norm_rms_epsilon", F32, struct.pack("<f", float("nan"))), "epsilon"),
    "epsilon -1": (key(K + "attention.layer_norm_rms_epsilon", F32, struct.pack("<f", -1.0)), "epsilon"),
    "epsilon is text": (key(K + "attention.layer_norm_rms_epsilon", STRING, string("0.1")), "epsilon"),
    "rope base infinite": (key(K + "rope.freq_base", F32, struct.pack("<f", float("inf"))), "freq_base"),
    "rope base 1": (key(K + "rope.freq_base", F32, struct.pack("<f", 1.0)), "freq_base: 1.0"),
    "rope scaling unknown": (key(K + "rope.scaling.type", STRING, string("spiral")), "rope.scaling.type"),
    "rope factor 0": (
        lambda file: file.set(K + "rope.scaling.type", STRING, string("linear")).set(K + "rope.scaling.factor", F32, struct.pack("<f", 0.0)),
        "factor",
    ),
    "yarn without a ramp": (
        lambda file: (
            file.set(K + "rope.scaling.type", STRING, string("yarn"))
            .set(K + "rope.scaling.factor", F32, struct.pack("<f", 2.0))
            .set(K + "rope.scaling.yarn_beta_fast", F32, struct.pack("<f", 0.0))
        ),
        "yarn_beta_fast: 0.0",
    ),
    "rope factors that are no rule": (added(Record("rope_freqs.weight", [HIDDEN // 2])), "rope_freqs.weight"),
    "rope factors of another length": (added(Record("rope_freqs.weight", [8])), "rope_freqs.weight"),
    "rope factors beside scaling": (
        lambda file: (
            file.tensors.append(Record("rope_freqs.weight", [HIDDEN // 2]))
            or file.set(K + "rope.scaling.type", STRING, string("linear")).set(K + "rope.scaling.factor", F32, struct.pack("<f", 2.0))
        ),
        "rope.scaling.type: 'linear'",
    ),
    "head of a size no kernel takes": (
        lambda file: file.set(K + "attention.key_length", U32, u32(40)).set(K + "rope.dimension_count", U32, u32(40)),
        "head size: 40",
    ),
    "feed-forward of a size no kernel takes": (number(K + "feed_forward_length", 100), "feed-forward size: 100"),
    "context of one": (number(K + "context_length", 1), "context_length: 1"),
    "unequal heads in layers": (key(K + "attention.head_count", ARRAY, numbers(U32, "I", [1, 2])), "head_count"),
    "no head counts in an array": (key(K + "attention.head_count", ARRAY, numbers(U32, "I", [])), "head_count"),
    "experts": (number(K + "expert_count", 8), "expert_count: 8"),
    "values of another length": (number(K + "attention.value_length", 32), "value_length: 32"),
    "rotary part of a head": (number(K + "rope.dimension_count", 32), "rope.dimension_count: 32"),
    "head of its own, of another shape": (added(Record("output.weight", [HIDDEN, 8])), "output.weight shape"),
    "head of its own, of integers": (added(Record("output.weight", [HIDDEN, len(WORDS)], kind=26)), "output.weight type: 'I32'"),
    "bias without its layer's others": (added(Record("blk.0.attn_q.bias", [HIDDEN])), "blk.0.attn_k.bias: missing"),
    "vector of blocks": (tensor("output_norm.weight", kind=8, nbytes=68), "output_norm.weight type: 'Q8_0'"),
    "no tokens": (key(T + "tokens", ARRAY, strings([])), "tokens"),
    "tokens are numbers": (key(T + "tokens", ARRAY, numbers(U32, "I", [1, 2])), "array of strings"),
    "more tokens than vocab_size": (number(K + "vocab_size", 10), "tokenizer.ggml.tokens"),
    "vocab_size beyond every limit": (number(K + "vocab_size", 2**32 - 1), "vocab_size: 4294967295"),
    "SentencePiece without scores": (
        lambda file: file.set(T + "model", STRING, string("llama")).without(T + "merges"),
        "scores",
    ),
    "SentencePiece with quadratic pieces": (
        lambda file: [
            with_words([*WORDS[:-1], "a" * 60_000])(file),
            file.set(T + "model", STRING, string("llama")).without(T + "merges"),
            file.set(T + "scores", ARRAY, numbers(F32, "f", [0.0] * len(WORDS))),
        ],
        "60102 characters, 60000 in one token",
    ),
    "token of 2^17 bytes": (with_words([*WORDS[:-1], "a" * 2**17]), "a token of 131072 characters"),
    "add_bos_token is a number": (number(T + "add_bos_token", 1), "add_bos_token"),
    "unknown token beyond the vocabulary": (number(T + "unknown_token_id", 1000), "unknown_token_id: 1000"),
    "tokens missing": (without(T + "tokens"), "tokens"),
    "more tokens than rows": (with_words([*WORDS, "more"]), "tokens|token_embd"),
    "token not UTF-8": (with_words([*WORDS[:-1], b"\xff"]), "UTF-8"),
    "types too short": (key(T + "token_type", ARRAY, numbers(5, "i", [1])), "token_type"),
    "merge of unknown tokens": (key(T + "merges", ARRAY, strings(["q zz"])), r"merges\[0\]"),
    "merge without a space": (key(T + "merges", ARRAY, strings(["ab"])), r"merges\[0\]"),
    "merges missing": (without(T + "merges"), "merges"),
    "tokenizer unknown": (key(T + "model", STRING, string("runes")), "tokenizer.ggml.model"),
    "cut rule unknown": (key(T + "pre", STRING, string("scissors")), "tokenizer.ggml.pre"),
    "begin beyond the vocabulary": (number(T + "bos_token_id", 1 << 30), "bos_token_id|begin"),
    "end is text": (key(T + "eos_token_id", STRING, string("</s>")), "eos_token_id"),
    "template is a number": (number("tokenizer.chat_template", 7), "chat_template"),
}


def test_the_file_all_others_are_made_from_is_good(tmp_path):
    assert len(stretto.load(good_gguf().write(tmp_path)).generate("abc", max_tokens=3, ignore_eos=True).tokens) == 3


def test_there_are_enough():
    assert len(BAD) >= 100


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, name):
    change, message = BAD[name]
    file = good_gguf()
    change(file)
    path = file.write(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match=rf"(?s)model\.gguf.*({message})") as caught:
            stretto.load(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


def test_all_in_little_memory_and_time(tmp_path):
    """What tracemalloc does not see (the tokenizer library, torch) is held by the limit on the whole process."""
    for index, (change, _) in enumerate(BAD.values()):
        file = good_gguf()
        change(file)
        (tmp_path / str(index)).mkdir()
        file.write(tmp_path / str(index))
    assert loads_within([tmp_path / str(index) / "model.gguf" for index in range(len(BAD))]) == ["ModelFileError"] * len(BAD)


def test_truncated_at_every_section(tmp_path):
    """Cut after each byte of the first and the last part of each section, and within the data."""
    file = good_gguf()
    whole, header = len(file.bytes()), len(file.header())
    for cut in [*range(1, 400), *range(400, header + 64, 29), *range(header + 64, whole, 10_007), whole - 1]:
        file.cut = cut
        with pytest.raises(ModelFileError):
            read_gguf(file.write(tmp_path))


def test_unknown_architecture_says_which_are_known(tmp_path):
    file = good_gguf().set("general.architecture", STRING, string("mammoth"))
    with pytest.raises(stretto.UnknownModel, match=r"model\.gguf: general\.architecture: .*mammoth.*llama, mistral, qwen2, qwen3, gemma3"):
        stretto.load(file.write(tmp_path))


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(ModelFileError, match=r"config.json: missing"):
        stretto.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match=r"mode: 'p.*regular file"):
        stretto.load(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match=r"mode: 'c.*regular file"):
        stretto.load("/dev/zero")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match="file size: 0"):
        stretto.load(tmp_path / "empty.gguf")
    with pytest.raises(stretto.UnknownModel, match=r"nothing.gguf: no such file.*smollm2-135m"):
        stretto.load(tmp_path / "nothing.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    with pytest.raises(stretto.StrettoError):
        stretto.load(tmp_path / "loop.gguf")


def test_a_link_to_a_file_is_a_file(tmp_path):
    good_gguf().write(tmp_path)
    (tmp_path / "link.gguf").symlink_to("model.gguf")
    assert stretto.load(tmp_path / "link.gguf").generate("abc", max_tokens=1, ignore_eos=True).tokens


def test_gate_and_up_in_different_formats_name_the_way_out(tmp_path):
    file = good_gguf()
    tensor("blk.0.ffn_up.weight", kind=8, nbytes=HIDDEN * 96 // 32 * 34)(file)
    with pytest.raises(NotImplementedError, match=r"gate and up .*F32, Q8_0.*quantise both alike"):
        stretto.load(file.write(tmp_path))


@pytest.mark.parametrize("poison", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [record.name for record in good_gguf().tensors])
def test_weights_that_are_not_finite_never_become_tokens(tmp_path, name, poison):
    """Not a bad file: weights are not read through at load. The request ends with an error instead."""
    path = good_gguf().write(tmp_path)
    info = read_gguf(path).tensors[name]
    raw = bytearray(path.read_bytes())
    raw[info.offset : info.offset + info.nbytes] = struct.pack("<f", float(poison)) * (info.nbytes // 4)
    path.write_bytes(raw)
    llm = stretto.load(path)
    with pytest.raises(stretto.NonFiniteLogits):
        llm.generate("abc", max_tokens=3, ignore_eos=True)
    with pytest.raises(ModelFileError, match=r"model\.gguf: tensor .*: cannot become Q4_0: .*not finite") if len(info.shape) > 1 else nullcontext():
        stretto.load(path, dtype="q4_0")
