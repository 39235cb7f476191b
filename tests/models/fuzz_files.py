"""Structure-aware fuzzing of model files: small valid ones, changed where it hurts, then loaded and used.

    python -m tests.models.fuzz_files --cases 100000 --seed 7      another hundred thousand
    python -m tests.models.fuzz_files --seed 7 --only 4711         one case again, with its files kept

A case depends on (seed, number) alone. It fails if loading ends with anything but success, ModelFileError, UnknownModel or the one
NotImplementedError of the contract, or if a file that loads does not generate tokens or end with NonFiniteLogits. The process gives
itself a memory limit; a case that takes longer than SECONDS ends the process with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import json
import math
import random
import resource
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import stretto
import torch
from stretto.models.loading import tokenizer

from tests.models.files import ARRAY, BOOL, F32, STRING, U32, U64, Gguf, good_gguf, hf_config, hf_tensors, safetensors, string, u64, write_hf

SECONDS, MEGABYTES = 20, 1024
SMALL = {"hidden": 32, "feed": 32}
INTEGERS = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 255, 256, 1023, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62,
            2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]  # fmt: skip
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 2.0, 1e30, 3.4e38, math.inf, -math.inf, math.nan]
TEXTS = ["", " ", "a", "llama", "gemma3", "qwen2", "qwen3", "mistral", "gpt2", "default", "linear", "yarn", "llama3", "dynamic", "\0", "\u2581", "ab",
         "../x", "/", "é" * 50, "x" * 3000, "<s>", "{{ x", "{% for m in messages %}{{ m }}{% endfor %}", "\U0001f600"]  # fmt: skip
NAMES = ["rope_scaling", "rope_parameters", "layer_types", "sliding_window", "tie_word_embeddings", "eos_token_id", "bos_token_id", "head_dim", "name",
         "auto_map", "quantization_config", "text_config", "chat_template", "bos_token", "factor", "rope_type", "lm_head.weight"]  # fmt: skip


# ---- GGUF ----

_KEYS = ["vocab_size", "expert_count", "attention.key_length", "attention.value_length", "attention.sliding_window", "rope.freq_base", "rope.scaling.type",
         "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear", "attention.sliding_window_pattern",
         "final_logit_softcapping"]  # fmt: skip
_TOKENIZER_KEYS = [
    "scores",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "unknown_token_id",
    "padding_token_id",
    "eot_token_id",
    "pre",
    "merges",
]


def _value(rng: random.Random) -> tuple[int, bytes]:
    """A value of any type with an unlikely content."""
    kind = rng.choice([0, 1, 2, 3, U32, 5, F32, BOOL, STRING, ARRAY, U64, 11, 12])
    if kind == STRING:
        return kind, string(rng.choice(TEXTS))
    if kind == ARRAY:
        inner = rng.choice([U32, F32, BOOL, STRING, 5, ARRAY, 40])
        count = rng.choice([0, 1, 2, 32, 98])
        body = string(rng.choice(TEXTS)) * count if inner == STRING else rng.randbytes(count * 4)
        return kind, struct.pack("<IQ", inner, rng.choice([count, count, count, rng.choice(INTEGERS) % 2**64])) + body
    if kind == F32:
        return kind, struct.pack("<f", rng.choice(FLOATS))
    if kind == 12:
        return kind, struct.pack("<d", rng.choice(FLOATS))
    size = {0: 1, 1: 1, 2: 2, 3: 2, U32: 4, 5: 4, BOOL: 1, U64: 8, 11: 8}[kind]
    return kind, (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")


def _change_key(rng: random.Random, file: Gguf) -> None:
    names = list(file.keys)
    action = rng.randrange(5)
    if action == 0:
        file.keys.pop(rng.choice(names))
    elif action == 1:
        file.set(rng.choice([f"llama.{rng.choice(_KEYS)}", f"tokenizer.ggml.{rng.choice(_TOKENIZER_KEYS)}", "tokenizer.chat_template"]), *_value(rng))
    elif action == 2:  # a value of the right type
        name = rng.choice(names)
        kind, raw = file.keys[name]
        if kind == U32:
            file.set(name, kind, struct.pack("<I", rng.choice(INTEGERS) % 2**32))
        elif kind == F32:
            file.set(name, kind, struct.pack("<f", rng.choice(FLOATS)))
        elif kind == STRING:
            file.set(name, kind, string(rng.choice(TEXTS)))
        else:
            file.set(name, kind, _scrambled(rng, raw))
    else:
        file.set(rng.choice(names), *_value(rng))


def _change_tensor(rng: random.Random, file: Gguf) -> None:
    record = rng.choice(file.tensors)
    action = rng.randrange(8)
    if action == 0:
        file.tensors.remove(record)
    elif action == 1:
        file.tensors.insert(rng.randrange(len(file.tensors)), copy.copy(record))
    elif action == 2:
        record.nbytes = record.size()  # the data stays as long as it was
        record.dims[rng.randrange(len(record.dims))] = rng.choice(INTEGERS) % 2**64
    elif action == 3:
        record.nbytes = record.size()
        record.kind = rng.choice([*range(42), 2**31])
    elif action == 4:  # a true conversion, so that what follows is reached
        kind, block, nbytes = rng.choice([(1, 1, 2), (30, 1, 2), (8, 32, 34), (2, 32, 18), (3, 32, 20), (6, 32, 22), (7, 32, 24)])
        for one in file.tensors if rng.random() < 0.5 else [record]:
            if len(one.dims) == 2:
                one.kind, one.nbytes = kind, min(math.prod(one.dims) // block * nbytes, 1 << 20)
    elif action == 5:
        record.offset = rng.choice([*INTEGERS, rng.randrange(0, 40_000, 32)]) % 2**64
    elif action == 6:
        record.name = rng.choice(["output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.1.attn_q.weight", "", b"\xff",
                                  rng.choice(file.tensors).name])  # fmt: skip
    else:
        record.rank = rng.choice([0, 1, 2, 3, 4, 5, 2**32 - 1])


def _change_counts(rng: random.Random, file: Gguf) -> None:
    name = rng.choice(["num_keys", "num_tensors", "version", "alignment", "cut", "tail"])
    if name == "cut":
        file.cut = rng.randrange(len(file.bytes()))
    elif name == "tail":
        file.tail = rng.randbytes(rng.randrange(100))
    elif name == "alignment":
        file.alignment = rng.choice([8, 16, 64, 4096])
        file.set("general.alignment", U32, struct.pack("<I", rng.choice([file.alignment, 0, 1, 24, 2**31])))
    elif name == "version":
        file.version = rng.choice([0, 1, 2, 4, 3 << 24])
    else:
        setattr(file, name, rng.choice(INTEGERS))


def _scrambled(rng: random.Random, raw: bytes) -> bytes:
    """Bytes changed without knowledge of what they mean."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0:
            data[at : at + 1] = rng.randbytes(1)
        elif action == 1:
            size = rng.choice([1, 2, 4, 8])
            data[at : at + size] = (rng.choice(INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
        elif action == 2:
            del data[at : at + rng.choice([1, 4, 8, 100])]
        elif action == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        else:
            data[at:at] = data[at : at + rng.choice([1, 8, 64])]
    return bytes(data)


def _gguf_case(rng: random.Random, directory: Path) -> Path:
    file = copy.deepcopy(_BASE_GGUF)
    changes: list[Callable[[random.Random, Gguf], None]] = [_change_key, _change_key, _change_tensor, _change_tensor, _change_counts]
    if rng.random() < 0.8:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            rng.choice(changes)(rng, file)
    raw = file.bytes()
    if rng.random() < 0.25:
        header = min(len(file.header()), len(raw))
        raw = _scrambled(rng, raw[:header]) + raw[header:]
    if rng.random() < 0.1:  # weights of any bits, infinities and NaN among them
        at = rng.randrange(len(raw) // 2, len(raw)) if len(raw) > 64 else 0
        raw = raw[:at] + rng.randbytes(len(raw) - at)
    path = directory / "model.gguf"
    path.write_bytes(raw)
    return path


# ---- Hugging Face directories ----


def _leaf(rng: random.Random) -> Any:
    return rng.choice([rng.choice(INTEGERS), -1, rng.choice(FLOATS), rng.choice(TEXTS), None, True, False, [], {}, [[]], [rng.choice(INTEGERS)] * 3,
                       {"rope_type": rng.choice(TEXTS), "factor": rng.choice(FLOATS)}, "\ud800"])  # fmt: skip


def _change_json(rng: random.Random, content: Any) -> Any:
    """A JSON value with one place of it changed: replaced, removed, repeated or moved."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.1:
        return _leaf(rng)
    where = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
    action = rng.randrange(8)
    if action == 0:
        del content[where]
    elif action == 1 and isinstance(content, dict):
        content[rng.choice([*TEXTS, *NAMES])] = rng.choice([_leaf(rng), copy.deepcopy(content[where])])
    elif action == 2 and isinstance(content, dict):
        content[rng.choice(list(content))] = copy.deepcopy(content[where])
    elif action == 3:
        content[where] = _leaf(rng)
    else:
        content[where] = _change_json(rng, content[where])
    return content


def _hf_case(rng: random.Random, directory: Path) -> Path:
    """Writes what changed into a directory that `_restore` keeps whole."""
    name = rng.choice(["config.json", "config.json", "model.safetensors", "model.safetensors", "tokenizer.json", "tokenizer.json", "tokenizer_config.json",
                       "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"])  # fmt: skip
    header, data = copy.deepcopy(_BASE_SAFETENSORS)
    content: Any = {"config.json": hf_config(**SMALL), "tokenizer.json": copy.deepcopy(_BASE_TOKENIZER), "model.safetensors": header,
                    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEXTS[-2]},
                    "generation_config.json": {"eos_token_id": [1, 2]}, "chat_template.jinja": None,
                    "model.safetensors.index.json": {"weight_map": dict.fromkeys(header, "model.safetensors")}}[name]  # fmt: skip
    if name == "chat_template.jinja":
        raw = rng.choice(TEXTS).encode()
    else:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            content = _change_json(rng, content)
        raw = json.dumps(content).encode()
    if rng.random() < 0.25:
        raw = _scrambled(rng, raw)
    if name == "model.safetensors":
        if rng.random() < 0.1:
            at = rng.randrange(len(data))
            data = data[:at] + rng.randbytes(len(data) - at)
        raw = u64(rng.choice(INTEGERS) if rng.random() < 0.05 else len(raw)) + raw + data
        raw = raw[: rng.randrange(len(raw))] if rng.random() < 0.05 else raw
    (directory / name).write_bytes(raw)
    return directory


def _restore(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name not in _BASE_FILES:
            path.unlink()
        elif path.stat().st_mtime_ns != _WRITTEN.get(path):
            path.write_bytes(_BASE_FILES[path.name])
            _WRITTEN[path] = path.stat().st_mtime_ns


def _base_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        directory = write_hf(Path(name), **SMALL)
        return {path.name: path.read_bytes() for path in directory.iterdir()}


_BASE_GGUF = good_gguf(**SMALL)
_BASE_SAFETENSORS = safetensors(hf_tensors(**SMALL))
_BASE_FILES = _base_files()
_BASE_TOKENIZER = json.loads(_BASE_FILES["tokenizer.json"])
_WRITTEN: dict[Path, int] = {}


# ---- one case ----


def use(llm: Any) -> str:
    """Run what loaded. Non-finite logits must end the request; anything else must give tokens of the vocabulary."""
    vocab, context = llm.config.vocab_size, llm.engine.config.context
    ids = [7 % vocab, 9 % vocab, 11 % vocab][: context - 1]
    logits = llm.logits(ids)
    try:
        result = llm.generate(ids, max_tokens=2 if context > len(ids) + 1 else 1, ignore_eos=True, decode="off")
    except stretto.NonFiniteLogits:
        return "not finite"
    assert torch.isfinite(logits[-1]).all(), "tokens from logits that are not finite"
    assert len(result.tokens) >= 1, "no tokens"
    assert all(0 <= token < vocab for token in result.tokens), f"tokens {result.tokens} of {vocab}"
    assert isinstance(result.text, str)
    return "generates"


def talk(tokens: tokenizer.Tokenizer) -> None:
    """The tokenizer and the template may refuse a text; they may not do anything else."""
    with contextlib.suppress(stretto.ModelFileError):
        ids = tokens.encode("ab <s>c\u00e9")
        tokens.decode([token for token in ids if token < tokens.vocab_size])
    if tokens.has_chat_template:
        with contextlib.suppress(stretto.ModelFileError, ValueError):
            tokens.apply_chat_template([{"role": "user", "content": "ab"}])


def run_case(seed: int, number: int, directory: Path) -> str:
    """Writes, loads and uses case `number`; returns how it ended."""
    rng = random.Random(seed * 1_000_003 + number)
    if number % 2:
        path = _gguf_case(rng, directory)
    else:
        path = directory / "hf"
        _restore(path)
        path = _hf_case(rng, path)
    try:
        llm = stretto.load(path, threads=1, max_seqs=2)
    except (stretto.ModelFileError, stretto.UnknownModel) as error:
        if str(path) not in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"a message that does not name the file, or is as long as what the file holds: {error}") from None
        return type(error).__name__
    except NotImplementedError as error:
        if "gate and up" not in str(error):
            raise
        return "NotImplementedError"
    talk(llm.tokenizer)
    return use(llm)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case and keep its files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(tempfile.mkdtemp()) if arguments.only is not None else Path(name)
        write_hf(directory / "hf", **SMALL)
        stretto.load(directory / "hf").generate("ab", max_tokens=1)  # imports what loading imports, before the limit is set
        if arguments.only is not None:
            print(directory, run_case(arguments.seed, arguments.only, directory))
            return 0
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (MEGABYTES << 20),) * 2)
        before, ends, failures = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter[str](), 0
        with np.errstate(all="ignore"):
            for number in range(arguments.cases):
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                try:
                    ends[run_case(arguments.seed, number, directory)] += 1
                except BaseException as error:  # what this looks for; panics of the tokenizer library derive from BaseException
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    failures += 1
                    print(f"--seed {arguments.seed} --only {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({"cases": arguments.cases, "failures": failures, "grown_mib": grown >> 10, "ends": ends}))
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
