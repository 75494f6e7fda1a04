"""Who computes, and with which mixture: what a plan names and a folder holds beside its shards."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version

import torch

import flowfast
from flowfast import _cpp, _triton, backends
from flowfast.dataset.plan import MIXTURE, Kernel, Plan, mixture_digest
from flowfast.dataset.store import Store, write_file
from flowfast.mixture import GaussianMixture
from flowfast.storage import differences

MOST_MIXTURE_BYTES = 2**34


def kernel_here(backend: str, device: torch.device) -> Kernel:
    """What would compute on this machine.

    Args:
        backend: see `flow_map`. device: of the mixture.

    Raises:
        ValueError: unknown backend, or one that is not there.
    """
    backend = backends.choose(backend, device)
    if backend == "cpp":
        place = _cpp.isa()
    elif backend == "reference":
        place = f"torch {torch.__version__}"
    else:
        gpu = "interpreter" if _triton.interpreting() else torch.cuda.get_device_name(device)
        place = f"{gpu}, Triton {version('triton')}"
    return Kernel(backend, place, flowfast.__version__)


def device_of(plan: Plan) -> torch.device:
    """Where the plan's rows are computed."""
    on_gpu = plan.kernel.backend == "triton" and not _triton.interpreting()
    return torch.device("cuda" if on_gpu else "cpu")


def check_kernel(plan: Plan) -> None:
    """Raise ValueError where this machine would compute other bits than the plan's."""
    here = kernel_here(plan.kernel.backend, device_of(plan))
    differing = differences({"kernel": asdict(plan.kernel)}, {"kernel": asdict(here)})
    if differing:
        raise ValueError(f"teacher set: the plan's kernel is not this machine's ({differing}): go on where it began")


def write_mixture(store: Store, mixture: GaussianMixture) -> None:
    """Write mixture.safetensors, the same bits for the same mixture."""
    from safetensors.torch import save

    parts = {"means": mixture.means, "std": mixture.std, "log_weights": mixture.log_weights}
    write_file(store, MIXTURE, save({name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}))


def read_mixture(store: Store, plan: Plan) -> GaussianMixture:
    """The plan's mixture, to the same bits, on the CPU.

    Raises:
        ValueError: it is missing, damaged, or not the plan's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        arrays = load(store.read_bytes(MIXTURE, MOST_MIXTURE_BYTES))
        logs = arrays["log_weights"]
        mixture = GaussianMixture(arrays["means"], arrays["std"], logs.exp())
        mixture.log_weights = logs  # exp and log would not give back every bit
        fits = logs.dtype == torch.float64 and mixture_digest(mixture) == plan.mixture
    except (FileNotFoundError, KeyError, TypeError, ValueError, SafetensorError):
        fits = False
    if not fits:
        raise ValueError(f"teacher set: {store.location}/{MIXTURE} is not the mixture of the plan: restore it")
    return mixture
