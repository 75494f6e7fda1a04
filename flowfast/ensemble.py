"""Many students of equal shape trained as one batched model, none of them aware of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flowfast.stacked import Stack, mean_squared_errors
from flowfast.storage import differences, read_tensors, write_tensors
from flowfast.students.mlp import check_size

Precision = Literal["float32", "tf32", "bf16"]
_PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_FORMAT = {"format": "flowfast ensemble", "version": 1}


class Ensemble:
    """M students of equal shape under AdamW, each with its own loss, gradient clip, moments and weight bound.

    A member's result is that of training it alone. On the CPU, where each member is a stack of its own
    (`together=1`), this holds to the bit, whoever else is in the ensemble and however many threads there are; members
    of one stack of batched products (`together` > 1, the default elsewhere) agree with it to rounding.

    On the CPU as many stacks are at work at once as torch.get_num_threads() allows, each on `threads` of them: a
    product on all cores waits for the slowest core at every layer. Meanwhile torch.get_num_threads() is `threads`.

    Args:
        students: M >= 1 modules that map (b, d_in) to (b, d_out), of one class, structure, dtype and device; their
            tensors are copied, what is no tensor is taken from the first. `MLP` and `TransformerFlowMap` run as
            batched products, others through torch.func.vmap.
        learning_rate: of AdamW, > 0; the attribute of this name may be set between steps.
        weight_decay: of AdamW, >= 0.
        clip_norm: bound on the norm of each member's gradient, > 0, applied as `torch.nn.utils.clip_grad_norm_` does.
        weight_bound: after every step the entries of each weight matrix (two dimensions, called "weight") are clamped
            to [-bound, bound]: one number > 0, or one per member (inf does not clamp). None clamps nothing.
        bound_biases: clamp biases too.
        precision: of the products: "float32", "tf32" (CUDA only), or "bf16" (autocast; the weights stay as they are).
        compile: pass the loss through torch.compile.
        together: members per stack of batched products, >= 1. None is 1 on the CPU, where batched products spare
            nothing, and M elsewhere.
        threads: of torch per stack on the CPU, >= 1. More serve few members on an idle machine; the bits may depend on
            their number.

    Raises:
        TypeError, ValueError: an argument outside these ranges, or students that differ in shape.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        *,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
        weight_bound: float | Sequence[float] | None = None,
        bound_biases: bool = False,
        precision: Precision = "float32",
        compile: bool = False,
        together: int | None = None,
        threads: int = 1,
    ) -> None:
        _check_students(students)
        for name, value, least in (
            ("learning_rate", learning_rate, "above 0"),
            ("weight_decay", weight_decay, "at least 0"),
            ("clip_norm", clip_norm, "above 0"),
        ):
            if not (0 <= value < math.inf) or (value == 0 and least == "above 0"):
                raise ValueError(f"{name} must be finite and {least}; got {value}")
        self.size, self.done, self.learning_rate = len(students), 0, learning_rate
        self.device, self.precision = next(students[0].parameters()).device, precision
        if precision not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}; got {precision!r}")
        if precision == "tf32" and self.device.type != "cuda":
            raise ValueError(f"precision 'tf32' is a mode of CUDA, the students are on {self.device}: use 'float32'")
        if together is None:
            together = 1 if self.device.type == "cpu" else self.size
        check_size("together", together)
        check_size("threads", threads)
        self._together, self._threads = together, threads
        self._pool: ThreadPoolExecutor | None = None
        bounds = _bounds(weight_bound, self.size)
        losses = torch.compile(mean_squared_errors) if compile else mean_squared_errors
        self._stacks = []
        for i in range(0, self.size, together):
            here = slice(i, i + together)
            clamp = {} if bounds is None else _clamped(students[0], bounds[here], bound_biases)
            self._stacks.append(Stack(students[here], clamp, losses, clip_norm, weight_decay))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one optimiser step of every member.

        Args:
            x: (M, b, d_in), row i is member i's own batch. y: (M, b, d_out), what the members should answer. Dtype and
                device of the students.

        Returns:
            (M,), each member's mean squared error over all entries, before the step.

        Raises:
            ValueError: x or y of another shape.
        """
        if x.ndim != 3 or y.ndim != 3 or not x.shape[0] == y.shape[0] == self.size or x.shape[1] != y.shape[1]:
            raise ValueError(
                f"x and y must have shapes ({self.size}, b, d_in) and ({self.size}, b, d_out); "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        losses = self._each(lambda stack, *pairs: stack.step(*pairs, self.learning_rate), x, y)
        self.done += 1
        return losses

    def predict(self, x: Tensor) -> Tensor:
        """Answers of every member to its own points: x (M, n, d_in) to (M, n, d_out), without gradient."""
        if x.ndim != 3 or x.shape[0] != self.size:
            raise ValueError(f"x must have shape ({self.size}, n, d_in); got {tuple(x.shape)}")
        return self._each(lambda stack, points: stack.predict(points), x).to(x.dtype)

    def member(self, i: int) -> nn.Module:
        """A copy of member i, 0 to M - 1, as a module of its own, in evaluation mode."""
        if not 0 <= i < self.size:
            raise ValueError(f"i must be a member from 0 to {self.size - 1}; got {i}")
        return self._stacks[i // self._together].member(i % self._together)

    def write(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Leave everything that later steps depend on in one file: weights, AdamW's moments, steps done, `settings`."""
        states = [stack.state() for stack in self._stacks]
        tensors = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        write_tensors(Path(path), tensors, {**_FORMAT, "step": self.done, "settings": dict(settings)})

    def read(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Go on from a file that `write` left; `together` may differ. After an error the ensemble is as it was.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of other settings (the fields are named) or students.
        """
        tensors, about = read_tensors(Path(path), "checkpoint")
        if {name: about.get(name) for name in _FORMAT} != _FORMAT or not isinstance(about.get("settings"), dict):
            raise ValueError(f"checkpoint: {path} is no ensemble of this version: choose another file")
        differing = differences(about["settings"], settings)
        if differing:
            raise ValueError(f"checkpoint: {path} is of another training ({differing}): choose another file")
        there = {name: tuple(value.shape) for name, value in tensors.items()}
        here = {name: (self.size, *value.shape[1:]) for name, value in self._stacks[0].state().items()}
        if there != here or not isinstance(about.get("step"), int):
            raise ValueError(f"checkpoint: {path} holds other students: choose another file")
        for i, stack in enumerate(self._stacks):
            part = slice(i * self._together, (i + 1) * self._together)
            stack.restore({name: value[part] for name, value in tensors.items()}, about["step"])
        self.done = about["step"]

    def _each(self, work: Callable[..., Tensor], *sides: Tensor) -> Tensor:
        """What `work` makes of every stack and its rows of `sides`, joined along the members."""
        jobs = list(zip(self._stacks, *(side.split(self._together) for side in sides), strict=True))
        if self.device.type != "cpu":
            with _products_in(self.precision, self.device):
                return torch.cat([work(*job) for job in jobs])

        def run(stack: Stack, *parts: Tensor) -> Tensor:
            torch.set_num_threads(self._threads)  # precision and threads are settings of each thread
            with _products_in(self.precision, self.device):
                return work(stack, *parts)

        allowed = torch.get_num_threads()
        workers = min(max(1, allowed // self._threads), len(jobs))
        if workers > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(workers)
        try:
            if workers == 1 or self._pool is None:
                return torch.cat([run(*job) for job in jobs])
            waiting = [self._pool.submit(run, *job) for job in jobs]
            wait(waiting)
            return torch.cat([future.result() for future in waiting])
        finally:
            torch.set_num_threads(allowed)


@contextmanager
def _products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Matrix products of the body in this precision; torch's own setting is as before afterwards."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif device.type != "cuda":
        yield
    else:
        products = torch.backends.cuda.matmul
        before, products.fp32_precision = products.fp32_precision, "tf32" if precision == "tf32" else "ieee"
        try:
            yield
        finally:
            products.fp32_precision = before


def _bounds(weight_bound: float | Sequence[float] | None, members: int) -> Tensor | None:
    """One bound per member, (m,), or None."""
    if weight_bound is None:
        return None
    try:
        bounds = torch.as_tensor(weight_bound, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"weight_bound must be None, a number or {members} numbers; got {weight_bound!r}") from error
    if bounds.shape not in ((), (members,)) or not bool((bounds > 0).all()):
        raise ValueError(f"weight_bound must be None, a number above 0 or {members} of them; got {weight_bound!r}")
    return bounds.expand(members)


def _clamped(student: nn.Module, bounds: Tensor, biases: bool) -> dict[str, Tensor]:
    """Bounds of the parameters that are clamped, by name, shaped to broadcast with the stacked parameter."""
    kinds = {"weight", "bias"} if biases else {"weight"}
    return {
        name: bounds.to(value).view(-1, *[1] * value.ndim)
        for name, value in student.named_parameters()
        if name.rsplit(".", 1)[-1] in kinds and (value.ndim == 2 or name.endswith("bias"))
    }


def _check_students(students: Sequence[nn.Module]) -> None:
    if not students or not all(isinstance(student, nn.Module) for student in students):
        raise TypeError(f"students must be one or more modules; got {[type(student).__name__ for student in students]}")
    first = _shape(students[0])
    if not any(True for _ in students[0].parameters()):
        raise ValueError("students must have parameters to train; the first has none")
    for i, student in enumerate(students):
        if _shape(student) != first:
            raise ValueError(f"students must be of one class, structure, dtype and device; {i} differs from 0")


def _shape(student: nn.Module) -> list[object]:
    """What the members of an ensemble have in common."""
    tensors = [*student.named_parameters(), *student.named_buffers()]
    kinds = [(name, value.shape, value.dtype, value.device) for name, value in tensors]
    return [type(student), getattr(student, "config", None), *kinds]
