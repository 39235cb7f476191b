"""Collects what ptxas said about each kernel: `report.py BUILD_DIR REPORT`. Exit code 1 where registers spill to memory."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. `spills`: bytes stored and loaded; `stack`: bytes of local arrays."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def parse(text: str, source: str) -> list[Kernel]:
    """The kernels of one object file's report."""
    return [
        Kernel(source, m["name"], m["arch"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"])) for m in ENTRY.finditer(text)
    ]


def readable(names: list[str]) -> list[str]:
    """Without mangling, arguments and the namespaces that every kernel shares."""
    plain = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"stretto::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", n).removeprefix("void ") for n in plain]


def main(build: Path, target: Path) -> int:
    files = sorted(build.rglob("*.cu.o.ptxas"))
    kernels = [k for file in files for k in parse(file.read_text(), file.name.removesuffix(".o.ptxas"))]
    if not kernels:
        print(f"{build}: no reports of ptxas, expected those of a build with STRETTO_CUDA=ON", file=sys.stderr)
        return 1
    lines = [
        f"{k.source:32} {k.arch:7} {k.registers:3} registers {k.stack:5} B stack {k.spills:5} B spilt  {name}"
        for k, name in sorted(zip(kernels, readable([k.name for k in kernels]), strict=True), key=lambda p: (p[0].source, p[1], p[0].arch))
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")
    spilling = [line for line in lines if " 0 B spilt" not in line]
    most = max(kernels, key=lambda k: k.registers)
    print(f"{len(kernels)} kernels in {len(files)} files, at most {most.registers} registers; {len(spilling)} spill. {target}")
    for line in spilling:
        print(line, file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
