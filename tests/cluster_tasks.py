"""Tasks for test_ray.py, in a module that Ray's processes can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def fragile(request: str) -> str:
    """Answer, raise, die always, or die unless the file that is named is there."""
    what, _, path = request.partition(" ")
    if what == "raise":
        raise ZeroDivisionError("asked for")
    if what == "die" or (what == "first" and not Path(path).exists()):
        if path:
            Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return request.upper()
