"""A student of the flow: one network evaluation for each segment of a time grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowfast.seeds import as_seed, generator_for
from flowfast.students import student_files
from flowfast.students.mlp import MLP, Activation, check_size

Pieces = Tensor | Sequence[Tensor]  # points (b, d) of every segment, b need not be the same; a tensor is (m, b, d)

_ORTHONORMAL = 1e-5  # entries of axes^T axes - 1; a float32 file leaves about 1e-7


@dataclass(frozen=True)
class SegmentTable:
    """A time grid in the numbers a student needs, from noise to data.

    Args:
        r: SNR roots alpha/s at the m + 1 times of the grid, positive, increasing (the data end is last).
        s: standard deviations of a component at the same times, positive.

    Raises:
        ValueError: fewer than two entries, two lengths, values not finite or not positive, r not increasing.
    """

    r: tuple[float, ...]
    s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Take any sequences of numbers and check them."""
        for name in ("r", "s"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) < 2 or not all(value > 0 and math.isfinite(value) for value in values):
                raise ValueError(f"{name} must hold at least two positive finite numbers; got {values}")
            object.__setattr__(self, name, values)
        if len(self.r) != len(self.s):
            raise ValueError(f"r and s must have one length; got {len(self.r)} and {len(self.s)}")
        if any(a >= b for a, b in zip(self.r, self.r[1:], strict=False)):
            raise ValueError(f"r must increase from noise to data; got {self.r}: give the times in decreasing order")

    @property
    def n_segments(self) -> int:
        """Number m of segments."""
        return len(self.r) - 1


class FlowStudent(nn.Module):
    """Segment maps of a probability flow, each one evaluation of a network, composed from noise to data.

    A preconditioned segment is `s_to (x/s_from + (r_to - r_from) F(x/s_from))`: in the coordinates y = x/s the flow is
    `dy/dr =` an average of the means, so F has to learn only such an average. F itself is `center + scale * network`,
    and the network sees points centred and scaled to unit size; with scale = 0 (a single component) the map is exact.
    With axes, the network sees and moves points along these directions only: the flow neither depends on y across the
    span of the means' differences nor moves it there. A plain segment is the network.

    Args:
        dim: d.
        segments: the time grid in numbers.
        width, depth, activation: of the network, see `MLP`.
        preconditioned: see above.
        shared: one network for all segments, with (log r_from, log r_to) as two more inputs; else one per segment.
        center: (d,), mean of the data's means; None is zero. Used when preconditioned.
        scale: root mean square of the means' coordinates (along the axes) about center, >= 0. Used when preconditioned.
        axes: (d, a) orthonormal columns, a >= 1; None is all coordinates. Used when preconditioned.
        seed: of the initial weights, >= 0; one seed gives one set of bits.
        dtype: of weights and computation, torch.float32 or torch.float64.

    Raises:
        TypeError, ValueError: an argument outside these ranges.

    Source: docs/math.md Eq. 10; arXiv 2606.03820, section 6 (plain students, one per segment).
    """

    center: Tensor
    axes: Tensor | None

    def __init__(
        self,
        dim: int,
        segments: SegmentTable,
        *,
        width: int = 512,
        depth: int = 4,
        activation: Activation = "relu",
        preconditioned: bool = True,
        shared: bool = True,
        center: Sequence[float] | Tensor | None = None,
        scale: float = 1.0,
        axes: Tensor | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_size("dim", dim)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
        middle = torch.as_tensor([0.0] * dim if center is None else center, dtype=torch.float64).detach().clone()
        if middle.shape != (dim,) or not bool(torch.isfinite(middle).all()):
            raise ValueError(f"center must hold {dim} finite numbers; got shape {tuple(middle.shape)}")
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale must be finite and at least 0; got {scale}")
        self.dim, self.segments, self.scale = dim, segments, float(scale)
        self.width, self.depth, self.activation = width, depth, activation
        self.preconditioned, self.shared, self.seed = bool(preconditioned), bool(shared), as_seed(seed)
        self.register_buffer("center", middle)
        self.register_buffer("axes", _directions(axes, dim) if self.preconditioned else None)
        inner = dim if self.axes is None else self.axes.shape[1]
        self.networks = nn.ModuleList(
            MLP(
                inner + 2 * self.shared,
                inner,
                width=width,
                depth=depth,
                activation=activation,
                generator=generator_for(seed, "network", i),
            )
            for i in range(1 if self.shared else segments.n_segments)
        )
        self._levels = _standardise([math.log(r) for r in segments.r])
        self.to(dtype)

    @property
    def n_segments(self) -> int:
        """Number m of segments, which is the number of network evaluations per sample."""
        return self.segments.n_segments

    def segment(self, i: int, x: Tensor) -> Tensor:
        """Carry points through segment i.

        Args:
            i: 0 (starts at noise) to m - 1 (ends at data).
            x: (..., d), floating; computed in the student's dtype, returned in x's.

        Returns:
            Like x.

        Raises:
            TypeError, ValueError: no such segment, or not points of this dimension.
        """
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.n_segments:
            raise ValueError(f"i must be a segment from 0 to {self.n_segments - 1}; got {i!r}")
        self._check(x)
        z = x.to(self.center.dtype)
        out: Tensor = self._network(i)(self._inputs(i, z))
        if self.preconditioned:
            table, step = self.segments, self.segments.r[i + 1] - self.segments.r[i]
            change = out if self.axes is None else out @ self.axes.mT
            y = self._centred(i, z) + (step * self.scale) * change
            out = table.s[i + 1] * y + (table.s[i + 1] * table.r[i + 1]) * self.center
        return out.to(x.dtype)

    def trajectory(self, x: Tensor) -> Tensor:
        """Compose the segments: x (n, d) at the noise end to (m + 1, n, d), x itself first."""
        points = [x]
        for i in range(self.n_segments):
            points.append(self.segment(i, points[-1]))
        return torch.stack(points)

    def forward(self, x: Tensor) -> Tensor:
        """Carry x (..., d) from noise to data; like x. The last of the trajectory."""
        for i in range(self.n_segments):
            x = self.segment(i, x)
        return x

    def losses(self, x_from: Pieces, x_to: Pieces) -> Tensor:
        """Mean squared error of the networks' outputs on teacher pairs: of F in units of scale, or of x when plain.

        Args:
            x_from: (b, d) for each segment, at its start; b may differ. x_to: likewise, where the teacher carries them.

        Returns:
            (m,), differentiable with respect to the weights.
        """
        segments = zip(range(self.n_segments), x_from, x_to, strict=True)
        inputs, targets = zip(*(self.network_pair(*segment) for segment in segments), strict=True)
        if self.shared:
            out: Tensor = self._network(0)(torch.cat(inputs))
        else:
            out = torch.cat([self._network(i)(x) for i, x in enumerate(inputs)])
        errors = (out - torch.cat(targets)).square().split([len(x) for x in inputs])
        return torch.stack([error.mean() for error in errors])

    def network_pair(self, i: int, x_from: Tensor, x_to: Tensor) -> tuple[Tensor, Tensor]:
        """What the network of segment i is to answer, and to what, when the teacher carries x_from to x_to.

        Args:
            i: 0 to m - 1. x_from, x_to: (b, d).

        Returns:
            inputs (b, d), with two more columns when shared, and outputs (b, d), in the student's dtype: `losses` is
            the mean squared difference between these outputs and the network's.
        """
        x_from, x_to = x_from.to(self.center.dtype), x_to.to(self.center.dtype)
        return self._inputs(i, x_from), self._output_for(i, x_from, x_to)

    def save(self, folder: str | Path) -> None:
        """Write student.safetensors (weights) and student.json (everything else) into `folder`, made if need be."""
        config = {
            "dim": self.dim,
            "segments": asdict(self.segments),
            "width": self.width,
            "depth": self.depth,
            "activation": self.activation,
            "preconditioned": self.preconditioned,
            "shared": self.shared,
            "scale": self.scale,
            "seed": self.seed,
        }
        student_files.write(Path(folder), config, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> FlowStudent:
        """Read a student that `save` wrote, to the same bits, on the CPU.

        Raises:
            ValueError: files missing, foreign, damaged or not of one student.
        """
        config, weights = student_files.read(Path(folder))
        try:
            table = SegmentTable(**config["segments"])
            axes, dtype = weights.get("axes"), weights["center"].dtype
            student = cls(**{**config, "segments": table, "axes": axes, "dtype": dtype})
            student.load_state_dict(weights)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"student: {folder} holds no student that this version can build ({error})") from error
        return student

    def _network(self, i: int) -> nn.Module:
        return self.networks[0 if self.shared else i]

    def _centred(self, i: int, x: Tensor) -> Tensor:
        """`x/s - r center` at grid time i: the coordinates y = x/s with the data's mean carried to the origin."""
        s = self.segments.s[i]
        return (x - (self.segments.r[i] * s) * self.center) / s

    def _inputs(self, i: int, x: Tensor) -> Tensor:
        if self.preconditioned:  # a point at SNR root r is r times a mean plus unit noise
            x = self._along(self._centred(i, x)) / math.hypot(1.0, self.segments.r[i] * self.scale)
        if not self.shared:
            return x
        levels = x.new_tensor(self._levels[i : i + 2]).expand(*x.shape[:-1], 2)
        return torch.cat([x, levels], -1)

    def _output_for(self, i: int, x_from: Tensor, x_to: Tensor) -> Tensor:
        """What the network must answer for `segment` to carry x_from to x_to."""
        if not self.preconditioned:
            return x_to
        step = self.segments.r[i + 1] - self.segments.r[i]
        return self._along(self._centred(i + 1, x_to) - self._centred(i, x_from)) / (step * (self.scale or 1.0))

    def _along(self, y: Tensor) -> Tensor:
        """Coordinates (..., a) along the axes of y (..., d)."""
        return y if self.axes is None else y @ self.axes

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a tensor of floating numbers; got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}); got {tuple(x.shape)}")
        if x.device != self.center.device:
            raise ValueError(f"x is on {x.device}, the student on {self.center.device}: move one of them with .to(...)")


def _directions(axes: Tensor | None, dim: int) -> Tensor | None:
    """The axes in float64, when they are orthonormal columns or None."""
    if axes is None:
        return None
    columns = torch.as_tensor(axes).detach().double().clone()
    if columns.ndim != 2 or columns.shape[0] != dim or not 1 <= columns.shape[1] <= dim:
        raise ValueError(f"axes must have shape ({dim}, 1 to {dim}); got {tuple(columns.shape)}")
    error = (columns.mT @ columns - torch.eye(columns.shape[1]).to(columns)).abs().max()
    if not error < _ORTHONORMAL:  # also when it is not a number
        raise ValueError(f"axes must be orthonormal columns; their products are off by {float(error):.1e}")
    return columns


def _standardise(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / spread for value in values]
