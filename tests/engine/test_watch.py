import json
import random

import pytest

from itpn.engine.watch import Watch


def noisy(num: int) -> list[float]:
    source = random.Random(0)
    return [5.0 + source.gauss(0, 0.05) for _ in range(num)]


def test_a_loss_far_above_the_median_is_noted() -> None:
    watch = Watch()
    assert not any(watch.outlier(loss) for loss in noisy(200))
    found = watch.outlier(9.0)
    assert found["loss_outlier"] == 9.0
    assert found["loss_median"] == pytest.approx(5.0, abs=0.05)
    assert not watch.outlier(1.0)


def test_a_smooth_fall_and_a_constant_stand_out_nowhere() -> None:
    for losses in ([2.0 * 0.99**i for i in range(300)], [1.0] * 100 + [1.05]):
        watch = Watch()
        assert not any(watch.outlier(loss) for loss in losses)


def test_the_same_after_a_restart() -> None:
    one, other, losses = Watch(), Watch(), noisy(150)
    for loss in losses:
        one.outlier(loss)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.outlier(7.0) == other.outlier(7.0) != {}
