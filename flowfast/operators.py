"""The compiled kernels as torch operators of the namespace `flowfast`: fake, autograd and vmap rules.

Each operator takes x (n, d), [v (n, d),] means (k, d), log_weights (k,), alpha and std (float64, () or (n,)); its
gradient reaches x (and v). The rules are compositions of these same operators, so every order of derivative exists.
Their matrix products are taken in float64, which neither autocast nor TF32 touches and no power of 1 / std overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from flowfast import _cpp, backends

_Saved = tuple[Tensor, ...]


def _shape_rows(x: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty(x.shape[0])


def _shape_points(x: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _shape_weights(x: Tensor, means: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], means.shape[0])


def _define(name: str, arguments: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    schema = "(" + ", ".join(f"Tensor {argument}" for argument in arguments.split()) + ") -> Tensor"

    def run(backend: str) -> Callable[..., Tensor]:
        def body(x: Tensor, *rest: Tensor) -> Tensor:
            module = backends.serve(backend, x.device, name)
            with backends.full_precision(x.device):
                return getattr(module, name)(x.contiguous(), *(tensor.contiguous() for tensor in rest))  # type: ignore[no-any-return]

        return body

    op = torch.library.custom_op(f"flowfast::{name}", run("cpp"), mutates_args=(), device_types="cpu", schema=schema)
    op.register_kernel("cuda")(run("triton"))
    op.register_fake(fake)
    op.register_vmap(lambda info, in_dims, *args: _vmap(op, info.batch_size, in_dims, args))
    return op


_ARGUMENTS = "x means log_weights alpha std"
log_density = _define("log_density", _ARGUMENTS, _shape_rows)
score = _define("score", _ARGUMENTS, _shape_points)
posterior_mean = _define("posterior_mean", _ARGUMENTS, _shape_points)
covariance_trace = _define("covariance_trace", _ARGUMENTS, _shape_rows)
posterior_weights = _define("posterior_weights", _ARGUMENTS, _shape_weights)
hessian_vector_product = _define("hessian_vector_product", "x v means log_weights alpha std", _shape_points)


def _diameter(means: Tensor, backend: str) -> Tensor:
    with backends.full_precision(means.device):
        value = backends.serve(backend, means.device, "diameter").diameter(means.contiguous())
    return torch.full((), value, dtype=torch.float64, device=means.device)


# Largest distance between two means (k, d): float64 (), no gradient. For compiled functions, which hold no numbers.
diameter = torch.library.custom_op(
    "flowfast::diameter", _diameter, mutates_args=(), schema="(Tensor means, str backend) -> Tensor"
)
diameter.register_fake(lambda means, backend: means.new_empty((), dtype=torch.float64))

OPERATORS = {
    "log_density": log_density,
    "score": score,
    "posterior_mean": posterior_mean,
    "covariance_trace": covariance_trace,
    "posterior_weights": posterior_weights,
    "hessian_vector_product": hessian_vector_product,
}


def call(op: str, backend: str, tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Run operator `op` on tensors of one device; `backend` is "cpp" or "triton" (interpreted on CPU tensors).

    The result may be written to `out` (contiguous, of its shape and dtype), or is another tensor: the caller looks.
    """
    if backend == "cpp" and unseen(tensors):
        body = getattr(_cpp, op)
        if fit_for_result(out, tensors):
            return body(*tensors, out=out)  # type: ignore[no-any-return]
        return body(*tensors)  # type: ignore[no-any-return]
    interpreted = backend == "triton" and tensors[0].is_cpu
    if interpreted and differentiated(*tensors):
        raise ValueError(
            "Triton's interpreter carries no gradient: pass another backend for CPU tensors, or detach them"
        )
    if interpreted or (backend == "triton" and unseen(tensors)):
        with backends.full_precision(tensors[0].device):
            return getattr(backends.body(backend), op)(*(tensor.contiguous() for tensor in tensors))  # type: ignore[no-any-return]
    return OPERATORS[op](*tensors)


def fit_for_result(out: Tensor | None, tensors: list[Tensor]) -> bool:
    """Whether a body may write to `out` directly, which then counts as changed: it is plain memory that none reads."""
    if out is None or not unseen([out]) or any(_share_memory(out, tensor) for tensor in tensors):
        return False
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as every operation in place does
    return True


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# What torch 2.11 to 2.13 have no public name for. Were one to go, every call would take the operator's way.
_is_tracing: Any = getattr(torch._C, "_is_tracing", None)
_top_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", None)
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)
_profiling: Any = getattr(torch._C._autograd, "_profiler_enabled", None)
_ALL_THERE = None not in (_is_tracing, _top_transform, _dispatch_modes, _function_modes, _profiling)


def unseen(tensors: list[Tensor]) -> bool:
    """Whether nothing could tell a call of the body from one of the operator (bench/overhead.py has what that spares).

    That is: no compiler, tracer, transform, mode or profiler is at work, and the tensors are plain, ready to be read
    by address and in need of no gradient.
    """
    if not _ALL_THERE or torch.compiler.is_compiling():
        return False
    if _is_tracing() or _top_transform() is not None or _dispatch_modes() or _function_modes() or _profiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or (grad and tensor.requires_grad):
            return False
        if tensor.is_neg() or not tensor.is_contiguous():
            return False
    return True


def need_reference(tensors: list[Tensor]) -> bool:
    """Whether a derivative that custom operators refuse or lose is being taken with respect to one of these tensors.

    That is one in forward mode, or one of torch.func; what neither follows goes through the operators there too.
    """
    if not _transforming():
        return False
    return torch.compiler.is_compiling() or any(_followed(tensor) for tensor in tensors)


def _transforming() -> bool:
    """Whether forward mode or a derivative of torch.func is at work.

    A compiler asks once, while it traces: it guards on the transforms that were at work then.
    """
    if forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack()
    return levels is not None and any(level.key() == TransformType.Grad for level in levels)


_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backends.py


def _followed(tensor: Tensor) -> bool:
    forward = forward_ad._current_level >= 0
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if forward or tensor.requires_grad:  # a wrapper does not say whether a tangent is within
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward and forward_ad.unpack_dual(tensor).tangent is not None


def differentiated(*values: object) -> bool:
    """Whether a derivative is being taken with respect to one of these values, backward or forward."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    if torch.compiler.is_compiling():  # a graph's tensors do not say, so any transform counts
        return _transforming()
    return any(_followed(tensor) for tensor in tensors)


def _vmap(op: Callable[..., Tensor], size: int, in_dims: tuple[int | None, ...], args: _Saved) -> tuple[Tensor, int]:
    """Fold the mapped dimension into the rows when the mixture is shared; one call per entry otherwise."""
    shared = all(dim is None for dim in in_dims[-4:-2])
    moved = [a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, in_dims, strict=True)]
    if not shared:
        entries = ([a if d is None else a[i] for a, d in zip(moved, in_dims, strict=True)] for i in range(size))
        return torch.stack([op(*entry) for entry in entries]), 0
    n = args[0].shape[0] if in_dims[0] is None else moved[0].shape[1]
    points, (means, log_weights, *scales) = moved[:-4], moved[-4:]
    flat = [
        (p.expand(size, *p.shape) if d is None else p).reshape(size * n, -1)
        for p, d in zip(points, in_dims, strict=False)
    ]
    scales = [s if s.ndim == 0 else _rows(s, d is not None, size, n) for s, d in zip(scales, in_dims[-2:], strict=True)]
    out = op(*flat, means, log_weights, *scales)
    return out.reshape(size, n, *out.shape[1:]), 0


def _rows(scale: Tensor, mapped: bool, size: int, n: int) -> Tensor:
    if mapped and scale.ndim == 1:
        scale = scale[:, None]
    return scale.expand(size, n).reshape(-1)


def _per_row(value: Tensor) -> Tensor:
    return value if value.ndim == 0 else value[:, None]


def _save(ctx: Any, inputs: _Saved, output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _refuse_own(ctx: Any, first: int) -> None:
    if any(ctx.needs_input_grad[first:]):
        raise ValueError(
            "flowfast operators carry gradients to points only: call the functions of flowfast, which send mixtures "
            "that require grad to the reference"
        )


def _log_density_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_own(ctx, 1)
    *inputs, _ = ctx.saved_tensors
    return g[:, None] * score(*inputs), None, None, None, None


def _score_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_own(ctx, 1)
    x, *mixture, _ = ctx.saved_tensors
    return hessian_vector_product(x, g, *mixture), None, None, None, None


def _posterior_mean_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_own(ctx, 1)
    *tensors, alpha, std, _ = ctx.saved_tensors
    x, means, log_weights, v = (tensor.double() for tensor in (*tensors, g))
    # Where alpha is small both terms nearly cancel: the derivative is alpha C / std^2.
    product = hessian_vector_product(x, v, means, log_weights, alpha, std)
    return ((_per_row(std) ** 2 * product + v) / _per_row(alpha)).to(g.dtype), None, None, None, None


def _posterior_weights_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_own(ctx, 1)
    _, means, _, alpha, std, weights = ctx.saved_tensors
    gamma, v = weights.double(), g.double()
    pull = gamma * (v - (gamma * v).sum(1, keepdim=True))  # (n, k)
    return (_per_row(alpha / std**2) * (pull @ means.double())).to(g.dtype), None, None, None, None


def _hessian_vector_product_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_own(ctx, 2)
    x, v, means, log_weights, alpha, std, _ = ctx.saved_tensors
    mixture = (means, log_weights, alpha, std)
    grad_x = None
    if ctx.needs_input_grad[0]:  # the third derivative: a posterior third moment
        weights, m = posterior_weights(x, *mixture).double(), means.double()
        a, b = g.double() @ m.T, v.double() @ m.T  # (n, k)
        a = a - (weights * a).sum(1, keepdim=True)
        b = b - (weights * b).sum(1, keepdim=True)
        third = weights * a * b
        third = third @ m - third.sum(1, keepdim=True) * (weights @ m)
        grad_x = (_per_row((alpha / std**2) ** 3) * third).to(g.dtype)
    grad_v = hessian_vector_product(x, g, *mixture) if ctx.needs_input_grad[1] else None
    return grad_x, grad_v, None, None, None, None


def _no_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    raise ValueError("the covariance trace has no compiled gradient: pass backend='reference'")


log_density.register_autograd(_log_density_backward, setup_context=_save)  # type: ignore[attr-defined]
score.register_autograd(_score_backward, setup_context=_save)  # type: ignore[attr-defined]
posterior_mean.register_autograd(_posterior_mean_backward, setup_context=_save)  # type: ignore[attr-defined]
covariance_trace.register_autograd(_no_backward, setup_context=_save)  # type: ignore[attr-defined]
posterior_weights.register_autograd(_posterior_weights_backward, setup_context=_save)  # type: ignore[attr-defined]
hessian_vector_product.register_autograd(_hessian_vector_product_backward, setup_context=_save)  # type: ignore[attr-defined]
