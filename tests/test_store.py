"""The run directory: files are complete or absent, damaged files are named, a full disk loses nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eacmoe_lightning.models import fingerprint as fingerprints
from eacmoe_lightning.models.fingerprint import fingerprint
from eacmoe_lightning.run.directory import RunDirectory
from eacmoe_lightning.run.files import StoreError, read_tensors, write_atomically, write_json, write_tensors
from eacmoe_lightning.run.lock import RunLock


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b.codes": torch.arange(600, dtype=torch.uint8).view(20, 30),
        "a.weight": torch.linspace(-1, 1, 300).view(3, 100).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).T,
    }


# --- one file


@pytest.mark.parametrize("failure", [OSError("no"), RuntimeError("no"), KeyboardInterrupt(), ValueError("no")])
def test_the_old_file_stays_when_the_writer_fails(tmp_path, failure):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def write(partial):
        partial.write_text("half of the ne")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]  # no partial file is left


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_are_as_readable_as_other_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "weights.safetensors", tensors())
        write_json(tmp_path / "config.json", {})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_write_replaces_the_old_file(tmp_path):
    for text in ("old and longer", "new"):
        write_atomically(tmp_path / "file", lambda partial, text=text: partial.write_text(text))
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_tensors_and_note_are_read_as_written(tmp_path):
    path, note = tmp_path / "x.safetensors", {"bits": {"a": 3}, "list": [1, 2.5, None]}
    write_tensors(path, tensors(), note)
    read, read_note = read_tensors(path)
    assert read_note == note and read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_the_order_of_names_does_not_change_a_file_s_bytes(tmp_path):
    note = {"a": 1, "b": [2, 3]}
    write_tensors(tmp_path / "1", tensors(), note)
    write_tensors(tmp_path / "2", dict(reversed(tensors().items())), dict(reversed(note.items())))
    write_json(tmp_path / "3", {"x": 1, "y": 2})
    write_json(tmp_path / "4", {"y": 2, "x": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "3").read_bytes() == (tmp_path / "4").read_bytes()


@pytest.mark.parametrize("size", [0, 5, 100, 800, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    path = tmp_path / "block.safetensors"
    write_tensors(path, tensors())
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(StoreError) as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "--ckpt_path auto" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StoreError, match="gone.safetensors"):
        read_tensors(tmp_path / "gone.safetensors")


def test_every_flipped_bit_is_detected(tmp_path):
    """Wherever it is in the file: length, header, checksum, note or tensors."""
    path = tmp_path / "block.safetensors"
    write_tensors(path, tensors(), {"stats": {"error": 0.25}})
    whole = path.read_bytes()
    for offset in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        with pytest.raises(StoreError) as error:
            read_tensors(path)
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    read_tensors(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="foreign.safetensors"):
        read_tensors(tmp_path / "foreign.safetensors")


# --- a full disk: files of the process are limited to 100,000 bytes

FULL = """
import resource, signal, sys, torch
from pathlib import Path
from eacmoe_lightning.job.checkpoint_io import AtomicCheckpointIO
from eacmoe_lightning.run.files import StoreError, write_atomically, write_tensors
def codes(n):
    return {"a": torch.full((n,), 7, dtype=torch.uint8)}
writers = {
    "tensors": lambda path, n: write_tensors(path, codes(n)),
    "text": lambda path, n: write_atomically(path, lambda partial: partial.write_text("x" * n)),
    "checkpoint": lambda path, n: AtomicCheckpointIO().save_checkpoint(codes(n), path),
}
paths = {kind: Path(sys.argv[1]) / kind for kind in writers}
before = {}
for kind, path in paths.items():
    writers[kind](path, 1000)
    before[kind] = path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for kind, path in paths.items():
    try:
        writers[kind](path, 1_000_000)
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
    assert path.read_bytes() == before[kind], "the old file is gone"
"""


@pytest.mark.slow
def test_a_full_disk_is_reported_and_keeps_existing_files(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "tensors", "text"]
    messages = result.stdout.splitlines()
    for kind, line in zip(("tensors", "text", "checkpoint"), messages, strict=True):
        assert line.startswith(f"FullDisk no room for {tmp_path / kind}") and "Free some space" in line


# --- what an original is recognized by


@pytest.fixture
def weights(tmp_path) -> Path:
    """A directory that looks like a model's, with 3 ranges of bytes that are hashed apart."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 12)
    return folder


@pytest.mark.parametrize("position", [0, 1023, 1024, 1500, 3071])
def test_a_changed_byte_anywhere_in_the_weights_gives_another_fingerprint(position, weights, monkeypatch):
    monkeypatch.setattr(fingerprints, "RANGE", 1024)
    before, path = fingerprint(str(weights)), weights / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    changed = fingerprint(str(weights))
    content[position] ^= 1
    path.write_bytes(content)
    assert changed != before == fingerprint(str(weights))


def test_the_fingerprint_is_of_all_that_a_model_is_loaded_from(weights, tmp_path):
    seen = {fingerprint(str(weights))}
    index = b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    for name, content in (
        ("config.json", b'{"auto_map": {"AutoConfig": "code/modeling_own.Config"}}'),
        ("modeling_own.py", b"x = 1"),
        ("hf_quant_config.json", b"{}"),
        ("code/modeling_own.py", b"x = 1"),
        ("code/consts.py", b"y = 1"),
        ("model.safetensors", None),  # removed
        ("pytorch_model.bin", b"1"),
        ("pytorch_model.bin", b"2"),
        ("part.safetensors", b"1"),  # taken before .bin
        ("model-00001-of-00001.safetensors", b"1"),
        ("model.safetensors.index.json", index),
        ("model-00001-of-00001.safetensors", b"2"),
    ):
        (weights / name).parent.mkdir(exist_ok=True)
        (weights / name).unlink() if content is None else (weights / name).write_bytes(content)
        new = fingerprint(str(weights))
        assert new not in seen, name
        seen.add(new)
    for name in ("part.safetensors", "training_args.bin", "README.md"):
        (weights / name).write_bytes(b"not of the model")
    assert fingerprint(str(weights)) == new == fingerprint(str(shutil.copytree(weights, tmp_path / "copy")))


def test_a_fingerprint_is_computed_again_only_if_a_file_may_have_changed(weights, monkeypatch):
    computed = []
    ranges = fingerprints._sha_of_range
    monkeypatch.setattr(fingerprints, "_sha_of_range", lambda part: computed.append(part) or ranges(part))
    first = fingerprint(str(weights))
    fingerprint(str(weights))
    assert len(computed) == 4  # the files are too new to trust their times
    monkeypatch.setattr(fingerprints, "SETTLED", -1e9)
    assert fingerprint(str(weights)) == first and len(computed) == 6
    assert fingerprint(str(weights)) == first and len(computed) == 6
    path = weights / "model.safetensors"
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times does
    assert fingerprint(str(weights)) != first and len(computed) == 8


# --- one job in a directory


def test_a_second_job_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    code = "import sys, time; from pathlib import Path; from eacmoe_lightning.run.lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1])).take(); print('taken', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "taken\n"
        refusal = rf"process {holder.pid} on .* is at work in .*\(--output\): wait"
        with pytest.raises(ValueError, match=refusal):
            RunLock(tmp_path, "--output").take()
        with pytest.raises(ValueError, match=refusal):
            RunLock(tmp_path, "--output").refuse_if_taken()
    finally:
        holder.kill()
        holder.wait()
    RunLock(tmp_path).refuse_if_taken()
    with RunLock(tmp_path) as lock, pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        lock.take()  # changes nothing
        RunLock(tmp_path).take()
    assert not list(tmp_path.iterdir())
    with RunLock(tmp_path):
        pass


def test_looking_for_a_lock_creates_nothing(tmp_path):
    RunLock(tmp_path / "none").refuse_if_taken()
    assert not (tmp_path / "none").exists()


# --- claiming a directory


def test_an_empty_or_missing_directory_is_claimed(tmp_path):
    for path in (tmp_path, tmp_path / "new" / "run"):
        RunDirectory(path).start({"bits": [3]}, resume=False)
        assert json.loads((path / "run.json").read_text()) == {"bits": [3]}


def test_the_same_run_continues_only_with_resume(tmp_path):
    RunDirectory(tmp_path).start({"bits": (3, 2), "seed": 0}, resume=False)
    RunDirectory(tmp_path).start({"seed": 0, "bits": (3, 2)}, resume=True)
    with pytest.raises(ValueError, match="already holds this run: add --ckpt_path auto"):
        RunDirectory(tmp_path).start({"bits": (3, 2), "seed": 0}, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_is_refused_with_both_values(tmp_path, resume):
    RunDirectory(tmp_path).start({"model.bits": [3], "data.seed": 0}, resume=False)
    before = (tmp_path / "run.json").read_bytes()
    for other in ({"model.bits": [2], "data.seed": 0}, {"model.bits": [2], "data.seed": 1, "new": 1}):
        with pytest.raises(ValueError, match=r"model.bits was \[3\] and is now \[2\]|data.seed was 0 and is now 1"):
            RunDirectory(tmp_path).start(other, resume)
    with pytest.raises(ValueError, match="data.seed was 0 and is now None"):
        RunDirectory(tmp_path).start({"model.bits": [3]}, resume)
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("resume", [False, True])
def test_content_decides_not_its_path(resume, tmp_path):
    """A moved original or text is the same; another content under the same path is not."""
    run = {
        "model.name_or_path": "/a",
        "model.fingerprint": "1",
        "data.calibration": "/t",
        "data.calibration_digest": "2",
    }
    RunDirectory(tmp_path).start(run, resume=False)
    moved = run | {"model.name_or_path": "/b", "data.calibration": "/u"}
    RunDirectory(tmp_path).start(moved, resume=True)
    for change, message in (
        ({"model.fingerprint": "3"}, r"holds a run, but the weights or the config.json in /a \(--model.name_or_path\)"),
        ({"data.calibration_digest": "3"}, r"the text of /t \(--data.calibration\) or its tokens \(the model's"),
        (moved | {"model.fingerprint": "3"}, "model.name_or_path was '/a' and is now '/b', which holds something else"),
        (moved | {"data.calibration_digest": "3"}, "data.calibration was '/t' and is now '/u'"),
        ({"data.calibration_digest": "3", "seed": 1}, "seed was None and is now 1"),  # which explains the digest
    ):
        with pytest.raises(ValueError, match=message):
            RunDirectory(tmp_path).start(run | change, resume)


def test_resuming_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run to continue in .*--trainer.default_root_dir"):
        RunDirectory(tmp_path / "none").start({"bits": 3}, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_directory_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("all there is")
    with pytest.raises(ValueError, match="thesis.tex"):
        RunDirectory(tmp_path).start({"bits": 3}, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_with_lightning_s_files_can_be_claimed(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "checkpoints").mkdir()
    RunDirectory(tmp_path).start({"bits": 3}, resume=False)


def test_a_damaged_manifest_is_reported(tmp_path):
    (tmp_path / "run.json").write_text('{"bits": ')
    with pytest.raises(StoreError, match="run.json is missing, truncated or corrupt"):
        RunDirectory(tmp_path).start({"bits": 3}, resume=True)


def test_costs_survive_a_line_truncated_by_a_kill(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.read_costs() == []
    run.add_cost(0, "observe", {"seconds": 1.5, "peak_bytes": 100})
    with open(run.costs, "a") as file:
        file.write('{"block": 0, "pha')
    run.add_cost(0, "experts", {"seconds": 2.0, "peak_bytes": 200})
    run.add_cost(1, "observe", {"seconds": 3.0, "peak_bytes": 300})
    assert [row["seconds"] for row in run.read_costs()] == [1.5, 2.0, 3.0]
