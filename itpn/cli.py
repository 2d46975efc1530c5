"""`itpn COMMAND …`. A command's module, and with it torch, is imported only once the command is known."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from itpn import __version__
from itpn.errors import UserError, printable

COMMANDS = {
    "train": ("itpn.commands.train", "train as a config says; the same command again resumes"),
    "test": ("itpn.commands.test", "how good weights are, on a config's validation images"),
    "predict": ("itpn.commands.predict", "what a model says of images: labels with scores, or embeddings"),
    "replay": ("itpn.commands.replay", "take a step again whose loss or gradient was not finite"),
    "reconstruct": ("itpn.commands.reconstruct", "show what a run fills in where images are masked"),
    "info": ("itpn.commands.info", "a config's, or a file of weights', parts, parameters and multiply-adds"),
    "configs": ("itpn.commands.configs", "list the configs"),
    "convert": ("itpn.commands.convert", "translate a released checkpoint to a file of ours, or back"),
    "export": ("itpn.commands.export", "write a model for other programs: safetensors, ONNX or torch.export"),
    "sample-data": ("itpn.commands.sample_data", "write the sample as image folder, COCO and ADE20K"),
    "shard": (
        "itpn.commands.shard",
        "write images as tar shards, for disks and networks that prefer few files",
    ),
    "check-data": ("itpn.commands.check_data", "find the images that cannot be read, before training does"),
    "bench": ("itpn.commands.bench", "how fast training and loading are, and whether memory is kept"),
    "demo": ("itpn.commands.demo", "pre-train a nano model on the sample and show what it learned"),
}


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables by which users say how OpenMP's threads wait."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Exit status 2 is the user's mistake, told in one line; 130 an interruption."""
    wait_asleep()
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        match name:
            case "-h" | "--help" | "help":
                print(usage())
            case "--version":
                print(f"itpn {__version__}")
            case _:
                importlib.import_module(module_of(name)).run(rest)
    except UserError as error:
        print(f"itpn: {printable(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("itpn: interrupted", file=sys.stderr)
        return 130
    return 0


def wait_asleep() -> None:
    """Lets OpenMP's threads sleep while they wait, not spin, unless the user has chosen.

    It holds in this process if torch is not imported yet, and in those that it starts.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {promise}" for name, (_, promise) in COMMANDS.items()]
    return "\n".join(
        ["usage: itpn COMMAND …", "", *lines, "", "`itpn COMMAND --help` says what a command takes."]
    )


def module_of(name: str) -> str:
    if name in COMMANDS:
        return COMMANDS[name][0]
    near = difflib.get_close_matches(name, COMMANDS, cutoff=0.4) or list(COMMANDS)
    raise UserError(f"there is no command {name!r}; perhaps you meant {' or '.join(near)}")
