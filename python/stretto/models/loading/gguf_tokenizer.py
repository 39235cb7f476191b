"""Builds the tokenizer a GGUF file describes.

The file holds the tokens, their types, the merges of a byte-level BPE or the scores of a SentencePiece BPE, and the name of the
rule that cuts text before merging (``tokenizer.ggml.pre``). Rules as in ggml-org/llama.cpp src/llama-vocab.cpp and in the
tokenizer files the models were published with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from stretto.errors import ModelFileError
from stretto.models.loading._files import fail, shown
from stretto.models.loading.config import gguf_eos_ids
from stretto.models.loading.gguf import GgufFile, StringArray
from stretto.models.loading.tokenizer import _SPACE, Tokenizer, Vocabulary

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # tokenizer.ggml.token_type
MAX_TOKEN_BYTES = 65_536
MAX_PIECE_CHARS, MAX_VOCAB_CHARS = 512, 16 << 20  # where merges are made from all cuts of all pieces; Gemma's have 2 M characters

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _WORDS + r"|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _CASED_TAIL
_GPT4O = _CASED.replace("{0}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _CASED_TAIL

# Each rule cuts what the one before has left. GPT-2's is built into the byte-level step, which is faster.
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,), "smollm": (r"\p{N}", _GPT2), "llama-bpe": (_LLAMA3,), "qwen2": (_QWEN2,), "tekken": (_TEKKEN,), "gpt-4o": (_GPT4O,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2.removesuffix(r"|\s+"), r"\p{N}+", r"[0-9][0-9][0-9]"),
}  # fmt: skip
_SAME_AS = {
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "exaone": "smollm", "codeshell": "smollm",
    "minerva-7b": "smollm", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "dbrx": "llama-bpe", "smaug-bpe": "llama-bpe",
    "falcon3": "llama-bpe", "pixtral": "llama-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "phi-2": "gpt-2",
    "olmo": "gpt-2", "mpt": "gpt-2", "jais": "gpt-2", "trillion": "gpt-2", "llama4": "gpt-4o",
}  # fmt: skip
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a word that is a token is not built from merges
_BOS_BY_DEFAULT = ("llama-bpe", "tekken")


class _Keys:
    """Checked access to the tokenizer keys of one file."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file

    def fail(self, name: str, value: object, expected: str) -> NoReturn:
        fail(self.file.path, f"tokenizer.ggml.{name}", value, expected)

    def get(self, name: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}")

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, StringArray):
            self.fail(name, type(value).__name__, "an array of strings")
        return list(value)

    def numbers(self, name: str, kinds: str, count: int) -> npt.NDArray[Any] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) != count:
            self.fail(name, "another type or length", f"{count} numbers, one for each token")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            self.fail(name, value, "a string")
        return default if value is None else value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is not None and type(value) is not bool:
            self.fail(name, value, "a boolean")
        return default if value is None else value

    def token_id(self, name: str, count: int) -> int | None:
        value = self.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < count):
            self.fail(name, value, f"a token id below {count}")
        return None if value is None else int(value)


def _byte_level(keys: _Keys, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, str]:
    pre = keys.text("pre", "default")
    rule = _SAME_AS.get(pre, pre)
    if rule not in _SPLITS:
        keys.fail("pre", pre, "one of " + ", ".join(sorted([*_SPLITS, *_SAME_AS])))
    merges = []
    for index, merge in enumerate(keys.strings("merges")):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            keys.fail(f"merges[{index}]", merge, "two tokens whose join is a token")
        merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=rule in _WHOLE_WORDS_FIRST))
    *cuts, last = _SPLITS[rule]
    built_in = last == _GPT2
    steps: list[Any] = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in (cuts if built_in else [*cuts, last])]
    if rule == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]  # the same cut without a regular expression
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=built_in))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()  # in the published tokenizer; the file does not say it
    return backend, rule


def _merges_by_rank(texts: list[str], ranks: Sequence[float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Merges of a SentencePiece BPE, which stores none: every cut of a piece into two pieces, lowest rank first.

    The cuts of one piece, and of pieces of equal rank, go from the longest left part to the shortest.
    """
    merges: list[tuple[str, str]] = []
    order = sorted(range(len(texts)), key=ranks.__getitem__)
    for _, group in groupby(order, key=ranks.__getitem__):
        start, members = len(merges), 0
        for index in group:
            text, members = texts[index], members + 1
            merges += [(left, right) for cut in range(len(text) - 1, 0, -1) if (right := text[cut:]) in vocab and (left := text[:cut]) in vocab]
        if members > 1:
            merges[start:] = sorted(merges[start:], key=lambda merge: (-len(merge[0]), -len(merge[1])))
    return merges


def _sentencepiece(keys: _Keys, tokens: list[str], kinds: Sequence[int], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    if keys.get("merges") is not None:
        merges = []
        for index, merge in enumerate(keys.strings("merges")):
            left, _, right = merge.partition(" ")
            if left not in vocab or right not in vocab or left + right not in vocab:
                keys.fail(f"merges[{index}]", merge, "two tokens whose join is a token")
            merges.append((left, right))
    else:
        gemma = str(keys.file.metadata.get("general.architecture", "")).startswith("gemma")
        scores = keys.numbers("scores", "f", len(tokens))
        if scores is None:
            keys.fail("scores", None, f"{len(tokens)} numbers, or merges")
        # Gemma's scores do not follow the order in which its merges were learned; the order of its tokens does.
        ranks = list(range(len(tokens))) if gemma else (-np.nan_to_num(scores.astype(np.float64))).tolist()
        # A merge never makes a control or byte token: those stand for something else than their text.
        kept = [index for index, kind in enumerate(kinds) if kind in (_NORMAL, _USER)]
        longest, total = max((len(tokens[index]) for index in kept), default=0), sum(len(tokens[index]) for index in kept)
        if longest > MAX_PIECE_CHARS or total > MAX_VOCAB_CHARS:
            keys.fail("tokens", f"{total} characters, {longest} in one token", f"at most {MAX_VOCAB_CHARS} and {MAX_PIECE_CHARS}, or merges")
        merges = _merges_by_rank([tokens[index] for index in kept], [ranks[index] for index in kept], vocab)
    unknown = keys.token_id("unknown_token_id", len(tokens))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=None if unknown is None else tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if keys.flag("add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def _respelled(tokens: list[str]) -> list[str]:
    """Some converters write runs of spaces as spaces, where text has been turned to U+2581 before tokens are looked up."""
    return [_SPACE * len(token) if token.startswith(" ") and not token.strip(" ") else token for token in tokens]


def _build_backend(keys: _Keys, model: str, tokens: list[str], kinds: Sequence[int]) -> tuple[tokenizers.Tokenizer, str, dict[int, AddedToken]]:
    vocab = {token: index for index, token in enumerate(tokens)}
    if model == "gpt2":
        backend, rule = _byte_level(keys, vocab)
    else:
        backend, rule = _sentencepiece(keys, tokens, kinds, vocab), "llama"
    added: dict[int, AddedToken] = {}
    for index, kind in enumerate(kinds):
        token = tokens[index]
        respelled_run = model == "llama" and kind == _USER and not token.strip(_SPACE)
        if kind in (_CONTROL, _USER) and token and vocab[token] == index and not respelled_run:
            added[index] = AddedToken(token, normalized=False, special=kind == _CONTROL)
    backend.add_special_tokens([item for item in added.values() if item.special])
    backend.add_tokens([item for item in added.values() if not item.special])
    return backend, rule, added


def build(file: GgufFile) -> Tokenizer:
    """See tokenizer.tokenizer_from_gguf."""
    keys = _Keys(file)
    model = keys.text("model", "")
    if model not in ("gpt2", "llama"):
        keys.fail("model", model, "gpt2 or llama")
    tokens = keys.strings("tokens")
    if not tokens:
        keys.fail("tokens", 0, "at least one token")
    longest = max(tokens, key=len)
    if len(longest) > MAX_TOKEN_BYTES:
        keys.fail("tokens", f"a token of {len(longest)} characters", f"at most {MAX_TOKEN_BYTES}")
    types = keys.numbers("token_type", "iu", len(tokens))
    kinds = [_NORMAL] * len(tokens) if types is None else types.tolist()
    if model == "llama":
        tokens = _respelled(tokens)
    try:
        backend, rule, added = _build_backend(keys, model, tokens, kinds)
    except ModelFileError:
        raise
    except Exception as error:  # the library raises bare exceptions for contradictions in vocabulary and merges
        raise ModelFileError(f"{file.path}: tokenizer.ggml: not a usable tokenizer: {shown(str(error))}") from None
    bos = keys.token_id("bos_token_id", len(tokens))
    eos = keys.token_id("eos_token_id", len(tokens))
    names = {"bos_token": bos, "eos_token": eos, "unk_token": keys.token_id("unknown_token_id", len(tokens)),
             "pad_token": keys.token_id("padding_token_id", len(tokens))}  # fmt: skip
    adds_bos = keys.flag("add_bos_token", model == "llama" or rule in _BOS_BY_DEFAULT)
    adds_eos = keys.flag("add_eos_token", False)
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        fail(file.path, "tokenizer.chat_template", template, "text")
    control = (index for index, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL))
    vocabulary = Vocabulary(
        style="byte" if model == "gpt2" else "space",
        size=len(tokens),
        piece=lambda token: tokens[token] if 0 <= token < len(tokens) else None,
        literal={index: item.content for index, item in added.items()},
        special=frozenset([*control, *(token for token in names.values() if token is not None)]),
        bos_id=bos,
        eos_ids=tuple(token for token in gguf_eos_ids(file) if token < len(tokens)),
        strips_space=model == "llama" and keys.flag("add_space_prefix", True),
    )
    return Tokenizer(
        backend,
        vocabulary,
        where=str(file.path),
        prefix=[bos] if adds_bos and bos is not None else [],
        suffix=[eos] if adds_eos and eos is not None else [],
        template=template,
        template_tokens={name: tokens[token] for name, token in names.items() if token is not None},
    )
