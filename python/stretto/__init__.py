"""stretto: makes trained models generate faster, and keeps only what the model would have said anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  first: _C binds to the OpenMP runtime that torch loads

from stretto.errors import (
    ContextTooLong,
    FallbackRefused,
    ModelFileError,
    NonFiniteLogits,
    OutOfPages,
    StrettoError,
    UnknownModel,
)

if TYPE_CHECKING:
    from stretto.engine.llm import LLM, load

__version__ = "0.1.0"
__all__ = [
    "LLM", "ContextTooLong", "FallbackRefused", "ModelFileError", "NonFiniteLogits", "OutOfPages", "StrettoError", "UnknownModel", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`load` and `LLM` bring the tokenizer library and the engine with them: imported when first used."""
    if name in ("load", "LLM"):
        from stretto.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'stretto' has no attribute {name!r}")
