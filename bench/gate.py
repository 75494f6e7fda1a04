"""No speed without correctness: the tests of an operation run before it is timed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from bench import own
from bench.cases import SIZES, base

ROOT = Path(__file__).parents[1]
STORE = ROOT / "build" / "bench" / "green.json"
POINTWISE = ("tests/test_ops.py", "tests/test_accuracy.py")
TESTS = {
    "score": POINTWISE,
    "weights": POINTWISE,
    "flow": ("tests/test_flow.py",),
    "diameter": ("tests/test_cpp.py", "tests/test_mixture.py"),
}


def operations(name: str) -> tuple[str, ...]:
    """The operations that a case times."""
    return own.OPERATIONS[name] if name in own.NAMES else (SIZES[base(name)][0],)


def red(operations: set[str], *, reuse: bool = False) -> set[str]:
    """Operations whose tests fail; `reuse` trusts an earlier green run of the same sources, build and tests."""
    now = fingerprint()
    known = json.loads(STORE.read_text()) if reuse and STORE.exists() else {}
    green: set[str] = set(known.get("files", ())) if known.get("fingerprint") == now else set()
    failed: set[str] = set()
    for file in sorted({file for operation in operations for file in TESTS[operation]} - green):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:torchtyping", file]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(f"{file} is red:", *done.stdout.splitlines()[-8:], sep="\n", file=sys.stderr)
        (failed if done.returncode else green).add(file)
    STORE.parent.mkdir(parents=True, exist_ok=True)
    STORE.write_text(json.dumps({"fingerprint": now, "files": sorted(green)}))
    return {operation for operation in operations if failed & set(TESTS[operation])}


def fingerprint() -> str:
    """Changes with any line of the package, its kernels, the built extension or the tests."""
    digest = hashlib.sha256()
    for pattern in ("flowfast/**/*.py", "flowfast/_core*.so", "csrc/*", "tests/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
