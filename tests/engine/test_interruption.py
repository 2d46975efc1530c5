import os
import signal

import pytest

from itpn.engine.interruption import Interrupted, Interruption


def test_the_first_signal_counts_and_later_ones_do_not_cut_the_way_out_short() -> None:
    ended = False
    with Interruption() as interruption:
        with pytest.raises(Interrupted), interruption.at_once():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                ended = True
        assert ended and interruption.signal == signal.SIGTERM


def test_a_signal_from_before_counts() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted), interruption.at_once():
            pytest.fail("went on")


def test_it_is_said_at_once_and_once(capfd) -> None:
    with Interruption("saving ..."):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "\nSIGINT: saving ...\n"
