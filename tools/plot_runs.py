"""Curves of several runs in one picture: `python tools/plot_runs.py OUT.png NAME=RUN[,RUN…] …`.

Runs of one name are seeds of one arm: they share a colour.
"""

import sys
from pathlib import Path

from itpn.outputs import writing
from itpn.show.curves import loss_curves


def main(out: str, *arms: str) -> None:
    named = dict(arm.split("=", 1) for arm in arms)
    runs = {name: [Path(run) / "metrics.jsonl" for run in paths.split(",")] for name, paths in named.items()}
    with writing(Path(out), "OUT.png") as file:
        loss_curves(runs, file, ("pixel", "knn_top1"), against="epoch")
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
