import json
import re
from pathlib import Path

import pytest

from itpn.engine.schedule import ScheduleConfig, lr_at
from itpn.errors import UserError

PUBLISHED = json.loads((Path(__file__).parents[1] / "reference" / "schedules.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_samples(case: str) -> None:
    peak, min_lr, warmup, epochs = (float(number) for number in re.findall(r"=([\d.e-]+)", case))
    config = ScheduleConfig(warmup_epochs=warmup, min_lr=min_lr)
    for epoch, expected in PUBLISHED[case].items():
        step = round(float(epoch) * 1000)
        lr = lr_at(step, config, peak=peak, epochs=int(epochs), steps_per_epoch=1000)
        assert lr == pytest.approx(expected, rel=1e-6, abs=1e-18)


def test_warm_up_from_start_factor_and_cosine_to_min_lr() -> None:
    config = ScheduleConfig(warmup_epochs=2, start_factor=0.1, min_lr=0.2)
    rates = [lr_at(step, config, peak=1.0, epochs=6, steps_per_epoch=1) for step in range(7)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert lr_at(0, ScheduleConfig(warmup_epochs=0), peak=0.5, epochs=3, steps_per_epoch=7) == 0.5


def test_warm_up_longer_than_the_run() -> None:
    with pytest.raises(UserError, match=r"warm-up takes 40 epochs, but the run has 10.*--epochs"):
        ScheduleConfig(warmup_epochs=40).warmup(10, 7)


def test_warmup_is_a_tenth_unless_given():
    assert ScheduleConfig().warmup(300, 7) == 30
    assert ScheduleConfig(warmup_epochs=5).warmup(300, 7) == 5


def test_poly_is_mmcv_s() -> None:
    config = ScheduleConfig(shape="poly", power=0.9, warmup_iterations=4, start_factor=0.1, min_lr=0.01)
    for step in range(20):  # PolyLrUpdaterHook and its linear warm-up, written out
        regular = (1 - step / 20) ** 0.9 * (0.5 - 0.01) + 0.01
        expected = regular * (1 - (1 - step / 4) * (1 - 0.1)) if step < 4 else regular
        found = lr_at(step, config, peak=0.5, epochs=20 / 7, steps_per_epoch=7)
        assert found == pytest.approx(expected, rel=1e-9)


def test_steps_are_mmcv_s() -> None:
    config = ScheduleConfig(shape="step", warmup_iterations=5, start_factor=0.001)
    for step in range(12 * 7):  # StepLrUpdaterHook(step=[9, 11]) and its linear warm-up, written out
        epoch = step // 7
        regular = 0.5 * 0.1 ** (2 if epoch >= 11 else 1 if epoch >= 9 else 0)
        expected = regular * (1 - (1 - step / 5) * (1 - 0.001)) if step < 5 else regular
        found = lr_at(step, config, peak=0.5, epochs=12, steps_per_epoch=7)
        assert found == pytest.approx(expected, rel=1e-9)


def test_a_warm_up_in_steps() -> None:
    by_steps, by_epochs = ScheduleConfig(warmup_iterations=10), ScheduleConfig(warmup_epochs=2)
    for step in range(25):
        rates = [
            lr_at(step, config, peak=1.0, epochs=5, steps_per_epoch=5) for config in (by_steps, by_epochs)
        ]
        assert rates[0] == rates[1]
    with pytest.raises(UserError, match=r"takes 10 steps, but the run has 10.*--iterations"):
        by_steps.warmup(2, 5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"warmup_epochs": 1, "warmup_iterations": 1}, "give only one"),
        ({"power": 0}, "power"),
        ({"milestones": (9, 11)}, "shares"),
    ],
)
def test_mistakes(fields, words) -> None:
    with pytest.raises(UserError, match=words):
        ScheduleConfig(**fields)
