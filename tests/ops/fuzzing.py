"""Illegal input for every op of the table, in memory that ends where none may be read: `python -m tests.ops.fuzzing OP... --cases N`.

Each case is a legal call of the table with one to three things wrong: an integer inside a tensor, a size, an order of dimensions, a dtype, a stride,
a scalar, an argument left out. Its number decides it, so `--only NUMBER` repeats one. Every tensor lies between two pages that may not be
touched. Each op runs in a process of its own, forked, so that a crash or a hang names its case; the JSON on stdout says what came of it.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import inspect
import json
import math
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import stretto.ops as ops
import torch
from stretto.ops.table import OPS, Case, Make, Op
from torch import Tensor

PAGE = mmap.PAGESIZE
ARENA_BYTES = 64 * PAGE  # of the largest tensor that is placed between guard pages
SMALL_BYTES = 48 << 10  # of all tensors of a case that is worth mutating: thousands of calls a second
HANG_SECONDS = 20
CRASHES = 3  # an op that crashes this often is not tried further
JOBS = 2
EDGES = (-1, 0, 1, 2, -(2**31), 2**31 - 1, -(2**63), 2**63 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e-45, 1e-30, 3e38, 0.5, 1.0, 2.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Memory with a page on either side that may not be touched."""

    def __init__(self, nbytes: int = ARENA_BYTES) -> None:
        self.nbytes = nbytes
        self.memory = mmap.mmap(-1, nbytes + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for guard in (start, start + PAGE + nbytes):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, t: Tensor, at_end: bool) -> Tensor:
        """A copy of `t`, strides kept, that ends (begins) at a guard page; `t` itself where it does not fit."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        item = t.element_size()
        if max(span, 1) * item > self.nbytes or not t.is_cpu:
            return t
        offset = PAGE + (self.nbytes - max(span, 1) * item if at_end else 0)
        flat = torch.frombuffer(self.memory, dtype=t.dtype, count=max(span, 1), offset=offset)
        if span == 0:
            return flat.as_strided(t.shape, t.stride(), 1)
        flat.copy_(t.as_strided((span,), (1,), t.storage_offset()))
        return flat.as_strided(t.shape, t.stride())


def hostile_int(rng: random.Random, sizes: Sequence[int]) -> int:
    if sizes and rng.random() < 0.6:
        return rng.choice(sizes) + rng.choice((-1, 0, 1))
    return rng.choice(EDGES)


def hostile_element(rng: random.Random, dtype: torch.dtype, sizes: Sequence[int]) -> float | int | bool:
    if dtype == torch.bool:
        return rng.random() < 0.5
    if dtype.is_floating_point:
        value = rng.choice(FLOATS)
        return value if not torch.finfo(dtype).max < abs(value) < math.inf else math.copysign(math.inf, value)
    limits = torch.iinfo(dtype)
    return min(max(hostile_int(rng, sizes), limits.min), limits.max)


def change_elements(rng: random.Random, t: Tensor, sizes: Sequence[int]) -> Tensor:
    if t.numel() == 0:
        return t
    t = t.clone()
    for _ in range(rng.choice((1, 1, 2, 5))):
        t[tuple(rng.randrange(size) for size in t.shape)] = hostile_element(rng, t.dtype, sizes)
    return t


def fill(rng: random.Random, t: Tensor, sizes: Sequence[int]) -> Tensor:
    """All elements the same hostile value: what a single one among legal ones may hide behind an earlier check."""
    return torch.full_like(t, hostile_element(rng, t.dtype, sizes))


def resize(rng: random.Random, t: Tensor, _: Sequence[int]) -> Tensor:
    if t.dim() == 0:
        return t.reshape(1)
    dim = rng.randrange(t.dim())
    size = t.shape[dim]
    wanted = rng.choice((size - 1, size + 1, 0, 1, 2 * size))
    if wanted <= size:
        return t.narrow(dim, 0, max(wanted, 0)).clone()
    if size == 0:
        shape = list(t.shape)
        shape[dim] = wanted
        return torch.zeros(shape, dtype=t.dtype)
    return t.index_select(dim, torch.arange(wanted) % size)


def permute(rng: random.Random, t: Tensor, _: Sequence[int]) -> Tensor:
    order = list(range(t.dim()))
    rng.shuffle(order)
    return t.permute(order) if rng.random() < 0.5 else t.permute(order).contiguous()


def restride(rng: random.Random, t: Tensor, _: Sequence[int]) -> Tensor:
    """Zero strides, gaps between elements, or rows that overlap."""
    if t.dim() == 0 or t.numel() == 0:
        return t
    dim = rng.randrange(t.dim())
    kind = rng.randrange(3)
    if kind == 0:
        return t.narrow(dim, 0, 1).expand(t.shape)
    if kind == 1:
        return t.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    flat = t.contiguous().view(-1)
    strides = [max(s - 1, 0) if d == dim else s for d, s in enumerate(t.contiguous().stride())]
    return flat.as_strided(t.shape, strides)


def recast(rng: random.Random, t: Tensor, _: Sequence[int]) -> Tensor:
    return t.to(rng.choice(DTYPES))


def rerank(rng: random.Random, t: Tensor, _: Sequence[int]) -> Tensor:
    kind = rng.randrange(3)
    if kind == 0:
        return t.unsqueeze(rng.randint(0, t.dim()))
    return t.flatten() if kind == 1 else t.reshape(-1)[:1].reshape(()) if t.numel() else t.flatten()


CHANGES: tuple[Callable[[random.Random, Tensor, Sequence[int]], Tensor], ...] = (
    change_elements, change_elements, change_elements, fill, resize, resize, permute, restride, recast, rerank,
)  # fmt: skip


def hostile(rng: random.Random, value: Any, sizes: Sequence[int], words: Sequence[str]) -> Any:
    """Another value of the same Python type."""
    if isinstance(value, Tensor):
        return rng.choice(CHANGES)(rng, value, sizes)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return hostile_int(rng, sizes)
    if isinstance(value, float):
        return rng.choice(FLOATS)
    return rng.choice(("", "x", *words))


class Target:
    """One op and how its legal calls are made illegal."""

    def __init__(self, op: Op) -> None:
        self.op = op
        cases = [c for c in op.cases(Make()) if any(t.numel() for t in _tensors(c))]
        small = [c for c in cases if sum(t.nbytes for t in _tensors(c)) <= SMALL_BYTES]
        self.cases = small or sorted(cases, key=lambda c: sum(t.nbytes for t in _tensors(c)))[:1]
        schema = getattr(torch.ops.stretto, op.name).default._schema
        parameters = inspect.signature(op.function).parameters
        self.optional = [isinstance(a.type, torch.OptionalType) and "Tensor" in str(a.type) for a in schema.arguments]
        self.counts = [n for n in parameters if n.startswith("num_") and parameters[n].kind is inspect.Parameter.KEYWORD_ONLY]
        self.outputs = [n for n in ("out",) if n in parameters] if len(schema.returns) == 1 else []
        self.names = {a.name for a in schema.arguments} | set(parameters) | {"k", "N"}  # sizes that docstrings name
        self.words = sorted({v for c in cases for v in c.args if isinstance(v, str)})
        self.arenas = [Arena() for _ in range(len(schema.arguments) + 4)]
        self.results: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}

    def arguments(self, number: int) -> tuple[list[Any], dict[str, Any], list[str]]:
        """The arguments of case `number`, and what is wrong with them."""
        rng = random.Random(number)
        which = rng.randrange(len(self.cases))
        case = self.cases[which]
        args, kwargs, wrong = list(case.args), dict(case.kwargs), [case.id]
        sizes = sorted({s for t in _tensors(case) for s in (*t.shape, t.numel())})
        for name in self.counts:
            if rng.random() < 0.25:
                kwargs[name] = torch.tensor([hostile_element(rng, torch.int32, sizes)], dtype=torch.int32)
                wrong.append(f"{name} = {int(kwargs[name])}")
        if self.outputs and which in self.results and rng.random() < 0.25:
            shape, dtype = self.results[which]
            kwargs["out"] = torch.zeros(shape, dtype=dtype)
            if rng.random() < 0.7:
                kwargs["out"] = hostile(rng, kwargs["out"], sizes, ())
                wrong.append(f"out: {_show(kwargs['out'])}")
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            i = rng.randrange(len(args))
            if args[i] is None or (self.optional[i] and rng.random() < 0.1):
                if not self.optional[i]:
                    continue
                args[i] = rng.choice([t for t in args if isinstance(t, Tensor)]) if args[i] is None else None
            else:
                args[i] = hostile(rng, args[i], sizes, self.words)
            wrong.append(f"argument {i}: {_show(args[i])}")
        return args, kwargs, wrong

    def placed(self, number: int) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs, _ = self.arguments(number)
        at_end = number % 4 != 0
        arenas = iter(self.arenas)
        args = [next(arenas).place(v, at_end) if isinstance(v, Tensor) else v for v in args]
        return args, {k: next(arenas).place(v, at_end) if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    def learn(self) -> None:
        """Shapes of the results of legal calls, for `out`."""
        for which, case in enumerate(self.cases if self.outputs else ()):
            result = self.op.function(*case.args, **case.kwargs)
            self.results[which] = (tuple(result.shape), result.dtype)

    def attempt(self, number: int) -> str:
        """Call case `number`: "returned", "refused", or what is wrong with how it was refused."""
        args, kwargs = self.placed(number)
        try:
            self.op.function(*args, **kwargs)
        except (ValueError, TypeError, NotImplementedError) as error:
            return "refused" if self.says_what(str(error)) else f"{type(error).__name__} that does not name op and argument: {error}"
        except Exception as error:  # whatever else comes out of an op is the finding
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return "returned"

    def says_what(self, message: str) -> bool:
        """op: argument: ..., with an op and arguments that are there."""
        found = re.match(r"([\w., ]+): ([\w, ]+): .", message)
        return bool(found) and any(n.split(".")[-1] in self.op.name for n in found[1].split(", ")) and set(found[2].split(", ")) <= self.names


def _tensors(case: Case) -> list[Tensor]:
    return [v for v in (*case.args, *case.kwargs.values()) if isinstance(v, Tensor)]


def _show(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    few = f" {value.tolist()}" if 0 < value.numel() <= 12 else ""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} strides {list(value.stride())}{few}"


def work(target: Target, begin: int, end: int, progress: mmap.mmap) -> dict[str, Any]:
    """Cases [begin, end) in this process."""
    counts, problems = {"returned": 0, "refused": 0}, {}
    for number in range(begin, end):
        struct.pack_into("q", progress, 0, number)
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        outcome = target.attempt(number)
        if outcome in counts:
            counts[outcome] += 1
        else:
            problems.setdefault(re.sub(r"-?\d+", "#", outcome), f"case {number}: {outcome}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {**counts, "problems": list(problems.values())}


class Job:
    """One op in a forked process."""

    def __init__(self, target: Target, cases: int) -> None:
        self.target, self.cases = target, cases
        self.outcome: dict[str, Any] = {"returned": 0, "refused": 0, "problems": []}
        self.progress = mmap.mmap(-1, 8)
        self.crashes = 0
        self.begin = 0

    def start(self) -> int:
        self.read, write = os.pipe()
        pid = os.fork()
        if pid:
            os.close(write)
            return pid
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(write, json.dumps(work(self.target, self.begin, self.cases, self.progress)).encode()[:60000])
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def ended(self, status: int) -> bool:
        """Take what the process found; True where there is nothing more to do."""
        with os.fdopen(self.read) as pipe:
            said = pipe.read()
        if status == 0:
            for key, value in json.loads(said).items():
                self.outcome[key] += value
            return True
        number = struct.unpack_from("q", self.progress)[0]
        code = os.waitstatus_to_exitcode(status)
        how = "does not return" if code == -signal.SIGALRM else f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.outcome["problems"].append(f"case {number}: {how}: {'; '.join(self.target.arguments(number)[2])}")
        self.crashes += 1
        self.begin = number + 1
        return self.crashes >= CRASHES or self.begin >= self.cases


def run(names: Sequence[str], cases: int) -> dict[str, Any]:
    waiting, running, outcomes = [OPS[name] for name in names], {}, {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            target = Target(waiting.pop(0))
            target.learn()
            job = Job(target, cases)
            running[job.start()] = job
        pid, status = os.wait()
        job = running.pop(pid)
        if job.ended(status):
            outcomes[job.target.op.name] = job.outcome
        else:
            running[job.start()] = job
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(OPS), help="ops; default: all")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--only", type=int, help="call this case of the op, in this process, and say what happens")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    ops.set_num_threads(1)  # no pool of threads: the processes are forked
    torch.set_num_threads(1)
    if given.only is None:
        json.dump(run(given.names, given.cases), sys.stdout)
        return
    faulthandler.enable()
    target = Target(OPS[given.names[0]])
    target.learn()
    print("\n".join(target.arguments(given.only)[2]), flush=True)
    print(target.attempt(given.only))


if __name__ == "__main__":
    main()
