import json
from pathlib import Path

import pytest
import torch

from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World
from itpn.engine.run import Run
from itpn.errors import UserError


def bad_files(directory: Path, num_files: int = 10_000, state: dict | None = None) -> BadFiles:
    bad = BadFiles(Run(directory, {}, World(0, 1, torch.device("cpu"))), num_files, max_share=0.05)
    if state:
        bad.load_state_dict(json.loads(json.dumps(state)))
    bad.begin()
    return bad


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "bad_images.jsonl").read_text().splitlines()]


def test_each_is_named_once_and_counted_whenever_it_is_replaced(tmp_path: Path, capsys) -> None:
    bad = bad_files(tmp_path)
    bad.met(Path("a.jpg"), "the file is empty", replaced=True)
    bad.met(Path("b.jpg"), "cut short", replaced=False)
    bad.share(step=1, num_seen=64)
    state = bad.state_dict()
    bad.met(Path("a.jpg"), "the file is empty", replaced=True)
    bad.met(Path("c.jpg"), "cut short", replaced=True)
    bad.share(step=2, num_seen=128)
    assert bad.num_replaced == 3
    assert [(line["step"], line["file"]) for line in lines(tmp_path)] == [
        (1, "a.jpg"),
        (1, "b.jpg"),
        (2, "c.jpg"),
    ]
    assert capsys.readouterr().out.count("unreadable image left out: ") == 3

    again = bad_files(tmp_path, state=state)
    again.met(Path("a.jpg"), "the file is empty", replaced=True)
    again.met(Path("d.jpg"), "cut short", replaced=True)
    again.share(step=2, num_seen=128)
    assert again.num_replaced == 3
    assert [line["file"] for line in lines(tmp_path)] == ["a.jpg", "b.jpg", "d.jpg"]


@pytest.mark.parametrize(("num_files", "allowed"), [(10_000, 50), (100, 5)])
def test_too_many_stop_the_run(tmp_path: Path, num_files: int, allowed: int) -> None:
    """Up to a thousand samples, or one pass over a smaller set, chance alone must not stop a run."""
    bad = bad_files(tmp_path, num_files)
    for i in range(allowed):
        bad.met(Path(f"{i}.jpg"), "cut short", replaced=True)
    bad.share(step=1, num_seen=64)
    for _ in range(100):
        bad.met(Path("val.jpg"), "cut short", replaced=False)
    bad.share(step=1, num_seen=64)
    bad.met(Path("one-more.jpg"), "cut short", replaced=True)
    with pytest.raises(UserError, match=r"cannot be read, more than the 5% .*bad_images\.jsonl .*check-data"):
        bad.share(step=1, num_seen=64)


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    bad = bad_files(tmp_path)
    bad.met(Path("\udcff\n\u2028.jpg"), "cut short", replaced=True)
    bad.share(1, 64)
    again = bad_files(tmp_path, state=bad.state_dict())
    assert again.named == {"\\udcff\n\u2028.jpg"}
