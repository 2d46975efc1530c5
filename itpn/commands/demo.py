"""`itpn demo`: the sample, a nano iTPN pre-trained on it for minutes, what came out, and a fine-tuning."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from itpn.commands.arguments import parse
from itpn.commands.reconstruct import run as reconstruct
from itpn.data.sample_data import write_imagefolder
from itpn.outputs import adding
from itpn.recipes.classify import Classify
from itpn.recipes.lookup import find, load_as
from itpn.recipes.pretrain import Pretrain
from itpn.show.curves import read_metrics
from itpn.tasks.classify import classify
from itpn.tasks.pretrain import pretrain
from itpn.weights import files


@dataclass(frozen=True)
class Demo:
    """Pre-train a nano iTPN on the bundled sample, then fine-tune it with and without pre-training. Takes
    some minutes on two CPU cores.

    Pre-training is on pixels and features. Fine-tuning starts once from the weights that ship with itpn, and
    once from scratch.
    """

    directory: Path = Path("runs/demo")
    """Folder for the sample images and the runs. With a finished demo, its results are shown again."""
    epochs: int | None = None
    """Number of pre-training epochs. Default: the config's."""
    fine_epochs: int | None = None
    """Number of epochs of each fine-tuning. Default: the config's."""


def run(arguments: list[str]) -> None:
    options = parse(Demo, arguments, "itpn demo")
    recipe = load_as(Pretrain, find("pretrain_demo"))
    loop = replace(
        recipe.loop, run_dir=options.directory / "run", epochs=options.epochs or recipe.loop.epochs
    )
    data = replace(recipe.data, root=options.directory / "images")
    if not data.root.is_dir():
        with adding(options.directory, "--directory") as folder:
            write_imagefolder(folder / data.root.name)
    finished = pretrain(replace(recipe, data=data, loop=loop))
    longer = finished / "pictures" / "longer-training.png"
    if not longer.exists():
        reconstruct([str(files.NANO), str(data.root), "--out", str(longer), "--num", "6", "--device", "cpu"])
    show_results(finished)
    print(f"After longer pre-training, with the weights that ship with itpn: {longer}")
    show_fine_tuning(options)


def show_fine_tuning(options: Demo) -> None:
    """The same short fine-tuning from the weights that ship with itpn, and from scratch."""
    recipe = load_as(Classify, find("classify_demo"))
    recipe = replace(recipe, data=replace(recipe.data, root=options.directory / "images"))
    top1 = {}
    for name, init in (("pre-trained", files.NANO), ("from-scratch", None)):
        loop = replace(recipe.loop, run_dir=options.directory / name)
        if options.fine_epochs:
            loop = replace(loop, epochs=options.fine_epochs)
        run = classify(replace(recipe, loop=loop, init=init))
        top1[name] = json.loads((run / "report.json").read_text())["val_top1"]
    print(
        f"Validation accuracy after fine-tuning for {loop.epochs} epochs: {top1['pre-trained']:.1%} from the "
        f"weights that ship with itpn, {top1['from-scratch']:.1%} from scratch. Look at "
        f"{options.directory / 'pre-trained' / 'pictures' / 'confusion.png'}."
    )


def show_results(finished: Path) -> None:
    """First and last numbers of a run, and where its pictures are."""
    metrics = read_metrics(finished / "metrics.jsonl")
    table = Table("", "at the start", "at the end", title="what pre-training changed", title_justify="left")
    for key, name in {
        "pixel": "pixel loss (1: each unit's mean)",
        "knn_top1": "k-NN top-1, validation images",
    }.items():
        values = [line[key] for line in metrics.values() if key in line]
        if values:
            shown = "{:.1%}" if key.startswith("knn") else "{:.3f}"
            table.add_row(name, shown.format(values[0]), shown.format(values[-1]))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    model = json.loads((finished / "config.json").read_text())["model"]["backbone"]
    console.print(
        f"After minutes of training {model['size']} on {model['image_size']}-pixel images, "
        "the pictures say more than k-NN accuracy."
    )
    newest = sorted((finished / "pictures").glob("reconstruction-*.png"))[-1]
    console.print(
        f"Everything is in {finished}. Look first at {newest}, then at {finished / 'pictures/curves.png'}."
    )
