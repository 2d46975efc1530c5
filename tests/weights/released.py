"""The reference models as files that people hold, converted as they would convert them."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from itpn import cli
from itpn.nn.positions import resample_table
from itpn.weights import files, loading, names
from itpn.weights.families import FAMILIES, kind_of
from itpn.weights.files import Weights

REFERENCE = Path(__file__).parents[1] / "reference"
FAMILY_OF = {
    "pixel": "official-pixel",
    "clip": "official-clip",
    "det": "official-detection",
    "seg": "official-segmentation",
    "fast": "official-fast",
    "mm": "mmpretrain-itpn",
}


@cache
def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of a reference model, and its state under its own names."""
    tensors = load_file(REFERENCE / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return {key: value for key, value in tensors.items() if not key.startswith("state.")}, state


def family_of(name: str) -> str:
    return "mmpretrain-hivit" if name == "mm_hivit_classifier" else FAMILY_OF[name.split("_")[0]]


def released(name: str, state: dict[str, Tensor]) -> dict[str, object]:
    """A state as its code saves it: backbones of detectors and segmentors among their heads."""
    match family_of(name):
        case "official-detection":
            head = {"rpn_head.rpn_conv.weight": torch.zeros(2, 2)}
            return {"state_dict": {f"backbone.{key}": value for key, value in state.items()} | head}
        case "official-segmentation":
            head = {"decode_head.conv_seg.weight": torch.zeros(2, 2)}
            return {"state_dict": {f"backbone.{key}": value for key, value in state.items()} | head}
        case "mmpretrain-itpn" | "mmpretrain-hivit":
            return {"meta": {"epoch": 1}, "state_dict": state}
        case _:
            return {"model": state, "optimizer": {"state": {}}, "epoch": 1}


@cache
def converted(name: str) -> Weights:
    """The file that ``itpn convert`` makes. These models' heads are narrower than all published ones."""
    _, state = load(name)
    with TemporaryDirectory() as folder:
        source, out = Path(folder, "source.pth"), Path(folder, "out.safetensors")
        torch.save(released(name, state), source)
        decoder_heads = "4" if name == "pixel_pretrain_p8" else "2"
        arguments = ["--num-heads", "2", "--decoder-heads", decoder_heads]
        assert cli.main(["convert", str(source), str(out), *arguments]) == 0
        weights = files.read(out)
    assert weights.source is not None and weights.source["family"] == family_of(name)
    return weights


def module(weights: Weights) -> nn.Module:
    model = files.module_of(weights).eval()
    loading.load_exactly(model, weights)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def gradients_close(name: str, model: nn.Module) -> None:
    """Compare every gradient that the reference has with the model's, within 1e-4 of its largest entry.

    Converted as if it were the weight, a gradient tells its own place and shape among ours.
    """
    tensors, state = load(name)
    style, kind = FAMILIES[family_of(name)].style, kind_of(state.keys())
    blank = {key: torch.zeros_like(value) for key, value in state.items()}
    gradients = {key.removeprefix("grad."): value for key, value in tensors.items() if key[:5] == "grad."}
    assert len(gradients) >= 4
    own = {parameter.removeprefix("model."): value.grad for parameter, value in model.named_parameters()}
    for key, theirs in gradients.items():
        translated, _ = names.to_ours({**blank, key: theirs}, style, kind)
        [(ours, expected)] = [(found, value) for found, value in translated.items() if value.any()]
        gradient = own[ours]
        assert gradient is not None
        if ours == "backbone.position" and kind == "pixel":
            gradient = straight_through(gradient)
        torch.testing.assert_close(gradient, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def straight_through(gradient: Tensor) -> Tensor:
    """At equal sizes torch's bicubic backward passes the gradient straight through although its forward
    resamples; the reference has that gradient, ours is the true one: undo it to compare."""
    matrix = resample_table(torch.eye(16), (4, 4), (4, 4), offset=0.1)
    return torch.linalg.solve(matrix.T, gradient)
