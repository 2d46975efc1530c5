"""Files of users are never replaced, outputs are, and no two inputs share one."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itpn.errors import UserError
from itpn.outputs import MANIFEST, adding, claim, distinct, growing, is_output, writing


def write(path, text="ours"):
    with writing(path) as file:
        file.write_text(text)


def refused(act, *words):
    with pytest.raises(UserError) as caught:
        act()
    assert all(word in str(caught.value) for word in words)


def test_what_was_written_is_an_output_and_is_replaced(tmp_path):
    path = tmp_path / "new" / "a.png"
    for text in ("first", "second", "second"):
        claim(("--out", path))
        write(path, text)
        assert path.read_text() == text and is_output(path)
    assert sorted(os.listdir(path.parent)) == [MANIFEST, "a.png"]
    assert (path.parent / MANIFEST).read_text().count("  a.png\n") == 2


def test_a_users_file_is_never_replaced(tmp_path):
    path = tmp_path / "photo.png"
    path.write_text("mine")
    refused(lambda: claim(("--json", path)), str(path), "--json")
    refused(lambda: write(path), str(path), "--out")
    assert path.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["photo.png"]


def test_an_output_that_was_changed_is_its_users(tmp_path):
    write(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("with notes")
    refused(lambda: write(tmp_path / "report.json"), "report.json")
    assert (tmp_path / "report.json").read_text() == "with notes"


def test_a_file_that_came_while_the_work_was_done_is_kept(tmp_path):
    def act():
        with writing(tmp_path / "a.txt") as file:
            file.write_text("ours")
            (tmp_path / "a.txt").write_text("mine")

    refused(act, "a.txt")
    assert (tmp_path / "a.txt").read_text() == "mine"


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_to_a_users_file_is_kept(tmp_path, link):
    mine, path = tmp_path / "mine", tmp_path / "out" / "a.png"
    write(path)
    path.unlink()
    mine.write_text("mine")
    link(path, mine)
    refused(lambda: write(path), "a.png")
    assert mine.read_text() == "mine"


def test_a_hard_link_to_an_output_keeps_what_it_had(tmp_path):
    write(tmp_path / "a.txt", "first")
    (tmp_path / "kept").hardlink_to(tmp_path / "a.txt")
    write(tmp_path / "a.txt", "second")
    assert (tmp_path / "kept").read_text() == "first"


def test_a_copy_of_an_output_elsewhere_is_its_users(tmp_path):
    write(tmp_path / "out" / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "out" / "a.png").read_bytes())
    refused(lambda: write(tmp_path / "a.png"), "a.png")


def test_a_failed_block_leaves_the_old_output(tmp_path):
    write(tmp_path / "a.txt")
    with pytest.raises(KeyError), writing(tmp_path / "a.txt") as file:
        file.write_text("half")
        raise KeyError
    assert (tmp_path / "a.txt").read_text() == "ours"
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "a.txt"]


def test_a_killed_move_leaves_an_output(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write(tmp_path / "a.txt", "second")
    write(tmp_path / "a.txt", "third")
    assert (tmp_path / "a.txt").read_text() == "third"


def test_a_torn_manifest_is_gone_on_with(tmp_path):
    write(tmp_path / "a.txt")
    with (tmp_path / MANIFEST).open("ab") as manifest:
        manifest.write(b"0123456789")
    write(tmp_path / "b.txt")
    assert is_output(tmp_path / "a.txt") and is_output(tmp_path / "b.txt")


def test_a_growing_file_is_read_while_it_is_written_and_replaced_later(tmp_path):
    path = tmp_path / "bad.jsonl"
    with pytest.raises(KeyError), growing(path) as file:
        print("one", file=file, flush=True)
        assert path.read_text() == "one\n"
        raise KeyError
    with growing(path) as file:
        print("two", file=file)
    assert path.read_text() == "two\n" and is_output(path)
    path.write_text("mine")
    refused(lambda: growing(path).__enter__(), "bad.jsonl")


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    claim(("--json", path))
    write(path, "line")
    assert os.read(reader, 100) == b"line"
    os.close(reader)


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(lambda: claim(("--json", tmp_path)), "folder", "--json")
    claim(("--json", tmp_path / "new" / "folder" / "a.txt"))
    assert sorted(os.listdir(tmp_path)) == ["file"]
    refused(lambda: claim(("--json", tmp_path / "file" / "a.txt")), "cannot write", "--json")
    refused(lambda: claim(("--a", tmp_path / "x.txt"), ("--b", tmp_path / "X.TXT")), "one file", "--b")


def test_files_are_added_all_or_none_and_never_in_the_place_of_others(tmp_path):
    def add(*names):
        with adding(tmp_path / "data", "DIR") as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)

    for _ in range(2):
        add("a.txt", "x/b.txt")
    assert not is_output(tmp_path / "data" / "a.txt")
    (tmp_path / "data" / "x" / "b.txt").write_text("mine")
    refused(lambda: add("a.txt", "x/b.txt", "x/c.txt"), "x/b.txt", "DIR")
    assert sorted(os.listdir(tmp_path / "data" / "x")) == ["b.txt"]
    assert (tmp_path / "data" / "x" / "b.txt").read_text() == "mine"


STEMS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda stem: stem.strip(".") and len(stem.encode()) <= 251
)
NAMES = STEMS.flatmap(
    lambda stem: st.sampled_from(
        [stem, stem.upper(), f"{stem}-2", *(unicodedata.normalize(form, stem) for form in ("NFC", "NFD"))]
    )
)
PATHS = st.builds(
    lambda folder, stem, ending: Path(folder, stem + ending),
    st.sampled_from(["", "a", "a/b"]),
    NAMES | st.sampled_from(["x", "X", "x-2", "é", "e\u0301", "İ", "ß", "SS", "y" * 251]),
    st.sampled_from([".png", ".jpg", ".PNG", ".tar.webp", ""]),
)


@given(st.lists(PATHS, max_size=12))
def test_no_two_inputs_share_an_output(paths):
    names = distinct(paths)
    assert len(names) == len(paths) and names == distinct(paths)
    forms = {unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold()) for name in names}
    assert len(forms) == len(names)
    assert all(len(f"{name}.png".encode()) <= 255 and "/" not in name for name in names)
    stems = {path.stem for path in paths}
    assert len(stems) < len(paths) or all(
        name.startswith(path.stem[:20]) for name, path in zip(names, paths, strict=True)
    )


def test_names_are_readable():
    paths = [Path(name) for name in ("a/x.png", "b/x.jpg", "X.PNG", "x-2.png", "y.png")]
    assert distinct(paths) == ["x", "x-2", "X-3", "x-2-2", "y"]
    assert distinct([Path("é.png"), Path("e\u0301.png")]) == ["é", "e\u0301-2"]


def test_odd_bytes_and_line_breaks_in_names(tmp_path):
    for name in (
        os.fsdecode(b"bad\xff.png"),
        "two\nlines.png",
        distinct([Path(os.fsdecode(b"\xff" * 255))])[0],
    ):
        path = tmp_path / f"{name}x"
        write(path)
        write(path, "again")
        assert path.read_text() == "again"
