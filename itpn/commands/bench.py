"""`itpn bench SUBJECT …`: how fast the code that trains is, and whether it keeps its memory."""

import importlib

from itpn.errors import UserError

SUBJECTS = {
    "pretrain": (
        "itpn.bench.pretrain",
        "a config's training step on synthetic data, beside the matmul ceiling",
    ),
    "finetune": ("itpn.bench.finetune", "the same of a config that fine-tunes"),
    "detect": (
        "itpn.bench.detect",
        "the same of one that detects, at any size, in windows or not",
    ),
    "segment": ("itpn.bench.segment", "the same of one that segments"),
    "infer": ("itpn.bench.infer", "a classifier's forward pass, and what relative positions cost of it"),
    "data": ("itpn.bench.data", "images per second that one core loads, beside Pillow + torchvision"),
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
