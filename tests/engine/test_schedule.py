import json
import re
from pathlib import Path

import pytest

from itpn.engine.schedule import CosineConfig, lr_at
from itpn.errors import UserError

PUBLISHED = json.loads((Path(__file__).parents[1] / "reference" / "schedules.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_samples(case: str) -> None:
    peak, min_lr, warmup, epochs = (float(number) for number in re.findall(r"=([\d.e-]+)", case))
    config = CosineConfig(warmup_epochs=warmup, min_lr=min_lr)
    for epoch, expected in PUBLISHED[case].items():
        step = round(float(epoch) * 1000)
        lr = lr_at(step, config, peak=peak, epochs=int(epochs), steps_per_epoch=1000)
        assert lr == pytest.approx(expected, rel=1e-6, abs=1e-18)


def test_warm_up_from_start_factor_and_cosine_to_min_lr() -> None:
    config = CosineConfig(warmup_epochs=2, start_factor=0.1, min_lr=0.2)
    rates = [lr_at(step, config, peak=1.0, epochs=6, steps_per_epoch=1) for step in range(7)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert lr_at(0, CosineConfig(warmup_epochs=0), peak=0.5, epochs=3, steps_per_epoch=7) == 0.5


def test_warm_up_longer_than_the_run() -> None:
    with pytest.raises(UserError, match=r"warm-up takes 40 epochs, but the run has 10.*--epochs"):
        CosineConfig(warmup_epochs=40).warmup(10)


def test_warmup_is_a_tenth_unless_given():
    assert CosineConfig().warmup(300) == 30
    assert CosineConfig(warmup_epochs=5).warmup(300) == 5
