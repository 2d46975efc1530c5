"""The stored index of tar shards, and shards that others wrote."""

import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from itpn.data import shard_index
from itpn.data.images import find_images
from itpn.data.picture import BadImageError
from tests.data.test_shards import error_of, jpeg, read_all, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        files = {f"{i}/{j}{suffix}": content for j in range(2) for suffix, content in
                 ((".jpg", jpeg(10 * i + j)), (".cls", b"%d\n" % j))}  # fmt: skip
        write_tar(tmp_path / f"{i}.tar", files)
    return tmp_path


def refuse(path: Path) -> None:
    raise AssertionError(f"{path} was read again")


def test_the_index_is_stored_and_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_images(folder)
    monkeypatch.setattr(shard_index, "members", refuse)
    second = find_images(folder)
    assert list(first.names) == list(second.names) and first.fingerprint == second.fingerprint
    assert torch.equal(first.labels, second.labels)  # type: ignore[arg-type]
    read_all(second, [jpeg(10 * i + j) for i in range(3) for j in range(2)])
    assert sorted(path.name for path in folder.iterdir()) == ["0.tar", "1.tar", "2.tar", "index.safetensors"]


def test_changed_shards_are_noticed(folder: Path) -> None:
    before = find_images(folder)
    content = (folder / "1.tar").read_bytes()
    assert content.count(b"1\n" + bytes(510)) == 1
    (folder / "1.tar").write_bytes(
        content.replace(b"1\n" + bytes(510), b"0\n" + bytes(510))
    )  # of the same size
    relabelled = find_images(folder)
    assert relabelled.labels is not None and relabelled.labels.tolist() == [0, 1, 0, 0, 0, 1]
    write_tar(folder / "3.tar", {"new.jpg": jpeg(), "new.cls": b"0"})
    (folder / "0.tar").unlink()
    changed = find_images(folder)
    assert list(changed.names) == ["1/0.jpg", "1/1.jpg", "2/0.jpg", "2/1.jpg", "new.jpg"]
    assert len({before.fingerprint, relabelled.fingerprint, changed.fingerprint}) == 3


def damaged(folder: Path, **columns: object) -> None:
    """Stores the index with other columns under the same description."""
    path = folder / "index.safetensors"
    with shard_index.safe_open(path, framework="numpy") as file:
        about = file.metadata()
    save_file(load_file(path) | {name: np.asarray(column) for name, column in columns.items()}, path, about)


@pytest.mark.parametrize(
    "columns",
    [
        {"offset": [-1, 0, 0, 0, 0, 0]},
        {"offset": [2**62] * 6},
        {"size": [2**62] * 6},
        {"size": [-1] * 6},
        {"shard": [0, 0, 1, 1, 2, 3]},
        {"shard": [0, 0, 2, 2, 1, 1]},
        {"shard": [-1, 0, 1, 1, 2, 2]},
        {"shard": [0, 0, 1]},
        {"label": [-2, 0, 0, 0, 0, 0]},
        {"label": [0.5] * 6},
        {"name_ends": [3, 2, 1, 9, 9, 42]},
        {"name_ends": [1, 2]},
        {"names": [1, 2, 3]},
    ],
    ids=str,
)
def test_an_index_that_misleads_is_made_anew(folder: Path, columns: dict[str, list[int]]) -> None:
    expected = find_images(folder)
    damaged(folder, **columns)
    found = find_images(folder)
    assert found.fingerprint == expected.fingerprint
    read_all(found, [jpeg(10 * i + j) for i in range(3) for j in range(2)])


def test_a_damaged_index_is_made_anew(folder: Path) -> None:
    expected = find_images(folder)
    path = folder / "index.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"\xff" * 100, whole[:-1], whole[:40]):
        path.write_bytes(content)
        assert find_images(folder).fingerprint == expected.fingerprint
        assert len(path.read_bytes()) == len(whole)


def test_an_index_that_says_infinity_is_made_anew(folder: Path) -> None:
    expected, path = find_images(folder), folder / "index.safetensors"
    with shard_index.safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["index"]) | {"num_left_out": float("inf")}
    save_file(load_file(path), path, {"index": json.dumps(about)})
    assert find_images(folder).description == expected.description


def test_where_it_cannot_be_stored_it_stays_in_memory(folder: Path) -> None:
    (folder / "index.safetensors").mkdir()
    images = find_images(folder)
    assert "index.safetensors cannot be written" in images.description
    read_all(images, [jpeg(10 * i + j) for i in range(3) for j in range(2)])
    assert len(list(folder.iterdir())) == 4  # and nothing is left lying about


def find_often(folder: Path) -> None:
    for _ in range(20):
        (folder / "index.safetensors").unlink(missing_ok=True)
        assert len(find_images(folder)) == 6


def test_processes_may_build_it_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=find_often, args=(folder,)) for _ in range(3)]
    for process in builders:
        process.start()
    for process in builders:
        process.join(60)
        assert process.exitcode == 0
    find_images(folder)
    monkeypatch.setattr(shard_index, "members", refuse)
    assert len(find_images(folder)) == 6
    assert len(list(folder.iterdir())) == 4


# Shards of others


def test_labels_in_json_and_other_members(tmp_path: Path) -> None:
    label = json.dumps({"label": 2, "caption": "x"}).encode()
    write_tar(
        tmp_path / "a.tar", {"0.txt": b"a", "0.JPG": jpeg(), "0.json": label, "1.cls": b" 0", "1.png": jpeg()}
    )
    images = find_images(tmp_path)
    assert list(images.names) == ["0.JPG", "1.png"]
    assert images.labels is not None and images.labels.tolist() == [2, 0]
    assert images.class_names == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\nemu\r\n")
    assert find_images(tmp_path).class_names == ("cat", "dog", "emu")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert "classes.txt names 2 classes, but there are ids up to 2" in error_of(tmp_path)


def test_where_a_label_is_missing_there_are_none(tmp_path: Path) -> None:
    other = {
        "b.json": b'{"label": 1}',
        "c.json": b"[1]",
        "d.json": b"[" * 10**5,
        "e.json": b'{"label": -1}',
        "a.json": b'{"label": "cat"}',
    }
    other["b.json"] += b" " * shard_index.MAX_LABEL_BYTES
    write_tar(tmp_path / "a.tar", {f"{key}.jpg": jpeg() for key in "abcde"} | {"a.cls": b"3"} | other)
    images = find_images(tmp_path)
    assert images.labels is None and images.class_names is None
    assert images.description == f"5 images without labels (only 1 have one) in 1 shards under {tmp_path}"


@pytest.mark.parametrize("content", [b"", b"cat", b"-1", b"1048577", b"9" * 5000, b"\xff", b"1.5"])
def test_a_label_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", {"x/0.cls": content, "x/0.jpg": jpeg()})
    assert f"{tmp_path / 'a.tar'}, byte 512: x/0.cls is no class id" in error_of(tmp_path)
    write_tar(tmp_path / "a.tar", {"\x1b[31m\n.cls": content})
    assert r": \x1b[31m\n.cls is no class id" in error_of(tmp_path)


def test_members_that_are_no_plain_images_are_counted(tmp_path: Path) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(jpeg(99))
    names = {"../../etc/x.jpg": jpeg(1), "/etc/y.jpg": jpeg(2), "z.seg.png": jpeg(3), "._w.jpg": b"x"}
    write_tar(tmp_path / "in/a.tar", names)
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
        with tarfile.open(tmp_path / f"in/{number}.tar", "w") as tar:
            member = tarfile.TarInfo("link.jpg")
            member.type, member.linkname = kind, str(outside)
            tar.addfile(member)
    images = find_images(tmp_path / "in")
    assert [images.read(i) for i in range(len(images))] == [jpeg(1), jpeg(2)]
    assert str(images.name(1)) == "a.tar/etc/y.jpg"  # only shown
    assert "; 6 members left out" in images.description


def test_folders_that_cannot_be_meant(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/a.tar", {"notes.txt": b"none"})
    assert "hold no image; looked for members like KEY.jpg" in error_of(tmp_path)
    (tmp_path / "train/deep").mkdir()
    (tmp_path / "train/deep/b.jpg").write_bytes(jpeg())
    assert "holds both tar shards (a.tar) and images (deep/b.jpg)" in error_of(tmp_path)
    (tmp_path / "train/a.tar").rename(tmp_path / "train/a.tar.gz")
    assert list(find_images(tmp_path).names) == ["deep/b.jpg"]
    (tmp_path / "train/deep/b.jpg").unlink()
    assert "a.tar.gz is compressed; unpack it" in error_of(tmp_path)
    write_tar(tmp_path / "train/c.tar", {"a.jpg": jpeg()})
    assert "a.tar.gz is compressed; unpack it" in error_of(tmp_path)


def test_a_truncated_shard_is_an_error_with_file_and_place(folder: Path) -> None:
    os.truncate(folder / "2.tar", 1000)
    assert error_of(folder).startswith(f"{folder / '2.tar'}, byte 0: the archive is truncated or damaged")


def test_too_large_a_member_is_a_bad_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itpn.data.shards.MAX_BYTES", 100)
    with pytest.raises(BadImageError, match=r"0\.tar/0/0\.jpg: .* more than the limit of 100"):
        find_images(folder).read(0)
