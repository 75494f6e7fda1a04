"""Arithmetic in pieces of bf16, as a model in plain torch, against float64."""

from __future__ import annotations

import pytest
import torch

from bench.split_model import UNIT, Case, bound, cases, errors, pieces, product, table, uncentred_errors

CASES = list(cases())


def _numbers(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    size = torch.exp(4 * torch.randn(count, generator=generator, dtype=torch.float64))
    return torch.randn(count, generator=generator, dtype=torch.float64) * size


def test_pieces_leave_what_the_docstring_says() -> None:
    """Two pieces leave 2^-17 of a number, three 2^-26; every piece is a bf16 number."""
    value = _numbers(100_000)
    first, second, third = pieces(value)
    assert all(torch.equal(piece.bfloat16().float(), piece) for piece in (first, second, third))
    rest = value - first.double() - second.double()
    assert float((rest / value).abs().max()) <= 2**-17
    assert float(((rest - third.double()) / value).abs().max()) <= 2**-26
    assert float((rest / value).abs().max()) > 2**-18  # the bounds are of the right size


@pytest.mark.parametrize(("terms", "left_out"), [(3, 2.0**-15), (6, 2.0**-23)])
def test_products_are_as_exact_as_their_number_of_pieces(terms: int, left_out: float) -> None:
    """What products leave out, worst case, and roundings of a float32 sum of 64 terms, by its absolute sum."""
    a, b = _numbers(128 * 64).reshape(128, 64), _numbers(96 * 64).reshape(96, 64)
    off = (product(a, b, terms).double() - a @ b.T).abs()
    allowed = (left_out + 64 * (1 + terms * 2**-7) * UNIT) * (a.abs() @ b.abs().T)
    assert (off <= allowed).all()


@pytest.mark.parametrize("terms", [3, 6])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bound_on_logits_holds(case: Case, terms: int) -> None:
    """The bound that decides which rows are done again is never below the model's error, nor a hundred times above."""
    found, allowed = errors(case, terms), bound(case, terms)
    assert (found <= allowed).all()
    assert float(allowed.max() / found.max()) < 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_six_products_are_no_worse_than_float32(case: Case) -> None:
    y, m = case.x.double() / case.std, case.means.double()
    exact = y @ m.T
    single = (y.float() @ case.means.T).double()
    scale = y.norm(dim=1)[:, None] * m.norm(dim=1)
    six, three = ((product(y, m, terms).double() - exact).abs() / scale for terms in (6, 3))
    assert float(six.max()) <= 2 * float(((single - exact).abs() / scale).max())
    assert float(six.max()) < float(three.max()) < 2e-5


def test_centring_is_what_far_means_need() -> None:
    far = next(case for case in CASES if case.name == "far from the origin")
    assert float(uncentred_errors(far).max()) > 1e6 * float(errors(far, 6).max())


def test_table_has_a_row_for_every_case() -> None:
    assert table().row_count == len(CASES) == 5
