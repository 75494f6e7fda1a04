"""Verifying, repairing and exporting teacher sets: every kind of damage is found, and repair restores the bytes."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowfast import GaussianMixture, OUProcess, TeacherDataset, export_dataset, generate_dataset, verify_dataset
from flowfast.cli import main
from flowfast.dataset import repair
from flowfast.dataset.identity import read_mixture
from flowfast.dataset.maker import read_plan
from flowfast.dataset.plan import PLAN, Plan, RandomTimes
from flowfast.dataset.receipts import Receipt, receipt_name
from flowfast.dataset.scan import Scan, examine
from flowfast.dataset.shards import shard_name
from flowfast.dataset.store import LocalStore

ROWS, PER_SHARD, D = 1_000, 400, 2  # shards of more than two pages of 4,096 bytes
TIMES = (1.0, 0.3, 0.0)


def generate(path: Path, times=TIMES, **more) -> Path:
    mixture = GaussianMixture.random(3, D, std=0.5, seed=0)
    settings = {"rows_per_shard": PER_SHARD, "seed": 7, "backend": "reference"} | more
    return generate_dataset(mixture, OUProcess(5.0), times, settings.pop("rows", ROWS), path, **settings).folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("whole") / "set")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A set of the same shape with another seed."""
    return generate(tmp_path_factory.mktemp("other") / "set", seed=8)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "set")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def look(folder: Path, shard: int, content: bytes):
    """What verify would say if `content` were the file of this shard; the function that verify calls."""
    store = LocalStore(folder)
    plan = read_plan(store)
    receipt = Receipt.parse((folder / receipt_name(shard)).read_bytes(), plan, shard)
    return examine(io.BytesIO(content), len(content), plan, D, receipt)


def test_a_whole_set_is_whole(whole):
    before = contents(whole)
    found = verify_dataset(whole)
    assert (found.ok, found.findings, found.shards, found.rows) == (True, (), 3, ROWS)
    assert found.bytes == sum(len(content) for name, content in before.items() if name.startswith("shards/"))
    assert found.plan == read_plan(LocalStore(whole)).digest()
    assert verify_dataset(whole, workers=1) == found
    assert contents(whole) == before


def test_every_flipped_bit_of_a_header_is_found(whole):
    content = (whole / shard_name(2)).read_bytes()
    assert look(whole, 2, content) is None
    size = 8 + int.from_bytes(content[:8], "little")
    assert size % 64 == 0 and size < 1_000
    for bit in range(8 * size):
        found = look(whole, 2, flip(content, bit))
        assert found is not None and found.what in ("plan", "shard", "sha256") and found.expected != found.actual, bit


def test_flipped_bits_of_the_numbers_are_found(whole):
    draw, shards = random.Random(0), [(whole / shard_name(shard)).read_bytes() for shard in range(3)]
    for _ in range(2_000):
        shard = draw.randrange(3)
        size = 8 + int.from_bytes(shards[shard][:8], "little")
        found = look(whole, shard, flip(shards[shard], draw.randrange(8 * size, 8 * len(shards[shard]))))
        assert found is not None and (found.path, found.what) == (shard_name(shard), "sha256")


def test_flipped_bits_are_found_in_files_too(folder):
    draw, before = random.Random(1), contents(folder)
    for _ in range(20):
        name = shard_name(draw.randrange(3))
        (folder / name).write_bytes(flip(before[name], draw.randrange(8 * len(before[name]))))
        (found,) = verify_dataset(folder).findings
        assert found.path == name
        (folder / name).write_bytes(before[name])
    assert verify_dataset(folder).ok


def test_every_flipped_bit_of_a_receipt_is_found(folder):
    store = LocalStore(folder)
    scan, path = Scan(store, read_plan(store), workers=1), folder / receipt_name(2)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        path.write_bytes(flip(content, bit))
        assert scan.check(2)[0] is not None, bit


def test_every_flipped_bit_of_a_plan_makes_another_plan_or_none(whole):
    content = (whole / PLAN).read_bytes()
    digest = Plan.parse(content).digest()
    for bit in range(8 * len(content)):
        try:
            assert Plan.parse(flip(content, bit)).digest() != digest, bit  # which every receipt contradicts
        except ValueError:
            continue


def test_every_flipped_bit_of_the_mixture_is_found_or_harmless(folder):
    store = LocalStore(folder)
    plan, path = read_plan(store), folder / "mixture.safetensors"
    content, mixture = path.read_bytes(), read_mixture(store, plan)
    refused = 0
    for bit in range(8 * len(content)):
        path.write_bytes(flip(content, bit))
        try:
            found = read_mixture(store, plan)
        except ValueError:
            refused += 1
            continue
        assert torch.equal(found.means, mixture.means) and torch.equal(found.log_weights, mixture.log_weights), bit
    assert refused >= 8 * (len(content) - int.from_bytes(content[:8], "little") - 8)  # every number's bits


def _cut(size: int):
    def harm(folder: Path, other: Path) -> None:
        content = (folder / shard_name(1)).read_bytes()
        (folder / shard_name(1)).write_bytes(content[:size])

    return harm


def _zero_page(page: int):
    def harm(folder: Path, other: Path) -> None:
        content = bytearray((folder / shard_name(1)).read_bytes())
        content[4_096 * page : 4_096 * (page + 1)] = bytes(len(content[4_096 * page : 4_096 * (page + 1)]))
        (folder / shard_name(1)).write_bytes(content)

    return harm


def _swap(folder: Path, other: Path) -> None:
    a, b = (folder / shard_name(shard) for shard in (0, 1))
    a.rename(folder / "held")
    b.rename(a)
    (folder / "held").rename(b)


def _swap_receipts_too(folder: Path, other: Path) -> None:
    _swap(folder, other)
    a, b = (folder / receipt_name(shard) for shard in (0, 1))
    a.rename(folder / "held")
    b.rename(a)
    (folder / "held").rename(b)


def _foreign(folder: Path, other: Path) -> None:
    shutil.copy(other / shard_name(1), folder / shard_name(1))


def _foreign_with_receipt(folder: Path, other: Path) -> None:
    _foreign(folder, other)
    shutil.copy(other / receipt_name(1), folder / receipt_name(1))


def _foreign_with_a_receipt_that_lies(folder: Path, other: Path) -> None:
    _foreign_with_receipt(folder, other)
    receipt = json.loads((folder / receipt_name(1)).read_text())
    plan = json.loads((folder / receipt_name(0)).read_text())["plan"]
    (folder / receipt_name(1)).write_text(json.dumps({**receipt, "plan": plan}))


def _append(folder: Path, other: Path) -> None:
    with (folder / shard_name(1)).open("ab") as stream:
        stream.write(b"\0")


def _sum_of_the_receipt(folder: Path, other: Path) -> None:
    receipt = json.loads((folder / receipt_name(1)).read_text())
    (folder / receipt_name(1)).write_text(json.dumps({**receipt, "sha256": "0" * 64}))


def _size_in_the_receipt(folder: Path, other: Path) -> None:
    receipt = json.loads((folder / receipt_name(1)).read_text())
    (folder / receipt_name(1)).write_text(json.dumps({**receipt, "bytes": 17}))


def _remove(*names: str):
    def harm(folder: Path, other: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return harm


def _link(folder: Path, other: Path) -> None:
    (folder / shard_name(1)).unlink()
    (folder / shard_name(1)).symlink_to(other / shard_name(1))


def _part(folder: Path, other: Path) -> None:
    (folder / "shards" / ".shard-00000001.safetensors.0-1-2.part").write_bytes(b"half")


def _manifest(folder: Path, other: Path) -> None:
    (folder / "manifest.json").write_text('{"plan": "", "shards": []}')


S1, R1 = shard_name(1), receipt_name(1)
HARMS = {
    "empty": (_cut(0), {S1: "size"}),
    "half a header": (_cut(7), {S1: "size"}),
    "a header": (_cut(384), {S1: "size"}),
    "last byte cut off": (_cut(-1), {S1: "size"}),
    "a byte more": (_append, {S1: "size"}),
    "first page zeroed": (_zero_page(0), {S1: "sha256"}),
    "second page zeroed": (_zero_page(1), {S1: "sha256"}),
    "swapped": (_swap, {shard_name(0): "shard", S1: "shard"}),
    "swapped with receipts": (_swap_receipts_too, {receipt_name(0): "receipt", R1: "receipt"}),
    "foreign": (_foreign, {S1: "plan"}),
    "foreign with receipt": (_foreign_with_receipt, {R1: "receipt"}),
    "foreign with a receipt that lies": (_foreign_with_a_receipt_that_lies, {S1: "plan"}),
    "receipt with another sum": (_sum_of_the_receipt, {S1: "sha256"}),
    "receipt with another size": (_size_in_the_receipt, {R1: "receipt"}),
    "no shard": (_remove(S1), {S1: "missing"}),
    "no receipt": (_remove(R1), {R1: "missing"}),
    "neither": (_remove(S1, R1, shard_name(2), receipt_name(2)), {S1: "missing"}),
    "a link": (_link, {S1: "missing"}),
    "unfinished file": (_part, {"shards/.shard-00000001.safetensors.0-1-2.part": "unfinished"}),
    "another manifest": (_manifest, {"manifest.json": "manifest"}),
    "no manifest": (_remove("manifest.json"), {"manifest.json": "manifest"}),
}


@pytest.mark.parametrize("name", HARMS)
def test_damage_is_found_and_repaired_to_the_same_bytes(folder, other, name):
    harm, expected = HARMS[name]
    before = contents(folder)
    harm(folder, other)
    harmed = contents(folder)
    found = verify_dataset(folder)
    # A foreign shard with a receipt that lies is known by its header alone, for its sum is that of the receipt.
    assert {finding.path: finding.what for finding in found.findings} == expected
    assert all(finding.expected != finding.actual for finding in found.findings)
    assert contents(folder) == harmed  # verifying changes nothing
    repaired = verify_dataset(folder, repair=True)
    if name == "foreign with a receipt that lies":  # two witnesses agree against the plan: nothing is replaced
        assert not repaired.ok and "nothing was replaced" in repaired.notes[0]
        (folder / R1).unlink()
        repaired = verify_dataset(folder, repair=True)
    assert (repaired.ok, repaired.notes) == (True, ())
    assert contents(folder) == before
    assert not (folder / S1).is_symlink()


def test_sizes_and_sums_are_named(folder):
    content = (folder / S1).read_bytes()
    (folder / S1).write_bytes(content[:-5])
    (found,) = verify_dataset(folder).findings
    assert str(found) == f"{S1}: size: expected {len(content)} bytes; found {len(content) - 5} bytes"
    (folder / S1).write_bytes(flip(content, 8 * len(content) - 1))
    (found,) = verify_dataset(folder).findings
    assert found.expected == json.loads((folder / R1).read_text())["sha256"] != found.actual


def test_a_run_of_shards_that_were_never_made_is_one_finding(folder):
    _remove(S1, R1, shard_name(2), receipt_name(2))(folder, folder)
    (found,) = verify_dataset(folder).findings
    assert found.expected == "shards 1 to 2 with their receipts"


def test_files_that_do_not_belong_are_reported_and_left(folder):
    for name in ("notes.txt", "shard-00000003.safetensors", "shard-1.safetensors", "shard-00000001.json"):
        (folder / "shards" / name).write_text("mine")
    found = verify_dataset(folder, repair=True)
    assert {finding.what for finding in found.findings} == {"unexpected"} and len(found.findings) == 4
    assert (folder / "shards" / "notes.txt").read_text() == "mine"


def test_another_kernel_replaces_only_what_the_receipt_vouches_for(folder, monkeypatch):
    before = contents(folder)

    def elsewhere(plan: Plan) -> None:
        raise ValueError("teacher set: the plan's kernel is not this machine's")

    monkeypatch.setattr(repair, "check_kernel", elsewhere)
    (folder / S1).write_bytes(flip(before[S1], 9_000))
    found = verify_dataset(folder, repair=True)
    assert found.ok and "kernel is not this machine's" in found.notes[0] and contents(folder) == before

    make = repair.make_shard

    def otherwise(*arguments):
        shard = make(*arguments)
        shard.tensors["x_to"].add_(1)
        return shard

    monkeypatch.setattr(repair, "make_shard", otherwise)
    for harm in (_cut(-1), _remove(S1)):  # with a receipt that says otherwise
        harm(folder, folder)
        harmed = contents(folder)
        found = verify_dataset(folder, repair=True)
        assert not found.ok and "shard 1: made again" in found.notes[1] and "its receipt says" in found.notes[1]
        assert contents(folder) == harmed
    (folder / R1).unlink()  # without any witness
    found = verify_dataset(folder, repair=True)
    assert not found.ok and "it has no receipt: nothing was replaced" in found.notes[1]


def test_a_receipt_alone_is_restored_where_the_file_vouches_for_it(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(repair, "check_kernel", lambda plan: (_ for _ in ()).throw(ValueError("elsewhere")))
    for harm in (_remove(R1), _sum_of_the_receipt):
        harm(folder, folder)
        assert verify_dataset(folder, repair=True).ok
        assert contents(folder) == before


def test_a_plan_that_no_file_knows_is_not_followed(folder):
    before = contents(folder)
    plan = json.loads((folder / PLAN).read_text())
    (folder / PLAN).write_text(json.dumps({**plan, "seed": 8}))
    assert len(verify_dataset(folder).findings) >= 3
    with pytest.raises(ValueError, match="no shard or receipt in .* is of plan .*: plan.json itself"):
        verify_dataset(folder, repair=True)
    (folder / PLAN).write_bytes(before[PLAN])
    assert contents(folder) == before


def test_a_lost_mixture_cannot_be_repaired(folder):
    (folder / "mixture.safetensors").unlink()
    (folder / S1).write_bytes(b"")
    found = verify_dataset(folder, repair=True)
    assert {finding.what for finding in found.findings} == {"mixture", "size"}
    assert found.notes == (
        "shards are made from the mixture: restore mixture.safetensors first, it cannot be made again",
    )


def test_repaired_files_follow_the_umask(folder):
    before = os.umask(0o027)
    try:
        (folder / S1).unlink()
        (folder / "manifest.json").unlink()
        assert verify_dataset(folder, repair=True).ok
    finally:
        os.umask(before)
    for name in (S1, R1, "manifest.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o640


def test_progress_and_wrong_calls(folder, tmp_path):
    seen = []
    verify_dataset(folder, progress=lambda done, shards: seen.append((done, shards)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="workers must be at least 1"):
        verify_dataset(folder, workers=0)
    with pytest.raises(ValueError, match="is no folder"):
        verify_dataset(tmp_path / "nothing")


def test_verify_on_the_command_line(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    assert "1,000 rows in 3 shards as they were written" in capsys.readouterr().out
    (folder / S1).write_bytes(b"")
    assert main(["verify", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["findings"][0]["path"]) == (False, S1)
    assert main(["verify", str(folder)]) == 1
    assert f"{S1}: size: expected" in capsys.readouterr().out
    assert main(["verify", str(folder), "--repair"]) == 0
    assert f"repaired {S1}: size" in capsys.readouterr().out
    (folder / "manifest.json").unlink()
    assert main(["verify", str(folder), "--rebuild"]) == 0
    assert main(["verify", str(folder.parent)]) == 2
    assert "plan.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_exports_hold_the_rows(whole, tmp_path, kind):
    pq = pytest.importorskip("pyarrow.parquet")
    folder = whole if kind == "grid" else generate(tmp_path / "set", RandomTimes((0.5, 1.0), (0.0, 0.4)), rows=30)
    data, seen = TeacherDataset(folder), []
    x_from, x_to, where = (tensor.numpy() for tensor in data.pairs(torch.arange(len(data))))
    arrays = export_dataset(folder, "npy", out=tmp_path / "arrays")
    last = "segment" if kind == "grid" else "t"
    assert sorted(path.name for path in arrays.iterdir()) == sorted(["x_from.npy", "x_to.npy", f"{last}.npy"])
    for name, values in (("x_from", x_from), ("x_to", x_to), (last, where)):
        assert np.array_equal(np.load(arrays / f"{name}.npy", mmap_mode="r"), values)
    file = export_dataset(folder, out=tmp_path / "rows.parquet", progress=lambda done, rows: seen.append((done, rows)))
    table = pq.read_table(file)
    for name, values in (("x_from", x_from), ("x_to", x_to)):
        assert np.array_equal(np.array(table[name].to_pylist(), values.dtype), values)
    columns = ["segment"] if kind == "grid" else ["t_from", "t_to"]
    assert np.array_equal(np.stack([table[name].to_numpy() for name in columns], 1).squeeze(), where)
    assert json.loads(table.schema.metadata[b"flowfast"]) == data.plan.to_dict()
    assert seen[-1] == (len(data), len(data))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_exports_refuse_damage_and_places_that_are_taken(folder, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="out: .*taken exists"):
        export_dataset(folder, "npy", out=tmp_path / "taken")
    with pytest.raises(ValueError, match="format must be one of parquet, npy; got 'csv'"):
        export_dataset(folder, "csv")
    content = (folder / S1).read_bytes()
    (folder / S1).write_bytes(flip(content, 8 * len(content) - 1))
    for kind in ("npy", "parquet"):
        with pytest.raises(ValueError, match="shard-00000001.safetensors: sha256.*verify --repair"):
            export_dataset(folder, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "taken"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flowfast\[export\]'"):
        export_dataset(folder)


def test_export_on_the_command_line(whole, tmp_path, capsys):
    assert main(["export", str(whole), "--format", "npy", "--out", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == ROWS
    assert main(["export", str(whole), "--format", "npy", "--out", str(tmp_path / "a")]) == 2
    assert main(["export", str(tmp_path), "--format", "npy"]) == 2
    assert "--out: " in (said := capsys.readouterr().err) and "FOLDER: " in said
