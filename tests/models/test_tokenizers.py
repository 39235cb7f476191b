"""Tokenizers and chat templates of the two real files against those transformers makes of the same files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from stretto import UnknownModel
from stretto.models.loading import find
from stretto.models.loading.gguf import read_gguf
from stretto.models.loading.tokenizer import Tokenizer, tokenizer_from_gguf, tokenizer_from_hf
from tokenizers import pre_tokenizers

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TEXTS = [
    "", " ", "  ", "   ", "\n", "\n\n\n", "\t", "\r\n", " \n \t ", "hello", " hello", "hello ", "Hello, world!", "  two  spaces   three",
    "tab\tnew\n\nline\r\nend", "trailing\n", "naïve café ÀÉÎÕÜ", "e\u0301 combining, \u1e9b\u0323",
    "ﬁ ligature ㎏ ½", "日本語のテキスト、漢字かな交じり。", "한국어 문장입니다",
    "עברית العربية हिन्दी ไทย", "😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪", "0 12 345 6789 3.14 1e-5 1,000,000", "x" * 300, "ab" * 200, "a b c d e f g", "I'm you're we'll they'd DON'T",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nclass A:\n\tpass\n", "https://example.org/a?b=c&d=%20#e", "<html><b>&amp;</b></html>",
    "\u00a0nbsp\u2028line\u3000ideographic\u200bzero", "\x00\x07\x1b control", "\ufeffbom \ufffd \ue000", "𝒳𝓎 𐍈", "$%^&*()[]{}|\\/~`", "____----====",
    "....!!!!????",
    "mixedCASE_snake-kebab.CamelCase", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", "<|im_end", "<bos><eos><pad><unk>",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "<s>[INST] x [/INST]</s>", "▁▁ literal marks ▁", "<0x41><0x0A>", "\u2581", "word " * 500,
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Characters of many kinds side by side: what a cut rule trips over."""
    rng = random.Random(0)
    alphabet = "aZé ñ09 \n\t.,'’-_(\u00a0\u0301日本😀ßİıǅʼn\u200d" + "".join(chr(rng.randrange(0x20, 0xD7FF)) for _ in range(60))
    return ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    try:
        path = find.resolve(request.param)
    except UnknownModel as error:
        pytest.skip(str(error))
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if request.param == "smollm2-135m":  # transformers leaves out the cut before digits, which is in the published tokenizer.json
        cut, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    return tokenizer_from_gguf(read_gguf(path)), theirs


def test_ids(pair):
    ours, theirs = pair
    for text in TEXTS + random_texts(500):
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False), repr(text)
        assert ours.encode(text) == theirs.encode(text), repr(text)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_ids_are_those_of_llama_cpp(name):
    """An oracle of its own: it knows the cut rules by their names in the file, and reads no regular expression of ours."""
    llama_cpp = pytest.importorskip("llama_cpp")
    try:
        path = find.resolve(name)
    except UnknownModel as error:
        pytest.skip(str(error))
    ours, theirs = tokenizer_from_gguf(read_gguf(path)), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS + random_texts(500):
        if "\u2581" in text:  # it takes the vocabulary's stand-in for a space, written out, for something else than a space
            continue
        assert ours.encode(text, add_special=False) == theirs.tokenize(text.encode(), add_bos=False, special=True), repr(text)


def test_text(pair):
    """Every text comes back, special tokens included, whole and token by token."""
    ours, _ = pair
    for text in TEXTS + random_texts(500):
        if "\u2581" in text or "<0x" in text:  # stand-ins of the vocabulary itself
            continue
        ids = ours.encode(text, add_special=False)
        stream = ours.stream(skip_special=False)
        assert ours.decode(ids, skip_special=False) == text
        assert "".join(stream.push(token) for token in ids) + stream.flush() == text


def test_pieces_are_those_of_transformers(pair):
    ours, theirs = pair
    assert ours.vocab_size >= len(theirs.get_vocab()) > 40_000
    for token in random.Random(1).sample(range(ours.vocab_size), 3000):
        raw = ours.token_bytes(token).decode(errors="replace")
        if "\ufffd" not in raw:
            assert raw.strip() == theirs.decode([token], skip_special_tokens=False).strip(), token


def test_special_tokens_written_out_may_be_text(pair):
    ours, theirs = pair
    marks = [token for token in theirs.all_special_tokens if len(token) > 2]
    assert marks
    for mark in marks:
        text = f"a {mark} b"
        special = theirs.convert_tokens_to_ids(mark)
        assert special in ours.encode(text)
        ids = ours.encode(text, add_special=False, parse_special=False)
        assert special not in ids
        assert ours.decode(ids) == text


def test_template(pair):
    ours, theirs = pair
    if theirs.chat_template is None:
        assert not ours.has_chat_template
        with pytest.raises(ValueError, match="no chat template"):
            ours.apply_chat_template([{"role": "user", "content": "x"}])
        return
    chats = [
        [{"role": "user", "content": " Hi there \n"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ok?"}, {"role": "assistant", "content": "Ja. 日本"}],
        [{"role": "user", "content": text} for text in TEXTS],
    ]
    for chat in chats:
        for prompted in (True, False):
            text = ours.apply_chat_template(chat, add_generation_prompt=prompted)
            assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted)
            assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False)


def test_the_same_tokenizer_from_a_directory(pair, tmp_path):
    """Saved by transformers as tokenizer.json, read back by us: the same ids and the same bytes."""
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = tokenizer_from_hf(Path(tmp_path))
    assert again.bos_id == ours.bos_id
    assert again.has_chat_template == ours.has_chat_template
    for text in TEXTS + random_texts(100):
        ids = ours.encode(text)
        assert again.encode(text) == ids, repr(text)
        assert again.decode(ids, skip_special=False) == ours.decode(ids, skip_special=False)
