"""Small model files, written byte by byte so that a test can lie in any field."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.subproc import python

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
HIDDEN, FEED, HEADS, LAYERS = 64, 96, 1, 1
WORDS = ["<s>", "</s>", *(chr(code) for code in range(0x21, 0x7F)), "Ġ", "ab"]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def strings(items: Iterable[str | bytes]) -> bytes:
    items = list(items)
    return u32(STRING) + u64(len(items)) + b"".join(string(item) for item in items)


def numbers(kind: int, form: str, values: list[Any]) -> bytes:
    return u32(kind) + u64(len(values)) + struct.pack(f"<{len(values)}{form}", *values)


@dataclass
class Record:
    """One tensor record of a GGUF file. ``dims`` are in the file's order: row length first."""

    name: str | bytes
    dims: list[int]
    kind: int = 0
    offset: int | None = None  # None: after the one before
    rank: int | None = None
    nbytes: int | None = None

    def size(self) -> int:
        return math.prod(self.dims) * 4 if self.nbytes is None else self.nbytes


@dataclass
class Gguf:
    """A complete one-layer Llama. Change a field and write it."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: dict[str | bytes, tuple[int, bytes]] = field(default_factory=dict)
    tensors: list[Record] = field(default_factory=list)
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32
    extra_keys: bytes = b""
    cut: int | None = None  # bytes to keep
    tail: bytes = b""

    def set(self, key: str, kind: int, raw: bytes) -> Gguf:
        self.keys[key] = (kind, raw)
        return self

    def without(self, *names: str) -> Gguf:
        self.keys = {key: value for key, value in self.keys.items() if key not in names}
        self.tensors = [record for record in self.tensors if record.name not in names]
        return self

    def tensor(self, name: str) -> Record:
        return next(record for record in self.tensors if record.name == name)

    def header(self) -> bytes:
        raw = self.magic + u32(self.version)
        raw += u64(len(self.tensors) if self.num_tensors is None else self.num_tensors)
        raw += u64(len(self.keys) if self.num_keys is None else self.num_keys)
        for key, (kind, value) in self.keys.items():
            raw += string(key) + u32(kind) + value
        raw += self.extra_keys
        position = 0
        for record in self.tensors:
            offset = position % 2**64 if record.offset is None else record.offset
            raw += string(record.name) + u32(len(record.dims) if record.rank is None else record.rank)
            raw += b"".join(u64(dim) for dim in record.dims) + u32(record.kind) + u64(offset)
            position = -(-(position + record.size()) // self.alignment) * self.alignment
        return raw

    def bytes(self) -> bytes:
        head = self.header()
        raw = head + bytes(-len(head) % self.alignment)
        rng = np.random.default_rng(0)
        for record in self.tensors:
            if record.size() < 1 << 20:
                raw += (rng.standard_normal(record.size() // 4) * 0.1).astype(np.float32).tobytes()
                raw += bytes(-len(raw) % self.alignment)
        return (raw + self.tail)[: self.cut]

    def write(self, directory: Path) -> Path:
        path = directory / "model.gguf"
        path.write_bytes(self.bytes())
        return path


def good_gguf(hidden: int = HIDDEN, feed: int = FEED) -> Gguf:
    file = Gguf()
    file.set("general.architecture", STRING, string("llama"))
    for name, value in {"block_count": LAYERS, "context_length": 128, "embedding_length": hidden, "feed_forward_length": feed,
                        "attention.head_count": HEADS, "attention.head_count_kv": HEADS, "rope.dimension_count": hidden}.items():  # fmt: skip
        file.set(f"llama.{name}", U32, u32(value))
    file.set("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5))
    file.set("tokenizer.ggml.model", STRING, string("gpt2"))
    file.set("tokenizer.ggml.pre", STRING, string("gpt-2"))
    file.set("tokenizer.ggml.tokens", ARRAY, strings(WORDS))
    file.set("tokenizer.ggml.merges", ARRAY, strings(["a b"]))
    file.set("tokenizer.ggml.token_type", ARRAY, numbers(5, "i", [3, 3] + [1] * (len(WORDS) - 2)))
    file.set("tokenizer.ggml.bos_token_id", U32, u32(0))
    file.set("tokenizer.ggml.eos_token_id", U32, u32(1))
    square = [hidden, hidden]
    shapes = {"attn_norm": [hidden], "attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square, "ffn_norm": [hidden],
              "ffn_gate": [hidden, feed], "ffn_up": [hidden, feed], "ffn_down": [feed, hidden]}  # fmt: skip
    file.tensors = [Record("token_embd.weight", [hidden, len(WORDS)]), Record("output_norm.weight", [hidden])]
    file.tensors += [Record(f"blk.0.{name}.weight", dims) for name, dims in shapes.items()]
    return file


def hf_config(hidden: int = HIDDEN, feed: int = FEED) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": len(WORDS),
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
            "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"}  # fmt: skip


def hf_tensors(hidden: int = HIDDEN, feed: int = FEED) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    square = (hidden, hidden)
    shapes = {"embed_tokens.weight": (len(WORDS), hidden), "norm.weight": (hidden,)}
    for name, shape in {"input_layernorm": (hidden,), "self_attn.q_proj": square, "self_attn.k_proj": square, "self_attn.v_proj": square,
                        "self_attn.o_proj": square, "post_attention_layernorm": (hidden,), "mlp.gate_proj": (feed, hidden),
                        "mlp.up_proj": (feed, hidden), "mlp.down_proj": (hidden, feed)}.items():  # fmt: skip
        shapes[f"layers.0.{name}.weight"] = shape
    return {f"model.{name}": (rng.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in shapes.items()}


def safetensors(tensors: dict[str, np.ndarray[Any, Any]]) -> tuple[dict[str, Any], bytes]:
    """Header (a dict a test may change) and data."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    return header, data


def write_safetensors(path: Path, header: Any, data: bytes, *, size: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(u64(len(raw) if size is None else size) + raw + data)
    return path


def write_tokenizer(directory: Path) -> None:
    model = {"type": "BPE", "vocab": {word: index for index, word in enumerate(WORDS)}, "merges": ["a b"]}
    added = [{"id": index, "content": WORDS[index], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for index in (0, 1)]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level, "post_processor": None,
             "decoder": level, "model": model}  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(whole))


def write_hf(directory: Path, hidden: int = HIDDEN, feed: int = FEED) -> Path:
    """A complete Hugging Face directory."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(hidden, feed)))
    write_safetensors(directory / "model.safetensors", *safetensors(hf_tensors(hidden, feed)))
    write_tokenizer(directory)
    return directory


def write_sharded(directory: Path) -> Path:
    """Replaces the single safetensors file of a directory by two and an index."""
    (directory / "model.safetensors").unlink()
    tensors = hf_tensors()
    names = [*tensors]
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(directory / file, *safetensors({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def loads_within(paths: list[Path], megabytes: int = 512, seconds: float = 1.0) -> list[str]:
    """What loading each path ends with ("ModelFileError", ..., or "" where it succeeds), in a process that may take this much memory
    beyond what the libraries themselves hold, each path within this much CPU time."""
    source = f"""
        import json, resource, stretto, sys, time
        import stretto.engine.llm, stretto.models.loading.gguf_tokenizer  # what load would import
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ({megabytes} << 20),) * 2)
        ends = []
        for path in json.loads({json.dumps([str(p) for p in paths])!r}):
            start, end = time.process_time(), ""
            try:
                stretto.load(path)
            except BaseException as error:
                end = type(error).__name__
            took = time.process_time() - start
            assert took < {seconds}, (path, end, took)
            ends.append(end)
        print(json.dumps(ends))
    """
    result: list[str] = json.loads(python(source))
    return result
