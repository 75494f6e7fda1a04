"""Wrong calls of the library: one sentence that names the argument, never an assert or a traceback from below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import flowfast
from flowfast import GaussianMixture, OUProcess, flow_map, score, time_grid, velocity

NAN = float("nan")
MIXTURE = GaussianMixture.random(3, 2, seed=0)
PROCESS = OUProcess(5.0)
X = torch.zeros(4, 2)
T4 = torch.linspace(0.1, 0.4, 4)


def _load(path: str, tmp: Path) -> Path:
    (tmp / "text.npy").write_text("not an array")
    np.savez(tmp / "other.npz", centres=np.zeros((2, 2)))
    return tmp / path


WRONG: list[tuple[str, type[Exception], str, Callable[[Path], object]]] = [
    ("means 1-d", ValueError, r"means must have shape \(k, d\)", lambda p: GaussianMixture(torch.zeros(3), 1.0)),
    ("means integer", TypeError, "means must be floating", lambda p: GaussianMixture(torch.zeros(3, 2).int(), 1.0)),
    ("means text", TypeError, "means must be an array", lambda p: GaussianMixture("means", 1.0)),
    ("means NaN", ValueError, "means must be finite; row 1", lambda p: GaussianMixture([[0.0], [NAN]], 1.0)),
    ("std zero", ValueError, "std must be positive", lambda p: GaussianMixture(X, 0.0)),
    ("std NaN", ValueError, "std must be positive", lambda p: GaussianMixture(X, NAN)),
    ("std text", TypeError, "std must be a positive number", lambda p: GaussianMixture(X, "wide")),
    ("std vector", ValueError, "std must be a number", lambda p: GaussianMixture(X, torch.ones(4))),
    ("weights short", ValueError, r"weights must have shape \(4,\)", lambda p: GaussianMixture(X, 1.0, [1.0])),
    ("weights negative", ValueError, "weights must be finite", lambda p: GaussianMixture(X[:2], 1.0, [1.0, -1.0])),
    ("weights zero", ValueError, "weights must be finite", lambda p: GaussianMixture(X[:2], 1.0, [0.0, 0.0])),
    ("n negative", ValueError, "n must be at least 0", lambda p: MIXTURE.sample(-1)),
    ("k zero", ValueError, "k and d must be at least 1", lambda p: GaussianMixture.random(0, 2)),
    ("beta negative", ValueError, "beta must be positive", lambda p: OUProcess(-1.0)),
    ("beta text", TypeError, "beta must be a number", lambda p: OUProcess("fast")),  # type: ignore[arg-type]
    ("beta table", ValueError, "start at 0 and increase", lambda p: OUProcess(([0.1, 1.0], [1.0, 1.0]))),
    ("t past the table", ValueError, "last time 1.0", lambda p: OUProcess(([0.0, 1.0], [1.0, 1.0])).alpha(1.5)),
    ("x list", TypeError, "x must be a torch tensor", lambda p: score([[0.0, 0.0]], MIXTURE)),  # type: ignore[arg-type]
    ("x integer", TypeError, "x must be floating", lambda p: score(X.int(), MIXTURE)),
    ("x dimension", ValueError, r"x must have shape \(\.\.\., 2\)", lambda p: score(torch.zeros(4, 3), MIXTURE)),
    ("x scalar", ValueError, r"x must have shape \(\.\.\., 2\)", lambda p: score(torch.tensor(1.0), MIXTURE)),
    ("x device", ValueError, "x is on meta, the mixture on cpu", lambda p: score(X.to("meta"), MIXTURE)),
    ("mixture", TypeError, "mixture must be a GaussianMixture", lambda p: score(X, X)),  # type: ignore[arg-type]
    ("v", ValueError, "v must match x", lambda p: flowfast.hessian_vector_product(X, X[:2], MIXTURE)),
    ("backend", ValueError, "backend must be one of", lambda p: score(X, MIXTURE, backend="gpu")),
    ("triton on cpu", ValueError, "backend 'triton'", lambda p: _triton_on_cpu()),
    ("bound", ValueError, "kind must be", lambda p: flowfast.hessian_norm_bound(X, MIXTURE, kind="max")),  # type: ignore[arg-type]
    ("t negative", ValueError, "t must be finite and at least 0", lambda p: velocity(X, MIXTURE, PROCESS, -0.1)),
    ("t NaN", ValueError, "t must be finite", lambda p: velocity(X, MIXTURE, PROCESS, NAN)),
    ("t text", TypeError, "t must be a number", lambda p: velocity(X, MIXTURE, PROCESS, "late")),  # type: ignore[arg-type]
    ("t shape", ValueError, "t must be a number or broadcast", lambda p: velocity(X, MIXTURE, PROCESS, T4[:3])),
    ("marginal per row", ValueError, "t must be one time", lambda p: PROCESS.marginal(MIXTURE, T4)),
    ("method", ValueError, "method must be", lambda p: flow_map(X, MIXTURE, PROCESS, 1, 0, method="euler")),  # type: ignore[arg-type]
    ("steps", ValueError, "steps must be", lambda p: flow_map(X, MIXTURE, PROCESS, 1, 0, steps=0)),
    ("rtol", ValueError, "rtol must be", lambda p: flow_map(X, MIXTURE, PROCESS, 1, 0, rtol=-1.0)),
    ("rtol and steps", ValueError, "no effect", lambda p: flow_map(X, MIXTURE, PROCESS, 1, 0, steps=5, rtol=1)),
    ("t_to", ValueError, "t_to must be a number or broadcast", lambda p: flow_map(X, MIXTURE, PROCESS, 1, T4[:3])),
    ("rows and steps", ValueError, "t_from must be one", lambda p: flow_map(X, MIXTURE, PROCESS, T4, 0, steps=5)),
    ("gradient", ValueError, "no gradient", lambda p: flow_map(X.clone().requires_grad_(), MIXTURE, PROCESS, 1, 0)),
    ("grid", ValueError, "kind must be one of", lambda p: time_grid(MIXTURE, PROCESS, 4, kind="even")),  # type: ignore[arg-type]
    ("n zero", ValueError, "n must be a number of segments", lambda p: time_grid(MIXTURE, PROCESS, 0)),
    ("horizon", ValueError, "horizon must be positive", lambda p: time_grid(MIXTURE, PROCESS, 4, horizon=0.0)),
    ("kappa", ValueError, "kappa must exceed 1", lambda p: flowfast.stability_regimes(MIXTURE, PROCESS, kappa=1.0)),
    ("no file", ValueError, "does not exist", lambda p: GaussianMixture.load(p / "none.npy", std=1.0)),
    ("kind of file", ValueError, "must end in one of", lambda p: GaussianMixture.load(p / "means.txt", std=1.0)),
    ("unreadable", ValueError, "cannot be read as .npy", lambda p: GaussianMixture.load(_load("text.npy", p), std=1.0)),
    ("no means", ValueError, "array named 'means'", lambda p: GaussianMixture.load(_load("other.npz", p), std=1.0)),
    ("save as", ValueError, "path must end in", lambda p: MIXTURE.save(p / "mixture.txt")),
]  # fmt: skip


def _triton_on_cpu() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        score(X, MIXTURE, backend="triton")


@pytest.mark.parametrize(("kind", "message", "call"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_call(kind: type[Exception], message: str, call: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_extension_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowfast.backends._cpp, "available", lambda: False)
    with pytest.raises(ValueError, match="pip install"):
        score(X, MIXTURE)
    assert score(X, MIXTURE, backend="reference").shape == X.shape
