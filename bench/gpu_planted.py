"""A kernel with a mistake, which the memory checker must find: it writes past the end of what it is given."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _past_the_end(out_ptr: Any, SIZE: tl.constexpr) -> None:
    tl.store(out_ptr + SIZE + tl.arange(0, 32), 1.0)


def main() -> None:
    """Write the 128 bytes that follow a tensor of 64 KiB."""
    out = torch.zeros(16_384, device="cuda")
    _past_the_end[(1,)](out, SIZE=out.numel())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
