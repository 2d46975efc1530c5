"""The pixel objective: masks, reconstruction, and what must not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from itpn.errors import UserError
from itpn.nn.layers import units_of
from itpn.objectives.decoder import fill
from itpn.objectives.masking import RandomMasking, hidden_units, num_kept
from itpn.objectives.pixel import normalise_units
from tests.toys import toy_batch, toy_objective


@settings(deadline=None)
@given(num_units=st.integers(2, 300), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_masks_hide_what_they_should(num_units, ratio, seed):
    kept = int(num_units * (1 - ratio))
    if not 0 < kept < num_units:
        with pytest.raises(UserError, match="mask_ratio"):
            num_kept(num_units, ratio)
        return
    draw = RandomMasking(num_units, num_kept(num_units, ratio), num_masks=2, num_drops=3)
    drawn = draw(torch.Generator().manual_seed(seed))
    assert drawn["keep"].shape == (2, kept)
    assert drawn["drop"].shape == (2, 3)
    hidden = hidden_units(drawn["keep"], num_units)
    assert (hidden.sum(1) == num_units - kept).all()
    assert not hidden.gather(1, drawn["keep"]).any()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.99])
def test_mask_ratio_out_of_range_names_the_field(ratio):
    with pytest.raises(UserError, match=r"objective\.mask_ratio"):
        toy_objective(mask_ratio=ratio)


def test_fill_puts_units_and_tokens_in_their_places():
    keep = torch.tensor([[2, 0], [1, 3]])
    visible = torch.arange(8.0).view(2, 2, 2)
    filled = fill(visible, keep, hidden_units(keep, 4), torch.tensor([-1.0, -2.0]))
    for b in range(2):
        for unit in range(4):
            place = (keep[b] == unit).nonzero()
            expected = visible[b, place[0, 0]] if len(place) else torch.tensor([-1.0, -2.0])
            assert torch.equal(filled[b, unit], expected)


def test_reconstruction_shows_the_visible_and_fills_in_the_hidden():
    objective = toy_objective().eval()
    batch = toy_batch(objective)
    keep = batch["keep"][:, 0]
    shown = objective.reconstruct(batch["images"], keep)
    hidden = hidden_units(keep, 16)
    original = batch["images"].float() / 255
    torch.testing.assert_close(shown.original, original, atol=1e-6, rtol=0)
    cells = [units_of(x, 16) for x in (original, shown.masked, shown.reconstruction)]
    torch.testing.assert_close(cells[1][~hidden], cells[0][~hidden], atol=1e-6, rtol=0)
    torch.testing.assert_close(cells[2][~hidden], cells[0][~hidden], atol=1e-6, rtol=0)
    assert (cells[1][hidden] - cells[1][hidden][:1]).abs().max() == 0
    assert [list(level.shape) for level in shown.levels] == [[3, 24, 16, 16], [3, 24, 8, 8], [3, 24, 4, 4]]


def test_a_perfect_prediction_reconstructs_the_image(monkeypatch):
    objective = toy_objective().eval()
    batch = toy_batch(objective)
    target, _, _ = normalise_units(units_of(objective.normalise(batch["images"]), 16).flatten(2))
    monkeypatch.setattr(objective.head, "forward", lambda decoded: target)
    shown = objective.reconstruct(batch["images"], batch["keep"][:, 0])
    torch.testing.assert_close(shown.reconstruction, shown.original, atol=1e-5, rtol=0)
    assert objective(batch)["loss"] == 0


def test_mae_is_the_same_objective_without_a_pyramid():
    objective = toy_objective(pyramid=False)
    losses = objective(toy_batch(objective))
    losses["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    assert (
        objective.reconstruct(toy_batch(objective)["images"], toy_batch(objective)["keep"][:, 0]).levels == []
    )


def test_hidden_pixels_do_not_reach_the_prediction_but_set_the_target():
    objective = toy_objective()
    batch = toy_batch(objective)
    hidden = hidden_units(batch["keep"][:, 0], 16)
    mask = hidden.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(mask, batch["images"].roll(1, 0), batch["images"])
    seen = []
    objective.head.register_forward_hook(lambda *call: seen.append(call[2]))
    losses = [objective({**batch, "images": x})["loss"] for x in (batch["images"], changed)]
    assert torch.equal(seen[0], seen[1])
    assert losses[0] != losses[1]


def test_every_sample_counts_the_same_whatever_the_batch():
    objective = toy_objective()
    batch = toy_batch(objective, size=4)
    whole = objective(batch)["loss"]
    parts = [objective({key: value[i : i + 1] for key, value in batch.items()})["loss"] for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_same_seed_same_start():
    states = [toy_objective({}, seed=3).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_flops_per_image_grow_with_what_is_computed():
    plain, features = toy_objective(), toy_objective({})
    images = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as teacher, torch.no_grad():
        features.features.teacher.to("meta")(images.to("meta"))
    heads = 3 * 2 * 16 * 32 * (16 * 8 + 4 * 16 + 32)
    assert features.flops_per_image() == plain.flops_per_image() + teacher.get_total_flops() + heads
    assert toy_objective(mask_ratio=0.5).flops_per_image() > plain.flops_per_image()
