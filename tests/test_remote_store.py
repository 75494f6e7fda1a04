"""Teacher sets on remote stores: the same bytes as on a disk, and what is left when the store goes away."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fault_store import FaultyMemory, faulty_memory
from faults import digests, generate

from flowfast import (
    GaussianMixture,
    OUProcess,
    TeacherDataset,
    cli,
    export_dataset,
    generate_dataset,
    verify_dataset,
)
from flowfast.dataset.addresses import open_store
from flowfast.dataset.remote_store import RemoteStore
from flowfast.dataset.store import LocalStore, StorageError, Store, is_part, write_file

ADDRESS = "faulty://bucket/set"


@pytest.fixture
def memory() -> Iterator[type[FaultyMemory]]:
    with faulty_memory() as made:
        yield made


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path, memory: type[FaultyMemory]) -> Store:
    return LocalStore(tmp_path / "set") if request.param == "local" else RemoteStore(ADDRESS)


def _stored(memory: type[FaultyMemory], address: str = ADDRESS) -> dict[str, str]:
    """SHA-256 of every object under the address."""
    root = address.removeprefix("faulty:/") + "/"
    return {
        name.removeprefix(root): hashlib.sha256(file.getvalue()).hexdigest()
        for name, file in memory.store.items()
        if name.startswith(root)
    }


def test_stores_keep_one_contract(store: Store) -> None:
    assert store.size("shards/a") is None and list(store.list("shards")) == []
    part = store.open_temporary("shards/a")
    part[1].write(b"abc")
    assert store.size("shards/a") is None
    assert is_part(part[0]) and part[0].startswith("shards/.a.") and not store.is_abandoned(part[0])
    store.commit(part, "shards/a")
    assert store.size("shards/a") == 3 and store.read_bytes("shards/a", 3) == b"abc"
    assert list(store.list("shards")) == ["shards/a"] and store.size("shards") is None
    write_file(store, "shards/a", b"new")
    assert store.read_bytes("shards/a", 10) == b"new"
    with pytest.raises(FileExistsError):
        write_file(store, "shards/a", b"newer", replace=False)
    assert list(store.list("shards")) == ["shards/a"] and store.read_bytes("shards/a", 10) == b"new"
    write_file(store, "b", b"", replace=False)
    assert sorted(store.list("")) == ["b", "shards"] and store.size("b") == 0
    with pytest.raises(ValueError, match="at most 2 bytes; it holds 3"):
        store.read_bytes("shards/a", 2)
    with pytest.raises(FileNotFoundError):
        store.read_bytes("shards/b", 2)
    store.discard(store.open_temporary("shards/c"))
    for _ in range(2):
        store.remove("shards/a")
    assert list(store.list("shards")) == []


def test_a_remote_set_has_the_bytes_of_a_local_one(memory: type[FaultyMemory], tmp_path: Path) -> None:
    generate(tmp_path / "set")
    generate(ADDRESS)
    assert _stored(memory) == digests(tmp_path / "set")
    generate(ADDRESS)  # finds it complete


@pytest.mark.parametrize("lasting", [True, False], ids=["lasting", "once"])
def test_a_store_that_goes_away_at_every_call(memory: type[FaultyMemory], lasting: bool) -> None:
    generate(ADDRESS)
    whole, calls = _stored(memory), memory.seen
    assert calls > 3 * len(whole), "an upload, writes, a copy and a removal for every file"
    memory.lasting = lasting
    for nth in range(1, calls + 1):
        address = f"faulty://bucket/{lasting}-{nth}"
        memory.seen, memory.fail_at = 0, nth
        with pytest.raises(StorageError, match="the store went away"):
            generate(address)
        left = {name: digest for name, digest in _stored(memory, address).items() if not is_part(name)}
        assert left.items() <= whole.items(), "an object under its final name is whole"
        memory.fail_at = 0
        generate(address)
        assert _stored(memory, address) == whole


def test_a_failed_question_is_not_taken_for_a_no(memory: type[FaultyMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own exists() answers False when the connection fails; finished shards would be made again."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("the key has expired")

    generate(ADDRESS)
    before = _stored(memory)
    monkeypatch.setattr(FaultyMemory, "info", refused)
    with pytest.raises(OSError, match="the key has expired"):
        generate(ADDRESS)
    assert _stored(memory) == before


def test_errors_of_a_stores_own_kind_are_typed(memory: type[FaultyMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        """As cloud packages have them: no OSError."""

    def refused(*_: Any, **__: Any) -> None:
        raise Refused("403")

    for name in ("_open", "cp_file", "ls"):
        with monkeypatch.context() as patch:
            patch.setattr(FaultyMemory, name, refused)
            with pytest.raises(StorageError, match="Refused: 403"):
                generate(f"{ADDRESS}-{name}")


def test_addresses_of_local_files_are_local(tmp_path: Path) -> None:
    for address in (f"file://{tmp_path}/set", f"local://{tmp_path}/set", f"{tmp_path}/set", tmp_path / "set"):
        store = open_store(address)
        assert isinstance(store, LocalStore) and store.location == f"{tmp_path}/set"


def test_the_command_line_takes_an_address(
    memory: type[FaultyMemory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GaussianMixture.random(3, 4, std=0.2, seed=1).save(tmp_path / "mixture.safetensors")
    command = f"generate --means {tmp_path}/mixture.safetensors --segments 2 --rows 12 --rows-per-shard 4 --workers 1"
    assert cli.main([*command.split(), "--out", f"{tmp_path}/set"]) == 0
    assert cli.main([*command.split(), "--out", ADDRESS]) == 0
    assert f"0 missing: {ADDRESS}" in capsys.readouterr().out
    assert _stored(memory) == digests(tmp_path / "set")
    with pytest.raises(ValueError, match="path must be a local folder"):
        generate_dataset(GaussianMixture.random(3, 4), OUProcess(5.0), (1.0, 0.0), 12, ADDRESS)


def test_what_reads_a_set_says_how_to_copy_it(
    memory: type[FaultyMemory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    generate(ADDRESS)
    for read in (TeacherDataset, verify_dataset, export_dataset):
        with pytest.raises(ValueError, match="set is not on this machine: copy it and read set: python -c") as caught:
            read(ADDRESS)
    for call in (["verify", ADDRESS], ["export", ADDRESS], ["distill", "--data", ADDRESS, "--out", "job"]):
        assert cli.main(call) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(caught.value) in said
    assert not list(tmp_path.iterdir())
    found = re.search('python -c "(.*)"$', str(caught.value))
    assert found is not None
    exec(found[1])
    assert verify_dataset("set").ok and verify_dataset(f"file://{tmp_path}/set").folder == tmp_path / "set"
    assert _stored(memory) == digests(tmp_path / "set")


def test_addresses_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="path.*nowhere"):
        RemoteStore("nowhere://bucket/set")
    with pytest.raises(ValueError, match="choose another name"):
        RemoteStore("memory://sets[1]")

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ModuleNotFoundError, match="Install s3fs"):
        RemoteStore("s3://bucket/set")
