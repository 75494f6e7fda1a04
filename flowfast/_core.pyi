"""Types of the C++ extension: addresses of tensors (0 where an output is not wanted), sizes and flags.

The functions that take addresses end in the dtype they work on. `flowfast._cpp` is the only caller.
"""

import enum

class Form(enum.Enum):
    automatic = 0
    span = 1
    full = 2

def isa() -> str: ...
def isas() -> list[str]: ...
def posterior_float32(
    x: int,
    v: int,
    means: int,
    log_weights: int,
    alpha: int,
    alpha_per_row: bool,
    std: int,
    std_per_row: bool,
    log_density: int,
    score: int,
    posterior_mean: int,
    trace: int,
    weights: int,
    hvp: int,
    n: int,
    k: int,
    d: int,
    threads: int,
    /,
) -> None: ...
def flow_fixed_float32(
    x: int,
    out: int,
    means: int,
    log_weights: int,
    center: int,
    ends: int,
    ends_per_row: bool,
    h: int,
    coefficients: int,
    tableau: int,
    stages: int,
    steps: int,
    n: int,
    k: int,
    d: int,
    form: Form,
    threads: int,
    /,
) -> None: ...
def flow_adaptive_float32(
    x: int,
    out: int,
    status: int,
    attempts: int,
    evaluations: int,
    means: int,
    log_weights: int,
    center: int,
    ends: int,
    ends_per_row: bool,
    tableau: int,
    stages: int,
    rtol: float,
    atol: float,
    max_steps: int,
    n: int,
    k: int,
    d: int,
    form: Form,
    threads: int,
    /,
) -> None: ...
def diameter_float32(means: int, k: int, d: int, threads: int, /) -> float: ...
def exponential_float32(x: int, out: int, n: int, /) -> None: ...
def block_float32() -> int: ...
def posterior_float64(
    x: int,
    v: int,
    means: int,
    log_weights: int,
    alpha: int,
    alpha_per_row: bool,
    std: int,
    std_per_row: bool,
    log_density: int,
    score: int,
    posterior_mean: int,
    trace: int,
    weights: int,
    hvp: int,
    n: int,
    k: int,
    d: int,
    threads: int,
    /,
) -> None: ...
def flow_fixed_float64(
    x: int,
    out: int,
    means: int,
    log_weights: int,
    center: int,
    ends: int,
    ends_per_row: bool,
    h: int,
    coefficients: int,
    tableau: int,
    stages: int,
    steps: int,
    n: int,
    k: int,
    d: int,
    form: Form,
    threads: int,
    /,
) -> None: ...
def flow_adaptive_float64(
    x: int,
    out: int,
    status: int,
    attempts: int,
    evaluations: int,
    means: int,
    log_weights: int,
    center: int,
    ends: int,
    ends_per_row: bool,
    tableau: int,
    stages: int,
    rtol: float,
    atol: float,
    max_steps: int,
    n: int,
    k: int,
    d: int,
    form: Form,
    threads: int,
    /,
) -> None: ...
def diameter_float64(means: int, k: int, d: int, threads: int, /) -> float: ...
def exponential_float64(x: int, out: int, n: int, /) -> None: ...
def block_float64() -> int: ...
