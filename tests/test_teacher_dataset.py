"""Reading teacher sets: rows, segments, random times, shuffled batches for ranks and loader workers."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from flowfast import GaussianMixture, OUProcess, TeacherDataset, generate_dataset
from flowfast.dataset import batches
from flowfast.dataset.batches import _Order
from flowfast.dataset.plan import RandomTimes

ROWS, PER_SHARD, M, D = 50, 8, 3, 2
TIMES = (1.0, 0.3, 0.1, 0.0)


def generate(path: Path, times=TIMES, **more) -> TeacherDataset:
    mixture = GaussianMixture.random(3, D, std=0.5, seed=0)
    settings = {"rows_per_shard": PER_SHARD, "seed": 7, "backend": "reference"} | more
    return generate_dataset(mixture, OUProcess(5.0), times, ROWS, path, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("set") / "grid").folder


@pytest.fixture(scope="module")
def random_times(tmp_path_factory) -> Path:
    law = RandomTimes((0.5, 1.0), (0.0, 0.4))
    return generate(tmp_path_factory.mktemp("set") / "random", law, dtype=torch.float64).folder


def stored(folder: Path, *names: str) -> list[torch.Tensor]:
    """The set's columns as the official library reads them, shard after shard."""
    shards = [load_file(path) for path in sorted((folder / "shards").iterdir())]
    return [torch.cat([shard[name] for shard in shards]) for name in names]


def test_rows_are_those_of_the_shards(folder):
    data, (x_from, x_to, segment) = TeacherDataset(folder), stored(folder, "x_from", "x_to", "segment")
    assert (len(data), data.dim, data.dtype, data.n_segments) == (ROWS, D, torch.float32, M)
    assert data.times.tolist() == list(TIMES)
    rows = torch.tensor([49, 0, 7, 8, 8, 31, 0])
    for found, whole in zip(data.pairs(rows), (x_from, x_to, segment), strict=True):
        assert found.dtype == whole.dtype and torch.equal(found, whole[rows])
    for row in (0, 8, 49, -1, -50):
        for found, whole in zip(data[row], (x_from, x_to, segment), strict=True):
            assert torch.equal(found, whole[row])
    assert torch.equal(segment, (torch.arange(ROWS) % M).to(torch.int32))
    assert [tensor.shape for tensor in data.pairs(rows[:0])] == [(0, D), (0, D), (0,)]


def test_rows_with_random_times(random_times):
    data, (x_from, x_to, t) = TeacherDataset(random_times), stored(random_times, "x_from", "x_to", "t")
    assert (data.n_segments, data.times, data.pairs_per_segment, data.dtype) == (0, None, 0, torch.float64)
    rows = torch.tensor([9, 49, 1])
    for found, whole in zip(data.pairs(rows), (x_from, x_to, t), strict=True):
        assert torch.equal(found, whole[rows])
    assert torch.equal(data[48][2], t[48])
    with pytest.raises(ValueError, match="has random times and no segments"):
        data.pair(0, rows)


def test_pairs_of_a_segment(folder):
    data, (x_from, x_to) = TeacherDataset(folder), stored(folder, "x_from", "x_to")
    assert data.pairs_per_segment == 16  # 50 rows: two segments have one more
    index = torch.tensor([15, 0, 3])
    for segment in range(M):
        found = data.pair(segment, index)
        assert torch.equal(found[0], x_from[index * M + segment])
        assert torch.equal(found[1], x_to[index * M + segment])


def test_what_is_returned_is_a_copy(folder):
    data, rows = TeacherDataset(folder), torch.arange(10)
    before = data.pairs(rows)[0].clone()
    data.pairs(rows)[0].zero_()
    data[0][0].zero_()
    assert torch.equal(data.pairs(rows)[0], before)
    assert torch.equal(copy.copy(data).pairs(rows)[0], before)


def test_only_shards_that_are_needed_are_opened(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "set")
    data = TeacherDataset(there)
    damaged = there / "shards" / "shard-00000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert data.pairs(torch.arange(16))[0].shape == (16, D)
    with pytest.raises(ValueError, match="shard-00000002.safetensors cannot be used .it must hold .*verify --repair"):
        data.pairs(torch.arange(17))


@pytest.mark.parametrize("bit", [0, 40, 8 * 100 + 3])
def test_damaged_headers_are_refused(folder, tmp_path, bit):
    there = shutil.copytree(folder, tmp_path / "set")
    path = there / "shards" / "shard-00000000.safetensors"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its header is damaged or of another shard or set"):
        TeacherDataset(there)[0]


def test_incomplete_sets_are_refused(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "set")
    for shard in (3, 5):
        (there / "receipts" / f"shard-{shard:08d}.json").unlink()
    with pytest.raises(ValueError, match="incomplete, 2 of 7 shards are missing, first 3: call generate_dataset again"):
        TeacherDataset(there)


@pytest.mark.parametrize(("rows", "per_shard"), [(1, 1), (7, 8), (8, 8), (65, 8), (1000, 9), (1000, 64), (129, 1)])
def test_an_epoch_is_a_permutation(rows, per_shard):
    whole = [_Order(rows, per_shard, seed=3, epoch=epoch).rows(0, rows) for epoch in (0, 1)]
    for order in whole:
        assert torch.equal(order.sort().values, torch.arange(rows))
    if rows > 8:
        assert not torch.equal(*whole)
    for cut in (1, rows // 2):  # whatever the pieces
        order = _Order(rows, per_shard, seed=3, epoch=0)
        pieces = [order.rows(begin, min(begin + cut, rows)) for begin in range(0, rows, cut)] if cut else [whole[0]]
        assert torch.equal(torch.cat(pieces), whole[0])


def test_ranks_divide_an_epoch(folder):
    data = TeacherDataset(folder)
    alone = list(data.batches(4, seed=1).rows())
    assert len(alone) == len(data.batches(4, seed=1)) == 12
    assert len(torch.cat(alone).unique()) == 48
    for world in (2, 3, 5):
        shares = [list(data.batches(4, seed=1, rank=rank, world=world).rows()) for rank in range(world)]
        assert {len(share) for share in shares} == {12 // world}
        for rank, share in enumerate(shares):
            assert all(torch.equal(a, b) for a, b in zip(share, alone[rank::world], strict=False))
    assert not torch.equal(torch.cat(alone), torch.cat(list(data.batches(4, seed=2).rows())))
    assert not torch.equal(torch.cat(alone), torch.cat(list(data.batches(4, seed=1, epoch=1).rows())))


def test_batches_are_the_rows_they_name(folder):
    batches = TeacherDataset(folder).batches(6)
    (x_from,) = stored(folder, "x_from")
    for rows, batch in zip(batches.rows(), batches, strict=True):
        assert torch.equal(batch[0], x_from[rows])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # where there are less cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_loader_workers_change_nothing(folder, workers):
    batches = TeacherDataset(folder).batches(4, seed=5, epoch=2, rank=1, world=2)
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    found = [batch[0] for batch in loader]
    assert len(found) == len(loader) == 6
    assert all(torch.equal(a, b[0]) for a, b in zip(found, batches, strict=True))


def test_a_process_group_tells_the_rank(folder, monkeypatch):
    data = TeacherDataset(folder)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    expected = data.batches(4, rank=1, world=3)
    assert all(torch.equal(a, b) for a, b in zip(data.batches(4).rows(), expected.rows(), strict=True))


def test_as_an_ordinary_torch_data_set(folder):
    x_from, x_to, segment = next(iter(DataLoader(TeacherDataset(folder), batch_size=5)))
    whole = stored(folder, "x_from", "x_to", "segment")
    for found, column in zip((x_from, x_to, segment), whole, strict=True):
        assert torch.equal(found, column[:5])
    shuffled = DataLoader(TeacherDataset(folder), 10, shuffle=True, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([batch[0] for batch in shuffled])
    assert not torch.equal(rows, whole[0]) and torch.equal(rows.sort(0).values, whole[0].sort(0).values)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda d: d[50], IndexError, "row must be from 0 to 49; got 50"),
        (lambda d: d["a"], TypeError, "row must be an int; got str"),
        (lambda d: d[True], TypeError, "row must be an int; got bool"),
        (lambda d: d.pairs([1, 2]), TypeError, "rows must be an int64 tensor"),
        (lambda d: d.pairs(torch.tensor([0.5])), TypeError, "rows must be an int64 tensor"),
        (lambda d: d.pairs(torch.tensor([-1, 3])), ValueError, "rows must be from 0 to 49; got -1 to 3"),
        (lambda d: d.pair(3, torch.tensor([0])), ValueError, "segment must be from 0 to 2; got 3"),
        (lambda d: d.pair(0, torch.tensor([17])), ValueError, "index must be from 0 to 16; got 17"),
        (lambda d: d.pair(0, [1]), TypeError, "index must be an int64 tensor"),
        (lambda d: d.batches(0), ValueError, "batch_size must be at least 1; got 0"),
        (lambda d: d.batches(2.0), TypeError, "batch_size must be an int; got float"),
        (lambda d: d.batches(4, seed=-1), ValueError, "seed must be at least 0"),
        (lambda d: d.batches(4, rank=1), ValueError, "rank and world must be given together"),
        (lambda d: d.batches(4, rank=2, world=2), ValueError, "rank must be from 0 to world - 1 = 1; got 2"),
        (lambda d: d.batches(26, rank=0, world=2), ValueError, "batch_size must leave every rank a batch of the 50"),
    ],
)  # fmt: skip
def test_wrong_reads(folder, call, kind, says):
    with pytest.raises(kind, match=says):
        call(TeacherDataset(folder))


class _AtOnce:
    """An executor that does not wait."""

    def __init__(self, workers):
        assert workers == 1

    def submit(self, call, *arguments):
        call(*arguments)

    def shutdown(self, **how):
        assert how == {"wait": False, "cancel_futures": True}


@pytest.mark.parametrize(("worker", "workers"), [(0, 1), (0, 3), (2, 3)])
def test_the_next_window_is_read_ahead(folder, monkeypatch, worker, workers):
    """Every file once, in the order in which windows come, no earlier than the window before begins."""
    monkeypatch.setattr(batches, "ThreadPoolExecutor", _AtOnce)
    monkeypatch.setattr(batches, "WINDOW", 2)
    monkeypatch.setattr(batches, "_worker", lambda: (worker, workers))
    data, seen = TeacherDataset(folder), []
    monkeypatch.setattr(data, "read_ahead", seen.append)
    shards = _Order(ROWS, PER_SHARD, seed=1, epoch=0).shards
    windows = [shards(window)[worker::workers] for window in range(5)]
    assert windows[4] == [] and sorted(shards(0) + shards(1) + shards(2) + shards(3)) == list(range(7))
    epoch = data.batches(4, seed=1)
    for rows, _ in zip(epoch.rows(), epoch, strict=True):
        current = max(window for window in range(4) if set((rows // PER_SHARD).tolist()) & set(shards(window)))
        assert seen == [shard for window in windows[: current + 2] for shard in window]
    assert seen == [shard for window in windows for shard in window]


def test_reading_ahead_reads_a_file_whole_and_minds_no_harm(folder, tmp_path, monkeypatch):
    data, read, send = TeacherDataset(shutil.copytree(folder, tmp_path / "set")), [], os.sendfile
    path = data.folder / "shards" / "shard-00000002.safetensors"
    size = path.stat().st_size
    monkeypatch.setattr(os, "sendfile", lambda *where: read.append(send(*where)) or read[-1])
    data.read_ahead(2)
    assert sum(read) == size
    path.unlink()
    data.read_ahead(2)
    path.symlink_to("/dev/zero")  # a link is not followed: this one has no end
    data.read_ahead(2)
    assert sum(read) == size
