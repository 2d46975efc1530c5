"""Work in processes that may die: each death is told, and nothing outlives the parent."""

import faulthandler
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from itpn import cli
from itpn.data import check, crashproof
from itpn.data.crashproof import Death, each
from tests.data.dirty import encoded, flat


def die_of(index: int) -> int:
    faulthandler.disable()  # pytest's would report every death that is meant
    match index:
        case 3:
            os.kill(os.getpid(), signal.SIGKILL)
        case 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 7:
            os._exit(9)
    return index * index


@pytest.mark.parametrize("num_workers", [1, 3, 20])
def test_the_death_of_a_process_is_told_and_the_work_goes_on(num_workers: int) -> None:
    results = dict(each(die_of, 9, num_workers))
    assert set(results) == set(range(9))
    assert {i: result for i, result in results.items() if not isinstance(result, Death)} == {
        i: i * i for i in (0, 1, 2, 5, 6, 8)
    }
    assert "SIGKILL, perhaps for lack of memory" in str(results[3])
    assert "SIGSEGV" in str(results[4]) and "status 9" in str(results[7])


def square(index: int) -> int:
    return index * index


def test_a_process_that_dies_after_its_result_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    result = crashproof._Worker.result

    def last_words(worker: crashproof._Worker[int]) -> int | Death:
        said = result(worker)
        if worker.index in (1, 4):
            worker.process.kill()
            worker.process.join()
        return said

    monkeypatch.setattr(crashproof._Worker, "result", last_words)
    assert dict(each(square, 5, 2)) == {i: i * i for i in range(5)}


def test_check_data_names_the_file_that_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(flat(), "PNG"))
    look = check.look

    def deadly(images: check.Images, index: int) -> check.Look | str:
        if images.name(index).name == "1.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return look(images, index)

    monkeypatch.setattr(check, "look", deadly)
    with pytest.raises(SystemExit) as stop:
        cli.main(["check-data", str(tmp_path)])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and "3 of 4 images can be read" in printed
    assert f"{tmp_path / '1.png'}: the process that read it was killed by SIGKILL" in printed


ENDLESS = """
    import signal, sys, time
    from itpn.data.crashproof import each

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def work(index):
        import os
        if index < 2:
            os.write(1, b"started\\n")  # at once: what two print might mix
        time.sleep(0.01)

    for _ in each(work, 10**9, 2):
        pass
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_their_parent(end: signal.Signals) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        started = [parent.stdout.readline() for _ in range(2)]
        if end == signal.SIGINT:
            os.killpg(parent.pid, end)  # as a terminal does
        else:
            parent.kill()
        try:  # the end of the pipe: no process is left that could write
            rest = parent.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            os.killpg(parent.pid, signal.SIGKILL)
            raise
    assert started == ["started\n"] * 2 and rest == ""
