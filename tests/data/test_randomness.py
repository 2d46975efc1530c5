import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from itpn.data.randomness import generator, permutation, replacement


def test_every_key_has_its_own_stream() -> None:
    keys = itertools.product((0, 1, 2**32, 2**40), (0, 1, 2), (0, 1, 1_281_166), ("crop", "draw"))
    draws = [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(draws)


def test_streams_of_neighbouring_samples_are_uniform_and_uncorrelated() -> None:
    draws = torch.stack([torch.rand(2, generator=generator(0, 0, i, "crop")) for i in range(4000)])
    assert torch.allclose(draws.mean(0), torch.tensor([0.5, 0.5]), atol=0.02)
    neighbours = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0], draws[1:, 1]]))
    assert (neighbours - torch.eye(3)).abs().max() < 0.06


@given(st.integers(-5, 2**70), st.integers(0, 2000), st.integers(1, 50))
def test_a_permutation_holds_each_index_once(seed: int, epoch: int, n: int) -> None:
    order = permutation(seed, epoch, n)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, permutation(seed, epoch, n))


def test_epochs_and_seeds_have_other_orders() -> None:
    orders = {tuple(permutation(seed, epoch, 30).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_drawing_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    permutation(0, 0, 10)
    replacement(0, 0, 0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_replacements_differ_from_attempt_to_attempt() -> None:
    chosen = [replacement(0, 0, 5, attempt, 1000) for attempt in range(10)]
    assert len(set(chosen)) > 5
    assert all(0 <= index < 1000 for index in chosen)
