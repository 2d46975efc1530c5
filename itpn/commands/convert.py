"""`itpn convert SOURCE OUT`: a released checkpoint to a file of ours, or back."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from itpn.commands.arguments import parse
from itpn.commands.info import contents, described
from itpn.commands.released import Reading, findings, read_released
from itpn.errors import UserError
from itpn.outputs import claim, writing
from itpn.weights import files
from itpn.weights.files import Weights
from itpn.weights.translate import write_back


@dataclass(frozen=True, kw_only=True)
class Convert(Reading):
    """Convert a released checkpoint of HiViT, iTPN or Fast-iTPN to a safetensors file with its config."""

    source: Annotated[Path, tyro.conf.Positional]
    """Checkpoint to read (.pth or .safetensors): the authors', mmpretrain's, a detector's or segmenter's, or
    one of itpn."""
    out: Annotated[Path, tyro.conf.Positional]
    """Safetensors file to write. An existing file is replaced only if itpn wrote it."""
    to: str | None = None
    """Convert an itpn file back to the names of this family: official-pixel, official-clip, official-fast,
    official-detection, official-segmentation, mmpretrain-itpn or mmpretrain-hivit."""


def run(arguments: list[str]) -> None:
    options = parse(Convert, arguments, "itpn convert")
    if options.out.suffix != ".safetensors":
        raise UserError(f"{options.out} must end in .safetensors, the format that is written")
    if not options.out.resolve().parent.is_dir():
        raise UserError(f"there is no folder {options.out.resolve().parent} to write {options.out.name} in")
    if str(options.source) == str(options.out) or _same(options.source, options.out):
        raise UserError(f"{options.out} is the source itself; name another file to write")
    claim(("OUT", options.out))
    if options.to:
        _write_back(options, options.to)
    else:
        _convert(options)


def _same(source: Path, out: Path) -> bool:
    try:
        return source.samefile(out)
    except (OSError, ValueError):  # one of them is not there, or can be no path
        return False


def _convert(options: Convert) -> None:
    if files.read_if_ours(options.source):
        raise UserError(f"{options.source} is already an itpn file; --to FAMILY converts it to other names")
    foreign, translated = read_released(options.source, options)
    source = {
        "file": options.source.name,
        "sha256": foreign.sha256,
        "family": translated.family,
        "left_out": foreign.left_out | translated.left_out,
    }
    _save(options.out, translated.tensors, translated.config, source)
    weights = Weights(options.out, translated.tensors, translated.config)
    print("\n".join(findings(foreign, translated)))
    Console(highlight=False, markup=False, soft_wrap=True).print(contents(weights))
    print("\n".join(described(weights)))
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")
    print(f'itpn.load("{options.out}") or --init {options.out} takes it from here')


def _save(out: Path, tensors: Mapping[str, Tensor], *contents: Any) -> None:
    try:
        with writing(out, "OUT") as file:
            files.save(file, _apart(tensors), *contents)
    except SafetensorError as error:
        raise UserError(f"cannot write {out} ({error}): make room there, or name another file") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous and each in its own memory, as safetensors has it; what is so already is not copied."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
        apart[name] = tensor.contiguous()
    return apart


def _write_back(options: Convert, family: str) -> None:
    for option in fields(Reading):
        if getattr(options, option.name) != option.default:
            flag = option.name.replace("_", "-")
            raise UserError(f"--to converts an itpn file as it is: leave out --{flag}")
    weights = files.read(options.source)
    files.check(weights)
    tensors = write_back(weights, family)
    _save(options.out, tensors, None)
    print(f"{options.source}: {len(tensors)} tensors under the names of {family}")
    print(f"wrote {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")
