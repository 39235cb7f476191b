"""Workers: engines in their own processes, asked one at a time, so that nothing else runs while one is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any

from stretto.cli.bench.engines import Spec

EXIT_SECONDS = 20


class Worker:
    """A running engine. `ask("prefill", tokens=512)` calls that verb there and waits."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        # The default wait policy: a pool spins for a moment between parallel regions and sleeps when its engine is idle. "active" would
        # spin through the others' turns, "passive" would cost every engine a wake-up in each region.
        environment |= {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "stretto.cli.bench.worker", json.dumps(spec.to_dict())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Call a verb. Raises RuntimeError naming the engine where it failed or died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"bench: {self.spec.label}: its process ended with code {self.process.wait(EXIT_SECONDS)} before answering {verb}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"bench: {self.spec.label}: {verb} {arguments}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """End the process: asked by closing its input, then made to."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(EXIT_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
