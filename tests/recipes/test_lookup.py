import pytest

from itpn.errors import UserError
from itpn.recipes import lookup

RECIPE = "from itpn.recipes.pretrain import demo\n\nconfig = demo(epochs=2)\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without a checkout around it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_comes_first_then_configs_here_then_the_packaged_ones(elsewhere):
    packaged = lookup.find("pretrain_demo")
    assert packaged.is_relative_to(lookup.packaged())
    local = elsewhere / "configs" / "deep" / "pretrain_demo.py"
    local.parent.mkdir(parents=True)
    local.write_text(RECIPE)
    assert lookup.find("pretrain_demo").samefile(local)
    beside = elsewhere / "pretrain_demo"
    beside.write_text(RECIPE)
    assert lookup.find("pretrain_demo").samefile(beside)


@pytest.mark.parametrize("name", ["pretrain_demo", "pretrain_demo.py", "configs/start/pretrain_demo.py"])
def test_a_published_path_is_found_from_anywhere(name):
    assert lookup.find(name).samefile(lookup.packaged() / "start" / "pretrain_demo.py")


def test_an_unknown_name_comes_with_the_nearest():
    with pytest.raises(UserError, match=r"'pretrian_demo'; the nearest are pretrain_demo"):
        lookup.find("pretrian_demo")
    with pytest.raises(UserError, match="itpn configs"):
        lookup.find("zzzzzzz")


def test_two_configs_of_one_name_are_refused(elsewhere):
    for folder in ("a", "b"):
        (elsewhere / "configs" / folder).mkdir(parents=True)
        (elsewhere / "configs" / folder / "mine.py").write_text(RECIPE)
    with pytest.raises(UserError, match=r"a.mine\.py and .*b.mine\.py"):
        lookup.find("mine")


def test_a_recipe_is_named_after_its_file(elsewhere):
    (elsewhere / "my-run.py").write_text(RECIPE)
    recipe = lookup.load(lookup.find("my-run.py"))
    assert recipe.name == "my-run"
    assert recipe.loop.epochs == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from itpn.recipes.pretrain import demo\nconfig = demo(epoch=3)\n", "line 2: .*epoch"),
        ("config = (\n", "line 1"),
        ("import no_such_module\n", "line 1: .*no_such_module"),
        ("setting = 3\n", "must set `config` .* sets none"),
        ("config = {}\n", "sets a dict"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(elsewhere, text, words):
    (elsewhere / "mine.py").write_text(text)
    with pytest.raises(UserError, match=rf"mine\.py.*{words}") as error:
        lookup.load(lookup.find("mine.py"))
    assert "\n" not in str(error.value)
