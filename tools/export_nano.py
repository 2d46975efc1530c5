"""Makes the bundled weights from a run: `python tools/export_nano.py RUN [OUT]`.

Backbone, pyramid and pixel decoder of the run's last checkpoint, as 16-bit floats.
"""

import sys
from pathlib import Path

from itpn.weights import files


def main(run: str, out: str = str(files.NANO)) -> None:
    weights = files.read(Path(run)).without("features")
    halves = {
        name: tensor.half() for name, tensor in weights.tensors.items() if "decoder.position" not in name
    }
    config = {**weights.config, "data": {}, "loop": {"seed": weights.config["loop"]["seed"]}, "init": None}
    files.save(Path(out), halves, config)
    num_numbers = sum(tensor.numel() for tensor in halves.values())
    print(f"{out}: {num_numbers:,} numbers, {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
