"""What goes wrong on GPUs and not in the interpreter: jobs of `make gpu`, one per shape.

Same bits in 20 calls, other streams and devices than the current one, capture in a CUDA graph; and small calls of
every kernel for compute-sanitizer. `python -m bench.gpu_hazards d=64 --device cuda --part rows.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import flowfast
from bench import gpu_problems as problems
from bench.gpu_jobs import Part, Row
from bench.gpu_problems import AbsentError, Setting
from flowfast.flow import Method

REPEATS = 20
SIGMAS = (1.0, 1e-4)  # with a posterior that is spread, and one that has collapsed
NEEDS_GPU = "needs a GPU"
SMALL = (  # for compute-sanitizer, which is slow: points, components, dimension, modes
    (33, 70, 3, ("highest", "float64")),
    (17, 70, 64, ("highest", "high")),
    (17, 70, 128, ("highest",)),
    (9, 40, 300, ("highest", "high")),
)
SANITIZE = "small"  # the job that compute-sanitizer runs

Call = Callable[[], Tensor]


def names(*, tiny: bool) -> list[str]:
    """The jobs."""
    return [*(problems.TINY if tiny else problems.SHAPES)]


def calls(s: Setting, *, tiny: bool = False) -> Iterator[tuple[str, str, Call]]:
    """Everything that is computed on a setting: name, mode, and the call; `tiny`: less of the flows."""
    for operation, compute in problems.OPERATIONS.items():
        for mode in problems.MODES:
            inputs = problems.given(operation, _in_dtype(s, problems.MODES[mode]))
            yield operation, mode, _in_mode(compute, inputs, mode)
    for mixture, form in ((_few(s.mixture), "few components"), (s.mixture, "many components"))[: 1 if tiny else 2]:
        if s.mixture.dim <= 128:
            yield f"flow, {form}", "highest", partial(_flow, s, mixture, None)
        if s.mixture.dim <= 128 and float(mixture.std) == 1:  # at low noise the paper's method runs away
            yield f"flow, paper's steps, {form}", "highest", partial(_flow, s, mixture, 3 if tiny else 100)
    yield "diameter", "highest", lambda: _diameter(s)


def _in_dtype(s: Setting, dtype: torch.dtype) -> Setting:
    wide = torch.promote_types(dtype, torch.float32)
    return Setting(s.mixture.to(wide), s.x.to(dtype), s.v.to(dtype), s.times)


def _few(mixture: flowfast.GaussianMixture) -> flowfast.GaussianMixture:
    return flowfast.GaussianMixture(mixture.means[:20].contiguous(), mixture.std)


def _flow(s: Setting, mixture: flowfast.GaussianMixture, steps: int | None) -> Tensor:
    """End points of the default flow, or of so many of the paper's steps."""
    process, rows = flowfast.OUProcess(problems.BETA), s.x[:256]
    method: Method = "snr" if steps is None else "paper"
    return flowfast.solve_flow(rows, mixture, process, 1.0, 0.0, method=method, steps=steps, backend="triton").x


def _in_mode(compute: problems.Operation, inputs: Setting, mode: str) -> Call:
    def call() -> Tensor:
        with problems.precision(mode):
            return compute(inputs, "triton")

    return call


def _diameter(s: Setting) -> Tensor:
    """A fresh mixture's, since a mixture remembers its own."""
    return torch.tensor([flowfast.GaussianMixture(s.mixture.means, 1.0).diameter(backend="triton")])


def checked(call: Callable[[], str | None]) -> Row:
    """The result of a check: right, wrong with a reason, or absent."""
    try:
        with problems.offered():
            wrong = call()
    except AbsentError as absent:
        return {"absent": str(absent)}
    except Exception as error:  # a check that falls over is a finding like any other
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"ok": wrong is None, "detail": wrong or ""}


def repeats(call: Call, times: int = REPEATS) -> str | None:
    """Whether every call gives the same bits."""
    first = call()
    if not bool(torch.isfinite(first).all()):
        return "not finite"
    different = sum(not torch.equal(call(), first) for _ in range(times - 1))
    return f"{different} of {times - 1} calls differ from the first" if different else None


def stream(s: Setting) -> str | None:
    """A score on a stream of its own, whose points arrive late, equals that on the current stream."""
    expected = flowfast.score(s.x, s.mixture, backend="triton")
    late, other = torch.full_like(s.x, float("nan")), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(20_000_000)  # cycles: a launch on another stream would read the NaNs
        late.copy_(s.x)
        got = flowfast.score(late, s.mixture, backend="triton")
    other.synchronize()
    return None if torch.equal(got, expected) else "differs from the current stream's"


def graph(s: Setting) -> str | None:
    """A captured score, replayed on other points, equals a call on them."""
    held, others = s.x.clone(), s.x.flip(0).contiguous()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            flowfast.score(held, s.mixture, backend="triton")
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = flowfast.score(held, s.mixture, backend="triton")
    held.copy_(others)
    captured.replay()
    return None if torch.equal(got, flowfast.score(others, s.mixture, backend="triton")) else "differs from a call"


def second_device(s: Setting) -> str | None:
    """A score on the second device while the first is current."""
    there = torch.device("cuda", 1)
    got = flowfast.score(s.x.to(there), s.mixture.to(there), backend="triton")
    expected = flowfast.score(s.x, s.mixture, backend="triton")
    return None if got.device == there and torch.equal(got.to(s.x.device), expected) else "differs"


def shape(name: str, *, device: str, tiny: bool, part: Part) -> None:
    """All checks of one shape."""
    size = (problems.TINY if tiny else problems.SHAPES)[name]
    cuda = device == "cuda"
    settings = [
        (problems.setting(*size, sigma0, device=device), {"shape": name, "sigma0": sigma0}) for sigma0 in SIGMAS
    ]
    for s, named in settings:
        times = 2 if tiny else REPEATS
        for operation, mode, call in calls(s, tiny=tiny):
            found = checked(partial(repeats, call, times))
            part.add(check=f"{times} calls", operation=operation, mode=mode, **named, **found)
    for check, possible, function in (
        ("other stream", cuda, stream),
        ("second device", cuda and torch.cuda.device_count() > 1, second_device),
        ("CUDA graph", cuda, graph),  # the last: a capture that fails may leave CUDA unusable
    ):
        for s, named in settings:
            found = checked(partial(function, s)) if possible else {"absent": needs(cuda)}
            part.add(check=check, operation="score", mode="highest", **named, **found)


def needs(cuda: bool) -> str:
    """Why a check cannot be made here."""
    return "needs a second GPU" if cuda else NEEDS_GPU


def small(*, device: str, tiny: bool) -> None:
    """Every operation once on small, odd sizes, for compute-sanitizer; `tiny`: only the first of them."""
    for n, k, d, modes in SMALL[: 1 if tiny else None]:
        for sigma0 in SIGMAS[: 1 if tiny else None]:
            for _, mode, call in calls(problems.setting(n, k, d, sigma0, device=device), tiny=tiny):
                if mode not in modes:
                    continue
                try:
                    with problems.offered():
                        call()
                except AbsentError:
                    continue
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """One job: exit code 1 when a check is red."""
    options = parse(arguments)
    part, begin = Part(options.part), time.perf_counter()
    with torch.no_grad():
        if options.job == SANITIZE:
            small(device=options.device, tiny=options.tiny)
        else:
            shape(options.job, device=options.device, tiny=options.tiny, part=part)
    wrong = [row for row in part.rows if row.get("ok") is False]
    print(f"{options.job}: {len(part.rows)} checks, {len(wrong)} wrong, {time.perf_counter() - begin:.1f} s")
    for row in wrong:
        print(row)
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_hazards", description=__doc__)
    parser.add_argument("job", choices=[*problems.SHAPES, *problems.TINY, SANITIZE])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for the interpreter")
    parser.add_argument("--part", type=Path, help="file of the rows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
