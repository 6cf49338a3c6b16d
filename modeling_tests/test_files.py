"""Outputs are whole or absent, on disks that are full or cannot be written to."""

import errno
import json
import subprocess

import numpy as np
import pytest
import torch
from commands import COMMANDS, SLOW, execute
from kills import read
from PIL import Image
from safetensors.torch import save_file

from transformers_unicode2.files import NotWrittenError, explained, whole_file, whole_folder, write_file

# Disk sizes as shares of the final output; the work of a build takes more room than its result.
SHARES = {"codebook build": (2, 3)}


@pytest.mark.parametrize("command", [*COMMANDS[:5], *SLOW])
def test_a_full_disk_is_called_one_and_the_command_goes_on_once_there_is_room(command, inputs, wanted, small_disk):
    bytes_, size, _ = wanted(command)
    for share in SHARES.get(command, (0.5,)):
        disk = small_disk(int(share * size) // 4096 * 4096)
        code, said = execute(command, inputs[1][command], disk / "output")
        assert code == 2 and "disk is full" in said, said
        assert not list(disk.rglob("*.tmp")) and not (disk / "output" / "config.json").exists()
        small_disk(2**28, "remount,")
        assert execute(command, inputs[1][command], disk / "output") == (0, "")
        assert read(disk / "output") == bytes_
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("writer", ["bytes", "safetensors", "torch", "parquet", "pillow", "json"])
def test_whatever_a_library_raises_a_full_disk_is_called_one(writer, small_disk):
    import pyarrow as pa
    from pyarrow import parquet

    disk, many = small_disk(2**16), 2**18
    writers = {
        "bytes": lambda file: file.write_bytes(bytes(many)),
        "safetensors": lambda file: save_file({"x": torch.zeros(many)}, file),
        "torch": lambda file: torch.save(torch.zeros(many), file),
        "parquet": lambda file: parquet.write_table(pa.table({"x": np.random.default_rng(0).random(many)}), file),
        "pillow": lambda file: Image.fromarray(np.zeros((512, 512), np.uint8)).save(file, "BMP"),
        "json": lambda file: json.dump(list(range(many)), open(file, "w")),
    }
    (disk / "x").write_bytes(b"before")
    with pytest.raises(NotWrittenError, match="^The disk is full: .*; make room and run") as error:
        with whole_file(disk / "x") as file:
            writers[writer](file)
    assert error.value.errno == errno.ENOSPC and (disk / "x").read_bytes() == b"before"
    assert sorted(path.name for path in disk.iterdir()) == ["x"]


def test_an_output_that_is_a_mount_point_is_filled_too(small_disk, inputs, wanted):
    disk = small_disk(2**28)
    (disk / "lost+found").mkdir()
    assert execute("init", inputs[1]["init"], disk) == (0, "")
    (disk / "lost+found").rmdir()
    assert read(disk) == wanted("init")[0]


def test_files_can_be_read_by_whom_other_files_can(tmp_path):
    with whole_folder(tmp_path) as new:
        save_file({"x": torch.zeros(1)}, new / "x.safetensors")
    with whole_file(tmp_path / "y.safetensors") as file:
        save_file({"x": torch.zeros(1)}, file)
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1


def test_a_disk_that_cannot_be_written_to_is_named_and_what_is_finished_there_is_known(small_disk, inputs, capsys):
    disk = small_disk(2**28)
    assert execute("init", inputs[1]["init"], disk / "output") == (0, "")
    small_disk(2**28, "remount,ro,")
    with pytest.raises(NotWrittenError, match="could not be written .Read-only file system.; choose another place"):
        write_file(disk / "x", b"")
    code, said = execute("scenes", inputs[1]["scenes"], disk / "scenes")
    assert code == 2 and "scenes cannot be made (Read-only file system); choose another --output" in said
    assert execute("init", inputs[1]["init"], disk / "output") == (0, "")
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_a_copy_that_cannot_be_written_is_named_by_where_it_was_going(tmp_path):
    with pytest.raises(NotWrittenError, match=f"The disk is full: {tmp_path / 'output' / 'b.py'} could not be written"):
        with explained(tmp_path / "output"):
            # As `shutil.copyfile` raises it.
            raise OSError(
                errno.ENOSPC, "No space left on device", "input/a.py", None, str(tmp_path / "output" / "b.py")
            )
