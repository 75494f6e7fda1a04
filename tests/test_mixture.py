"""GaussianMixture: construction, conversion, files, sampling, diameter."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import BACKENDS

from flowfast import GaussianMixture, log_density, posterior_weights, score


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_draws_the_papers_means(backend: str) -> None:
    mixture = GaussianMixture.random(20, 64, seed=0)
    assert mixture.means.dtype == torch.float32 and mixture.means.abs().max() <= 5
    assert round(mixture.diameter(backend=backend), 4) == 40.9973
    assert not GaussianMixture.random(20, 64, seed=1).means.equal(mixture.means)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_diameter_is_the_largest_distance(backend: str, offset: float) -> None:
    means = torch.randn(301, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    expected = max(float((means - row).norm(dim=1).max()) for row in means)
    assert GaussianMixture(means, 1.0).diameter(backend=backend) == pytest.approx(expected, rel=1e-14)
    assert GaussianMixture(means[:1], 1.0).diameter(backend=backend) == 0


def test_weights_are_normalised_and_zero_weight_contributes_nothing() -> None:
    means = torch.tensor([[0.0], [1.0], [0.5]], dtype=torch.float64)
    mixture = GaussianMixture(means, 0.3, [2.0, 6.0, 0.0])
    pair = GaussianMixture(means[:2], 0.3, [1.0, 3.0])
    x = torch.linspace(-1, 2, 13, dtype=torch.float64)[:, None]
    torch.testing.assert_close(mixture.weights, torch.tensor([0.25, 0.75, 0.0]).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(score(x, mixture, backend="reference"), score(x, pair, backend="reference"))
    torch.testing.assert_close(log_density(x, mixture, backend="reference"), log_density(x, pair, backend="reference"))
    assert (posterior_weights(x, mixture, backend="reference")[:, 2] == 0).all()
    assert mixture.sample(1000, generator=torch.Generator().manual_seed(0)).shape == (1000, 1)


@pytest.mark.parametrize("kind", [".safetensors", ".npz"])
def test_files_keep_every_bit(tmp_path: Path, kind: str) -> None:
    mixture = GaussianMixture(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), 0.1, [1.0, 2.0, 3.0, 0.0])
    path = tmp_path / f"mixture{kind}"
    mixture.save(path)
    again = GaussianMixture.load(path)
    assert again.means.equal(mixture.means) and again.std.equal(mixture.std)
    assert again.log_weights.equal(mixture.log_weights)
    assert GaussianMixture.load(path, std=2.0).std == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_plain_arrays_load_with_a_std(tmp_path: Path) -> None:
    means = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "means.npy", means)
    np.savetxt(tmp_path / "means.csv", means, delimiter=",")
    for name in ("means.npy", "means.csv"):
        mixture = GaussianMixture.load(tmp_path / name, std=0.5)
        assert mixture.means.tolist() == means.tolist() and mixture.std == 0.5
        with pytest.raises(ValueError, match="std is needed"):
            GaussianMixture.load(tmp_path / name)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "objects.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        stream.write(b"(lp0\n(dp1\na.")  # a list that holds a dictionary, as np.load would unpickle it
    with pytest.raises(ValueError, match="cannot be read"):
        GaussianMixture.load(tmp_path / "objects.npy", std=1.0)


def test_torch_and_sklearn_mixtures_convert() -> None:
    from sklearn.mixture import GaussianMixture as SklearnMixture

    mixture = GaussianMixture(
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double(), 0.4, [1.0, 2.0, 1.0]
    )
    again = GaussianMixture.from_torch(mixture.to_torch())
    x = mixture.sample(50, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.means, mixture.means)
    torch.testing.assert_close(mixture.to_torch().log_prob(x), log_density(x, mixture, backend="reference"))
    model = SklearnMixture(3, covariance_type="spherical", random_state=0).fit(x.numpy())
    model.covariances_[:] = 0.16
    model.precisions_cholesky_ = 1 / np.sqrt(model.covariances_)
    ours = log_density(x, GaussianMixture.from_sklearn(model), backend="reference")
    np.testing.assert_allclose(model.score_samples(x.numpy()), ours.numpy(), rtol=1e-12)
    model.covariances_[0] = 0.5
    with pytest.raises(ValueError, match="one variance"):
        GaussianMixture.from_sklearn(model)


def test_samples_have_the_mixtures_moments_and_leave_the_global_generator_alone() -> None:
    mixture = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]).double(), 0.5, [0.25, 0.75])
    state = torch.random.get_rng_state()
    x = mixture.sample(200_000, generator=torch.Generator().manual_seed(0))
    mixture.sample(3)
    assert torch.random.get_rng_state().equal(state)
    assert x.equal(mixture.sample(200_000, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, 0.75]).double(), rtol=0, atol=0.02)
    assert math.isclose(float(x[:, 0].var()), 0.25 + 16 * 0.25 * 0.75, rel_tol=0.02)
    assert mixture.sample(0).shape == (0, 2)
    assert GaussianMixture.from_samples(x[:5], 0.1).n_components == 5
