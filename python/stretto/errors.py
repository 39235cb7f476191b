"""Every error stretto raises on purpose, besides ValueError for a bad argument and NotImplementedError for what is not there."""

from __future__ import annotations


class StrettoError(Exception):
    """Base of the errors below, so that a caller can catch all of them at once."""


class ModelFileError(StrettoError, ValueError):
    """A model file is truncated, contradicts itself, or asks for something unsafe. The message names the file, the field and its value."""


class UnknownModel(StrettoError, ValueError):
    """No such model name, path or architecture. The message lists what is known."""


class ContextTooLong(StrettoError, ValueError):
    """Prompt (and at least one new token) does not fit the model's context or the cache. The message holds both numbers."""


class NonFiniteLogits(StrettoError, ArithmeticError):
    """The model produced NaN or infinite logits for this request. Other requests of the batch go on."""


class OutOfPages(StrettoError, MemoryError):
    """The paged cache has no free page left. Raised by the cache only; the engine queues or preempts instead."""


class FallbackRefused(StrettoError, RuntimeError):
    """A slower path would have run under ``strict=True``. The message holds the reason."""
