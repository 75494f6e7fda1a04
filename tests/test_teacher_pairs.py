"""Pairs of the teachers: where they come from, that members do not share them, and the error measured on fresh ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowfast import GaussianMixture, OUProcess, flow_map, relative_mse, score
from flowfast.ensemble import Ensemble
from flowfast.teacher_pairs import PairSource, ScoreTarget, SegmentTarget, TeacherPairs, paper_steps, relative_errors

MIXTURE, PROCESS = GaussianMixture.random(k=5, d=3, std=0.5), OUProcess()
SCORE, EXACT, PAPER = ScoreTarget(0.3), SegmentTarget(0.5, 0.1), SegmentTarget(0.5, 0.1, "paper", 7)


def source(target=EXACT, name="a", mixture=MIXTURE):
    return PairSource(mixture, PROCESS, target, (0, name))


@pytest.mark.parametrize(("target", "t"), [(SCORE, 0.3), (EXACT, 0.5), (PAPER, 0.5)])
def test_pairs_start_at_the_marginal(target, t):
    """Mean and spread of 4,000 points within five standard errors of those of p_t."""
    n, law = 4_000, PROCESS.marginal(MIXTURE, t)
    x, y = source(target).draw(n, "pairs", 0)
    assert x.shape == y.shape == (n, 3) and x.dtype == y.dtype == torch.float32
    variance = law.means.var(0, correction=0) + float(law.std) ** 2
    assert bool(((x.mean(0) - law.means.mean(0)).abs() < 5 * (variance / n).sqrt()).all())
    assert bool(((x.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all())


def test_targets_are_the_teachers_answers():
    x, y = source(SCORE).draw(50, "pairs", 0)
    assert torch.equal(y, score(x, PROCESS.marginal(MIXTURE, 0.3)))
    x, y = source(EXACT).draw(50, "pairs", 0)
    assert torch.equal(y, flow_map(x, MIXTURE, PROCESS, 0.5, 0.1))
    same, paper = source(PAPER).draw(50, "pairs", 0)
    assert torch.equal(same, x)  # the stream names the points, whoever answers
    assert torch.equal(paper, flow_map(x, MIXTURE, PROCESS, 0.5, 0.1, method="paper", steps=7))
    assert not torch.equal(paper, y)


def test_two_teachers_differ_where_the_published_one_leaves_the_flow():
    """docs/math.md: at std 0.01 ten steps uniform in t end more than a norm away."""
    mixture = GaussianMixture.random(k=20, d=64, std=0.01)
    tail = SegmentTarget(math.log(2) / 10, 0.0)
    _, exact = source(tail, mixture=mixture).draw(64, "pairs", 0)
    _, published = source(replace(tail, teacher="paper", steps=10), mixture=mixture).draw(64, "pairs", 0)
    assert relative_mse(published, exact) > 1


def test_a_step_is_a_pure_function_of_source_and_step():
    sources = [source(EXACT, "a"), source(SCORE, "b"), source(EXACT, "c")]
    pairs = TeacherPairs(sources, 2_000)  # blocks of four steps
    steps = [pairs(step) for step in range(6)]
    x, y = steps[5]
    assert x.shape == y.shape == (3, 2_000, 3)
    for i, one in enumerate(sources):
        alone = TeacherPairs([one], 2_000)
        for step in (5, 0, 3):  # in any order
            a, b = alone(step)
            assert torch.equal(a[0], steps[step][0][i]) and torch.equal(b[0], steps[step][1][i])
    firsts = [float(x[i, 0, 0]) for x, _ in steps for i in range(3)]
    assert len(set(firsts)) == len(firsts)  # fresh at every step, another for every member


def test_large_batches_are_blocks_of_one_step():
    x, y = TeacherPairs([source(SCORE)], 10_000)(1)
    assert x.shape == (1, 10_000, 3)
    assert torch.equal(x[0], source(SCORE).draw(10_000, "pairs", 1)[0])


class _Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


def test_relative_errors_are_those_of_each_member_on_its_own_fresh_points():
    sources = [source(SCORE, "a"), source(EXACT, "b"), source(PAPER, "b")]
    ensemble = Ensemble([_Scaled(0.0), _Scaled(1.0), _Scaled(1.0)])
    n = 6_000  # more than a chunk
    got = relative_errors(ensemble, sources, n=n)
    assert got.dtype == torch.float64 and got.shape == (3,)
    assert float(got[0]) == 1.0
    parts = [sources[1].draw(rows, "evaluation", chunk) for chunk, rows in enumerate((5_000, 1_000))]
    x, y = (torch.cat(side) for side in zip(*parts, strict=True))
    assert float(got[1]) == pytest.approx(relative_mse(x, y), rel=1e-6)
    assert float(got[1]) != float(got[2])
    assert torch.equal(relative_errors(Ensemble([_Scaled(1.0)]), sources[1:2], n=n), got[1:2])
    trained_on = TeacherPairs(sources[1:2], 5_000)(0)[0]
    assert not bool(torch.isin(x[:, 0], trained_on[0, :, 0]).all())


def test_a_member_that_is_ruined_says_so():
    got = relative_errors(Ensemble([_Scaled(math.nan), _Scaled(1.0)]), [source(), source()], n=10)
    assert got.isfinite().tolist() == [False, True]


@pytest.mark.parametrize(
    ("t_from", "t_to", "least", "steps"),
    [(1.0, 0.0, 5, 100), (1.0, 0.75, 5, 25), (0.02, 0.0, 5, 5), (0.5, 0.4375, 5, 6), (0.5, 0.4375, 20, 20)],
)
def test_a_segment_gets_its_share_of_the_published_steps(t_from, t_to, least, steps):
    assert paper_steps(t_from, t_to, least=least) == steps


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: SegmentTarget(0.1, 0.5), ValueError, "t_from must lie above t_to >= 0; got 0.1 and 0.5"),
        (lambda: SegmentTarget(0.1, -0.5), ValueError, "t_from must lie above t_to >= 0"),
        (lambda: SegmentTarget(1.0, 0.0, "papers"), ValueError, "teacher must be 'exact' or 'paper'; got 'papers'"),
        (lambda: SegmentTarget(1.0, 0.0, "paper"), ValueError, "steps must be given with teacher 'paper'"),
        (lambda: SegmentTarget(1.0, 0.0, steps=10), ValueError, "only there; got 10"),
        (lambda: SegmentTarget(1.0, 0.0, "paper", 0), ValueError, "steps must be at least 1"),
        (lambda: ScoreTarget(-1.0), ValueError, "t must be finite and at least 0; got -1.0"),
        (lambda: TeacherPairs([], 8), ValueError, "sources must hold one source per member; got none"),
        (lambda: TeacherPairs([source()], 0), ValueError, "batch_size must be at least 1"),
        (lambda: TeacherPairs([source()], 8)(-1), ValueError, "step must be at least 0; got -1"),
        (lambda: relative_errors(Ensemble([_Scaled(1.0)]), [], n=10), ValueError, "one source per member, 1; got 0"),
        (lambda: relative_errors(Ensemble([_Scaled(1.0)]), [source()], n=0), ValueError, "n must be at least 1"),
    ],
)
def test_wrong_calls(call, kind, says):
    with pytest.raises(kind, match=says):
        call()
