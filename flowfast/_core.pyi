"""Types of the C++ extension: addresses of tensors (0 where there is none), sizes and flags.

The functions that take addresses end in the dtype they work on. `flowfast._cpp` is the only caller.
"""

import enum

class Form(enum.Enum):
    automatic = 0
    span = 1
    full = 2

class Output(enum.Enum):
    log_density = 0
    score = 1
    posterior_mean = 2
    covariance_trace = 3
    posterior_weights = 4
    hessian_vector_product = 5

def isa() -> str: ...
def isas() -> list[str]: ...
def posterior_float32(
    output: Output,
    out: int,
    x: int,
    v: int,
    means: int,
    log_weights: int,
    alpha: int,
    alpha_per_row: bool,
    std: int,
    std_per_row: bool,
    n: int,
    k: int,
    d: int,
    threads: int,
    /,
) -> None: ...
def flow_float32(
    x: int,
    out: int,
    means: int,
    log_weights: int,
    center: int,
    ends: int,
    ends_per_row: bool,
    tableau: int,
    stages: int,
    steps: int,
    h: int,
    coefficients: int,
    rtol: float,
    atol: float,
    max_steps: int,
    status: int,
    attempts: int,
    evaluations: int,
    n: int,
    k: int,
    d: int,
    form: Form,
    threads: int,
    /,
) -> None: ...
def diameter_float32(means: int, k: int, d: int, threads: int, /) -> float: ...
def exp2_float32(x: int, out: int, n: int, /) -> None: ...
def block_float32() -> int: ...
def posterior_float64(
    output: Output,
    out: int,
    x: int,
    v: int,
    means: int,
    log_weights: int,
    alpha: int,
    alpha_per_row: bool,
    std: int,
    std_per_row: bool,
    n: int,
    k: int,
    d: int,
    threads: int,
    /,
) -> None: ...
def flow_float64(
    x: int,
    out: int,
    means: int,
    log_weights: int,
    center: int,
    ends: int,
    ends_per_row: bool,
    tableau: int,
    stages: int,
    steps: int,
    h: int,
    coefficients: int,
    rtol: float,
    atol: float,
    max_steps: int,
    status: int,
    attempts: int,
    evaluations: int,
    n: int,
    k: int,
    d: int,
    form: Form,
    threads: int,
    /,
) -> None: ...
def diameter_float64(means: int, k: int, d: int, threads: int, /) -> float: ...
def exp2_float64(x: int, out: int, n: int, /) -> None: ...
def block_float64() -> int: ...
