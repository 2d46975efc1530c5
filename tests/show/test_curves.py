import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from itpn.errors import UserError
from itpn.show.curves import _running_mean, _series, loss_curves, read_metrics


def write_run(path: Path, num_steps: int = 60, *, mfm: bool = False, offset: float = 0.0) -> Path:
    with path.open("w") as file:
        for step in range(num_steps):
            line = {
                "step": step,
                "epoch": step / 10,
                "loss": 1 / (1 + step) + offset,
                "lr": 1e-3,
                "arm": "nano",
            }
            if mfm:
                line |= {"pixel": 0.7 / (1 + step), "feature": 0.3 / (1 + step)}
            file.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                file.write(json.dumps({"step": step, "knn_top1": step / 100}) + "\n")
    return path


def coloured_pixels(picture: Path) -> int:
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    return int((pixels.max(2) - pixels.min(2) > 60).sum())


def matplotlib_state() -> tuple[str | None, dict[str, object]]:
    # Reading the parameter "backend" would itself choose one.
    settings = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
    return matplotlib.get_backend(auto_select=False), settings


def test_a_run_is_drawn_and_nothing_global_changes(tmp_path: Path):
    before = matplotlib_state()
    out = tmp_path / "pictures" / "curves.png"
    loss_curves({"nano": [write_run(tmp_path / "metrics.jsonl")]}, out)
    picture = Image.open(out).convert("RGB")
    assert picture.width > picture.height > 300
    assert picture.getpixel((2, picture.height // 2)) == (255, 255, 255)
    assert coloured_pixels(out) > 2000
    assert matplotlib_state() == before


def test_pictures_are_repeatable(tmp_path: Path):
    run = write_run(tmp_path / "metrics.jsonl")
    for name in ("a.png", "b.png"):
        loss_curves({"nano": [run]}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_arms_have_colours_and_all_seeds_are_drawn(tmp_path: Path):
    first, second = (write_run(tmp_path / f"{o}.jsonl", offset=o) for o in (0.0, 0.5))
    third = write_run(tmp_path / "mfm.jsonl", mfm=True)

    def size_and_ink(runs: dict[str, list[Path]]) -> tuple[tuple[int, int], int]:
        loss_curves(runs, tmp_path / "out.png", ["loss"])
        return Image.open(tmp_path / "out.png").size, coloured_pixels(tmp_path / "out.png")

    one, both = size_and_ink({"pixel": [first]}), size_and_ink({"pixel": [first, second]})
    assert one[0] == both[0] and both[1] > one[1]
    loss_curves({"pixel": [first], "mfm": [third]}, tmp_path / "arms.png", ["loss"])
    pixels = np.asarray(Image.open(tmp_path / "arms.png").convert("RGB")).astype(int)
    assert (pixels[..., 2] - pixels[..., 0] > 100).any() and (pixels[..., 0] - pixels[..., 2] > 100).any()


def test_parts_get_panels_only_where_there_are_several(tmp_path: Path):
    loss_curves({"pixel": [write_run(tmp_path / "a.jsonl")]}, tmp_path / "few.png")
    loss_curves({"mfm": [write_run(tmp_path / "b.jsonl", mfm=True)]}, tmp_path / "many.png")
    assert Image.open(tmp_path / "many.png").height > Image.open(tmp_path / "few.png").height


def test_lines_of_one_step_are_merged_and_the_later_wins(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "loss": 3.0}\n\n{"step": 1, "loss": NaN, "lr": 0.5}\n'
        '{"step": 2.0, "loss": 4, "note": "resumed"}\n'
        '{"step": 2, "knn_top1": 0.25, "big": 1' + "0" * 5000 + "}\n"
    )
    assert read_metrics(path) == {1: {"step": 1, "lr": 0.5}, 2: {"step": 2, "loss": 4, "knn_top1": 0.25}}
    assert list(read_metrics(path)) == [1, 2]


def test_epochs_are_interpolated_where_a_line_lacks_them():
    run = {0: {"epoch": 0.0}, 10: {"epoch": 1.0, "loss": 2.0}, 15: {"knn_top1": 0.5}, 20: {"epoch": 2.0}}
    x, y = _series(run, "knn_top1", "epoch")
    assert x.tolist() == [1.5] and y.tolist() == [0.5]


@given(st.lists(st.floats(-100, 100), max_size=700))
def test_running_mean_is_the_mean_over_the_points_around(values: list[float]):
    reach = len(values) // 100
    expected = [np.mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    np.testing.assert_allclose(_running_mean(np.array(values)), np.array(expected), atol=1e-9)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[1, 2]",
        b"17",
        b"null",
        b'{"loss": 1.0}',
        b'{"step": "1"}',
        b'{"step": -1}',
        b'{"step": 1.5}',
        b'{"step": true}',
        b'{"step": NaN}',
        b'{"step": 1e999}',
        b'{"step": 3, "loss": 0.1{"step": 4}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_damaged_line_is_named(tmp_path: Path, line: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1.0}\n' + line + b'\n{"step": 5, "loss": 1.0}\n')
    with pytest.raises(UserError) as caught:
        loss_curves({"run": [path]}, tmp_path / "out.png")
    assert f"{path}, line 2" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.png").exists()


def test_a_line_still_being_written_is_passed_over(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    assert read_metrics(path) == {0: {"step": 0, "loss": 1.0}}


def test_missing_files_and_keys_are_named(tmp_path: Path):
    out = tmp_path / "out.png"
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        loss_curves({"run": [tmp_path / "nowhere.jsonl"]}, out)
    with pytest.raises(UserError, match="cannot read"):
        loss_curves({"run": [tmp_path]}, out)
    run = write_run(tmp_path / "metrics.jsonl")
    with pytest.raises(
        UserError, match=r"metrics\.jsonl has grad_norm; found epoch, knn_top1, loss, lr, step"
    ):
        loss_curves({"run": [run]}, out, ["loss", "grad_norm"])
    run.write_text("")
    with pytest.raises(UserError, match="has loss, step; found nothing"):
        loss_curves({"run": [run]}, out)
