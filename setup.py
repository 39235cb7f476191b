"""Builds stretto._C with CMake and ninja. torch is not needed: the module reads tensors through DLPack's exchange table.

Environment: MAX_JOBS (compiler processes), STRETTO_BUILD_TYPE (Release), STRETTO_SKIP_BUILD=1 (editable installation whose
module `make build` compiles), STRETTO_CUDA (AUTO: CUDA kernels where nvcc is found; ON, OFF), CUDAARCHS (as CMake knows it).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake. An editable installation builds in ./build, the tree that `make build` keeps up to date."""

    def run(self) -> None:
        if self.editable_mode and os.environ.get("STRETTO_SKIP_BUILD") == "1":
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" if self.editable_mode else Path(self.build_temp).resolve()
        output = ROOT / "python" / "stretto" if self.editable_mode else target.parent
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('STRETTO_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSTRETTO_OUTPUT_DIR={output}",
            f"-DSTRETTO_CUDA={os.environ.get('STRETTO_CUDA', 'AUTO')}",
            f"-DSTRETTO_CUDA_SHIM={'ON' if self.editable_mode else 'OFF'}",
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        if output != target.parent:  # setuptools copies the module from its own folder into the source tree
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(output / target.name, target)


setup(ext_modules=[Extension("stretto._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
