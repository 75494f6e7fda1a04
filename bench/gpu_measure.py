"""How a GPU case is timed: contenders take turns, CUDA events around a call, error and memory of the first call.

`python -m bench.gpu_measure --device cuda --part rows.json` is a job of `make gpu`: ceilings first, then every case.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench import gpu_cases, gpu_problems, timing
from bench.gpu_cases import Case
from bench.gpu_jobs import Part, Row
from bench.gpu_peers import Contender
from bench.peers import NotOffered, Run

FIRST = 60.0  # seconds that building, compiling and a first call may take
SETTLED = 1.0  # seconds of a call that needs no untimed one before it
HOW = (
    "contenders take turns; CUDA events (the host's clock for JAX, KeOps and diffrax) around one call after an untimed "
    "one of the same contender (none above 1 s); inputs are not flushed from the L2 cache; the median of at least "
    f"{timing.FEWEST_TURNS} calls (one above {timing.ONCE:g} s); errors and extra memory (result included) are the "
    "first call's, building included; shares count the plain form's flops once, however many products a method makes"
)


class OverdueError(Exception):
    """A call took longer than it may."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OverdueError in the main thread after so many seconds, between two steps of the interpreter.

    And once more every second, should somebody have swallowed it.
    """

    def ring(number: int, frame: FrameType | None) -> None:
        raise OverdueError(f"above {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(case: Case, *, seconds: float | None, until: float, rates: dict[str, float]) -> Row:
    """Time every contender of a case.

    Args:
        seconds: of turns per contender; None takes the first call's, for a rehearsal. until: value of
            time.monotonic() after which nobody new is begun. rates: the machine's ceilings.

    Returns:
        A row: "contenders" with numbers for each who ran, "absent" with reasons for the others, "failed" names ours
        among them that should have run.
    """
    turns: dict[str, Callable[[], float]] = {}
    first: dict[str, Row] = {}
    absent: dict[str, str] = {}
    failed: list[str] = []
    for name, contender in case.contenders.items():
        left = min(FIRST, until - time.monotonic())
        if left <= 0:
            absent[name] = "no time left in this run"
            continue
        try:
            with at_most(left), gpu_problems.precision(contender.mode), gpu_problems.offered():
                run, first[name] = begin(case, contender)
            turns[name] = partial(turn, run, contender, case.problem.x.is_cuda, first[name]["first"])
        except (NotOffered, OverdueError, gpu_problems.AbsentError) as reason:
            absent[name] = str(reason)
        except ModuleNotFoundError as error:
            absent[name] = f"not installed ({error.name})"
        except Exception as error:  # whatever a contender trips over is its result
            absent[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failed += [name] * contender.ours
            gc.collect()
            if case.problem.x.is_cuda:
                torch.cuda.empty_cache()
    samples = {name: [first[name]["first"]] for name in turns}
    if seconds is not None:
        samples = timing.take_turns(turns, seconds)
    rows = {name: first[name] | _numbers(case, case.contenders[name], samples[name], rates) for name in samples}
    return {"case": case.workload.name, "title": case.title, "contenders": rows, "absent": absent, "failed": failed}


def first_round(case: Case, timed: Callable[[Case], Row]) -> Row:
    """Ours and torch's, kept at once: libraries with an own runtime can take the program down."""
    own = {name: one for name, one in case.contenders.items() if not one.foreign}
    row = timed(replace(case, contenders=own)) | {"written": case.written, "complete": False}
    row["absent"] |= dict.fromkeys(case.contenders.keys() - own.keys(), "its program ended before it was timed")
    return row


def second_round(case: Case, timed: Callable[[Case], Row], first: Row) -> Row:
    """The first round's row with those of other libraries added, which took turns with ours."""
    others = {name: one for name, one in case.contenders.items() if one.foreign}
    ours = {name: one for name, one in case.contenders.items() if name in first["contenders"] and one.ours}
    second = timed(replace(case, contenders=ours | others))
    ran = {name: one for name, one in second["contenders"].items() if name in others}
    absent = {name: why for name, why in first["absent"].items() if name not in others}
    absent |= {name: why for name, why in second["absent"].items() if name in others}
    return {**first, "contenders": first["contenders"] | ran, "absent": absent, "complete": True}


def begin(case: Case, contender: Contender) -> tuple[Run, Row]:
    """Build a contender and call it once: seconds, errors of its first rows, bytes beyond those before."""
    cuda = case.problem.x.is_cuda
    gc.collect()
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    run = contender.build(case.problem)
    got = run()
    if cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    extra = torch.cuda.max_memory_allocated() - before if cuda and not contender.foreign else None
    rows = timing.as_tensor(got)[: len(case.exact)].to(case.exact.device)
    errors = gpu_problems.row_errors(rows, case.exact, case.scale).sort().values
    at = (len(errors) // 2, int(0.999 * (len(errors) - 1)), len(errors) - 1)
    found = dict(
        zip(
            ("error_median", "error_most", "error_worst"),
            (gpu_problems.finite(float(errors[i])) for i in at),
            strict=True,
        )
    )
    return run, {
        "first": round(taken, 6),
        **found,
        "extra_memory": extra,
        "ours": contender.ours,
        "mode": contender.mode,
    }


def turn(run: Run, contender: Contender, cuda: bool, first: float) -> float:
    """Seconds of one call after an untimed one, or of the first when it is slow."""
    with gpu_problems.precision(contender.mode):
        if first <= SETTLED or not cuda:
            run()
        if not cuda or contender.foreign:
            return _by_clock(run, cuda)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))


def _by_clock(run: Run, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _numbers(case: Case, contender: Contender, taken: list[float], rates: dict[str, float]) -> Row:
    """Median and quartiles, and the shares of the ceilings that the nominal work comes to."""
    median, lower, upper, fastest, turns = timing.summary(taken)
    row: Row = {"median": median, "lower": lower, "upper": upper, "fastest": fastest, "turns": turns}
    row["share_of_copy"] = case.moved / median / rates["copy_bytes"] if rates else None
    for name in ("bf16", "float32"):
        row[f"share_of_{name}"] = case.flops / median / rates[name] if rates and case.flops else None
    return row


def ceilings(device: str) -> dict[str, float]:
    """Rates of this machine: bytes of a copy (read and written), flop/s of products in bf16, float32 and TF32."""
    cuda, size = device == "cuda", 8_192 if device == "cuda" else 128
    source = torch.rand(2**29 if cuda else 2**16, device=device)
    target = torch.empty_like(source)
    found = {"copy_bytes": 2 * source.numel() * 4 / _median(partial(target.copy_, source), cuda)}
    del source, target
    for name, dtype, mode in (
        ("bf16", torch.bfloat16, "highest"), ("float32", torch.float32, "highest"), ("tf32", torch.float32, "high"),
    ):  # fmt: skip
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * size**3 / _median(partial(torch.mm, a, b), cuda, mode)
    return found


def _median(run: Callable[[], Any], cuda: bool, mode: str = "highest") -> float:
    """Median seconds of a call."""
    contender = Contender(lambda problem: run, mode=mode)
    return statistics.median(turn(run, contender, cuda, 0.0) for _ in range(11))


def main(arguments: Sequence[str] | None = None) -> int:
    """The ceilings and the cases that are asked for: exit code 1 when one of ours failed."""
    options = parse(arguments)
    part, end = Part(options.part), time.monotonic() + options.total
    warnings.filterwarnings("ignore")  # the peers': their results are compared all the same
    failed = False
    with torch.no_grad():
        rates = ceilings(options.device)
        part.add(ceilings=rates)
        for done, name in enumerate(options.case):
            begin = time.monotonic()
            case = gpu_cases.named(name, device=options.device, tiny=options.tiny)
            until = min(end, begin + 1.5 * (end - begin) / (len(options.case) - done))
            timed = partial(measure, seconds=None if options.tiny else options.seconds, until=until, rates=rates)
            row = part.add(**first_round(case, timed))
            if options.foreign:
                part.rows.pop()
                row = part.add(**second_round(case, timed, row))
            failed |= bool(row["failed"])
            print(f"{row['title']}: {time.monotonic() - begin:.1f} s")
            del case
            gc.collect()
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_measure", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for the interpreter")
    parser.add_argument("--part", type=Path, help="file of the rows")
    parser.add_argument("--case", nargs="+", default=[w.name for w in gpu_cases.WORKLOADS], help="only these")
    parser.add_argument("--no-foreign", dest="foreign", action="store_false", help="without JAX, KeOps and diffrax")
    parser.add_argument("--seconds", type=float, default=0.5, help="of turns per contender of a case")
    parser.add_argument("--total", type=float, default=240.0, help="seconds after which no contender is begun")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
