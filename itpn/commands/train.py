"""`itpn train CONFIG [--field value …]`: pre-trains; the same command again goes on where it stopped."""

from itpn.commands.config import read_config
from itpn.tasks.pretrain import pretrain


def run(arguments: list[str]) -> None:
    pretrain(read_config("itpn train", arguments))
