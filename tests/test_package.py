"""The package as it is installed: what it links, what importing it does, and what happens where the binary is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import stretto
import torch
from stretto.ops import _backend

from tests.subproc import PYTHON_DIR, python

ROOT = Path(__file__).parent.parent
native = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")


@native
def test_links_no_torch_and_no_openmp():
    linked = subprocess.run(["ldd", _backend._C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in linked  # ldd did look
    for library in ("torch", "c10", "gomp", "iomp", "omp.so", "cuda"):
        assert library not in linked


@native
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_kernels_define_no_symbol_that_another_isa_could_borrow(isa: str):
    """A weak function compiled with AVX-512 could be the one the linker keeps for all, and crash where there is no AVX-512."""
    objects = sorted((ROOT / "build" / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip("no build tree beside the sources")
    table = subprocess.run(["nm", "-C", "--defined-only", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2) for line in table.splitlines() if line[:1].isalnum() and len(line.split(maxsplit=2)) == 3]
    assert any(kind == "T" and name.startswith(f"stretto::{isa}::") for _, kind, name in symbols)
    shared = [name for _, kind, name in symbols if kind in "TWVuBDRi" and f"stretto::{isa}::" not in name]
    assert shared == []


def test_import_takes_a_moment():
    """CPU seconds beyond torch; the least of three, since other processes disturb."""
    source = """
        import time, torch
        start = time.process_time()
        import stretto, stretto.ops
        print(time.process_time() - start)
    """
    assert min(float(python(source)) for _ in range(3)) <= 0.3


def test_import_touches_nothing():
    """No thread, no network, no process, no file written."""
    events = json.loads(
        python("""
        import json, os, sys, threading, torch
        threads = lambda: len(os.listdir("/proc/self/task"))
        before, seen = threads(), []
        def hook(event, args):
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.fork", "os.system", "urllib.")) or writes:
                seen.append([event, str(args[0])])
        sys.dont_write_bytecode = True
        sys.addaudithook(hook)
        import stretto, stretto.ops
        print(json.dumps(seen + [["thread", n] for n in range(threads() - before)]))
        """)
    )
    assert events == []


def test_without_binary_the_reference_runs_and_says_so_once(tmp_path: Path):
    shutil.copytree(PYTHON_DIR / "stretto", tmp_path / "stretto", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    out = python(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, stretto
            from stretto import ops
            x, w = torch.randn(3, 8), torch.randn(8)
            for _ in range(3):
                y = ops.norm.rms_norm(x, w, 1e-5)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), w, 1e-5))
        ours = [str(c.message) for c in caught if "stretto" in str(c.message)]
        assert len(ours) == 1, ours
        assert "could not be loaded" in ours[0], ours
        assert sum(ops.fallbacks.values()) == 3, ops.fallbacks
        with ops.strict():
            try:
                ops.norm.rms_norm(x, w, 1e-5)
            except stretto.FallbackRefused as error:
                print(error)
        """,
        path=tmp_path,
    )
    assert "rms_norm" in out
    assert "strict=True" in out


def test_native_can_be_switched_off():
    assert python("import stretto.ops.table as t; print(t.native_available())", STRETTO_NATIVE="0").strip() == "False"


@native
def test_isa_can_be_forced():
    source = "from stretto.ops import _backend; print(_backend._C.isa())"
    for isa in _backend._C.isas():
        assert python(source, STRETTO_ISA=isa).strip() == isa


@native
@pytest.mark.parametrize(("name", "value"), [("STRETTO_ISA", "sse9"), ("STRETTO_NUM_THREADS", "many"), ("STRETTO_NUM_THREADS", "0")])
def test_nonsense_in_the_environment_is_named(name: str, value: str):
    out = python(
        """
        try:
            import stretto.ops
            from stretto.ops import _backend
            _backend._C.isa()
        except Exception as error:
            print(type(error).__name__, error)
        """,
        **{name: value},
    )
    assert name in out
    assert value in out


@native
def test_threads_from_the_environment():
    assert python("import stretto.ops as ops; print(ops.num_threads())", STRETTO_NUM_THREADS="1").strip() == "1"


@native
def test_one_openmp_runtime():
    """After a parallel op the process holds the runtime that torch loaded and no other: two pools would fight for the cores."""
    runtimes = python("""
        import re, torch
        from stretto import ops
        ops.set_num_threads(2) if ops._backend._C.available_cpus() > 1 else None
        ops.norm.rms_norm(torch.randn(512, 4096), torch.ones(4096), 1e-5)
        maps = open("/proc/self/maps").read()
        print(*{m for m in re.findall(r"\\S*/(lib(?:gomp|iomp5|omp)[^/\\s]*)", maps)})
    """).split()
    assert len(runtimes) == 1


def test_metadata_agrees():
    assert f'version = "{stretto.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{stretto.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert (PYTHON_DIR / "stretto" / "py.typed").exists()


def test_cuda_library_links_neither_python_nor_torch_and_loads_without_a_driver():
    if not _backend.CUDA_LIBRARY.exists():
        pytest.skip("the CUDA kernels are not built (make cuda)")
    linked = subprocess.run(["ldd", str(_backend.CUDA_LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in linked
    for library in ("python", "torch", "c10", "libcuda"):
        assert library not in linked
    names, reason = _backend.cuda_kernels()
    assert "rms_norm" in names
    assert reason == ""
    assert _backend.no_kernel("norm.no_such_op", torch.device("cuda")) == "no CUDA kernel for norm.no_such_op"
    assert _backend.no_kernel("sampling.argmax", torch.device("meta")) == "no kernels for meta"


def test_without_the_cuda_library_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_backend, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    _backend.cuda_kernels.cache_clear()
    assert "no CUDA kernels in this build" in _backend.no_kernel("rms_norm", torch.device("cuda"))
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    _backend.cuda_kernels.cache_clear()
    if _backend._C is not None:
        assert "could not be loaded" in _backend.no_kernel("rms_norm", torch.device("cuda"))
    _backend.cuda_kernels.cache_clear()
