"""Peak memory: the compiled operations hold their outputs and a workspace, nothing of size n k."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORKSPACE = 64 * 2**20  # bytes beyond inputs and outputs

SCRIPT = """
import resource, torch, flowfast
from flowfast import GaussianMixture, OUProcess

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

n, k, d = 100_000, 2_000, 4  # n k float32 numbers are 800 MB
mixture, process = GaussianMixture.random(k, d, std=0.5), OUProcess(5.0)
x = process.marginal(mixture, 0.1).sample(n)
flowfast.score(x[:1000], mixture), flowfast.flow_map(x[:1000], mixture, process, 0.1, 0.09)
before = peak()
{call}
print(peak() - before)
"""

CALLS = {
    "score": "out = flowfast.score(x, mixture)",
    "log_density": "out = flowfast.log_density(x, mixture)",
    "covariance_trace": "out = flowfast.covariance_trace(x, mixture)",
    "hessian_vector_product": "out = flowfast.hessian_vector_product(x, x, mixture)",
    "flow_map": "out = flowfast.flow_map(x, mixture, process, 0.1, 0.09, steps=1)",
    "diameter": "out = GaussianMixture.random(20_000, 4).diameter()",  # k k float32 numbers are 1.6 GB
}


@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name: str) -> None:
    script = SCRIPT.format(call=CALLS[name])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= WORKSPACE
