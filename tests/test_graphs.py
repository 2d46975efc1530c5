"""`--compile`: how many graphs the blocks of every task need, whatever sizes of images come."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from itpn.heads.classify import ClassifierConfig
from itpn.heads.finetune import ClassifyObjective, FinetuneConfig
from itpn.heads.segment import SegmentObjective
from itpn.heads.upernet import SegmenterConfig
from tests.toys import toy_backbone, toy_batch, toy_detector, toy_model, toy_objective, toy_scenes

SIZES = (64, 64), (96, 96), (96, 128), (128, 96), (64, 128), (128, 160), (160, 96)
DEEP = {"depths": (2, 2, 4), "drop_path": 0.2}
SEEN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
BACKBONE, PYRAMID = 3, 1  # kinds of block: of each stage; the pyramid


def graphs(objective: nn.Module, batches: Sequence[dict[str, Tensor]]) -> int:
    """Compile the blocks, take a forward and a backward pass on each batch, and count the graphs."""
    found = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    torch._dynamo.reset()
    counters.clear()
    for block in objective.compile_blocks():
        block.compile(backend=backend)
    for batch in batches:
        objective.train()(batch)["loss"].backward()
    assert not counters["unimplemented"], "a block fell back to eager"
    assert not counters["graph_break"]
    return len(found)


def test_detection_at_seven_sizes() -> None:
    detector = toy_detector(relative_position_bias=True, layer_scale=0.1, checkpointing=True, **DEEP)
    assert graphs(detector, [toy_scenes(pixels=size) for size in SIZES]) <= 2 * (BACKBONE + PYRAMID)


def test_segmentation_at_seven_sizes() -> None:
    config = SegmenterConfig(num_classes=5, width=16, auxiliary_width=8, norm="group", **SEEN)
    objective = SegmentObjective(toy_model(**DEEP), config, (64, 64))
    batches = [
        {
            "images": torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8),
            "labels": torch.randint(0, 5, (2, *size), dtype=torch.uint8),
            "drop": torch.rand(2, objective.model.backbone.num_drops),
        }
        for size in SIZES
    ]
    assert graphs(objective, batches) <= 2 * (BACKBONE + PYRAMID + 2)  # two heads


def test_classification_at_seven_sizes() -> None:
    batches = []
    for size in SIZES:
        objective = ClassifyObjective(
            toy_backbone(**DEEP), ClassifierConfig(num_classes=5), FinetuneConfig(**SEEN), size
        )
        draws = [objective.draw(torch.Generator().manual_seed(0)) for _ in range(2)]
        batches.append(
            {
                "images": torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8),
                "labels": torch.zeros(2, dtype=torch.long),
                **{name: torch.stack([draw[name] for draw in draws]) for name in draws[0]},
            }
        )
    assert graphs(objective, batches) <= 2 * BACKBONE


def test_pretraining() -> None:
    objective = toy_objective(features={"branches": "levels"}, **DEEP)
    batch = toy_batch(objective)
    # Visible units and all of them (the teacher's); the decoder's blocks are one more kind.
    assert graphs(objective, [batch, batch]) <= 2 * (BACKBONE + PYRAMID + 1)
