"""A path becomes a config, a source of weights, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from stretto.errors import ModelFileError
from stretto.models.loading.config import TextConfig, config_from_gguf, read_hf_config
from stretto.models.loading.gguf import read_gguf
from stretto.models.loading.safetensors import open_safetensors
from stretto.models.loading.tokenizer import Tokenizer, tokenizer_from_gguf, tokenizer_from_hf
from stretto.models.loading.weights import RawWeight, Weights, WeightSource, dequantize, quantize

DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")


class Converted:
    """Weights whose matrices are converted to one format as they are read."""

    def __init__(self, source: Weights, fmt: str, path: Path) -> None:
        self._source, self._format, self._path = source, fmt, path

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def get(self, name: str) -> RawWeight:
        weight = self._source.get(name)
        if len(weight.shape) == 1 or weight.dtype == self._format:
            return weight
        values = dequantize(weight)
        if self._format in ("F32", "F16", "BF16"):
            plain = torch.from_numpy(values).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[self._format])
            return RawWeight(self._format, weight.shape, plain.view(torch.uint8).numpy().reshape(-1))
        try:
            return quantize(values, self._format)
        except ValueError as error:  # a row that is not whole blocks, a value that is not finite, a scale beyond float16
            raise ModelFileError(f"{self._path}: tensor {name}: cannot become {self._format}: {error}") from None


def open_model(path: Path, dtype: str | None = None) -> tuple[TextConfig, Weights, Tokenizer]:
    """Open a GGUF file or a Hugging Face directory; every tensor the config needs is checked to be there with the right shape.

    dtype: convert matrices to this format; see DTYPES. None keeps what the file holds.
    Raises: ModelFileError, UnknownModel; ValueError for dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"load: dtype: {dtype!r}, expected one of {', '.join(DTYPES)}, or None for the file's own formats")
    if path.is_dir():
        config = read_hf_config(path)
        source = WeightSource.from_safetensors(open_safetensors(path))
        tokenizer = tokenizer_from_hf(path)
    else:
        file = read_gguf(path)
        config, source, tokenizer = config_from_gguf(file), WeightSource.from_gguf(file), tokenizer_from_gguf(file)
    source.check(config)
    return config, source if dtype is None else Converted(source, dtype.upper(), path), tokenizer
