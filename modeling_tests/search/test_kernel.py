"""The kernel: what compiles it, where it is kept, and what is refused before it reads memory."""

import os
import subprocess
import sys

import pytest
import torch

from transformers_unicode2.search.kernel import Pairs, load_kernel


def test_kernel_is_left_out_on_request_or_without_a_compiler(monkeypatch, tmp_path):
    load = load_kernel.__wrapped__
    monkeypatch.setenv("UNICODE2_KERNEL", "0")
    assert load() is None
    monkeypatch.delenv("UNICODE2_KERNEL")
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not load_kernel(), reason="no C compiler")
def test_cache_of_the_kernel(monkeypatch, tmp_path):
    """Two processes compile at once. A damaged library is made again, and one that others can write to is not used."""
    load = load_kernel.__wrapped__
    environment = {**os.environ, "UNICODE2_CACHE": str(tmp_path / "cache")}
    code = "from transformers_unicode2.search.kernel import load_kernel; assert load_kernel()"
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    (library,) = (tmp_path / "cache").iterdir()
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path / "cache"))
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert load() and library.read_bytes() == whole
    # It is mapped.
    library.unlink()
    library.write_bytes(b"planted")
    os.chmod(tmp_path / "cache", 0o777)
    assert load() and library.read_bytes() == b"planted"
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path / "file" / "cache"))
    assert load()


def test_compiling_is_told_with_its_place(monkeypatch, tmp_path, caplog):
    if not load_kernel():
        pytest.skip("no C compiler")
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path))
    assert load_kernel.__wrapped__() and load_kernel.__wrapped__()
    (record,) = caplog.records
    assert "kernel.c with" in record.getMessage() and str(tmp_path) in record.getMessage()


def test_a_compiler_that_fails_is_told_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("UNICODE2_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert load_kernel.__wrapped__() is None
    begun, failed = (record.getMessage() for record in caplog.records)
    assert "Compiling" in begun and "kernel.c could not be compiled" in failed and "exit status 1" in failed
    assert list(tmp_path.iterdir()) == []


def test_compiling_is_shown_where_nothing_is_set_up(tmp_path):
    code = "from transformers_unicode2.search.kernel import load_kernel; print(bool(load_kernel()))"
    environment = {**os.environ, "UNICODE2_CACHE": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    if said[0].stdout.split()[-1] != "True":
        pytest.skip("no C compiler")
    lines = [[line for line in run.stderr.splitlines() if str(tmp_path) in line] for run in said]
    assert len(lines[0]) == 1 and lines[0][0].startswith("Compiling ") and not lines[1]


def test_a_struct_takes_what_the_kernel_reads_alone():
    numbers = torch.zeros(3, dtype=torch.long)
    rows = torch.zeros(3, 4)
    pairs = {
        "features": rows,
        "codes": rows,
        "rows": numbers,
        "numbers": numbers,
        "found": numbers,
        "dim": 4,
        "count": 3,
    }
    pairs["distances"] = torch.zeros(3, dtype=torch.float64)
    assert Pairs.fill(**pairs).count == 3
    with pytest.raises(ValueError, match=r"`codes` of the kernel is torch.float64 .* it must be torch.float32"):
        Pairs.fill(**{**pairs, "codes": rows.double()})
    with pytest.raises(ValueError, match=r"with strides \(1, 4\)"):
        Pairs.fill(**{**pairs, "codes": torch.zeros(4, 4).T})
    with pytest.raises(ValueError, match="`rows` of the kernel has 2 elements; it reads 3"):
        Pairs.fill(**{**pairs, "rows": numbers[:2]})
    with pytest.raises(TypeError, match="other fields than were given: .'dim'"):
        Pairs.fill(**{name: value for name, value in pairs.items() if name != "dim"})
