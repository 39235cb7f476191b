"""What a user waits for and pays before the first token: import, load, first token, memory. Each sample is a process of its own.

python -m bench.e2e.startup MODEL [--rounds 5] [--out FILE]
Medians of the rounds with their range; files are in the page cache ("warm"), as they are for everybody but the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from stretto.cli.bench import machine
from stretto.models.loading.find import resolve

IMPORT = """
import time
before = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - before
before = time.perf_counter()
import stretto
stretto.load  # the engine and all it needs are imported when first named
found = {"import_seconds": time.perf_counter() - before, "torch_seconds": torch_seconds}
"""
# Memory is counted beyond the process that has imported torch and stretto: their libraries are no part of the model.
LOAD = """
def peak():  # bytes; VmHWM is this process's own, ru_maxrss would start with the parent's
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
found["base_bytes"] = peak()
before = time.perf_counter()
model = stretto.load({path!r}, threads={threads})
found["load_seconds"] = time.perf_counter() - before
next(iter(model.generate("Once upon a time", max_tokens=1, stream=True)))
found["first_token_seconds"] = time.perf_counter() - before
model.generate("Once upon a time there was a king", max_tokens=64, ignore_eos=True)
found["peak_bytes"] = peak()
found["threads"] = model.threads
"""
PRINT = "\nimport json; print(json.dumps(found))"


def sample(source: str) -> dict[str, Any]:
    """What the piece of Python found, run in a fresh process."""
    done = subprocess.run([sys.executable, "-c", source + PRINT], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(path: str, threads: int | None, rounds: int) -> dict[str, Any]:
    """field -> median, low, high over the rounds; `threads` as used."""
    sample(IMPORT)  # the page cache is warm from here on
    samples = [sample(IMPORT + LOAD.format(path=path, threads=threads)) for _ in range(rounds)]
    used = samples[0].pop("threads")
    fields = {f: {"median": median(v := [s[f] for s in samples]), "low": min(v), "high": max(v)} for f in samples[0]}
    return {"threads": used, "fields": fields}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=resolve, help="path or known name")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    document = {
        "kind": "startup", "model": options.model.name, "file_bytes": options.model.stat().st_size, "rounds": options.rounds,
        "command": " ".join(["python -m bench.e2e.startup", *sys.argv[1:]]), "machine": machine.describe(),
    } | measure(str(options.model), options.threads, options.rounds)  # fmt: skip
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
