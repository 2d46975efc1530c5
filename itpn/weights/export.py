"""Models for programs without itpn, as ONNX and by torch.export: written, read back, compared.

A file takes any batch, and images of the one size that it was written for: position tables are resampled for
a grid once, and dynamic sides would do so for every image.
"""

import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from itpn.engine import checkpoint
from itpn.errors import UserError
from itpn.outputs import writing

OPSET = 18
"""The ONNX operator set: from onnxruntime 1.14 on."""
ONNX_BYTES = 2**31 - 2**24
"""Of parameters; a single ONNX file holds 2 GiB, its graph included."""
BATCHES = (1, 3)
"""Batches that a file is checked with."""
TOLERANCE = 1e-3
"""Largest difference from PyTorch, as a share of the output's largest value."""
Size = tuple[int, int]
Run = Callable[[Tensor], Mapping[str, Tensor]]
"""From images ``[B, c, H, W]`` to outputs by name."""


class Difference(NamedTuple):
    """What a batch came to: the largest difference in any output, and the largest such share of an output's
    largest value."""

    batch: int
    absolute: float
    share: float


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A path that takes the name ``out`` once the block has written and checked it, or is removed.

    Raises:
        UserError: the disk did not take it, or a file is there that is no output.
    """
    try:
        with writing(out, "OUT") as beside:
            yield beside
            checkpoint.sync(beside)
    except SafetensorError as error:
        raise UserError(f"cannot write {out} ({error}); make room or name another place") from error


def run_of(model: nn.Module) -> Run:
    """A model in evaluation mode as a function; a single output is called logits."""

    @torch.no_grad()
    def run(images: Tensor) -> Mapping[str, Tensor]:
        outputs: Tensor | Mapping[str, Tensor] = model(images)
        return {"logits": outputs} if isinstance(outputs, Tensor) else outputs

    return run


def write_onnx(model: nn.Module, path: Path, images: Tensor, metadata: Mapping[str, object]) -> None:
    """Write a model in evaluation mode as one ONNX file of operator set OPSET.

    Args:
        images: ``[2, c, H, W]``, of the size that the file will take.
        metadata: becomes the file's metadata_props, as JSON values.

    Raises:
        UserError: the extra itpn[onnx] is not installed, the parameters exceed what one file holds, or ONNX
            lacks an operator.
    """
    need_onnx()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > ONNX_BYTES:
        raise UserError(
            f"an ONNX file holds at most 2 GiB, and the parameters take {size / 2**30:.2f} GiB; "
            "write --format torch-export instead"
        )
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=list(run_of(model)(images)),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=_any_batch(),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"ONNX cannot express this model at {images.shape[2]} x {images.shape[3]} pixels "
            f"({_deepest(error)}); write --format torch-export, or a square size, whose tables are resampled "
            "beforehand"
        ) from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file of this machine it was computed
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    program.save(path, external_data=False)


def write_torch(model: nn.Module, path: Path, images: Tensor, metadata: Mapping[str, object]) -> None:
    """Write a model in evaluation mode by torch.export.

    Args:
        images: as for `write_onnx`.
        metadata: becomes the file's extra file ``itpn.json``.
    """
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=_any_batch())
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names files of this machine
    whole = io.BytesIO()  # torch's writer ends a full disk in a RuntimeError that shows its stack
    torch.export.save(program, whole, extra_files={"itpn.json": json.dumps(dict(metadata))})
    path.write_bytes(whole.getbuffer())


def read_onnx(path: Path) -> Run:
    """An ONNX file as a function, run by onnxruntime on the CPU.

    Raises:
        UserError: the extra itpn[onnx] is not installed.
    """
    need_onnx()
    import onnxruntime  # type: ignore[import-untyped]  # it has no types

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Mapping[str, Tensor]:
        outputs = session.run(None, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


def read_torch(path: Path) -> Run:
    """A file of torch.export as a function."""
    return run_of(torch.export.load(path).module())


def compare(expected: Run, found: Run, channels: int, size: Size) -> list[Difference]:
    """Run both on random images in the batches BATCHES.

    Raises:
        UserError: they differ by more than TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    differences = []
    for batch in BATCHES:
        images = torch.randn(batch, channels, *size, generator=generator)
        theirs, ours = found(images), expected(images)
        if list(theirs) != list(ours):
            raise UserError(f"it gives {', '.join(theirs)} where PyTorch gives {', '.join(ours)}")
        most = {name: float((theirs[name] - value).abs().max()) for name, value in ours.items()}
        shares = {name: most[name] / max(float(ours[name].abs().max()), 1e-30) for name in ours}
        wrong = [name for name, share in shares.items() if not share <= TOLERANCE]  # NaN is wrong too
        if wrong:
            raise UserError(
                f"{', '.join(wrong)} of a batch of {batch} differ from PyTorch by {most[wrong[0]]:.1e}, "
                f"{shares[wrong[0]]:.1e} of the largest value; please report it"
            )
        differences.append(Difference(batch, max(most.values()), max(shares.values())))
    return differences


def need_onnx() -> None:
    """
    Raises:
        UserError: a package of the extra itpn[onnx] is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'itpn[onnx]'")


def _any_batch() -> dict[str, dict[int, torch.export.Dim]]:
    return {"images": {0: torch.export.Dim("batch")}}


def _deepest(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0]
