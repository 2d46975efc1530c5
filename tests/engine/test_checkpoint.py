import json
from pathlib import Path

import pytest
import torch
from torch import nn

from itpn.engine import checkpoint
from itpn.engine.optim import AdamWConfig, adamw
from itpn.errors import UserError


def trained(seed: int = 0, width: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width))
    optimizer = adamw(model, AdamWConfig())
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(root: Path, step: int, seed: int = 0) -> Path:
    model, optimizer = trained(seed)
    return checkpoint.save(
        root,
        step,
        checkpoint.model_tensors(model),
        checkpoint.optimizer_tensors(optimizer),
        config={"name": "x"},
        portable={},
        progress={"losses": [0.5]},
    )


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    directory = save(tmp_path, 7)
    saved_model, saved_optimizer = trained()
    model, optimizer = trained(seed=1)
    checkpoint.load_model(directory, model)
    checkpoint.load_optimizer(directory, optimizer)
    assert all(map(torch.equal, model.state_dict().values(), saved_model.state_dict().values()))
    loaded, expected = optimizer.state_dict()["state"], saved_optimizer.state_dict()["state"]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[i][key], expected[i][key]) for i in loaded for key in expected[i])
    state = checkpoint.read_state(directory)
    assert (state["step"], state["config"], state["progress"]) == (7, {"name": "x"}, {"losses": [0.5]})


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert sorted(path.name for path in one.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert all(path.read_bytes() == (other / path.name).read_bytes() for path in one.iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, damage, name: str) -> None:
    newest = [save(tmp_path, step) for step in (1, 2)][-1]
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == 2
    assert not said
    damage(newest / name)
    assert checkpoint.latest(tmp_path, said.append) == 1
    assert len(said) == 1 and "00000002" in said[0] and name in said[0]


@pytest.mark.parametrize(
    ("content", "step"), [(b"\xff\xfe", 4), (b"", 4), (b"00000001", 4), (b"00000003", 3), (b"00000009", 4)]
)
def test_a_damaged_last_costs_nothing(tmp_path: Path, content: bytes, step: int) -> None:
    """It cannot be told from a change of mind where it names another checkpoint: that is said."""
    root = tmp_path / "checkpoints"
    for older in (2, 3, 4):
        save(root, older)
    (root / "last").write_bytes(content)
    said: list[str] = []
    assert checkpoint.latest(root, said.append) == step
    assert len(said) == (content != b"00000009") and all("checkpoints/last" in line for line in said)


def test_a_checkpoint_that_the_disk_does_not_give_back(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)
    newest, read = save(tmp_path, 2), checkpoint._hash

    def failing(path: Path) -> str:
        if path == newest / "model.safetensors":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint, "_hash", failing)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) == 1
    assert "model.safetensors: Input/output error" in said[0]


def test_others_may_read_what_they_may_read_of_us(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


def test_nothing_whole_is_left(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match="no undamaged checkpoint is left"):
        checkpoint.latest(tmp_path, print)


def test_last_decides_and_can_be_set_back(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path, print) is None
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last").write_text("00000001\n")
    assert checkpoint.latest(tmp_path, print) == 1
    (tmp_path / "last").unlink()
    assert checkpoint.latest(tmp_path, print) == 2


@pytest.mark.parametrize("step", [1, 2])
def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch, step: int) -> None:
    save(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, step, seed=1)
    assert checkpoint.latest(tmp_path, pytest.fail) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "last"]


def test_a_save_that_was_killed_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".writing-00000002").mkdir()
    assert checkpoint.latest(tmp_path, pytest.fail) == 1
    assert save(tmp_path, 2).is_dir()
    assert not (tmp_path / ".writing-00000002").exists()


def test_prune_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 9):
        (tmp_path / f"{step:08d}").mkdir()
    checkpoint.prune(tmp_path, 7, keep_last=2, keep_every=3)
    # Step 8 is from before going back to 7: it is written again, and must not push out what is older.
    assert [int(path.name) for path in sorted(tmp_path.iterdir())] == [3, 6, 7, 8]


def test_another_model(tmp_path: Path) -> None:
    model, _ = trained(width=4)
    with pytest.raises(
        UserError, match=r"another model.*0.weight is \[3, 2\] there, \[4, 2\] here.*its own --run-dir"
    ):
        checkpoint.load_model(save(tmp_path, 1), model)


def test_a_parameter_frozen_since(tmp_path: Path) -> None:
    model, _ = trained()
    model[1].requires_grad_(False)
    with pytest.raises(UserError, match=r"trained 1\.(weight|bias), which is frozen now"):
        checkpoint.load_optimizer(save(tmp_path, 1), adamw(model, AdamWConfig()))


def test_a_later_format(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    directory = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="update itpn"):
        checkpoint.read_state(directory)


def test_a_changed_step_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 5}))
    with pytest.raises(checkpoint.DamagedError, match="checksum"):
        checkpoint.read_state(path.parent)
