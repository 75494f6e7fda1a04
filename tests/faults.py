"""Runs of `generate_dataset` in processes of their own that meet disk faults, signals and death on demand.

A `Stage` is one process started with native/faults.cpp in front of the C library; it imports torch once and forks a
child for each run, so that a run costs milliseconds. Nothing in flowfast knows of this.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import fault_store as fault_store  # its disk:// must be known to worker processes, too
import torch

from flowfast import GaussianMixture, OUProcess, cli, generate_dataset
from flowfast.dataset import engines
from flowfast.dataset.addresses import open_store
from flowfast.dataset.generate import carry_out, make_plan
from flowfast.rank import Rank

TESTS = Path(__file__).parent
LIBRARY = "FLOWFAST_TEST_FAULTS"
KINDS = ("any", "open", "write", "file sync", "folder sync", "rename", "link", "remove", "make folder", "open to read")
ACTIONS = ("nothing", "fail", "fail from here", "die before", "die after", "half", "half then die", "stop")


@dataclass(frozen=True)
class Rule:
    """What happens at the n-th call of a kind (from 1) on a path that holds `where`, counted over all processes.

    "fail from here" and "die before" stay: later calls meet them, too.

    Attributes:
        kind: one of KINDS, "any" for all calls that change files. action: one of ACTIONS. error: errno of "fail".
    """

    kind: str
    where: str
    nth: int = 0
    action: str = "nothing"
    error: int = errno.EIO

    def plain(self) -> list[Any]:
        """Kind, nth, action, error and where, as native/faults.cpp takes them."""
        return [KINDS.index(self.kind), self.nth, ACTIONS.index(self.action), self.error, self.where]


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code, negative after a signal. error: type and message of what it raised, and what else it or its
            workers wrote to stderr; "" if nothing.
        calls: those that its rule matched, kind and path, in order.
    """

    code: int
    error: str
    calls: list[tuple[str, str]]


class Stage:
    """The process that forks runs; use `stage()`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self._open: set[int] = set()  # runs that nobody has waited for

    def start(self, path: str | Path, rule: Rule | None = None, workers_rule: Rule | None = None, **call: Any) -> int:
        """Fork a run of `generate(path, **call)` in a session of its own; its process id.

        `rule` is for the run and what it forks, `workers_rule` for the processes that it starts otherwise.
        """
        call["workers_rule"] = workers_rule.plain() if workers_rule else []
        armed = (rule or Rule("any", "")).plain()
        run = int(self._ask({"do": "start", "call": {"path": str(path), **call}, "rule": armed}))
        self._open.add(run)
        return run

    def wait(self, run: int) -> Outcome:
        """Wait for a run to end."""
        code, error, log = self._ask({"do": "wait", "run": run})
        self._open.discard(run)
        calls = [line.split(" ", 1) for line in log.splitlines()]
        return Outcome(code, error, [(KINDS[int(kind)], path) for kind, path in calls])

    def run(self, path: str | Path, rule: Rule | None = None, **call: Any) -> Outcome:
        """Start a run and wait for it."""
        return self.wait(self.start(path, rule, **call))

    def clear(self) -> None:
        """Kill what a test that failed has left running."""
        for pid in (pid for run in self._open for pid in session(run)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def stage(folder: Path, within: Sequence[str] = ()) -> Iterator[Stage]:
    """Compile the faults into `folder` and start a stage, by the command `within` that ends by becoming its arguments.

    Raises:
        FileNotFoundError: no C++ compiler.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: set CXX")
    library = folder / "faults.so"
    source = TESTS / "native" / "faults.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), LIBRARY: str(library), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path])
    command = [*within, sys.executable, "-W", "ignore", __file__, str(folder)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        made = Stage(process)
        try:
            yield made
        finally:
            made.clear()
            process.kill()


class Process(NamedTuple):
    """What the kernel says of a process; its state is "R" while it runs, "S" while it waits, "T" when it is stopped."""

    state: str
    parent: int


def session(leader: int) -> dict[int, Process]:
    """The processes in the session of `leader`, by their ids; zombies left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == leader and state != "Z":
            found[int(stat.parent.name)] = Process(state, int(parent))
    return found


def stopped(run: int) -> bool:
    """Whether a run has been stopped by a signal or a rule."""
    here = session(run).get(run)  # it is not there before it has made its session
    return here is not None and here.state == "T"


def until(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until something is true; it failing to be so in time fails the test."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, hidden ones too, by its path from there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def generate(
    path: str | Path, *, rows: int = 12, rows_per_shard: int = 4, seed: int = 7, rank: Sequence[int] = (), **call: Any
) -> None:
    """The small set of these tests: 3 components in 4 dimensions, 2 segments, 3 shards; `path` may be an address."""
    mixture = GaussianMixture.random(3, 4, half_width=1.0, std=0.2, seed=1)
    process, times = OUProcess(5.0), (1.0, 0.5, 0.0)
    if rank or "://" in str(path):
        plan = make_plan(mixture, process, times, rows, rows_per_shard, seed=seed)
        carry_out(plan, mixture, open_store(path), rank=Rank(*rank), **call)
    else:
        generate_dataset(mixture, process, times, rows, path, seed=seed, rows_per_shard=rows_per_shard, **call)


def _serve(folder: Path) -> None:
    """Answer the questions of a Stage until its end of the pipe is closed."""
    torch.set_num_threads(1)
    faults = ctypes.CDLL(os.environ[LIBRARY])
    faults.faults_log.restype = ctypes.c_char_p
    generate(folder / "warm")  # what a first call loads is loaded before forking
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "start":
            kind, nth, action, error, where = asked["rule"]
            faults.faults_arm(kind, where.encode(), ctypes.c_long(nth), action, error)
            answer: Any = os.fork() or _run(folder, asked["call"])
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(asked["run"], 0)[1])
            said = folder / f"{asked['run']}.stderr"  # it may have died before it made that
            answer = code, said.read_text() if said.exists() else "", faults.faults_log().decode()
        print(json.dumps(answer), flush=True)


def _run(folder: Path, call: dict[str, Any]) -> NoReturn:
    """Generate, or run a command; say what was raised, and leave without the parent's clean-up."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that a shell starts with & ignore it
    said = os.open(folder / f"{os.getpid()}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)  # the answers go through the old standard output
    os.dup2(said, 2)
    os.environ["FLOWFAST_TEST_RULE"] = " ".join(map(str, call.pop("workers_rule")))
    engines._START = call.pop("start", "spawn")
    multiprocessing.set_forkserver_preload(["faults"])
    engines._HANDS = call.pop("hands", 1)  # with one, shards are written in turn, and calls come in one order
    torch.set_num_threads(call.pop("threads", 1))
    code: Any = 1
    try:
        code = cli.main(call["command"]) if "command" in call else generate(**call) or 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
