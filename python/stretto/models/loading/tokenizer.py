"""Text to token ids and back, and the chat template: from a GGUF file or a Hugging Face directory.

Encoding is done by the ``tokenizers`` library. Decoding is done here on bytes: each token stands for fixed bytes, so a stream of
tokens gives exactly the text that decoding them together gives, and an unfinished UTF-8 character is held back until it is whole.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from stretto.errors import ModelFileError
from stretto.models.loading._files import fail, read_bytes, shown
from stretto.models.loading.config import CONFIG_NAME, GENERATION_NAME, MAX_VOCAB, read_json
from stretto.models.loading.gguf import GgufFile

MAX_TOKENIZER_BYTES = 128 << 20  # tokenizer.json of 262,144 tokens takes 33 MB
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece vocabularies write a space


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises over a bad file becomes a ModelFileError; its panics derive from BaseException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{what}: {shown(str(error))}") from None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies: itself if printable Latin-1, else from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_ALPHABET: Mapping[str, int] = _byte_alphabet()


@dataclass(frozen=True)
class Vocabulary:
    """What decoding needs. ``style`` is "byte" (byte-level alphabet) or "space" (SentencePiece: U+2581, <0x00> byte tokens)."""

    style: str
    size: int
    piece: Callable[[int], str | None]  # token id -> its text in the vocabulary
    literal: Mapping[int, str]  # added tokens, whose text stands for itself
    special: frozenset[int]  # those that are not shown
    bos_id: int | None
    eos_ids: tuple[int, ...]
    strips_space: bool = False  # encoding put a space in front: decoding takes one away

    def token_bytes(self, token: int) -> bytes:
        """The bytes ``token`` stands for; none for an id without a token (embeddings may be padded)."""
        if token in self.literal:
            return self.literal[token].encode()
        piece = self.piece(token)
        if piece is None:
            return b""
        if self.style == "byte":
            if all(char in BYTE_ALPHABET for char in piece):
                return bytes(BYTE_ALPHABET[char] for char in piece)
            return piece.encode()
        match = _BYTE_TOKEN.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()


class TextStream:
    """Turns token ids into text as they come. ``push`` returns what is certain, ``flush`` the rest."""

    def __init__(self, token_bytes: Callable[[int], bytes], strips_space: bool) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strips_space

    def push(self, token: int) -> str:
        """Text that is complete with this token; "" while a character is unfinished."""
        raw = self._token_bytes(token)
        if self._strip and raw:
            raw, self._strip = raw.removeprefix(b" "), False
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing. The stream starts anew."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A model's tokenizer. Threads may share it.

    Attributes: vocab_size (ids are below it), bos_id or None, eos_ids (ids that end a generation), has_chat_template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        vocabulary: Vocabulary,
        *,
        where: str,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] = (),
        template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """``prefix`` None: the backend's own post-processor adds the special tokens."""
        self._backend, self._vocabulary, self._where = backend, vocabulary, where
        self._prefix, self._suffix = prefix, list(suffix)
        self._template_source, self._template_tokens = template, dict(template_tokens or {})
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def bos_id(self) -> int | None:
        return self._vocabulary.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._vocabulary.eos_ids

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the bytes of all tokens in order: equal fingerprints mean that ids mean the same text."""
        digest = hashlib.sha256()
        for token in range(self.vocab_size):
            raw = self.token_bytes(token)
            digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.hexdigest()

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, blind to special tokens; a second object because the switch is a property of the object."""
        plain = tokenizers.Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._backend, part) is not None:
                setattr(plain, part, getattr(self._backend, part))
        added = self._backend.get_added_tokens_decoder()
        plain.add_tokens([added[token] for token in sorted(added) if not added[token].special])
        return plain

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special or not; b"" for an id that has no token."""
        raw = self._bytes.get(token)
        if raw is None:
            raw = self._bytes[token] = self._vocabulary.token_bytes(token)
        return raw

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of ``text``.

        Args:
            add_special: put the begin (and end) tokens the model wants around it. Not for text from a chat template, which has them.
            parse_special: a special token written out in ``text``, such as "<|im_end|>", becomes that token; otherwise it is text.
        Raises: ValueError if ``text`` is no string or holds a lone surrogate; ModelFileError if the tokenizer in the file fails.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode: text: {type(text).__name__}, expected a string")
        backend = self._backend if parse_special else self._plain
        own_prefix = self._prefix is None and add_special and parse_special
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"encode: text: {shown(text)}, expected no lone surrogates") from None
        with _library_errors(f"{self._where}: tokenizer fails on {shown(text)}"):
            ids = backend.encode(text, add_special_tokens=own_prefix).ids
            if not add_special or own_prefix:
                return list(ids)
            if self._prefix is None:
                return list(self._backend.post_process(backend.encode(text, add_special_tokens=False)).ids)
        return [*self._prefix, *ids, *self._suffix]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        stream = self.stream(skip_special)
        parts = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"decode: ids: {token}, expected 0 to {self.vocab_size - 1}")
            parts.append(stream.push(int(token)))
        return "".join(parts) + stream.flush()

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for tokens that come one by one. Ids beyond the vocabulary (padding of the embedding) give no text."""
        special = self._vocabulary.special if skip_special else frozenset()
        return TextStream(lambda token: b"" if token in special else self.token_bytes(token), self._vocabulary.strips_space)

    @cached_property
    def _template(self) -> Any:
        from stretto.models.loading.template import ChatTemplate  # Jinja takes 0.1 s to import

        if self._template_source is None:
            raise ValueError("apply_chat_template: the model file holds no chat template; give the prompt as one string")
        return ChatTemplate(self._template_source, f"{self._where}: chat template", self._template_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained to see it; encode it with ``add_special=False``.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt: end with the words that make the model answer.
        Raises: ValueError for malformed messages, those the template refuses, or a model without template; ModelFileError for
            a template that does not compile, or uses too much time or memory.
        """
        text: str = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        return text


# ---- Hugging Face directories ----


def _style(backend: tokenizers.Tokenizer, path: Path) -> tuple[str, bool]:
    """(style, whether decoding takes a leading space away), from the decoder of a tokenizer.json."""
    decoder = backend.decoder
    kind = type(decoder).__name__
    text = "" if decoder is None else decoder.__getstate__().decode()  # JSON of the decoder
    if kind == "ByteLevel":
        return "byte", False
    if kind == "Metaspace":
        return "space", '"prepend_scheme":"never"' not in text
    if kind == "Sequence" and "ByteLevel" in text and "ByteFallback" not in text:
        return "byte", False
    if kind == "Sequence" and ("ByteFallback" in text or "Metaspace" in text):
        return "space", '"Strip"' in text
    fail(path, "decoder", kind, "ByteLevel, Metaspace, or a sequence with ByteFallback")


def _content(value: object, path: Path, field: str) -> str | None:
    """A token as tokenizer_config.json writes it: text, or an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        fail(path, field, value, "a token")
    return value


def _hf_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    separate = directory / "chat_template.jinja"
    if separate.exists():
        raw = read_bytes(separate, 1 << 20)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            fail(separate, "text", raw[:32], "UTF-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((item.get("template") for item in template if isinstance(item, dict) and item.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        fail(directory / "tokenizer_config.json", "chat_template", template, "text")
    return template


def load_backend(raw: bytes, path: Path) -> tokenizers.Tokenizer:
    """Parse tokenizer.json. ModelFileError if the library refuses it or fails on it."""
    with _library_errors(f"{path}: not a usable tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(raw)
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenizer_from_hf(directory: str | os.PathLike[str]) -> Tokenizer:
    """Tokenizer of a model directory: tokenizer.json, with tokenizer_config.json and generation_config.json where they exist.

    Raises: ModelFileError for a missing or bad file.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelFileError(f"{path}: missing; convert the tokenizer once with transformers (save_pretrained)")
    backend = load_backend(read_bytes(path, MAX_TOKENIZER_BYTES), path)
    settings = read_json(directory, "tokenizer_config.json")
    style, strips = _style(backend, path)
    added = backend.get_added_tokens_decoder()
    tokens: dict[str, str] = {}
    for field in ("bos_token", "eos_token", "unk_token", "pad_token"):
        text = _content(settings.get(field), directory / "tokenizer_config.json", field)
        if text is not None:
            tokens[field] = text
    bos = backend.token_to_id(tokens["bos_token"]) if "bos_token" in tokens else None
    ends = [backend.token_to_id(tokens["eos_token"])] if "eos_token" in tokens else []
    for name in (CONFIG_NAME, GENERATION_NAME):
        value = read_json(directory, name).get("eos_token_id")
        ends += value if isinstance(value, list) else [value]
    size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
    if not 1 <= size <= MAX_VOCAB:
        fail(path, "number of tokens", size, f"1 to {MAX_VOCAB}")
    vocabulary = Vocabulary(
        style=style,
        size=size,
        piece=backend.id_to_token,
        literal={token: item.content for token, item in added.items()},
        special=frozenset(token for token, item in added.items() if item.special),
        bos_id=bos,
        eos_ids=tuple(dict.fromkeys(token for token in ends if type(token) is int and 0 <= token < size)),
        strips_space=strips,
    )
    return Tokenizer(backend, vocabulary, where=str(directory), template=_hf_template(directory, settings), template_tokens=tokens)


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Tokenizer of a GGUF file: model "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).

    Raises: ModelFileError for a bad field, or a kind of tokenizer not built here.
    """
    from stretto.models.loading.gguf_tokenizer import build

    return build(file)
