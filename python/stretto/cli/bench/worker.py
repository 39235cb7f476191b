"""One engine in a process of its own: reads a request a line on stdin, answers a line on stdout. Run by `remote.Worker` only.

Each engine brings its own thread pool (ours and torch's, llama.cpp's); in one process they would fight, and a crash of one would end all.
"""

from __future__ import annotations

import json
import os
import sys

from stretto.cli.bench.engines import Spec, build


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the answers
    engine = build(Spec(**json.loads(sys.argv[1])))
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("verb")
        try:
            answer = {"value": getattr(engine, verb)(**request)}
        except Exception as error:  # reported to the parent, which decides
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    engine.close()


if __name__ == "__main__":
    main()
