from pathlib import Path

import pytest

from itpn.engine.journal import Journal


def test_a_resumed_journal_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "lines.jsonl", pytest.fail)
    journal.begin()
    journal.add({"step": 1})
    state = journal.state_dict()
    journal.add({"step": 2})
    again = Journal(journal.path, pytest.fail)
    again.load_state_dict(state)
    again.begin()
    again.add({"step": 2, "name": "é"})
    assert journal.path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2, "name": "é"}\n'


def test_a_journal_that_someone_shortened_goes_on_at_its_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "lines.jsonl", pytest.fail)
    journal.load_state_dict({"size": 1000})
    journal.path.write_text('{"step": 1}\n')
    journal.begin()
    journal.add({"step": 2})
    assert journal.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_wait_until_they_can_be_written(tmp_path: Path) -> None:
    """A folder in the file's place stands for whatever makes writing fail."""
    said: list[str] = []
    journal = Journal(tmp_path / "lines.jsonl", said.append)
    journal.begin()
    journal.add({"step": 1})
    journal.path.rename(tmp_path / "kept")
    journal.path.mkdir()
    for step in (2, 3):
        journal.add({"step": step})
    assert len(said) == 1 and "Is a directory" in said[0]
    journal.path.rmdir()
    (tmp_path / "kept").rename(journal.path)
    journal.add({"step": 4})
    assert [line for line in journal.path.read_text().splitlines()] == [
        '{"step": 1}', '{"step": 2}', '{"step": 3}', '{"step": 4}'
    ]  # fmt: skip
