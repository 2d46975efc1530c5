"""`itpn train CONFIG [--field value …]`: trains; the same command again goes on where it stopped."""

from itpn.commands.config import read_config
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.lookup import Recipe
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment
from itpn.tasks.classify import classify
from itpn.tasks.detect import detect
from itpn.tasks.pretrain import pretrain
from itpn.tasks.segment import segment


def run(arguments: list[str]) -> None:
    train(read_config("itpn train", arguments))


def train(recipe: Recipe) -> None:
    """To the recipe's end, or as far as it lets a run go."""
    match recipe:
        case Pretrain():
            pretrain(recipe)
        case Classify():
            classify(recipe)
        case Detect():
            detect(recipe)
        case Segment():
            segment(recipe)
