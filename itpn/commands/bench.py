"""`itpn bench SUBJECT …`: how fast the code that trains is, and whether it keeps its memory."""

import importlib

from itpn.errors import UserError

SUBJECTS = {
    "pretrain": (
        "itpn.bench.pretrain",
        "training step of a pre-training config, as a share of the matmul ceiling",
    ),
    "finetune": ("itpn.bench.finetune", "training step of a classification config"),
    "detect": (
        "itpn.bench.detect",
        "training step of a detection config, with global or windowed attention",
    ),
    "segment": ("itpn.bench.segment", "training step of a segmentation config"),
    "infer": ("itpn.bench.infer", "forward pass of a classifier, and the cost of relative positions"),
    "data": ("itpn.bench.data", "images per second loaded by one core, beside Pillow + torchvision"),
    "memory": ("itpn.bench.memory", "resident memory over thousands of steps"),
}


def run(arguments: list[str]) -> None:
    match arguments:
        case [subject, *rest] if subject in SUBJECTS:
            importlib.import_module(SUBJECTS[subject][0]).run(rest)
        case [] | ["-h" | "--help", *_]:
            lines = [f"  {name:8}  {promise}" for name, (_, promise) in SUBJECTS.items()]
            print("\n".join(["usage: itpn bench SUBJECT …", "", *lines]))
            raise SystemExit(0 if arguments else 2)
        case [subject, *_]:
            raise UserError(f"itpn bench: no subject {subject!r}; choose one of {', '.join(SUBJECTS)}")
