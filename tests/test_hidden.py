"""Hidden states in files: reading returns what was written; damage, other windows and full disks are reported."""

import json
import os
from pathlib import Path

import pytest
import torch

from eacmoe_lightning.run.files import StoreError
from eacmoe_lightning.run.hidden import HiddenFile, HiddenWriter, Shelf
from eacmoe_lightning.run.memory import peak_memory, reset_peak_memory

NOTE = {"windows": [3, 5]}


def written(path: Path, dtype=torch.float32) -> tuple[HiddenWriter, torch.Tensor]:
    rows = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    writer = HiddenWriter(path, dtype)
    for piece in rows.split(2):
        writer.append(piece)
    return writer, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_as_written(dtype, tmp_path):
    writer, rows = written(tmp_path / "block_001.x", dtype)
    path = tmp_path / "block_001.x"
    for read in (writer.written, lambda: writer.finish(NOTE), lambda: HiddenFile.open(path, NOTE)):
        file = read()
        assert file.shape == (5, 4, 6) and len(file) == 5 and file.dtype == dtype
        assert torch.equal(file[:], rows) and torch.equal(file[1:3], rows[1:3])
        chosen = torch.tensor([4, 0, 4])
        assert torch.equal(file[chosen], rows[chosen]) and file[chosen[:0]].shape == (0, 4, 6)
        assert torch.equal(file.flatten(0, 1)[torch.tensor([19, 2])], rows.flatten(0, 1)[[19, 2]])


def test_rows_may_be_read_in_another_dtype_than_they_are_stored_in(tmp_path):
    writer, rows = written(tmp_path / "x", torch.bfloat16)
    file = writer.written(torch.float32)
    for part, expected in (
        (file[1:3], rows[1:3]),
        (file.flatten(0, 1)[:7], rows.flatten(0, 1)[:7]),
        (file[:0], rows[:0]),
    ):
        assert part.dtype == torch.float32 and torch.equal(part, expected.float())


def test_reading_returns_a_copy(tmp_path):
    file = written(tmp_path / "x")[0].written()
    file[:2].zero_()
    assert (file[:2] != 0).all()


def test_a_file_without_its_json_is_not_finished(tmp_path):
    path = tmp_path / "x"
    writer, _ = written(path)
    assert not path.exists() and not HiddenFile.is_finished(path)
    writer.finish(NOTE)
    assert HiddenFile.is_finished(path) and sorted(os.listdir(tmp_path)) == ["x", "x.json"]
    (tmp_path / "x.json").unlink()
    assert not HiddenFile.is_finished(path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "note", "json"])
def test_damage_is_reported(damage, tmp_path):
    path = tmp_path / "x"
    written(path)[0].finish(NOTE)
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        content[17] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        os.truncate(path, 100)
    elif damage == "note":
        (tmp_path / "x.json").write_text(json.dumps(json.loads((tmp_path / "x.json").read_text()) | {"note": {}}))
    else:
        (tmp_path / "x.json").write_text("{")
    with pytest.raises(StoreError, match="--ckpt_path auto"):
        HiddenFile.open(path, NOTE)


def test_a_full_disk_is_reported():
    """Writes to /dev/full fail as on a full disk."""
    writer = HiddenWriter.__new__(HiddenWriter)
    writer.__init__(Path(os.environ.get("TMPDIR", "/tmp")) / f"full_{os.getpid()}", torch.float32)
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(StoreError, match="no room for"):
        writer.append(torch.ones(1, 2, 3))
    assert not writer.partial.exists()


def test_memory_holds_only_the_rows_in_use(tmp_path):
    """Writes and reads 192 MB in pieces of 2 MB."""
    reset_peak_memory()
    before = peak_memory()
    writer = HiddenWriter(tmp_path / "x", torch.float32)
    for i in range(96):
        writer.append(torch.full((1, 512, 1024), float(i)))
    file = writer.written()
    for i in range(96):
        assert file[i : i + 1].max() == i
    assert peak_memory() - before < 64 << 20


def test_a_shelf_works_as_a_dict_and_leaves_no_files(tmp_path):
    with Shelf.opened(tmp_path / "shelf") as shelf:
        for i in range(3):
            shelf[i, "x"] = torch.full((2, 3), float(i))
        shelf[1, "x"] = shelf[1, "x"].half() + 5
        shelf[0, "x_hat"] = torch.ones(4)
        assert len(shelf) == 4 and len(os.listdir(tmp_path / "shelf")) == 4
        assert torch.equal(shelf[1, "x"], torch.full((2, 3), 6.0).half()) and shelf[2, "x"].sum() == 12
        del shelf[2, "x"]
        assert (2, "x") not in shelf
    assert not (tmp_path / "shelf").exists()
