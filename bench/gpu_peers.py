"""Peers on a GPU: torch eager, compiled, captured in a CUDA graph and fused (SDPA, FlexAttention); KeOps, JAX, diffrax.

A peer is built as in `bench.peers`: a `Problem` in, a function without arguments out. What does not fit the memory is
taken in parts of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import peers, peers_compiled
from bench.peers import NotOffered, Problem, Run

PART = 12 * 2**30  # bytes of temporaries beyond which rows are taken in parts

Build = Callable[[Problem], Run]


@dataclass(frozen=True)
class Contender:
    """Somebody who computes a case.

    Attributes:
        build: makes the function to time. mode: of torch.set_float32_matmul_precision around it. ours: flowfast's own.
        foreign: of a library with streams and memory of its own, so that it is timed by the clock of the host, and
            its memory is not known.
    """

    build: Build
    mode: str = "highest"
    ours: bool = False
    foreign: bool = False


def of(operation: str) -> dict[str, Contender]:
    """The peers of an operation, those that need no compiler first."""
    eager, scripts = Contender(in_parts(peers.lean, _logits)), Contender(in_parts(peers.scripts, _differences))
    if operation == "score":
        return {
            "torch eager": eager,
            "torch eager, high": replace(eager, mode="high"),
            "torch SDPA": Contender(sdpa),
            "paper's scripts": scripts,
            "torch.compile": Contender(peers_compiled.torch_compile),
            "FlexAttention": Contender(flex_attention),
            "KeOps": Contender(peers_compiled.keops, foreign=True),
            "JAX": Contender(peers_compiled.jax, foreign=True),
        }
    return {
        "torch eager": eager,
        "torch CUDA graph": Contender(captured),
        "paper's scripts": scripts,
        "torchdiffeq": Contender(peers.torchdiffeq_rk4),
        "torch.compile": Contender(peers_compiled.torch_compile),
        "JAX": Contender(peers_compiled.jax, foreign=True),
        "diffrax": Contender(peers_compiled.diffrax_rk4, foreign=True),
        "diffrax Dopri5": Contender(peers_compiled.diffrax_dopri5, foreign=True),
    }


def _logits(problem: Problem) -> int:
    """Bytes of temporaries of a row of the lean form: logits, and their softmax."""
    return 2 * len(problem.means) * problem.x.element_size()


def _differences(problem: Problem) -> int:
    """Bytes of temporaries of a row of the scripts' form: differences, and their squares or weighted ones."""
    return 2 * problem.means.numel() * problem.x.element_size()


def in_parts(build: Build, row_bytes: Callable[[Problem], int]) -> Build:
    """The same peer, on parts of the rows where all of them at once would take more than PART."""

    def make(problem: Problem) -> Run:
        rows = max(1, PART // row_bytes(problem))
        if rows >= len(problem.x):
            return build(problem)
        runs = [build(replace(problem, x=part)) for part in problem.x.split(rows)]
        return lambda: torch.cat([run() for run in runs])

    return make


def captured(problem: Problem) -> Run:
    """The lean form's whole flow in one CUDA graph; the result stays in the graph's memory."""
    if not problem.x.is_cuda:
        raise NotOffered("needs a GPU")
    run: Callable[[], Tensor] = peers.lean(problem)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        peers.lean(replace(problem, steps=1))()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def sdpa(problem: Problem) -> Run:
    """torch's memory-efficient attention, its only fused one in float32: points query means, the bias is their norm.

    It wants d in fours and a bias whose rows are aligned, so both are filled up beforehand (with components of weight
    zero); the bias has one row that stands for all.
    """
    (n, d), k = problem.x.shape, len(problem.means)
    precision = 1 / problem.std**2
    wide = torch.nn.functional.pad(problem.means, (0, -d % 4, 0, -k % 16))
    bias = -0.5 * precision * wide.square().sum(1)
    bias[k:] = -float("inf")
    x, means, mask = (
        torch.nn.functional.pad(problem.x, (0, -d % 4))[None, None], wide[None, None], bias.expand(1, 1, n, -1)
    )  # fmt: skip

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if x.is_cuda else SDPBackend.MATH):
            mean = torch.nn.functional.scaled_dot_product_attention(x, means, means, attn_mask=mask, scale=precision)
        return (mean[0, 0, :, :d] - problem.x) * precision

    return run


def flex_attention(problem: Problem) -> Run:
    """FlexAttention, compiled, the bias as a modification of its scores; d is filled up to a power of two."""
    from torch.nn.attention.flex_attention import flex_attention as attention

    if not problem.x.is_cuda:
        raise NotOffered("needs a GPU")
    d = problem.x.shape[1]
    width = max(16, 1 << (d - 1).bit_length())
    if width > 256:
        raise NotOffered("offers d <= 256")
    precision = 1 / problem.std**2
    bias = -0.5 * precision * problem.means.square().sum(1)
    x, means = (torch.nn.functional.pad(rows, (0, width - d))[None, None] for rows in (problem.x, problem.means))
    compiled = torch.compile(attention, dynamic=False)

    def modified(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, component: Tensor) -> Tensor:
        return score + bias[component]

    def run() -> Tensor:
        mean = compiled(x, means, means, score_mod=modified, scale=precision)
        return (mean[0, 0, :, :d] - problem.x) * precision

    return run
