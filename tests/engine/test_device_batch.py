from pathlib import Path

import pytest
import torch

from itpn.engine import device_batch
from itpn.engine.distributed import World
from itpn.engine.run import Run
from itpn.errors import UserError
from tests.engine.toy import Toy


@pytest.mark.parametrize(
    ("batch_size", "ranks", "size", "message"),
    [
        (
            100,
            2,
            16,
            "--batch-size 100 is not a multiple of 2 ranks x --device-batch 16; the nearest are 96 and 128",
        ),
        (5, 2, None, "--batch-size 5 is not a multiple of 2 ranks; the nearest are 4 and 6"),
        (8, 1, 16, "--batch-size 8 is not a multiple of 1 rank x --device-batch 16; the smallest is 16"),
    ],
)
def test_a_batch_that_does_not_divide(batch_size: int, ranks: int, size: int | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        device_batch.check_division(batch_size, ranks, size)
    assert str(error.value) == message


def settle(run: Run, share: int, given: int | None = None) -> int:
    images = torch.zeros(512, 4)
    toy = Toy()
    return device_batch.settle(
        toy, lambda size: {"images": images[:size]}, run, share=share, given=given, precision=torch.float32
    )


@pytest.mark.parametrize(("share", "expected"), [(256, 16), (8, 8), (20, 10), (17, 1)])
def test_default_on_a_cpu(tmp_path: Path, share: int, expected: int) -> None:
    assert settle(Run(tmp_path, {}, World(0, 1, torch.device("cpu"))), share) == expected


def test_halved_until_it_fits_and_then_fixed(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path, {}, World(0, 1, torch.device("cuda")))
    tried: list[int] = []

    def fits(objective, batch, device, precision) -> bool:
        tried.append(len(batch["images"]))
        return tried[-1] <= 100

    monkeypatch.setattr(device_batch, "step_fits", fits)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert settle(run, 1000) == 50
    assert tried == [500, 250, 125, 50]
    assert settle(run, 1000) == 50
    assert len(tried) == 4


def test_trying_a_step_leaves_no_trace() -> None:
    toy = Toy()
    state = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    toy.begin_step(0, 1)
    forward = toy.forward

    def counting(batch):
        toy.steps_seen += 1
        if len(batch["images"]) > 4:
            raise torch.OutOfMemoryError("no room")
        return forward(batch)

    toy.forward = counting
    batch = {"images": torch.zeros(8, 4), "target": torch.zeros(8)}
    fits = [
        device_batch.step_fits(toy, device_batch.first(batch, size), torch.device("cpu"), torch.float32)
        for size in (8, 4)
    ]
    assert fits == [False, True]
    assert all(tensor.equal(state[name]) for name, tensor in toy.state_dict().items())
    assert all(parameter.grad is None for parameter in toy.parameters())
