"""`python tools/test.py CONFIG [CHECKPOINT] [--field value …]` is `itpn test CONFIG [CHECKPOINT] …`."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("itpn") is None:  # not installed: use the checkout this file lies in
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from itpn.cli import main

if __name__ == "__main__":  # the loader's workers import this file again where processes are spawned
    sys.exit(main(["test", *sys.argv[1:]]))
