from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn.data.grouping import GroupedEpochs
from itpn.data.views import (
    NUM_DRAWS,
    MultiScale,
    fitting,
    paddings,
    random_views,
    scaled,
    shrunk,
    whole_views,
)
from itpn.errors import UserError

PUBLISHED = MultiScale()
SMALL = MultiScale(
    short_sides=(96, 128), max_side=200, crop_short_sides=(90,), crop_sides=(40, 90), eval_short_side=128
)


def coco_like(n: int, seed: int = 0) -> np.ndarray:
    """Heights and widths about as often as in COCO."""
    kinds = np.array(
        [(480, 640)] * 9 + [(427, 640)] * 4 + [(640, 480)] * 4 + [(640, 427), (500, 500), (240, 640)]
    )
    return kinds[np.random.default_rng(seed).integers(0, len(kinds), n)]


def test_the_published_scales() -> None:
    sizes = np.array([(480, 640)] * 4000)
    draws = np.random.default_rng(0).random((4000, NUM_DRAWS))
    views = random_views(sizes, draws, PUBLISHED)
    whole = draws[:, 1] >= 0.5
    assert (views.boxes[whole] == [0, 0, 640, 480]).all()
    short = views.sizes[whole].min(1)
    assert sorted(set(short.tolist())) == list(range(480, 801, 32))
    assert np.bincount(short)[480::32].min() > len(short) / 11 * 0.7
    assert abs(views.mirrored.mean() - 0.5) < 0.03
    # A part has sides of 384 to 600 once the image's shorter side is 400, 500 or 600.
    parts = views.boxes[~whole][:, 2:]
    factors = np.array([400, 500, 600])[(draws[~whole][:, 2] * 3).astype(int)] / 480
    sides = parts * factors[:, None]
    assert sides.min() > 383 and sides.max() < 601
    assert len(np.unique(views.boxes[~whole][:, 0])) > 50
    assert views.sizes.max() <= 1333 and views.sizes.min(1).min() >= 480


def test_the_scale_of_evaluation() -> None:
    sizes = np.array([(480, 640), (640, 427), (100, 900), (1600, 1600), (1, 3000)])
    views = whole_views(sizes, PUBLISHED)
    assert views.sizes.tolist() == [[800, 1067], [1199, 800], [148, 1333], [800, 800], [1, 1333]]
    assert (views.boxes == np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], 1)).all()
    assert not views.mirrored.any()


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    seed=st.integers(0, 1 << 30),
    scale=st.sampled_from([PUBLISHED, SMALL, MultiScale(max_side=300), MultiScale(num_short_sides=1)]),
)
def test_views_lie_in_their_images_and_fit_into_a_padding(
    height: int, width: int, seed: int, scale: MultiScale
) -> None:
    sizes = np.array([(height, width)] * 8)
    rng = np.random.default_rng(seed)
    draws = np.where(rng.random((8, NUM_DRAWS)) < 0.1, np.nextafter(1, 0), rng.random((8, NUM_DRAWS)))
    shapes = paddings(scale)
    assert (shapes % 32 == 0).all() and len(shapes) <= 12
    for views in (random_views(sizes, draws, scale), whole_views(sizes, scale)):
        left, top, across, down = views.boxes.T
        assert min(left.min(), top.min()) >= 0 and min(across.min(), down.min()) >= 1
        assert (left + across <= width).all() and (top + down <= height).all()
        assert (views.sizes >= 1).all() and views.sizes.max() <= scale.max_side
        assert (shapes[fitting(views.sizes, shapes)] >= views.sizes).all()
        aspects = views.boxes[:, 2] / views.boxes[:, 3] * views.sizes[:, 0] / views.sizes[:, 1]
        exact = views.sizes.min(1) > 50
        assert np.abs(np.log(aspects[exact])).max(initial=0) < 0.03
        for size in views.sizes:
            small = shrunk(size, np.array([64, 96]))
            assert (small >= 1).all() and (small <= [64, 96]).all()
            assert (shrunk(size, size) == size).all()


def test_few_paddings_without_much_waste() -> None:
    shapes = paddings(PUBLISHED)
    assert len(shapes) == 12 and len({h * w for h, w in shapes.tolist()}) == 6
    assert (np.diff(shapes.prod(1)) >= 0).all() and shapes[-1].tolist() in ([800, 1344], [1344, 800])
    sizes = coco_like(4000)
    views = random_views(sizes, np.random.default_rng(1).random((4000, NUM_DRAWS)), PUBLISHED)
    assert shapes[fitting(views.sizes, shapes)].prod(1).sum() < 1.35 * views.sizes.prod(1).sum()
    assert (scaled(np.array([[3, 5]]), np.array([30]), PUBLISHED) == [30, 50]).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"flip": 2.0}, "scale.flip is 2.0"),
        ({"crop": -1.0}, "scale.crop is -1.0"),
        ({"short_sides": ()}, r"scale.short_sides is \(\)"),
        ({"crop_short_sides": (0,)}, "scale.crop_short_sides"),
        ({"crop_sides": (600, 384)}, "the least side comes first"),
        ({"max_side": 0}, "scale.max_side is 0"),
        ({"num_short_sides": 0}, "scale.num_short_sides is 0"),
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(PUBLISHED, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "batch_size"), [(1000, 16), (400, 64), (37, 8), (8, 8), (9, 1)])
def test_an_epoch_sees_each_image_once_in_batches_of_one_padding(n: int, batch_size: int) -> None:
    sizes = coco_like(n)
    epochs = GroupedEpochs(sizes, PUBLISHED, batch_size)
    plan = epochs.plan(3, 5)
    assert torch.equal(plan.order.sort().values, torch.arange(n))
    batches = plan.order[: n // batch_size * batch_size].view(-1, batch_size).numpy()
    padded = plan.padded[batches]
    assert (padded == padded[:, :1]).all()
    # But for what is left over of the twelve paddings, views fit without being shrunk.
    views = random_views(sizes, plan.draws, PUBLISHED).sizes
    fits = (views[batches] <= padded).all(-1).all(-1)
    assert (~fits).sum() <= 12 and (n < 1000 or fits.mean() > 0.8)
    shapes = {tuple(shape) for shape in paddings(PUBLISHED).tolist()}
    assert {tuple(shape) for shape in plan.padded.tolist()} <= shapes


def test_an_epoch_is_a_function_of_seed_epoch_and_global_batch() -> None:
    sizes = coco_like(300)
    first = GroupedEpochs(sizes, PUBLISHED, 8)
    plans = {
        key: first.plan(*key) for key in ((0, 0), (0, 1), (1, 0), (0, 0))
    }  # more of them than are remembered
    again = GroupedEpochs(sizes, PUBLISHED, 8)
    for key, plan in plans.items():
        other = again.plan(*key)
        assert torch.equal(plan.order, other.order) and (plan.draws == other.draws).all()
        assert (plan.padded == other.padded).all()
    assert not torch.equal(plans[0, 0].order, plans[0, 1].order)
    assert not torch.equal(plans[0, 0].order, plans[1, 0].order)
    assert (plans[0, 0].draws != plans[0, 1].draws).all()


def test_batches_of_all_paddings_are_mixed() -> None:
    epochs = GroupedEpochs(coco_like(2005), PUBLISHED, 10)
    plan = epochs.plan(0, 0)
    standing = plan.padded[plan.order.numpy()[:2000:10]]
    changes = (np.diff(standing[:, 0] > standing[:, 1]) != 0).sum()
    assert changes > 50
    left_out = [set(epochs.plan(0, epoch).order[2000:].tolist()) for epoch in range(3)]
    assert len(left_out[0] & left_out[1] & left_out[2]) <= 1
