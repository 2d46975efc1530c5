"""`itpn COMMAND …`. A command's module, and with it torch, is imported only once the command is known."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from itpn import __version__
from itpn.errors import UserError, printable

COMMANDS = {
    "train": ("itpn.commands.train", "train a config; the same command resumes"),
    "test": ("itpn.commands.test", "evaluate weights on a config's validation images"),
    "predict": ("itpn.commands.predict", "predict labels, objects, label maps or embeddings for images"),
    "replay": ("itpn.commands.replay", "repeat a step whose loss or gradient was not finite"),
    "reconstruct": (
        "itpn.commands.reconstruct",
        "draw a pre-trained model's reconstruction of masked images",
    ),
    "info": ("itpn.commands.info", "show parts, parameters and multiply-adds of a config or weights file"),
    "configs": ("itpn.commands.configs", "list the configs"),
    "convert": ("itpn.commands.convert", "convert a released checkpoint to an itpn file, or back"),
    "export": ("itpn.commands.export", "export a model as safetensors, ONNX or torch.export"),
    "sample-data": ("itpn.commands.sample_data", "write the bundled sample as image folder, COCO and ADE20K"),
    "shard": (
        "itpn.commands.shard",
        "pack images into tar shards, for disks and networks that prefer few files",
    ),
    "check-data": ("itpn.commands.check_data", "check images, labels and annotations before training"),
    "bench": ("itpn.commands.bench", "measure the speed of training and loading, and memory use"),
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
        ["usage: itpn COMMAND …", "", *lines, "", "`itpn COMMAND --help` lists a command's options."]
    )


def module_of(name: str) -> str:
    if name in COMMANDS:
        return COMMANDS[name][0]
    near = difflib.get_close_matches(name, COMMANDS, cutoff=0.4) or list(COMMANDS)
    raise UserError(f"there is no command {name!r}; did you mean {' or '.join(near)}?")
