"""Errors of products of bf16 pieces, in plain torch: `python -m bench.split_model` prints them for five kinds of means.

A model of kernels/pieces.py, to be read beside it: numbers are cut into pieces of 8 bits, products of pieces are summed
in float32, rounded to nearest (tensor cores truncate). Errors are those of logits, r y . m - r^2 |m|^2 / 2 with
y = (x - c) / std and r = 1 / std, against float64, in units of 2^-24; the last columns are the bound that decides which
rows are done again (kernels/finish.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

UNIT = 2.0**-24
PAIRS = {3: ((1, 0), (0, 1), (0, 0)), 6: ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))}  # small products first


class Case(NamedTuple):
    """Points x (n, d) and means (k, d), both float32, and the noise."""

    name: str
    x: Tensor
    means: Tensor
    std: float


class Centred(NamedTuple):
    """What a product is made of: y (n, d) and m - c (k, d), float64, and r."""

    y: Tensor
    means: Tensor
    ratio: float


def pieces(value: Tensor) -> list[Tensor]:
    """Three float32 tensors of 8-bit numbers whose sum is value (float64), but for 2^-26 of it."""
    found, rest = [], value
    for _ in range(3):
        found.append(rest.float().bfloat16().float())
        rest = rest - found[-1].double()
    return found


def product(a: Tensor, b: Tensor, terms: int) -> Tensor:
    """a @ b.T of float64 matrices (m, d) and (n, d), from 3 or 6 products of pieces, summed in float32."""
    a_pieces, b_pieces = pieces(a), pieces(b)
    total = torch.zeros(len(a), len(b))
    for i, j in PAIRS[terms]:
        total = torch.addmm(total, a_pieces[i], b_pieces[j].T)
    return total


def cases(*, n: int = 64, k: int = 256, d: int = 64) -> Iterator[Case]:
    """Points drawn from mixtures whose posterior is undecided, and points between two means."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    spread = draw(k, d)
    groups = 4 * draw(8, d).repeat_interleave(k // 8, 0) + 0.1 * draw(k, d)
    twins = draw(k // 2, d).repeat_interleave(2, 0) + 1e-4 * draw(k, d)
    for name, means, std in (
        ("random", spread, 4.0),
        ("clustered", groups, 0.5),
        ("far from the origin", spread + 1e4, 4.0),
        ("near-duplicates", twins, 2.0),
        ("near-duplicates, low noise", twins, 1e-2),
    ):
        m = means.float()
        x = m[torch.randint(k, (n,), generator=generator)].double() + std * draw(n, d)
        x[: n // 4] = (m[: n // 4] + m[n // 4 : n // 2]).double() / 2
        yield Case(name, x.float(), m, std)


def centred(case: Case) -> Centred:
    """Coordinates around the mean of the means."""
    center = case.means.double().mean(0).float().double()
    return Centred((case.x.double() - center) / case.std, case.means.double() - center, 1 / case.std)


def errors(case: Case, terms: int) -> Tensor:
    """Largest error of a logit, of those that matter, for every point, (n,), in units of 2^-24.

    A logit matters within 30 of the largest one; what all components of a point share does not count.
    """
    y, m, ratio = centred(case)
    half = 0.5 * m.square().sum(1)
    exact = ratio * (y @ m.T) - ratio**2 * half
    single = torch.tensor(ratio, dtype=torch.float32)
    got = product(y, m, terms) * single - single * single * half.float()
    off = (got.double() - exact).abs()
    return off.where(exact >= exact.amax(1, keepdim=True) - 30, 0).amax(1) / UNIT


def uncentred_errors(case: Case) -> Tensor:
    """The same of |x - m|^2 expanded in float32 as it stands, (n,): what centring is for."""
    x, m = case.x, case.means
    squares = x.square().sum(1)[:, None] - 2 * x @ m.T + m.square().sum(1)
    exact = -(x.double()[:, None] - m.double()).square().sum(2) / (2 * case.std**2)
    off = (squares.double() / (2 * case.std**2) + exact).abs()
    return off.where(exact >= exact.amax(1, keepdim=True) - 30, 0).amax(1) / UNIT


def bound(case: Case, terms: int) -> Tensor:
    """The bound of kernels/finish.py on the same errors, for uniform weights, (n,), in units of 2^-24."""
    y, m, ratio = centred(case)
    rho = ratio * float(m.norm(dim=1).max())
    quartic = y.norm(p=4, dim=1) * ratio * float(m.norm(p=4, dim=1).max())
    top = (ratio * (y @ m.T) - ratio**2 * 0.5 * m.square().sum(1)).amax(1)
    most, total = y.norm(dim=1) * rho, top.abs() + 0.5 * rho**2
    width = 1 << (y.shape[1] - 1).bit_length()
    found: Tensor = (2 * (width / 16) ** 0.5 + 4) * torch.minimum(most, total + 4 * quartic) + 2 * rho**2 + 16
    return found + 256 * quartic + 128 * torch.minimum(most, total) if terms == 3 else found


def table() -> Table:
    """Largest errors of every case, beside the bounds."""
    shown = Table("means", "float32, expanded", "bf16x6", "bf16x3", "bound of x6", "bound of x3")
    shown.title = "Largest error of a logit, in units of 2^-24"
    for case in cases():
        columns = (uncentred_errors(case), errors(case, 6), errors(case, 3), bound(case, 6), bound(case, 3))
        shown.add_row(case.name, *(f"{float(column.max()):.3g}" for column in columns))
    return shown


if __name__ == "__main__":
    Console().print(table())
