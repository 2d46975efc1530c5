"""What fine-tuning keeps of a run."""

import pytest
from torch import nn

from itpn.tasks.finetuning import Kept


def kept(folder, *scores):
    """The epoch of the best of models that were measured one after the other; None: nothing was measured."""
    keeper = Kept(folder, "score", last_step=len(scores))
    for epoch, score in enumerate(scores, 1):
        numbers = {} if score is None else {"score": score}
        keeper.offer(nn.Linear(1, 1), {}, float(epoch), epoch, {"loss": 1.0, **numbers})
    return keeper.best["epoch"]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.2, 0.4, 0.3], 2),
        ([0.2, 0.2], 1),
        ([None, None, None], 3),
        ([None, 0.0, None], 2),
        ([0.5, None, 0.6], 3),
    ],
)
def test_what_was_not_measured_is_never_better(tmp_path, scores, best):
    assert kept(tmp_path, *scores) == best
