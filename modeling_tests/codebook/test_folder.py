"""The folder of a build: finished, in use, of other settings, or on a disk without room."""

import json
import shutil
from types import SimpleNamespace

import pytest
from builds import SIZE, break_off, build, refusal, words
from safetensors import SafetensorError


def test_build_of_a_finished_folder_does_nothing_and_of_another_setting_is_refused(
    place, reference, monkeypatch, capsys, tmp_path
):
    build(monkeypatch, *words(place, place / "faiss"))
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert (place / "faiss" / "codebook.safetensors").read_bytes() == reference["faiss"]
    message = refusal(monkeypatch, capsys, *words(place, place / "faiss", "--seed", "3"))
    assert "seed was 0 and is 3" in message
    break_off(place, tmp_path, monkeypatch, 9)
    message = refusal(monkeypatch, capsys, *words(place, tmp_path, "--num-images", "39"))
    assert "num_images was None and is 39" in message and "images_sha256" in message


def test_a_finished_folder_is_looked_at(place, reference, monkeypatch, capsys, tmp_path):
    """A missing codebook is built again; a damaged or grown one is named."""
    folder = tmp_path / "faiss"
    shutil.copytree(place / "faiss", folder)
    weights, description = folder / "codebook.safetensors", folder / "codebook.json"
    weights.write_bytes(reference["faiss"][:200])
    assert "codebook.safetensors is damaged" in refusal(monkeypatch, capsys, *words(place, folder))
    weights.unlink()
    build(monkeypatch, *words(place, folder))
    assert weights.read_bytes() == reference["faiss"]
    content = json.loads(description.read_text())
    content["provenance"]["grown"] = [{"added": 8}]
    description.write_text(json.dumps(content))
    assert "holds a codebook that 8 codes were added to" in refusal(monkeypatch, capsys, *words(place, folder))
    del content["provenance"]["grown"]
    for command in ([], {"encoder": 5}, {"encoder_sha256": 5}):
        description.write_text(json.dumps({**content, "provenance": {**content["provenance"], "command": command}}))
        assert "codebook.json is damaged" in refusal(monkeypatch, capsys, *words(place, folder))
    description.write_text(description.read_text()[:200])
    assert "codebook.json is damaged" in refusal(monkeypatch, capsys, *words(place, folder))
    assert "--num-images: -3 is not allowed" in refusal(
        monkeypatch, capsys, *words(place, tmp_path / "new", "--num-images", "-3")
    )


def test_a_second_run_in_the_same_folder_is_refused(place, monkeypatch, capsys, tmp_path):
    from filelock import FileLock

    (tmp_path / "work").mkdir()
    with FileLock(tmp_path / "work" / "lock"):
        assert "Another run is building" in refusal(monkeypatch, capsys, *words(place, tmp_path))


def test_when_files_cannot_be_made_again_the_work_is_to_be_deleted(place, reference, tmp_path, monkeypatch, capsys):
    break_off(place, tmp_path, monkeypatch, 60)
    cells = tmp_path / "work" / "cells.safetensors"
    cells.write_bytes(cells.read_bytes()[:100])
    message = refusal(monkeypatch, capsys, *words(place, tmp_path))
    assert f"{cells} is damaged" in message and f"delete the folder {tmp_path / 'work'} and run" in message
    shutil.rmtree(tmp_path / "work")
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


def test_changed_images_and_a_changed_encoder_are_refused(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "images", tmp_path / "images")
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    arguments = ["--images", str(tmp_path / "images"), "--encoder", str(tmp_path / "encoder"), *SIZE]
    arguments += ["--output", str(tmp_path / "o"), "--keep-work"]
    build(monkeypatch, *arguments)
    # The same files.
    build(monkeypatch, *arguments, "--images", f"{tmp_path}/images/../images/*.png")
    (tmp_path / "images" / "07.png").write_bytes((place / "images" / "08.png").read_bytes())
    message = refusal(monkeypatch, capsys, *arguments)
    assert "images_sha256" in message and "07.png" in message.split("first difference")[1]
    shutil.copy2(place / "images" / "07.png", tmp_path / "images")
    processor = json.loads((tmp_path / "encoder" / "preprocessor_config.json").read_text())
    processor["image_mean"] = [0.4, 0.4, 0.4]
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert "encoder_sha256" in refusal(monkeypatch, capsys, *arguments)


def test_a_disk_that_fills_up_at_the_end_stops_the_build_in_one_sentence(
    place, reference, tmp_path, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: File too large")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        assert "could not be written (I/O error: File too large); make room" in refusal(
            patch, capsys, *words(place, tmp_path)
        )
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob(".*"))
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]
    modes = [(tmp_path / f"codebook.{suffix}").stat().st_mode for suffix in ("json", "safetensors")]
    assert modes[0] == modes[1]


def test_a_disk_without_the_room_is_refused_before_work_starts(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    message = refusal(monkeypatch, capsys, *words(place, tmp_path))
    assert "The build needs 0.00 GiB more in" in message and "which has 0.00 GiB free; use fewer images" in message
    assert not list((tmp_path / "work" / "features").iterdir())


def test_a_folder_that_cannot_be_written_to_is_named(place, monkeypatch, capsys):
    assert "/proc/codebook/work/features cannot be made" in refusal(
        monkeypatch, capsys, *words(place, "/proc/codebook")
    )
