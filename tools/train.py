"""The published command line: `python tools/train.py CONFIG [--field value …]` is `itpn train CONFIG …`."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("itpn") is None:  # not installed: use the checkout this file lies in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from itpn.cli import main

if __name__ == "__main__":  # the loader's workers import this file again where processes are spawned
    sys.exit(main(["train", *sys.argv[1:]]))
