"""Started by torchrun in test_distributed.py: trains the toy on every rank."""

import sys
from pathlib import Path

from itpn.engine.distributed import join_world
from itpn.errors import UserError
from tests.engine.toy import Toy, toy_train


class DivergingOnRank1(Toy):
    rank = 0

    def forward(self, batch):
        outputs = super().forward(batch)
        return {**outputs, "loss": outputs["loss"] * (float("nan") if self.rank == 1 else 1)}


def main(directory: Path, parts: list[str]) -> None:
    with join_world("cpu") as world:
        for part in parts:
            match part:
                case "resume":
                    toy_train(directory / "whole", world=world, toy=Toy(200), device_batch=2)
                    toy_train(directory / "parts", world=world, toy=Toy(200), device_batch=2, max_steps=3)
                    toy_train(directory / "parts", world=world, toy=Toy(200), device_batch=2)
                case "compare":
                    toy_train(directory / "plain", world=world, toy=Toy(dropout=0.0), device_batch=3)
                case "diverge":
                    toy = DivergingOnRank1()
                    toy.rank = world.rank
                    try:
                        toy_train(directory / "nan", world=world, toy=toy)
                    except UserError as error:
                        (directory / f"error{world.rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
