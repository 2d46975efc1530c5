"""Folders and the Hub, without a network: what is saved loads again, with a card that tells what it is."""

import json
import socket

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub import constants as hub_constants

import itpn
from itpn.errors import UserError
from itpn.heads.classify import ClassifierConfig
from itpn.hub import as_json
from itpn.models import ClassifierModel, FeatureModel
from itpn.nn.hivit import HiViT
from itpn.nn.pyramid import Model
from itpn.weights import files
from tests.toys import toy_backbone, toy_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refused(*_):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def models():
    torch.manual_seed(0)
    head = ClassifierConfig(num_classes=7)
    return {
        "pyramid": FeatureModel(toy_model()),
        "stages": FeatureModel(toy_model(pyramid=False, relative_position_bias=True), "stages"),
        "classifier": ClassifierModel(HiViT(toy_backbone()), head),
    }


@pytest.mark.parametrize("kind", models())
def test_a_folder_round_trips(tmp_path, kind):
    model, folder = models()[kind].eval(), tmp_path / "folder"
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    images = torch.randn(1, 3, 64, 64)
    again = [
        type(model).from_pretrained(folder),
        itpn.load(folder),
        itpn.load(str(folder / "model.safetensors")),
    ]
    for other in again:
        assert type(other) is type(model) and not other.training
        assert other.file_config() == model.file_config()
        if kind == "classifier":
            assert torch.equal(other(images), model(images))
        else:
            assert all(torch.equal(other(images)[name], level) for name, level in model(images).items())
    assert json.loads((folder / "config.json").read_text()) == files.read(folder).config


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_of_another_model_is_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is not replaced"):
        itpn.load(files.NANO).save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_config_that_a_user_changed_is_kept(tmp_path):
    model = itpn.load(files.NANO)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mine": 1}))
    before = config.read_text()
    with pytest.raises(UserError, match=r"config.json is not replaced.*move it away"):
        model.save_pretrained(tmp_path)
    assert config.read_text() == before
    config.rename(tmp_path / "mine.json")
    model.save_pretrained(tmp_path)


def test_a_folder_of_ours_is_saved_to_again(tmp_path):
    for features in ("pyramid", "stages"):
        itpn.load(files.NANO, features=features).save_pretrained(tmp_path)
    assert itpn.load(tmp_path).features == "stages"


def test_saved_as_stages_the_pyramid_is_left_out(tmp_path):
    model = itpn.load(files.NANO, features="stages")
    model.save_pretrained(tmp_path / "stages")
    assert files.read(tmp_path / "stages").parts == {"backbone"}
    assert itpn.load(tmp_path / "stages").features == "stages"


def test_the_card_tells_what_it_is(tmp_path):
    model = itpn.load(files.NANO)
    model.save_pretrained(tmp_path, model_card_kwargs={"license": "cc-by-4.0"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "itpn"
    assert {"arxiv:2211.12735", "feature-pyramid"} <= set(card.data.tags)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    for said in (f"{millions:.2f} M", "itpn_nano", "48, 96, 192", "96 x 96", "2211.12735", "itpn.load("):
        assert said in card.text
    classifier = models()["classifier"].generate_model_card()
    assert classifier.data.pipeline_tag == "image-classification"
    assert classifier.data.license == "unknown"
    assert "| classes | 7 |" in classifier.text


def test_a_readme_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    models()["pyramid"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_uploads_the_folder(tmp_path, monkeypatch):
    uploaded = {}

    def create_repo(self, repo_id, **_):
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **_):
        weights = files.read(folder_path)
        uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir()), weights
        return "https://huggingface.co/commit"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = models()["pyramid"]
    assert model.push_to_hub("someone/toy").endswith("commit")
    names, weights = uploaded["someone/toy"]
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    model, asked = models()["pyramid"], []
    model.save_pretrained(tmp_path / "there")

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision")))
        return str(tmp_path / "there" / filename)

    monkeypatch.setattr("itpn.hub.hf_hub_download", download)
    assert torch.equal(itpn.load("someone/toy").backbone.position, model.backbone.position)
    FeatureModel.from_pretrained("someone/toy", revision="v2")
    assert asked == [("someone/toy", "model.safetensors", None), ("someone/toy", "model.safetensors", "v2")]


def test_what_is_neither_here_nor_there_is_said():
    with pytest.raises(UserError, match=r"someone/nothing is no file or folder here, and .* the Hub"):
        itpn.load("someone/nothing")
    with pytest.raises(UserError, match="no file"):
        itpn.load("nothing")


def test_a_class_loads_only_its_own_kind(tmp_path):
    models()["pyramid"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no 'classifier'"):
        ClassifierModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("features", "num_levels"), [("tokens", 3), ("stages", 3), ("pyramid", 5)])
def test_what_a_model_gives_is_saved_with_it(tmp_path, features, num_levels):
    model = itpn.create_model("itpn_pico", features=features, num_levels=num_levels)
    model.save_pretrained(tmp_path)
    for again in (itpn.load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert (again.features, again.num_levels) == (features, num_levels)


def test_normalisation_and_origin_are_kept(tmp_path):
    """A converted student of CLIP: its images had a mean of 0.5."""
    model = toy_model()
    config = {"model": as_json(model), "objective": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    source = {"file": "theirs.pth", "sha256": "0" * 64, "family": "official-clip", "left_out": {}}
    files.save(tmp_path / "a.safetensors", Model(model).state_dict(), config, source)
    itpn.load(tmp_path / "a.safetensors").save_pretrained(tmp_path / "folder")
    again = itpn.load(tmp_path / "folder")
    assert (again.mean, again.std, again.source) == ((0.5,) * 3, (0.25,) * 3, source)
    card = (tmp_path / "folder/README.md").read_text()
    assert "mean 0.5, 0.5, 0.5 and deviation 0.25" in card and "theirs.pth (official-clip)" in card


def test_classes_and_image_size_are_kept(tmp_path):
    model = models()["classifier"]
    model.classes, model.input_size = tuple("abcdefg"), (32, 64)
    model.save_pretrained(tmp_path / "first")
    itpn.load(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = itpn.load(tmp_path / "second")
    assert (again.classes, again.input_size) == (tuple("abcdefg"), (32, 64))
    assert itpn.load(tmp_path / "second", image_size=96).input_size is None  # it is the backbone's then
    assert itpn.load(tmp_path / "second", features="stages").input_size == (32, 64)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"classes": "abcdefg"}, "its classes are no list of names"),
        ({"classes": [*"abcdef", 7]}, "its classes are no list of names"),
        ({"classes": list("abc")}, "it names 3 classes, but predicts 7"),
        ({"input": [1]}, "its mean or std are no numbers"),
        ({"input": {"image_size": 64}}, "its image size is 64, not"),
        ({"input": {"image_size": [64]}}, "its image size is"),
        ({"input": {"image_size": [64, -64]}}, "its image size is"),
        ({"input": {"image_size": [64, 1 << 40]}}, "its image size is"),
        ({"input": {"image_size": [64, True]}}, "its image size is"),
        ({"input": {"image_size": "\x1b[2J" * 99}}, r"its image size is \\x1b\[2J"),
    ],
)
def test_metadata_that_make_no_sense_are_an_error(tmp_path, changed, words):
    model = models()["classifier"]
    path = tmp_path / "odd.safetensors"
    files.save(path, model.state_dict(), model.file_config() | changed)
    with pytest.raises(UserError, match=words) as raised:
        itpn.load(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300 + len(str(path))
