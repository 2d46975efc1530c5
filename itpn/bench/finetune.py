"""`itpn bench finetune`: the step of a config that fine-tunes, as `itpn bench pretrain` measures it."""

from itpn.bench.pretrain import time_steps
from itpn.recipes.classify import Classify


def run(arguments: list[str]) -> None:
    time_steps("itpn bench finetune", arguments, Classify)
