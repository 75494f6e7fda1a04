"""Triton normals against the reference in flowfast/philox.py: interpreted on the CPU, or compiled (make gpu)."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flowfast import philox
from flowfast.kernels.random import draw_normals, normal_pair

DEVICE = torch.device(os.environ.get("FLOWFAST_TEST_DEVICE", "cpu"))
DTYPES = (torch.float32, torch.float64)
RELATIVE = 8  # eps that a normal may be off, relative to itself: what sample_rows promises on every device
BLOCK = 4096


@triton.jit
def pairs_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Both normals (2, n) of pairs of words (2, n), int64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    first = tl.load(words_ptr + offs, mask=mask, other=0).to(tl.uint32)
    second = tl.load(words_ptr + n + offs, mask=mask, other=0).to(tl.uint32)
    one, two = normal_pair(first, second, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, one, mask=mask)
    tl.store(out_ptr + n + offs, two, mask=mask)


def off(words: Tensor, dtype: torch.dtype) -> float:
    """Largest error, in eps and relative to the normal itself, over pairs of words (2, n), int64; 0 must be 0."""
    out = torch.full(words.shape, torch.nan, dtype=dtype, device=DEVICE)
    pairs_kernel[(triton.cdiv(words.shape[1], BLOCK),)](words.to(DEVICE), out, words.shape[1], BLOCK)
    exact = torch.stack(philox.normal_pair(words[0], words[1]))
    error = torch.where(exact == 0, out.cpu().double(), (out.cpu().double() - exact) / exact)
    return float(error.abs().max()) / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_normal_is_right_to_its_own_last_bits(dtype: torch.dtype) -> None:
    """At the ends of the range, next to the axes, where the logarithm vanishes and where its series changes; drawn."""
    powers = 2 ** torch.arange(32)
    around = torch.cat([powers, 2**32 - powers, torch.tensor([round(2**31.5), 2**29 + 2**30, 2**30 + 2**31])])
    edges = (around[:, None] + torch.arange(-2, 3)).flatten().clamp(0, 2**32 - 1).unique()
    assert off(torch.cartesian_prod(edges, edges).T.contiguous(), dtype) <= RELATIVE
    four = torch.stack(philox.words(5, torch.arange(2**18), torch.tensor(0), 0))
    drawn = torch.cat([four[:2], four[2:]], 1)
    assert off(drawn, dtype) <= RELATIVE
    drawn[0] = 2**32 - 1 - (drawn[0] >> 12)  # the short ones among 2^32 draws: radius below 0.022
    assert off(drawn, dtype) <= RELATIVE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_of_the_reference(dtype: torch.dtype) -> None:
    for seed, first_row in ((0, 0), (0x123456789ABCDEF, 2**33 + 5)):
        got = draw_normals(3, 37, seed, first_row, dtype=dtype, device=DEVICE).cpu()
        exact = philox.normals(seed, torch.arange(first_row, first_row + 3), 37)
        assert float(((got.double() - exact) / exact).abs().max()) <= RELATIVE * torch.finfo(dtype).eps


def test_normals_do_not_depend_on_the_launch() -> None:
    whole, part = (draw_normals(n, 10, 7, first, dtype=torch.float32, device=DEVICE) for n, first in ((40, 0), (9, 21)))
    assert part.equal(whole[21:30])
    many = draw_normals(1000, 32, 3, 0, dtype=torch.float32, device=DEVICE).double()
    assert abs(float(many.mean())) < 0.03 and abs(float(many.var()) - 1) < 0.04  # five standard deviations
