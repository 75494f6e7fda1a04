"""Who makes the missing shards of a set: this process, or a pool of processes on this machine."""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from flowfast.dataset.addresses import open_store
from flowfast.dataset.maker import Maker
from flowfast.dataset.receipts import Receipt, sweep
from flowfast.dataset.store import StorageError, Store

Tell = Callable[[int], None]  # of rows made since the last call; negative when rows are lost with their worker

TRIES = 3  # of a shard whose workers die
_HANDS = 8  # threads that hash and write, at most: each holds a shard in memory
_PATIENCE = 3.0  # seconds for a worker to end when it is told to
_START = "spawn"  # how processes start: a fork would inherit torch's threads half-way through something
_END = b""  # instead of a number: there are no more shards


@dataclass(frozen=True)
class SetAside:
    """A shard that could not be made, and why."""

    shard: int
    reason: str


def run_here(store: Store, shards: Iterable[int], tell: Tell) -> list[SetAside]:
    """Make shards in this process, with torch's threads; while one is computed, others are hashed and written.

    Returns:
        Shards with a trajectory that failed; all others are made.

    Raises:
        StorageError: files cannot be written.
    """
    maker, failed, kept = Maker(store), [], collections.deque[Future[Receipt]]()
    most = min(torch.get_num_threads(), _HANDS)
    with ThreadPoolExecutor(most) as hands:
        for shard in shards:
            if len(kept) == most:
                kept.popleft().result()
            try:
                kept.append(hands.submit(maker.compute(shard, tell)))
            except RuntimeError as error:
                failed.append(SetAside(shard, str(error)))
        for each in kept:
            each.result()
    return failed


def run_pool(store: Store, shards: Iterable[int], workers: int, tell: Tell) -> list[SetAside]:
    """Make shards in `workers` processes of one thread each; a shard whose worker dies is tried again.

    Returns:
        Shards that failed, or whose workers died three times; all others are made.

    Raises:
        StorageError: files cannot be written. RuntimeError: workers do not start.
    """
    pool = _Pool(store, iter(shards), tell)
    try:
        pool.run(workers)
        return pool.failed
    finally:
        pool.stop()
        sweep(store, complete=False)


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    shard: int | None = None
    rows: int = 0  # of its shard, told so far


class _Pool:
    def __init__(self, store: Store, shards: Iterator[int], tell: Tell) -> None:
        self.store, self.shards, self.tell = store, shards, tell
        self.again: collections.deque[int] = collections.deque()
        self.tries: collections.Counter[int] = collections.Counter()
        self.workers: list[_Worker] = []
        self.failed: list[SetAside] = []
        self.stillborn = 0

    def run(self, workers: int) -> None:
        for _ in range(workers):
            self.hire()
        while self.workers:
            for connection in wait([worker.connection for worker in self.workers]):
                worker = next(each for each in self.workers if each.connection is connection)
                try:
                    message = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):  # also in the middle of a message
                    self.bury(worker)
                else:
                    self.hear(worker, message)

    def next_shard(self) -> int | None:
        return self.again.popleft() if self.again else next(self.shards, None)

    def hire(self) -> None:
        """Start a process, if there is a shard left for it."""
        shard = self.next_shard()
        if shard is None:
            return
        context: Any = multiprocessing.get_context(_START)
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.store.location, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is noticed here
        worker = _Worker(process, ours)
        self.workers.append(worker)
        self.give(worker, shard)

    def give(self, worker: _Worker, shard: int) -> None:
        worker.shard, worker.rows = shard, 0
        self.send(worker, str(shard).encode())

    def send(self, worker: _Worker, message: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it is dead, which reading will show
            worker.connection.send_bytes(message)

    def hear(self, worker: _Worker, message: dict[str, str | int]) -> None:
        worker.ready, self.stillborn = True, 0
        if "rows" in message:
            worker.rows += int(message["rows"])
            self.tell(int(message["rows"]))
        elif "storage" in message:
            raise StorageError(str(message["storage"]))
        elif "wrong" in message:
            raise RuntimeError(f"a worker process failed: {message['wrong']}")
        elif "finished" in message or "failed" in message:
            if "failed" in message and worker.shard is not None:
                self.failed.append(SetAside(worker.shard, str(message["failed"])))
            shard = self.next_shard()
            if shard is None:
                self.send(worker, _END)
                self.workers.remove(worker)
                worker.process.join()
                worker.connection.close()
            else:
                self.give(worker, shard)

    def bury(self, worker: _Worker) -> None:
        """Try a dead worker's shard again, or set it aside, and start another worker."""
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        self.tell(-worker.rows)
        self.stillborn += not worker.ready
        said = f"its worker process ended with code {worker.process.exitcode}"
        if self.stillborn >= TRIES:
            raise RuntimeError(f"worker processes do not start: {said}")
        if worker.shard is not None:
            self.tries[worker.shard] += worker.ready  # before that it has not seen the shard
            if self.tries[worker.shard] < TRIES:
                self.again.append(worker.shard)
            else:
                self.failed.append(SetAside(worker.shard, f"{said}, {TRIES} times"))
        self.hire()

    def stop(self) -> None:
        """End the processes that are left, whatever they do."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(_PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _serve(location: str, connection: Connection) -> None:
    """A worker: numbers in, signs of life out; it ends with its coordinator."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the coordinator decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)

    def say(**message: str | int) -> None:
        connection.send_bytes(json.dumps(message).encode())

    try:
        maker = Maker(open_store(location))
        say(ready=1)
        while (message := connection.recv_bytes()) != _END:
            shard = int(message)
            try:
                maker.make(shard, lambda rows: say(rows=rows))
                say(finished=shard)
            except RuntimeError as error:
                say(failed=str(error))
    except (EOFError, ConnectionError):
        return
    except StorageError as error:
        say(storage=str(error))
    except Exception as error:
        say(wrong=f"{type(error).__name__}: {error}")
