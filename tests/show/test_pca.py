import pytest
import torch

from itpn.show.pca import QUANTILES, pca_colours


def random_maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_colours_are_the_main_components_of_an_independent_svd():
    scales = torch.linspace(3, 0.1, 12).view(1, 12, 1, 1)
    maps = random_maps(3, 12, 5, 7) * scales + 2
    cells = maps.double().permute(0, 2, 3, 1).reshape(-1, 12)
    left, singular, _ = torch.linalg.svd(cells - cells.mean(0), full_matrices=False)
    expected = left[:, :3] * singular[:3]

    colours = pca_colours(maps).permute(0, 2, 3, 1).reshape(-1, 3).double()

    for component, colour in zip(expected.T, colours.T, strict=True):
        sign = torch.corrcoef(torch.stack([component, colour]))[0, 1].sign()
        low, high = (component * sign).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
        torch.testing.assert_close(colour, ((component * sign - low) / (high - low)).clamp(0, 1))


def test_colours_are_bitwise_repeatable_and_fill_the_range():
    maps = random_maps(2, 8, 6, 6)
    colours = pca_colours(maps)
    assert colours.shape == (2, 3, 6, 6) and colours.dtype == torch.float32
    assert torch.equal(colours, pca_colours(maps.clone()))
    assert colours.amin() == 0 and colours.amax() == 1


def test_direction_of_a_component_follows_its_largest_loading():
    ramp = torch.arange(16.0).view(1, 1, 4, 4)
    colours = pca_colours(torch.cat([-0.1 * ramp, 2 * ramp, 0.5 * ramp], dim=1))
    assert colours[0, 0, 0, 0] == 0 and colours[0, 0, 3, 3] == 1
    assert torch.equal(colours[0, 1:], torch.full((2, 4, 4), 0.5)), "the other two directions hold nothing"


def test_images_share_their_colours():
    maps = random_maps(2, 8, 4, 4)
    maps[1, :, 0, 0] = maps[0, :, 2, 3]
    colours = pca_colours(maps)
    assert torch.equal(colours[1, :, 0, 0], colours[0, :, 2, 3])


def test_maps_in_the_colours_of_others():
    maps, others = random_maps(2, 8, 4, 4), 5 * random_maps(3, 8, 4, 4).flip(0)
    assert torch.equal(pca_colours(maps, fitted_to=maps), pca_colours(maps))
    others[0, :, 1, 1] = maps[1, :, 2, 3]
    painted = pca_colours(others, fitted_to=maps)
    torch.testing.assert_close(painted[0, :, 1, 1], pca_colours(maps)[1, :, 2, 3])
    assert torch.equal(painted[1:2], pca_colours(others[1:2], fitted_to=maps))  # whatever is beside it
    assert (pca_colours(maps, fitted_to=torch.ones(1, 8, 2, 2)) == 0.5).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_maps_are_grey(value: float):
    assert torch.equal(pca_colours(torch.full((2, 7, 3, 3), value)), torch.full((2, 3, 3, 3), 0.5))


def test_a_single_cell_is_grey():
    assert torch.equal(pca_colours(random_maps(1, 64, 1, 1)), torch.full((1, 3, 1, 1), 0.5))


@pytest.mark.parametrize("channels", [1, 2])
def test_missing_components_are_grey(channels: int):
    colours = pca_colours(random_maps(1, channels, 5, 5))
    assert torch.equal(colours[:, channels:], torch.full((1, 3 - channels, 5, 5), 0.5))
    assert colours[:, :channels].flatten(2).std(2).min() > 0.1


def test_one_outlier_does_not_turn_rounding_noise_into_colours():
    maps = torch.full((1, 16, 20, 20), 0.3)
    maps[0, :, 4, 4] = random_maps(16)
    others = torch.ones(20, 20, dtype=torch.bool)
    others[4, 4] = False
    colours = pca_colours(maps)[0, :, others]
    assert (colours.amax(1) - colours.amin(1)).max() < 1e-3


def test_low_precision_maps_with_gradients_are_taken():
    maps = random_maps(1, 8, 4, 4).bfloat16().requires_grad_()
    assert not pca_colours(maps).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_maps_are_refused(bad: float):
    maps = random_maps(1, 4, 3, 3)
    maps[0, 1, 2, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        pca_colours(maps)


@pytest.mark.parametrize("shape", [(4, 3, 3), (0, 4, 3, 3), (1, 4, 0, 3)])
def test_shapes_that_are_no_maps_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="must be"):
        pca_colours(torch.zeros(shape))
