from pathlib import Path

import pytest
import torch

from itpn.data.classes import check_same_classes, describe_balance, names_for, readable
from itpn.data.images import ImageList, find_images
from itpn.data.source import Names
from itpn.errors import UserError


def of_classes(**counts: int) -> ImageList:
    names = [f"{name}/{i}.jpg" for name, count in counts.items() for i in range(count)]
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    return ImageList(
        root=Path("x"),
        names=Names(names),
        labels=torch.tensor(labels),
        class_names=tuple(counts),
        description=f"{len(names)} images",
    )


def test_classes_of_like_sizes_take_one_line() -> None:
    assert describe_balance(of_classes(dog=50, cat=10, cow=20, pig=30)) == (
        "4 classes: smallest cat (10 images), median cow (20), largest dog (50)"
    )


def test_unlike_sizes_give_a_hint() -> None:
    first, hint = describe_balance(of_classes(n01440764=1_300, cat=200)).splitlines()
    assert first == "2 classes: smallest cat (200 images), median cat (200), largest tench (1,300)"
    assert hint.startswith("tench has 6.5 times the images of cat: ")


def test_a_class_without_images_is_named() -> None:
    assert describe_balance(of_classes(dog=5, cat=0)).splitlines()[1].startswith("cat has none: ")


def test_images_without_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match="classes are needed, but found 1 images without class folders"):
        describe_balance(find_images(tmp_path))


def test_synsets_get_names_in_words() -> None:
    assert readable(("n01440764", "n02504458", "n99999999", "cat")) == (
        "tench",
        "African elephant",
        "n99999999",
        "cat",
    )
    assert readable(("cat", "dog")) == ("cat", "dog")


def test_names_in_words_are_unique() -> None:
    cranes = "n02012849", "n03126707", "crane"
    assert readable(cranes) == ("crane (n02012849)", "crane (n03126707)", "crane")
    assert readable(("n03710637", "n03710721")) == ("maillot (n03710637)", "maillot (n03710721)")
    from timm.data import ImageNetInfo

    assert len(set(readable(tuple(ImageNetInfo().label_names())))) == 1000


def test_a_model_s_classes_have_names() -> None:
    assert names_for(("n01440764", "cat"), 2) == ("tench", "cat")
    assert names_for(None, 3) == ("class 0", "class 1", "class 2")
    imagenet = names_for(None, 1000)
    assert (imagenet[0], imagenet[134], imagenet[999]) == ("tench", "crane (n02012849)", "toilet tissue")
    assert names_for(tuple(map(str, range(1000))), 1000)[7] == "7"


def test_the_same_classes_agree() -> None:
    assert check_same_classes(of_classes(dog=5, cat=1), of_classes(dog=1, cat=3)) == ("dog", "cat")


def test_other_classes_are_listed() -> None:
    train = of_classes(both=1, **{f"only{i:02}": 1 for i in range(23)})
    listed = ", ".join(f"only{i:02}" for i in range(20))
    with pytest.raises(UserError, match=rf"only in train: {listed}, and 3 more; only in val: none$"):
        check_same_classes(train, of_classes(both=1))
    with pytest.raises(UserError, match=r"or remove those classes; only in train: none; only in val: dog$"):
        check_same_classes(of_classes(cat=1), of_classes(cat=1, dog=1))


def test_another_order_is_an_error() -> None:
    with pytest.raises(UserError, match=r"another order.*classes\.txt"):
        check_same_classes(of_classes(dog=5, cat=1), of_classes(cat=5, dog=1))


def test_images_of_one_class_cannot_tell_how_good_features_are() -> None:
    with pytest.raises(UserError, match="all are of one class, 'cat', so accuracy says nothing"):
        check_same_classes(of_classes(dog=5, cat=1), of_classes(dog=0, cat=3))


def test_names_of_classes_are_harmless_to_a_terminal() -> None:
    odd, shown = "a\n\x1b[31m[bold]b", r"a\n\x1b[31m[bold]b"
    assert f"smallest {shown} (1 images)" in describe_balance(of_classes(dog=2, **{odd: 1}))
    with pytest.raises(UserError) as caught:
        check_same_classes(of_classes(dog=2, **{odd: 1}), of_classes(dog=2))
    assert str(caught.value).endswith(f"only in train: {shown}; only in val: none")
