import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from transformers_unicode2 import cli
from transformers_unicode2.codebook import images
from transformers_unicode2.codebook.build import make_parser
from transformers_unicode2.codebook.features import write_arrays
from transformers_unicode2.codebook.images import ImageSource, open_stream
from transformers_unicode2.codebook.storage import load_codebook

ENCODER = {
    "hidden_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SIZE = ["--codebook-size", "96", "--num-cells", "5", "--polish", "1", "--images-per-shard", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 40 images, a SigLIP and a CLIP encoder."""
    folder = tmp_path_factory.mktemp("codebook")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(folder / "images" / f"{i:02d}.png")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**ENCODER)).save_pretrained(folder / "encoder")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    CLIPVisionModel(CLIPVisionConfig(**ENCODER)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder / "clip")
    return folder


def words(place, output, *more, images="images", encoder="encoder"):
    return ["--images", str(place / images), "--encoder", str(place / encoder), "--output", str(output), *SIZE, *more]


def build(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["unicode2", "codebook", "build", *arguments])
    cli.main()


def refusal(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        build(monkeypatch, *arguments)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def reference(place):
    """Bytes of the codebook of an uninterrupted build, per backend."""
    output = {}
    for backend in ("faiss", "torch"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            build(monkeypatch, *words(place, place / backend, "--backend", backend))
        output[backend] = (place / backend / "codebook.safetensors").read_bytes()
    return output


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_build_makes_distinct_finite_bfloat16_codes_and_leaves_nothing_else(place, reference, backend):
    codebook = load_codebook(place / backend)
    codes = codebook.codes.numpy()
    assert codes.shape == (96, 16) and np.isfinite(codes).all() and len(np.unique(codes, axis=0)) == 96
    assert np.array_equal(codes, codebook.codes.bfloat16().float().numpy())
    assert codebook.previews.shape == (96, 8, 8, 3) and codebook.cell_offsets[-1] == 96
    provenance = json.loads((place / backend / "codebook.json").read_text())["provenance"]
    names = ["README.md", "codebook.json", "codebook.safetensors"]
    assert sorted(file.name for file in (place / backend).iterdir()) == names
    card = (place / backend / "README.md").read_text()
    assert "**The encoder in float32 defines the ids**" in card and "--codebook-size 96 --num-cells 5" in card
    assert str(place) not in card
    options = next(line for line in card.splitlines() if line.startswith("    unicode2 codebook build ")).split()[3:]
    again = vars(make_parser().parse_args(["--images", "-", "--encoder", "-", "--output", "-", *options]))
    assert all(
        again[name] == value
        for name, value in provenance["command"].items()
        if name in again and name not in ("images", "encoder")
    )
    assert provenance["statistics"]["num_features"] == 40 * 16
    before, after = provenance["polish_distortions"]
    assert after < before


def launch(place, output, num_processes: int, *more) -> list[str]:
    """The build as a command, started by `torchrun` if it has several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc_per_node", str(num_processes)]
    module = ["-m", "transformers_unicode2.codebook.build", *words(place, output, *more)]
    return [sys.executable, *(launcher if num_processes > 1 else []), *module]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_two_processes_build_the_same_bytes(place, reference, tmp_path, backend):
    said = subprocess.run(
        launch(place, tmp_path, 2, "--backend", backend), check=True, capture_output=True, text=True, timeout=300
    ).stdout
    assert "5 cells, 2 processes" in said
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference[backend]
    # A refusal ends both processes.
    if backend == "faiss":
        refused = subprocess.run(launch(place, tmp_path, 2, "--seed", "7"), capture_output=True, text=True, timeout=120)
        assert refused.returncode and refused.stderr.count("seed was 0 and is 7") == 1


def kill_tree(pid: int) -> None:
    """Sends SIGKILL to a launcher and its workers, which have their own process groups."""
    launcher = psutil.Process(pid)
    launcher.suspend()
    workers = launcher.children(recursive=True)
    for process in (launcher, *workers):
        process.kill()
    psutil.wait_procs(workers)


def kill_and_resume(place, folder, delay: float, num_processes: int) -> bool:
    """Starts a build, kills all its processes `delay` seconds after its first file, and resumes it.

    Returns whether the kill came before the end.
    """
    command = launch(place, folder, num_processes)
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and not (folder / "work" / "run.json").exists():
        time.sleep(0.01)
    time.sleep(delay)
    running = job.poll() is None
    if running:
        kill_tree(job.pid)
    job.wait()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, f"killed after {delay:.3f} s: {resumed.stdout}{resumed.stderr[-6000:]}"
    return running


def break_off(place, folder, monkeypatch, count: int) -> None:
    """A build that dies silently at write number `count`."""
    written = []

    class Killed(BaseException):
        pass

    def write(path, arrays):
        if len(written) == count:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise Killed
        written.append(path)
        write_arrays(path, arrays)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("features", "phases", "build", "polish"):
            patch.setattr(f"transformers_unicode2.codebook.{module}.write_arrays", write)
        with pytest.raises(Killed):
            build(patch, *words(place, folder))


@pytest.mark.parametrize("count", [17, 41, 60, 82, 89, 92, 93, 97])
def test_build_that_was_broken_off_at_a_write_resumes_to_the_same_bytes(place, reference, tmp_path, monkeypatch, count):
    break_off(place, tmp_path, monkeypatch, count)
    assert not (tmp_path / "codebook.json").exists()
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_twenty_kills_at_random_times_resume_to_the_same_bytes(place, reference, tmp_path):
    rng = np.random.default_rng(int(os.environ.get("UNICODE2_KILL_SEED", 0)))
    # Latest kill in seconds, by number of processes; shortened after a build that ended before its kill.
    latest = {1: 2.5, 2: 2.5}
    stopped = 0
    for trial in range(20):
        num_processes = 1 + trial % 2
        running = kill_and_resume(place, tmp_path / str(trial), rng.uniform(0, latest[num_processes]), num_processes)
        latest[num_processes] *= 1 if running else 0.7
        stopped += running
        assert (tmp_path / str(trial) / "codebook.safetensors").read_bytes() == reference["faiss"], trial
    assert stopped >= 12, latest


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


def write_parquet(folder, files, rows_per_group=7):
    import pyarrow
    from pyarrow import parquet

    rows = [{"image": {"bytes": file.read_bytes(), "path": None}, "text": file.name} for file in files]
    for part, chunk in enumerate((rows[:25], rows[25:])):
        parquet.write_table(pyarrow.Table.from_pylist(chunk), folder / f"{part}.parquet", row_group_size=rows_per_group)


def write_arrow(folder, files):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "text": [f.name for f in files]}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(folder)


def write_tars(folder, files):
    for part, chunk in enumerate((files[:25], files[25:])):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for file in chunk:
                tar.add(file, file.name)
                tar.add(__file__, file.with_suffix(".json").name)


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_tars])
def test_sources_give_the_same_images_from_any_position(place, tmp_path, write):
    files = sorted((place / "images").iterdir())
    write(tmp_path, files)
    source = ImageSource(str(tmp_path))
    assert len(source) == 40
    for start, stop in ((0, 40), (0, 1), (6, 15), (24, 26), (39, 40), (13, 14)):
        assert [content for _, content in source.read(start, stop)] == [file.read_bytes() for file in files[start:stop]]
    assert len(ImageSource(str(tmp_path), limit=12)) == 12


def test_source_streams_a_data_set_from_any_position(place, tmp_path, monkeypatch):
    files = sorted((place / "images").iterdir())
    write_parquet(tmp_path, files)
    source = ImageSource(str(tmp_path), limit=40, streaming=True)
    contents, opened = [file.read_bytes() for file in files], []
    monkeypatch.setattr(images, "open_stream", lambda name: opened.append(name) or open_stream(name))
    # Reads on, also after a gap.
    for start, stop in ((24, 27), (27, 30), (33, 40)):
        assert [content for _, content in source.read(start, stop)] == contents[start:stop]
    assert len(opened) == 1
    assert [content for _, content in source.read(2, 4)] == contents[2:4] and len(opened) == 2
    with pytest.raises(ValueError, match="--num-images"):
        ImageSource(str(tmp_path), streaming=True)
    before = source.fingerprint()
    assert ImageSource(str(tmp_path), limit=40, streaming=True).fingerprint() == before
    write_parquet(tmp_path, files[::-1])
    assert ImageSource(str(tmp_path), limit=40, streaming=True).fingerprint() != before


def test_streams_have_the_columns_of_webdataset_or_are_refused(place, tmp_path):
    import pyarrow
    from pyarrow import parquet

    content = next((place / "images").iterdir()).read_bytes()
    for column in ("png", "picture"):
        (tmp_path / column).mkdir()
        parquet.write_table(pyarrow.table({column: [content] * 3}), tmp_path / column / "0.parquet")
    source = ImageSource(str(tmp_path / "png"), limit=3, streaming=True)
    assert [found for _, found in source.read(1, 3)] == [content] * 2
    with pytest.raises(ValueError, match="has the columns picture, none of them image, jpg"):
        list(ImageSource(str(tmp_path / "picture"), limit=3, streaming=True).read(0, 3))
    (tmp_path / "png" / "0.parquet").rename(tmp_path / "png" / "validation.parquet")
    parquet.write_table(pyarrow.table({"png": [content]}), tmp_path / "png" / "test.parquet")
    with pytest.raises(ValueError, match="none of them named train"):
        ImageSource(str(tmp_path / "png"), limit=3, streaming=True).fingerprint()


def test_source_refuses_what_it_cannot_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="No images"):
        ImageSource(str(tmp_path))
    (tmp_path / "a.png").touch()
    (tmp_path / "b.parquet").touch()
    with pytest.raises(ValueError, match="1 parquet and 1 image files"):
        ImageSource(str(tmp_path))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "c.tar.gz").touch()
    with pytest.raises(ValueError, match="is compressed"):
        ImageSource(str(tmp_path / "tars"))
    (tmp_path / "d.tar").write_bytes(b"nothing like a tar" * 100)
    with pytest.raises(ValueError, match="d.tar is no whole, uncompressed tar"):
        ImageSource(str(tmp_path / "d.tar"))
    with pytest.raises(FileNotFoundError, match="There is no folder or file"):
        ImageSource(str(tmp_path / "nowhere"))


def test_tables_hold_bytes_paths_or_nothing(place, tmp_path):
    import pyarrow
    from pyarrow import parquet

    files = [shutil.copy(place / "images" / f"0{i}.png", tmp_path) for i in range(2)]
    contents = [Path(file).read_bytes() for file in files]
    columns = {
        "both": [{"bytes": contents[0], "path": None}, {"bytes": None, "path": files[1]}, None],
        "bytes": [contents[0], contents[1], None],
        "paths": ["00.png", files[1], None],
        "text": [b64encode(contents[0]).decode(), f"data:image/png;base64,{b64encode(contents[1]).decode()}", ""],
    }
    for name, column in columns.items():
        parquet.write_table(pyarrow.table({"image": column}), tmp_path / f"{name}.parquet")
        found = [content for _, content in ImageSource(str(tmp_path / f"{name}.parquet")).read(0, 3)]
        assert found[:2] == contents, name
        assert isinstance(found[2], ValueError) and "there is no image" in str(found[2])


def test_a_stream_that_ends_early_is_named(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data", sorted((place / "images").iterdir()))
    arguments = ["--images", str(tmp_path / "data"), "--streaming", "--num-images", "60"]
    arguments += words(place, tmp_path / "o")[2:]
    assert "ends after 40 images; --num-images is 60" in refusal(monkeypatch, capsys, *arguments)


def test_clip_features_come_without_cls(place, tmp_path, monkeypatch):
    build(monkeypatch, *words(place, tmp_path, encoder="clip"))
    statistics = json.loads((tmp_path / "codebook.json").read_text())["provenance"]["statistics"]
    assert statistics["num_features"] == 40 * 16


def test_unreadable_images_are_listed_and_too_many_of_them_stop_the_build(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for file in (place / "images").iterdir():
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "images" / "07.png").write_bytes(b"")
    content = (tmp_path / "images" / "31.png").read_bytes()
    (tmp_path / "images" / "31.png").write_bytes(content[: len(content) // 2])
    # Reading it fails with an input/output error.
    (tmp_path / "images" / "40.png").symlink_to("/proc/self/mem")
    arguments = ["--images", str(tmp_path / "images"), "--encoder", str(place / "encoder"), *SIZE]
    message = refusal(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "strict"), "--max-unreadable", "0.03")
    assert "2 of 41 images cannot be read" in message and "31.png" in message
    build(monkeypatch, *arguments, "--output", str(tmp_path / "loose"), "--max-unreadable", "0.1")
    listed = (tmp_path / "loose" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3 and "07.png" in listed[0] and "31.png" in listed[1]
    assert "40.png" in listed[2] and "the file cannot be read: Input/output error" in listed[2]


def test_too_few_features_and_features_that_are_not_finite_are_refused(place, tmp_path, monkeypatch, capsys):
    many = words(place, tmp_path / "a", "--codebook-size", "700")
    assert "40 images have 640 features, too few for 700 codes" in refusal(monkeypatch, capsys, *many)
    (tmp_path / "twins").mkdir()
    for i in range(2):
        shutil.copy(place / "images" / "03.png", tmp_path / "twins" / f"{i}.png")
    twins = ["--images", str(tmp_path / "twins"), *words(place, tmp_path / "t", "--codebook-size", "20")[2:]]
    assert "16 distinct features are too few for 20 codes" in refusal(monkeypatch, capsys, *twins)
    model = SiglipVisionModel.from_pretrained(place / "encoder")
    model.embeddings.position_embedding.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    SiglipImageProcessor.from_pretrained(place / "encoder").save_pretrained(tmp_path / "broken")
    arguments = ["--images", str(place / "images"), "--encoder", str(tmp_path / "broken"), *SIZE]
    message = refusal(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "b"))
    assert "640 of 640 features are not finite" in message


def test_a_full_disk_stops_the_build_in_one_sentence_and_it_resumes(place, reference, tmp_path):
    command = [sys.executable, "-m", "transformers_unicode2.codebook.build", *words(place, tmp_path)]
    limited = (
        "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (1400, 1400)); "
        f"sys.argv = {command[2:]!r}; "
        "runpy.run_module('transformers_unicode2.codebook.build', run_name='__main__')"
    )
    stopped = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=300)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "could not be written" in stopped.stderr and "run the same command again" in stopped.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


@pytest.mark.parametrize("folder", ["cells", "features", "fine"])
def test_a_shard_that_was_cut_short_is_named_and_can_be_deleted(
    place, reference, tmp_path, monkeypatch, capsys, folder
):
    break_off(place, tmp_path, monkeypatch, {"features": 39, "cells": 60, "fine": 88}[folder])
    shard = next((tmp_path / "work" / folder).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    message = refusal(monkeypatch, capsys, *words(place, tmp_path))
    assert f"{shard} is damaged" in message and "delete it and run the same command again" in message
    shard.unlink()
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


@pytest.mark.parametrize("folder", ["cells", "features", "fine"])
def test_a_flipped_bit_in_a_shard_is_noticed(place, reference, tmp_path, monkeypatch, capsys, folder):
    break_off(place, tmp_path, monkeypatch, {"features": 39, "cells": 60, "fine": 88}[folder])
    shard = sorted((tmp_path / "work" / folder).glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-9] ^= 0x40
    shard.write_bytes(content)
    message = refusal(monkeypatch, capsys, *words(place, tmp_path))
    assert f"{shard} is damaged" in message and "does not match its checksum" in message
    assert "delete it and run" in message
    shard.unlink()
    build(monkeypatch, *words(place, tmp_path))
    assert (tmp_path / "codebook.safetensors").read_bytes() == reference["faiss"]


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


@pytest.mark.parametrize(
    "options, message",
    [
        (["--codebook-size", "4", "--num-cells", "5"], "--num-cells is 5, more than the 4 codes"),
        (["--codebook-size", "0"], "--codebook-size: 0 is not allowed; it must be at least 1"),
        (["--polish", "-1"], "--polish: -1 is not allowed; it must be at least 0"),
        (["--preview-size", "-1"], "--preview-size: -1 is not allowed"),
        (["--patches-per-image", "0"], "--patches-per-image: 0 is not allowed"),
        (["--num-images", "-5"], "--num-images: -5 is not allowed"),
        (["--max-unreadable", "1.5"], "--max-unreadable is 1.5"),
        (
            ["--max-memory-gib", "0.1"],
            "--max-memory-gib is 0.1; 96 codes of width 16 and this encoder need at least 0.75",
        ),
    ],
)
def test_options_that_make_no_codebook_are_refused(place, tmp_path, monkeypatch, capsys, options, message):
    assert message in refusal(monkeypatch, capsys, *words(place, tmp_path, *options))
    assert not (tmp_path / "codebook.json").exists()


def test_shards_that_the_memory_cannot_hold_are_refused(place, tmp_path, monkeypatch, capsys):
    options = ["--images-per-shard", "40", "--preview-size", "800"]
    message = refusal(monkeypatch, capsys, *words(place, tmp_path, *options, "--max-memory-gib", "6"))
    assert (
        "--images-per-shard is 40; a shard of 1.14 GiB needs --max-memory-gib of at least 9.2, and it is 6" in message
    )


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_cells_without_features_are_no_obstacle(place, tmp_path, monkeypatch, backend):
    (tmp_path / "images").mkdir()
    for i, color in enumerate(("red", "navy")):
        Image.new("RGB", (32, 32), color).save(tmp_path / "images" / f"{i}.png")
    arguments = ["--images", str(tmp_path / "images"), "--encoder", str(place / "encoder"), "--backend", backend]
    build(monkeypatch, *arguments, "--codebook-size", "30", "--num-cells", "28", "--output", str(tmp_path / "o"))
    codes = load_codebook(tmp_path / "o").codes
    assert len(codes.unique(dim=0)) == 30


def test_large_images_are_held_one_at_a_time(place, tmp_path):
    """16 images of 16 megapixels would take 730 MiB as RGB if they were held together."""
    (tmp_path / "images").mkdir()
    for i in range(16):
        Image.new("L", (4000, 4000), 8 * i).save(tmp_path / "images" / f"{i}.png", compress_level=1)
    script = (
        "import resource, sys; from transformers_unicode2.codebook.features import Encoder, encode_all; "
        "from transformers_unicode2.codebook.images import ImageSource; "
        f"encoder, source = Encoder({str(place / 'encoder')!r}), ImageSource({str(tmp_path / 'images')!r}); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "[features for _, features, _ in encode_all(source, encoder)]; "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    added = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(added.split()[-1]) < 400


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


def test_another_model_as_encoder_is_refused(place, monkeypatch, capsys, tmp_path, tiny_checkpoint):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    arguments = ["--images", str(place / "images"), "--encoder", str(tmp_path / "bert")]
    arguments += ["--output", str(tmp_path / "o")]
    assert "is a bert model; the encoder must be" in refusal(monkeypatch, capsys, *arguments)
