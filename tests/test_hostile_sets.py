"""Teacher sets written by someone who means harm: refused in one sentence, at once, in little memory, from within.

All cases run in one process that watches itself: processor time and memory of each, and every file that Python opens.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowfast import GaussianMixture, OUProcess, generate_dataset
from flowfast.dataset.receipts import receipt_name
from flowfast.dataset.shards import shard_name

# 0.1 s of processor time and 64 MiB are what a case may take. Other programs that share the core's caches and its other
# thread slow it down, tracing every allocation does too: hence the factor.
SECONDS, BUSY, MEBIBYTES = 0.1, 10, 64
GIBIBYTE = 2**30

Harm = Callable[[Path], None]


EVIL = b"cposix\nsystem\n(S'touch unpickled'\ntR."  # whoever unpickles these bytes runs the command


def raw(name: str, content: bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(content) and None


def fields(name: str, **changed: Any) -> Harm:
    """Other values for some fields of a JSON file; ... removes one."""

    def harm(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changed}
        (folder / name).write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))

    return harm


def text(name: str, old: str, new: str) -> Harm:
    def harm(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new, 1))

    return harm


def sparse(name: str, size: int = GIBIBYTE) -> Harm:
    return lambda folder: os.truncate(folder / name, size)


def outside(name: str) -> Harm:
    """A link to a file or folder of the same contents outside the set."""

    def harm(folder: Path) -> None:
        place = folder.parent / f"outside-{folder.name}"
        (folder / name).rename(place)
        (folder / name).symlink_to(place)

    return harm


def fifo(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return harm


def directory(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return harm


def header(**tensors: Any) -> Harm:
    """Another header for a shard, of the same length if it can be."""

    def harm(folder: Path) -> None:
        path = folder / shard_name(1)
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        changed = json.dumps({**json.loads(content[8 : 8 + size]), **tensors}, separators=(",", ":")).encode()
        changed = changed.ljust(size)
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])

    return harm


PLAN, RECEIPT, MANIFEST = "plan.json", receipt_name(1), "manifest.json"
HUGE = "1" + "0" * 4_000
DEEP = b"[" * 100_000
NESTED = b'{"a":' * 40_000
MANY = b"{" + b",".join(b'"%d":0' % i for i in range(25_000)) + b',"24999":0}'
TENSOR = {"dtype": "F32", "shape": [4, 2]}

PLANS: dict[str, Harm] = {
    "empty": raw(PLAN, b""),
    "cut off": raw(PLAN, b'{"rows": '),
    "list": raw(PLAN, b"[]"),
    "number": raw(PLAN, b"1e400"),
    "null": raw(PLAN, b"null"),
    "invalid UTF-8": raw(PLAN, b'{"rows": "\xff\xfe"}'),
    "byte order mark": raw(PLAN, b"\xef\xbb\xbf{}"),
    "UTF-16": raw(PLAN, "{}".encode("utf-16")),
    "NUL": raw(PLAN, b'{"rows": 10}\0'),
    "deep lists": raw(PLAN, DEEP),
    "deep objects": raw(PLAN, NESTED),
    "many names, one twice": raw(PLAN, MANY),
    "a pickle": raw(PLAN, EVIL),
    "a gibibyte": sparse(PLAN),
    "300 KiB of blanks": raw(PLAN, b" " * 300_000 + b"{}"),
    "a field twice": text(PLAN, '"rows": 10,', '"rows": 10, "rows": 11,'),
    "a nested field twice": text(PLAN, '"beta": 5.0', '"beta": 5.0, "beta": 5.0'),
    "version 1": fields(PLAN, version=1),
    "version 3": fields(PLAN, version=3),
    "version as text": fields(PLAN, version="2"),
    "version as float": fields(PLAN, version=2.0),
    "version true": fields(PLAN, version=True),
    "another format": fields(PLAN, format="flowfast student"),
    "no seed": fields(PLAN, seed=...),
    "unknown field": fields(PLAN, shards=["../../../etc/passwd"]),
    "mixture with a path": fields(PLAN, mixture="../../../../../etc/passwd"),
    "mixture with NUL": fields(PLAN, mixture="0" * 31 + "\0"),
    "mixture a number": fields(PLAN, mixture=12),
    "another mixture": fields(PLAN, mixture="0" * 32),
    "no rows": fields(PLAN, rows=0),
    "negative rows": fields(PLAN, rows=-10),
    "half rows": fields(PLAN, rows=9.5),
    "rows as text": fields(PLAN, rows="10"),
    "rows true": fields(PLAN, rows=True),
    "rows null": fields(PLAN, rows=None),
    "rows beyond all disks": fields(PLAN, rows=2**62),
    "a huge number of rows": text(PLAN, '"rows": 10', f'"rows": {HUGE}'),
    "more digits than Python reads": text(PLAN, '"rows": 10', f'"rows": {"9" * 200_000}'),
    "1e12 shards": fields(PLAN, rows=10**12, rows_per_shard=1),
    "as many shards as allowed": fields(PLAN, rows=2**24, rows_per_shard=1),
    "no rows per shard": fields(PLAN, rows_per_shard=0),
    "negative rows per shard": fields(PLAN, rows_per_shard=-4),
    "overlapping shards": fields(PLAN, rows_per_shard=3),
    "negative seed": fields(PLAN, seed=-1),
    "a seed of 65 bits": fields(PLAN, seed=2**64),
    "half precision": fields(PLAN, dtype="float16"),
    "objects": fields(PLAN, dtype="object"),
    "NaN": fields(PLAN, times=[1.0, float("nan"), 0.0]),
    "infinity": fields(PLAN, times=[float("inf"), 0.3, 0.0]),
    "infinity in disguise": text(PLAN, "1.0,", "1e999,"),
    "increasing times": fields(PLAN, times=[0.0, 0.3, 1.0]),
    "equal times": fields(PLAN, times=[1.0, 0.3, 0.3, 0.0]),
    "negative times": fields(PLAN, times=[1.0, 0.3, -0.1]),
    "20,000 times": fields(PLAN, times=[round(1 - i * 1e-5, 5) for i in range(20_000)]),
    "one time": fields(PLAN, times=[1.0]),
    "times as text": fields(PLAN, times=["1.0", "0.3", "0.0"]),
    "times within times": fields(PLAN, times=[[1.0], [0.3], [0.0]]),
    "no times": fields(PLAN, times=None),
    "two laws of times": fields(PLAN, random_times={"law": "decreasing", "t_from": [0.5, 1.0], "t_to": [0.0, 0.4]}),
    "a law that is code": fields(
        PLAN, times=None, random_times={"law": "__import__('os')", "t_from": [0.5, 1.0], "t_to": [0.0, 0.4]}
    ),
    "a law without a range": fields(PLAN, times=None, random_times={"law": "decreasing", "t_from": [0.5, 1.0]}),
    "process with a path": fields(PLAN, process="../process.json"),
    "process with another field": fields(PLAN, process={"beta": 5.0, "file": "/etc/passwd"}),
    "negative beta": fields(PLAN, process={"beta": -5.0}),
    "a table of unequal columns": fields(PLAN, process={"beta": [[0.0, 1.0], [5.0]]}),
    "a table that ends too early": fields(PLAN, process={"beta": [[0.0, 0.5], [5.0, 5.0]]}),
    "kernel a text": fields(PLAN, kernel="cpp"),
    "kernel without version": fields(PLAN, kernel={"backend": "cpp", "device": "avx2"}),
    "kernel with a path": fields(PLAN, kernel={"backend": "../../lib.so", "device": "avx2", "version": "0.1.0"}),
    "kernel of 100 kB": fields(PLAN, kernel={"backend": "cpp", "device": "x" * 100_000, "version": "0.1.0"}),
    "plan a link": outside(PLAN),
    "plan a folder": directory(PLAN),
    "plan a pipe": fifo(PLAN),
    "plan a device": lambda folder: (folder / PLAN).unlink() or (folder / PLAN).symlink_to("/dev/zero"),
    "mixture a link": outside("mixture.safetensors"),
    "mixture a pipe": fifo("mixture.safetensors"),
    "mixture a pickle": raw("mixture.safetensors", EVIL),
    "shards a link": outside("shards"),
    "receipts a link": outside("receipts"),
}

RECEIPTS: dict[str, Harm] = {
    "receipt empty": raw(RECEIPT, b""),
    "receipt of another shard": fields(RECEIPT, shard=0),
    "receipt of another plan": fields(RECEIPT, plan="0" * 32),
    "receipt of overlapping rows": fields(RECEIPT, rows=8),
    "receipt of half rows": fields(RECEIPT, rows=4.0),
    "receipt of negative bytes": fields(RECEIPT, bytes=-1),
    "receipt of 2^70 bytes": fields(RECEIPT, bytes=2**70),
    "receipt of huge bytes": text(RECEIPT, '"bytes": ', f'"bytes": {HUGE}'),
    "receipt of NaN bytes": fields(RECEIPT, bytes=float("nan")),
    "receipt with a field twice": text(RECEIPT, '"shard": 1', '"shard": 0, "shard": 1'),
    "receipt with a file": fields(RECEIPT, file="../../../etc/passwd"),
    "receipt with NUL": fields(RECEIPT, sha256="0" * 63 + "\0"),
    "receipt with a short sum": fields(RECEIPT, sha256="0" * 63),
    "receipt with a list": fields(RECEIPT, sha256=["0"] * 64),
    "receipt deep": raw(RECEIPT, DEEP[:4_000]),
    "receipt a gibibyte": sparse(RECEIPT),
    "receipt a pickle": raw(RECEIPT, EVIL),
    "receipt a link": outside(RECEIPT),
    "receipt a pipe": fifo(RECEIPT),
    "receipt a folder": directory(RECEIPT),
    "shard a link": outside(shard_name(1)),
    "shard a pipe": fifo(shard_name(1)),
    "shard a pickle": raw(shard_name(1), EVIL),
    "shard a gibibyte": sparse(shard_name(1)),
    "header of 2^63 bytes": lambda f: (f / shard_name(1)).write_bytes(
        (2**63).to_bytes(8, "little") + (f / shard_name(1)).read_bytes()[8:]
    ) and None,
    "tensors that overlap": header(x_to={**TENSOR, "data_offsets": [16, 48]}),
    "a tensor beyond the end": header(x_to={**TENSOR, "data_offsets": [48, 2**40]}),
    "a tensor of 2^60 rows": header(x_to={**TENSOR, "shape": [2**60, 2]}),
    "a tensor of another type": header(x_to={**TENSOR, "dtype": "F16"}),
}  # fmt: skip

MANIFESTS: dict[str, Harm] = {
    "manifest empty": raw(MANIFEST, b""),
    "manifest with paths": raw(MANIFEST, b'{"plan": "", "shards": [["../../../etc/passwd", 4, 400, ""]]}'),
    "manifest of 1e12 shards": raw(MANIFEST, b'{"plan": "", "shards": 1000000000000}'),
    "manifest with overlapping shards": raw(MANIFEST, b'{"plan": "", "shards": [[0, 8, 9, ""], [0, 8, 9, ""]]}'),
    "manifest with NaN": raw(MANIFEST, b'{"plan": NaN, "shards": []}'),
    "manifest with NUL": raw(MANIFEST, b'{"plan": "\0", "shards": []}'),
    "manifest with a field twice": raw(MANIFEST, b'{"plan": "", "plan": "", "shards": []}'),
    "manifest with invalid UTF-8": raw(MANIFEST, b"\xff\xfe"),
    "manifest deep": raw(MANIFEST, DEEP),
    "manifest with a huge number": raw(MANIFEST, b'{"plan": ' + HUGE.encode() + b"}"),
    "manifest of another version": raw(MANIFEST, b'{"version": 9}'),
    "manifest a pickle": raw(MANIFEST, EVIL),
    "manifest a gibibyte": sparse(MANIFEST),
    "manifest a link": outside(MANIFEST),
    "manifest a pipe": fifo(MANIFEST),
    "manifest a folder": directory(MANIFEST),
    "a name of huge digits": raw("receipts/shard-99999999999.json", b"{}"),
    "a name of more digits": raw(f"receipts/shard-{'9' * 100}.json", b"{}"),
    "a name of other digits": raw("receipts/shard-0000000\u0661.json", b"{}"),
    "a name that is no UTF-8": lambda f: os.close(os.open(os.fsencode(f / "shards") + b"/\xff\n", os.O_CREAT)),
    "a shard beyond the last": raw(shard_name(3), b"{}"),
    "an unfinished file that is a link": lambda f: (f / "shards" / ".x.part").symlink_to("/etc/passwd"),
}

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
CASES = {**PLANS, **RECEIPTS, **MANIFESTS}

WATCH = """
import json, os, resource, sys, time, tracemalloc
from pathlib import Path
import torch
import flowfast.dataset.shard_files as shard_files
from flowfast import TeacherDataset, verify_dataset

def load(folder):
    return float(TeacherDataset(folder).pairs(torch.arange(10))[0].sum())

def outcome(call, folder):
    try:
        return call(folder)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

def verify(folder):
    return [finding.what for finding in verify_dataset(folder, workers=1).findings]

opened, told, native = [], [], shard_files.safe_open
def watched_open(path, **more):  # opens in Rust, where no audit hook looks
    opened.append(os.fspath(path))
    return native(path, **more)
shard_files.safe_open = watched_open
WATCHED = ("pickle.", "exec", "compile", "import", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "socket.", "ctypes.", "marshal.", "urllib.")
def audit(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else repr(arguments[0]))
    elif event.startswith(WATCHED):
        told.append(f"{event} {arguments!r:.200}")

root, good = Path(sys.argv[1]), sys.argv[2]
assert isinstance(load(good), float) and verify(good) == []  # whatever is imported late is imported now
sys.addaudithook(audit)
found = {}
for folder in sorted(root.iterdir()):
    if folder.name.startswith("outside-"):
        continue
    opened.clear(), told.clear()
    begin = time.process_time()
    loaded, verified = outcome(load, folder), outcome(verify, folder)
    seconds = time.process_time() - begin
    audited = {"opened": list(opened), "told": list(told)}
    tracemalloc.start()
    outcome(load, folder), outcome(verify, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found[folder.name] = {"loaded": loaded, "verified": verified, "seconds": seconds, "peak": peak,
                          "resident": resident, **audited}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile").resolve()


@pytest.fixture(scope="module")
def found(root) -> dict[str, dict[str, Any]]:
    good = root / "good"
    mixture = GaussianMixture.random(3, 2, std=0.5, seed=0)
    generate_dataset(mixture, OUProcess(5.0), (1.0, 0.3, 0.0), 10, good, rows_per_shard=4, seed=7, backend="reference")
    (root / "cases").mkdir()
    for number, harm in enumerate(CASES.values()):
        harm(shutil.copytree(good, root / "cases" / f"{number:03d}"))
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(root / "cases"), str(good)],
        cwd=root, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout).values(), strict=True))


def test_there_are_cases_enough():
    assert len(PLANS) >= 60 and len(CASES) >= 120


@pytest.mark.parametrize("name", CASES)
def test_refused_at_once_in_little_memory_from_within(found, root, name):
    case = found[name]
    if name in MANIFESTS:  # nothing but verify looks at them
        assert isinstance(case["loaded"], float)
        assert case["verified"] and set(case["verified"]) <= {"manifest", "unexpected", "unfinished"}
    else:
        assert str(case["loaded"]).startswith("ValueError: ")
        assert "\n" not in case["loaded"] and len(case["loaded"]) < 600
        assert case["verified"] and (isinstance(case["verified"], list) or case["verified"].startswith("ValueError: "))
    assert case["seconds"] < SECONDS * BUSY
    assert case["peak"] < MEBIBYTES * 2**20
    folder = root / "cases" / f"{list(CASES).index(name):03d}"
    assert all(Path(os.path.realpath(path)).is_relative_to(folder) for path in case["opened"])
    assert case["told"] == []


def test_memory_stays_and_nothing_ran(found, root):
    resident = [case["resident"] for case in found.values()]  # KiB; the most so far
    assert resident[-1] - resident[0] < MEBIBYTES * 2**10
    assert not (root / "unpickled").exists()


def test_the_watch_sees_what_it_watches_for(root):
    """A hook that misses everything would pass all of the above."""
    code = WATCH.split("root, good =")[0] + (
        "sys.addaudithook(audit)\n"
        "open(sys.argv[1]).read(), os.listdir('/'), os.system('true')\n"
        "sys.audit('pickle.find_class', 'posix', 'getcwd')\n"  # what unpickling raises
        "exec('1')\n"
        "print(json.dumps([opened, told]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "/etc/passwd"],
        cwd=root, env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened, told = json.loads(done.stdout)
    assert opened == ["/etc/passwd", "/"]
    assert {said.split()[0] for said in told} >= {"os.system", "pickle.find_class", "exec"}


@pytest.mark.parametrize("name", ["shards", "receipts"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    def generate() -> None:
        mixture = GaussianMixture.random(3, 2, std=0.5, seed=0)
        generate_dataset(mixture, OUProcess(5.0), (1.0, 0.0), 4, tmp_path / "set", backend="reference")

    generate()
    outside(name)(tmp_path / "set")
    (place,) = tmp_path.glob("outside-*")
    for path in place.iterdir():
        path.unlink()
    with pytest.raises(OSError, match="is a link: the folders of a teacher set must be its own"):
        generate()
    assert not list(place.iterdir())


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        mixture = GaussianMixture.random(3, 2, std=0.5, seed=0)
        generate_dataset(mixture, OUProcess(5.0), (1.0, 0.0), 4, tmp_path / "set", backend="reference")
    finally:
        os.umask(before)
    for path in (tmp_path / "set").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
