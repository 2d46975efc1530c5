"""Started by torchrun in test_distributed.py: trains the toy, or a toy that distils, on every rank."""

import sys
from pathlib import Path

from itpn.engine.distributed import join_world
from itpn.errors import UserError
from itpn.objectives.stages import FrozenConfig
from tests.engine.sharded import pretrain
from tests.engine.toy import Toy, toy_train
from tests.objectives.test_distill import STAGES, toy
from tests.toys import toy_model


class DivergingOnRank1(Toy):
    rank = 0

    def forward(self, batch):
        outputs = super().forward(batch)
        return {**outputs, "loss": outputs["loss"] * (float("nan") if self.rank == 1 else 1)}


def taught():
    """Everything at once: drop path, relative positions, the second branch, supervised stages."""
    model = toy_model(drop_path=0.2, layer_scale=0.1, relative_position_bias=True)
    return toy(model=model, frozen=FrozenConfig(**STAGES))


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
                case "distill":
                    pretrain(directory / "taught", world, taught())
                    pretrain(directory / "taught_parts", world, taught(), max_steps=7)
                    pretrain(directory / "taught_parts", world, taught())
                    pretrain(directory / "taught_fsdp", world, taught(), strategy="fsdp")
                case "diverge":
                    toy = DivergingOnRank1()
                    toy.rank = world.rank
                    try:
                        toy_train(directory / "nan", world=world, toy=toy)
                    except UserError as error:
                        (directory / f"error{world.rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
