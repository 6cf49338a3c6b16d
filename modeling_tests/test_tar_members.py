"""WebDataset tars: read whole, or refused."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from numbered import fill, numbers, picture

from transformers_unicode2.codebook.images import ImageSource
from transformers_unicode2.tar_members import read_members


def make_tar(path: Path, count: int = 6, **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))


def offsets(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("record", [None, 1024])
def test_joined_tars_are_read_whole(tmp_path, record):
    """As written, and with the shortest end that a tar may have."""
    make_tar(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    if record:
        content = content.rstrip(b"\0")
        content += b"\0" * (-len(content) % 512 + 1024)
    (tmp_path / "b.tar").write_bytes(content + content)
    assert numbers(ImageSource(str(tmp_path / "b.tar"))) == [*range(6), *range(6)]


def test_an_end_may_be_a_record_and_a_block(tmp_path):
    """Two blocks of zeros that begin in the last block of a record are followed by a whole one."""
    for blocks in range(18, 22):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            info = tarfile.TarInfo("0.txt")
            info.size = 512 * (blocks - 1)
            tar.addfile(info, io.BytesIO(b"x" * info.size))
        assert [member.name for member in read_members(tmp_path / "a.tar")] == ["0.txt"]


@pytest.mark.parametrize("hole", [(8192, 16384), (16384, None), (0, 16384)])
def test_zeros_where_images_may_have_been_are_refused(tmp_path, hole):
    """A download that stopped in a file of full length leaves such zeros."""
    make_tar(tmp_path / "a.tar", 30)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[slice(*hole)] = bytes(len(content[slice(*hole)]))
    (tmp_path / "b.tar").write_bytes(content)
    with pytest.raises(ValueError, match="bytes of zeros from byte .* where images may have been"):
        ImageSource(str(tmp_path / "b.tar"))


def test_a_stream_refuses_a_damaged_tar_among_whole_ones(tmp_path):
    for name in "ab":
        make_tar(tmp_path / f"{name}.tar", 20)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[offsets(tmp_path / "a.tar")[7] + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a.tar is no whole, uncompressed tar"):
        ImageSource(str(tmp_path), limit=25, streaming=True)


def test_zeros_in_the_middle_of_a_tar_end_nothing(tmp_path):
    make_tar(tmp_path / "a.tar")
    content, place = (tmp_path / "a.tar").read_bytes(), offsets(tmp_path / "a.tar")[3]
    (tmp_path / "b.tar").write_bytes(content[:place] + b"\0" * 1024 + content[place:])
    assert numbers(ImageSource(str(tmp_path / "b.tar"))) == list(range(6))


def damage(content: bytes, places: list[int], how: str) -> bytes:
    place = places[3]
    if how.startswith("header"):
        at = place + {"header name": 2, "header size": 130, "header checksum": 150, "header first": 0}[how]
        return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
    cuts = {
        "cut in a header": place + 200,
        "cut before a header": place,
        "cut in a content": place + 512 + 20,
        "cut before the end": places[-1] + 1024,
    }
    if how in cuts:
        return content[: cuts[how]]
    return {"garbage after the end": content + b"garbage", "nothing": b"", "no tar": b"no tar" * 1000}[how]


@pytest.mark.parametrize(
    "how",
    [
        *("header name", "header size", "header checksum", "header first", "cut in a header", "cut before a header"),
        *("cut in a content", "cut before the end", "garbage after the end", "nothing", "no tar"),
    ],
)
def test_damaged_tars_are_refused(tmp_path, how):
    make_tar(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes(), offsets(tmp_path / "a.tar"), how))
    with pytest.raises(ValueError, match="b.tar is no whole, uncompressed tar"):
        ImageSource(str(tmp_path / "b.tar"))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_by_their_content(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", f"w:{kind}") as tar:
        tar.add(__file__, "a.png")
    with pytest.raises(ValueError, match="it is compressed"):
        ImageSource(str(tmp_path / "x.tar"))


def test_members_of_every_kind(tmp_path):
    """Long names, folders, links, repeated names, hidden files and texts; each image is an image."""
    folder, long = tmp_path / "f", "x" * 120
    fill(folder, "0.png", "same.jpg", f"{long}.png", "ü\n.png", ".hidden.png", "blob")
    (folder / "0.txt").touch()
    os.link(folder / "0.png", folder / "zhard.png")
    (folder / "zlink.png").symlink_to("0.png")
    (folder / "zblob.png").symlink_to("blob")
    (folder / "zgone.png").symlink_to("nowhere.png")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for name in sorted(os.listdir(folder)):
                tar.add(folder / name, f"./d/{name}")
            tar.add(folder, "./folder", recursive=False)
            tar.add(folder / "same.jpg", "./d/0.png")
        source = ImageSource(str(tmp_path / "a.tar"))
        assert sorted(numbers(source)) == [0, 0, 1, 1, 2, 3, 5]
        assert source.left_out == {
            "hidden file": 1,
            ".txt": 1,
            "without a suffix": 1,
            "repeated link": 1,
            "broken link": 1,
        }


def test_a_sparse_member_and_a_link_to_nothing_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    member = tarfile.TarInfo("zz.png")
    member.type, member.linkname = tarfile.LNKTYPE, "nowhere.png"
    end = offsets(tmp_path / "a.tar")[-1] + 1024
    (tmp_path / "b.tar").write_bytes(content[:end] + member.tobuf() + b"\0" * 1024)
    with pytest.raises(ValueError, match="zz.png is a link to nowhere.png, which is not before it"):
        ImageSource(str(tmp_path / "b.tar"))
    member.type = b"Z"
    (tmp_path / "b.tar").write_bytes(content[:end] + member.tobuf() + b"\0" * 1024)
    with pytest.raises(ValueError, match="zz.png is stored as type b'Z', which is not read"):
        ImageSource(str(tmp_path / "b.tar"))


def write_pictures(file, *names: str) -> None:
    """A tar of pictures in the order of their numbers."""
    with tarfile.open(file, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))


def test_several_images_of_a_key_are_images(tmp_path):
    write_pictures(tmp_path / "a.tar", "0.png", "0.depth.png", "0.JPG", "1.png")
    assert numbers(ImageSource(str(tmp_path / "a.tar"))) == [0, 1, 2, 3]


def test_a_stream_with_several_images_in_a_row_is_refused(tmp_path):
    """`datasets` makes a column of each suffix."""
    write_pictures(tmp_path / "0.tar", "0.png", "0.depth.png", "1.png", "1.depth.png")
    with pytest.raises(ValueError, match="has several images in row 0, png and depth.png; without --streaming each is"):
        list(ImageSource(str(tmp_path), limit=2, streaming=True).read(0, 2))
    assert numbers(ImageSource(str(tmp_path))) == [0, 1, 2, 3]


def test_what_is_compressed_is_counted_beside_images_and_refused_beside_tars(tmp_path):
    fill(tmp_path / "images", "0.png", "x.tar.png")
    (tmp_path / "images" / "backup.tar.gz").touch()
    source = ImageSource(str(tmp_path / "images"))
    assert numbers(source) == [0, 1] and source.left_out.sentence() == "left out: 1 .gz"
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars" / "0.tar")
    (tmp_path / "tars" / "1.tar.gz").touch()
    with pytest.raises(ValueError, match="1.tar.gz is compressed"):
        ImageSource(str(tmp_path / "tars"))
