"""Saved tries: what comes back, and what is refused before anything is built from it."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import stretto.cache.trie as module
from stretto.cache import NgramTrie
from stretto.errors import ModelFileError
from stretto.ops.table import native_available

from tests.cache.ngram_model import ngrams

pytestmark = pytest.mark.skipif(not native_available(), reason="the trie is native code")


def make(**changes) -> NgramTrie:
    return NgramTrie(**({"branch_length": 3, "vocab_size": 8, "fingerprint": "letters", "max_tree_nodes": 2**31 - 1} | changes))


def filled() -> NgramTrie:
    trie = make()
    trie.insert(random.Random(1).choices(range(8), k=300))
    return trie


@pytest.fixture
def path(tmp_path):
    filled().save(tmp_path / "a.trie")
    return tmp_path / "a.trie"


def test_round_trip(path, tmp_path):
    trie = make()
    trie.insert([1, 2, 3])  # replaced
    trie.insert([0, 1, 2], "input", 1)  # kept
    trie.load(path)
    expected = ngrams(random.Random(1).choices(range(8), k=300), 4)
    assert trie.stats()["nodes"] == len(expected)
    for g, n in expected.items():
        assert trie.count(g)[1] == n
    assert trie.count([1, 2], 1)[0] == 1
    trie.save(tmp_path / "b.trie")
    assert path.read_bytes() == (tmp_path / "b.trie").read_bytes(), "least recently used order included"
    trie.insert([1, 2, 3, 4, 5])
    assert trie.count([1, 2])[1] == expected[1, 2] + 1
    deeper = make(branch_length=5)
    deeper.load(path)
    assert deeper.stats()["nodes"] == len(expected)


def test_open_outputs_go_on_after_a_load(path):
    trie = make()
    trie.insert([1, 2], "output", 1)
    trie.load(path)
    before = trie.count([3, 4])[1], trie.count([2, 3])[1]
    trie.insert([3, 4], "output", 1)
    assert (trie.count([3, 4])[1], trie.count([2, 3])[1]) == (before[0] + 1, before[1])


def test_empty_trie_round_trip(tmp_path):
    make().save(tmp_path / "e")
    trie = filled()
    trie.load(tmp_path / "e")
    assert trie.stats()["nodes"] == 0


def test_save_replaces_whole_files_only(path):
    before = path.read_bytes()
    with pytest.raises(OSError):
        filled().save(path.parent / "missing" / "x")
    filled().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.trie"]


def refused(data: bytes, path, message: str = "", trie: NgramTrie | None = None) -> None:
    """The file is refused by name, and what the trie held stays."""
    path.write_bytes(data)
    trie = trie or make()
    trie.insert([1, 2, 3])
    with pytest.raises(ModelFileError) as caught:
        trie.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert trie.count([1, 2, 3]) == (0, 1)
    assert trie.stats()["nodes"] == 3


def test_other_vocabulary_tokenizer_depth_or_limit(path):
    data = path.read_bytes()
    refused(data, path, "vocabulary: 8, expected 9", make(vocab_size=9))
    refused(data, path, "tokenizer fingerprint", make(fingerprint="words"))
    refused(data, path, "depth: 4, expected 1 to 3", make(branch_length=2))
    big = make(max_bytes=1 << 20, vocab_size=8)
    big.insert(random.Random(2).choices(range(8), k=9000))
    big.save(path)
    refused(path.read_bytes(), path, "(max_bytes)", make(max_bytes=1 << 16))


def test_every_truncation_and_every_flipped_byte(path):
    data = path.read_bytes()
    for size in [*range(140), *range(140, len(data), 97), len(data) - 1]:
        refused(data[:size], path)
    refused(data + b"\0", path, "words")
    for place in [*range(140), *range(140, len(data), 61)]:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        refused(bytes(changed), path)


def signed(numbers: list[int] | np.ndarray, **fields) -> bytes:
    """A file with this payload and a right checksum."""
    payload = np.asarray(numbers, dtype="<i4").tobytes()
    head = {
        "magic": b"strtrie\0",
        "version": 1,
        "vocab": 8,
        "depth": 4,
        "reserved": 0,
        "words": len(payload) // 4,
    } | fields
    return module._HEADER.pack(*head.values(), module._digest(b"letters"), module._digest(payload)) + payload


GOOD = [5, 0, 2, 1, 3, 1, 2, 2, 0, 4, 1, 0, 6, 0, 1, 7, 1, 0]  # 5 -> (1 -> 2, 4), 6 -> 7


def test_the_hand_made_file_is_good(tmp_path):
    (tmp_path / "g").write_bytes(signed(GOOD))
    trie = make()
    trie.load(tmp_path / "g")
    assert trie.count([5, 1, 2]) == (0, 2)
    assert trie.query([5])[0].tolist() == [5, 1, 2, 4]


def changed(place: int, value: int) -> list[int]:
    words = list(GOOD)
    words[place] = value
    return words


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (signed(changed(0, 8)), "node 0: token 8, expected 0 to 7"),
        (signed(changed(0, -1)), "node 0: token -1"),
        (signed(changed(3, 2**31 - 1)), "node 1: token 2147483647"),
        (signed(changed(1, 1)), "node 0: a root with count 1"),
        (signed(changed(14, 0)), "node 4: a root with count 0 and 0 children"),
        (signed(changed(2, 2**31 - 1)), "node 0: children 2147483647"),
        (signed(changed(2, -1)), "node 0: children -1"),
        (signed(changed(2, 3)), "node 4: count 0"),
        (signed(changed(2, 1)), "node 3: a root with count 1"),
        (signed(changed(4, 0)), "node 1: count 0"),
        (signed(changed(4, -3)), "node 1: count -3"),
        (signed(changed(7, 4)), "node 2: count 4, expected 1 to its parent's 3"),
        (signed(changed(9, 1)), "node 3: token 1, expected more than its sibling's 1"),
        (signed(changed(9, 0)), "node 3: token 0"),
        (signed(changed(12, 5)), "node 4: token 5 is a root for the second time"),
        (signed(changed(17, 1)), "node 5: children 1, expected at most the nodes that follow"),
        (signed(GOOD[:-3]), "children 1, expected at most the nodes that follow"),
        (signed(GOOD[:9]), "the last tree ends early"),
        (signed(GOOD[:-1]), "words: 17"),
        (signed([1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]), "node 4: deeper than 4"),
        (signed(GOOD, words=2**63), "words: 9223372036854775808"),
        (signed(GOOD, words=2**62 + 18), "words: "),
        (signed(GOOD, words=0), "words: 0"),
        (signed(GOOD, version=2), "version: 2, expected 1"),
        (signed(GOOD, magic=b"GGUF\0\0\0\0"), "magic: "),
        (signed(GOOD, vocab=2**32 - 1), "vocabulary: 4294967295"),
        (signed(GOOD, depth=0), "depth: 0"),
        (signed(GOOD, depth=2**32 - 1), "depth: 4294967295"),
        (signed(GOOD, reserved=1), "reserved: 1"),
        (b"", "size: 0 bytes"),
        (b"\x80\x04K\x01.", "size: 5 bytes"),
    ],
)
def test_contradictory_files(data, message, tmp_path):
    refused(data, tmp_path / "bad", message)


def test_a_directory_or_a_missing_file_is_an_os_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError):
            make().load(path)


@pytest.mark.fuzz
def test_random_payloads_with_a_right_checksum(tmp_path):
    """Either refused, or a trie whose counts obey the rules: its own dump loads again and says the same."""
    rng = np.random.default_rng(0)
    good, loaded = np.array(GOOD), 0
    path = tmp_path / "f"
    for i in range(5000):
        words = good.copy() if i % 2 else rng.integers(-1, 9, 3 * rng.integers(0, 8))
        for _ in range(rng.integers(1, 4) if words.size else 0):
            words[rng.integers(words.size)] = rng.choice([-(2**31), -1, 0, 1, 2, 3, 5, 2**31 - 1])
        path.write_bytes(signed(words))
        trie = make()
        try:
            trie.load(path)
        except ModelFileError:
            continue
        loaded += 1
        assert trie._native.dump().tolist() == words.tolist()
        trie.query([5, 1])
    assert loaded > 50


def test_header_size_is_fixed():
    assert module._HEADER.size == struct.calcsize("<8sIIIIQ32s32s") == 96
