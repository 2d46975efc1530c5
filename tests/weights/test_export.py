"""`itpn export`: what other programs read gives what the model gives, at any batch, or nothing is written."""

import errno
import importlib.util
import json
from collections.abc import Mapping

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import itpn
from itpn import cli
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.nn.hivit import HiViT
from itpn.nn.pyramid import Model, ModelConfig, PyramidConfig
from itpn.outputs import MANIFEST, writing
from itpn.weights import export, files
from tests.saved import save
from tests.toys import toy_backbone, toy_objective

ENDINGS = {"onnx": "onnx", "torch-export": "pt2", "safetensors": "safetensors"}
RELATIVE = {"relative_position_bias": True, "layer_scale": 0.5}
SOURCES = {
    "plain": {"drop_path": 0.5},
    "relative": RELATIVE
    | {"relative_image_size": 48, "relative_resampling": "geometric", "position_resampling": "published"},
    "decomposed": RELATIVE | {"relative_position_decomposed": True},
    "fast": RELATIVE | {"layers": "fast", "mlp_ratio": None},
}


def stirred(module: nn.Module) -> nn.Module:
    """With random numbers in every parameter, those that start as zeros too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@pytest.fixture
def source(tmp_path):
    """Writes a model by its name in SOURCES, with a classifier if asked for; returns its path."""

    def write(name: str = "plain", classes: int | None = None):
        backbone = toy_backbone(**SOURCES[name])
        path = tmp_path / "source.safetensors"
        if classes:
            model = Classifier(HiViT(backbone), ClassifierConfig(num_classes=classes))
            config = ModelConfig(backbone=backbone, pyramid=None)
            return save(path, stirred(model), config, classifier=model.config)
        layers = "fast" if name == "fast" else "hivit"
        pyramid = PyramidConfig(width=24, depth=1, mlp_ratio=2.0, layers=layers)
        config = ModelConfig(backbone=backbone, pyramid=pyramid)
        return save(path, stirred(Model(config)), config)

    return write


def complaint(capsys, *arguments: object) -> str:
    assert cli.main(["export", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def outputs_of(path, images: Tensor) -> Mapping[str, Tensor]:
    """What another program makes of a file."""
    match path.suffix:
        case ".onnx":
            session = onnxruntime.InferenceSession(path)
            names = [output.name for output in session.get_outputs()]
            found = session.run(names, {"images": images.numpy()})
            return dict(zip(names, map(torch.from_numpy, found), strict=True))
        case ".pt2":
            outputs = torch.export.load(path).module()(images)
        case ".safetensors":
            outputs = itpn.load(path)(images)
    return {"logits": outputs} if isinstance(outputs, Tensor) else outputs


@pytest.mark.parametrize(
    ("name", "classes", "part", "size", "names"),
    [
        ("plain", None, "pyramid", "96x64", ["p4", "p8", "p16"]),
        ("relative", None, "backbone", "96", ["c4", "c8", "c16"]),
        ("decomposed", 5, "classifier", "64x96", ["logits"]),
        ("fast", None, "pyramid", "64", ["p4", "p8", "p16"]),
    ],
)
@pytest.mark.parametrize("format", ENDINGS)
def test_other_programs_get_what_the_model_gives(
    capsys, tmp_path, source, format, name, classes, part, size, names
):
    if format == "safetensors":
        size = size.split("x")[0]
    height, width = map(int, (size.split("x") * 2)[:2])
    path, out = source(name, classes), tmp_path / f"out.{ENDINGS[format]}"
    given = ["export", str(path), str(out), "--format", format, "--part", part, "--image-size", size]
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert str(out) in said and f"[batch, 3, {height}, {width}]" in said
    features = {"backbone": "stages", "pyramid": "pyramid", "classifier": None}[part]
    model = itpn.load(path, features=features).eval()
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected, found = model(images), outputs_of(out, images)
        expected = {"logits": expected} if isinstance(expected, Tensor) else expected
        assert list(found) == names == list(expected)
        for key in names:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
            assert f"{key}: float32 [batch, {', '.join(map(str, expected[key].shape[1:]))}]" in said
    assert {file.name for file in tmp_path.iterdir()} == {"source.safetensors", out.name, MANIFEST}


def test_five_levels(capsys, tmp_path, source):
    path, out = source(), tmp_path / "five.pt2"
    assert cli.main(["export", str(path), str(out), "--levels", "5"]) == 0
    images = torch.randn(3, 3, 64, 64)
    found = outputs_of(out, images)
    assert list(found) == ["p4", "p8", "p16", "p32", "p64"]
    for name, level in itpn.load(path, num_levels=5)(images).items():
        torch.testing.assert_close(found[name], level)
    assert "p64: float32 [batch, 24, 1, 1]" in capsys.readouterr().out


def test_several_sizes_are_a_file_each(tmp_path, source):
    path, out = source("relative"), tmp_path / "part.safetensors"
    assert cli.main(["export", str(path), str(out), "--image-size", "64", "96x96", "64"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "source.safetensors",
        "part-64x64.safetensors",
        "part-96x96.safetensors",
        MANIFEST,
    }
    assert itpn.load(tmp_path / "part-96x96.safetensors").backbone.config.image_size == 96


def test_mean_and_std_travel_along(tmp_path):
    objective = toy_objective(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    path = save(tmp_path / "all.safetensors", objective, objective.model.config, objective=objective.config)
    outs = {format: tmp_path / f"out.{ending}" for format, ending in ENDINGS.items()}
    for out in outs.values():
        assert cli.main(["export", str(path), str(out)]) == 0
    in_onnx = {item.key: json.loads(item.value) for item in onnx.load(outs["onnx"]).metadata_props}
    extra = {"itpn.json": ""}
    torch.export.load(outs["torch-export"], extra_files=extra)
    for metadata in (
        in_onnx,
        json.loads(extra["itpn.json"]),
        files.read(outs["safetensors"]).config["input"],
    ):
        assert (metadata["mean"], metadata["std"]) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])
    assert in_onnx["part"] == "pyramid" and in_onnx["image_size"] == [64, 64]
    assert {entry.version for entry in onnx.load(outs["onnx"]).opset_import if not entry.domain} == {18}


@pytest.mark.parametrize("part", ["backbone", "pyramid"])
def test_a_part_as_safetensors_is_the_sources_own_tensors(tmp_path, part):
    out = tmp_path / "part.safetensors"
    assert cli.main(["export", str(files.NANO), str(out), "--part", part]) == 0
    whole, kept = files.read(files.NANO), files.read(out)
    assert kept.parts == {"backbone", part} and (kept.config["model"]["pyramid"] is None) == (
        part != "pyramid"
    )
    assert list(kept.tensors) == [name for name in whole.tensors if name.split(".")[0] in kept.parts]
    for name, tensor in kept.tensors.items():
        assert tensor.dtype == whole.tensors[name].dtype
        assert torch.equal(tensor, whole.tensors[name])


def test_where_a_converted_file_came_from_is_kept(tmp_path, source):
    path, out = source(), tmp_path / "part.safetensors"
    weights, origin = files.read(path), {"file": "theirs.pth", "sha256": "0", "family": "f", "left_out": {}}
    files.save(path, weights.tensors, weights.config, origin)
    assert cli.main(["export", str(path), str(out), "--part", "backbone"]) == 0
    assert files.read(out).source == origin


def test_the_largest_part_is_the_default(capsys, tmp_path, source):
    for classes, said in ((None, "pyramid"), (4, "classifier")):
        assert cli.main(["export", str(source(classes=classes)), str(tmp_path / "out.safetensors")]) == 0
        assert f"safetensors, {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("out.pt2 --part classifier", "holds no classifier; --part can be backbone or pyramid"),
        ("out.pth", "give --format, or one of the extensions .safetensors, .onnx, .pt2"),
        ("out.onnx --format torch-export", "must end in .pt2 for --format torch-export"),
        ("nowhere/out.onnx", "there is no folder"),
        ("out.pt2 --image-size 64*64", "--image-size '64*64' is neither"),
        ("out.pt2 --image-size 0", "--image-size '0' is neither"),
        ("out.pt2 --image-size 60x64", "image of 60 x 64 pixels: each side must be a multiple of the unit"),
        ("out.pt2 --image-size 60", "60 is not a multiple of the unit of 16 pixels"),
        ("out.pt2 --levels 5 --image-size 32", "five levels need 64 pixels"),
        ("out.pt2 --levels 5 --part backbone", "--levels 5 is for --part pyramid"),
        ("out.safetensors --levels 5", "--levels 5 is for --part pyramid"),
        ("out.safetensors --image-size 96x64", "only stores tables for square images"),
        ("source.safetensors", "is the source itself"),
        ("out.onnx --format jpeg", "--format"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, source, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in complaint(capsys, source().name, *arguments.split())
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_sources_that_are_none(capsys, tmp_path):
    assert "there is no file" in complaint(capsys, tmp_path / "none.safetensors", tmp_path / "out.pt2")
    torch.save({}, tmp_path / "theirs.pth")
    assert "itpn convert" in complaint(capsys, tmp_path / "theirs.pth", tmp_path / "out.pt2")


def test_without_the_onnx_packages(capsys, tmp_path, monkeypatch, source):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    line = complaint(capsys, source(), tmp_path / "out.onnx")
    assert line == "itpn: ONNX needs onnxscript: pip install 'itpn[onnx]'"


def test_what_onnx_cannot_hold(capsys, tmp_path, monkeypatch, source):
    path, out = source("relative"), tmp_path / "out.onnx"
    said = complaint(capsys, path, out, "--image-size", "96x64")
    assert "ONNX cannot express this model at 96 x 64 pixels" in said and "linalg_inv" in said
    monkeypatch.setattr(export, "ONNX_BYTES", 1000)
    assert "holds at most 2 GiB" in complaint(capsys, path, out)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_what_reads_back_otherwise_is_not_kept(capsys, tmp_path, monkeypatch, source, factor):
    out = tmp_path / "out.pt2"
    with writing(out) as file:
        file.write_text("older")

    def off(path):
        run = export.run_of(torch.export.load(path).module())
        return lambda images: {name: value * factor for name, value in run(images).items()}

    monkeypatch.setattr(export, "read_torch", off)
    said = complaint(capsys, source(), out)
    assert "was not kept" in said and "p4, p8, p16 of a batch of 1 differ from PyTorch" in said
    assert out.read_text() == "older"
    assert {file.name for file in tmp_path.iterdir()} == {"source.safetensors", "out.pt2", MANIFEST}


def test_a_full_disk_leaves_the_older_file(capsys, tmp_path, monkeypatch, source):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    path, out = source(), tmp_path / "out.safetensors"
    with writing(out) as file:
        file.write_text("older")
    monkeypatch.setattr("itpn.engine.checkpoint.sync", full)
    assert "No space left on device" in complaint(capsys, path, out)
    assert out.read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_of_the_users_is_kept(capsys, tmp_path, source):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert f"{out} is not replaced" in complaint(capsys, source(), out)
    assert out.read_text() == "mine"


def test_a_run_directory_with_its_decoder(tmp_path):
    objective = toy_objective()
    step = tmp_path / "run" / "checkpoints" / "00000007"
    step.mkdir(parents=True)
    model = objective.model.config
    save(step / "model.safetensors", objective, model, objective=objective.config)
    (step.parent / "last").write_text("00000007\n")
    out = tmp_path / "out.safetensors"
    assert cli.main(["export", str(tmp_path / "run"), str(out)]) == 0
    assert files.read(out).parts == {"backbone", "pyramid"}
    assert files.read(out).part("model", ModelConfig) == model
