"""`itpn predict` with a segmenter: a class for every pixel, as pictures and as label PNGs."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from itpn.commands.predicting import Predict, sources_of, tell_unreadable, writing
from itpn.data.aligned import fitted
from itpn.data.classes import names_for
from itpn.data.labels import Labelling, Labels, label_picture
from itpn.data.picture import BadImageError
from itpn.data.progress import watched
from itpn.engine.distributed import choose_device
from itpn.errors import UserError, printable
from itpn.models import SegmenterModel
from itpn.show.segment import class_colours, segmentation_picture, shares_of
from itpn.tasks.segment import labeller

NUM_SHOWN = 100
"""Images in the table on the terminal."""


def segment(model: SegmenterModel, options: Predict) -> None:
    """Pictures, label PNGs, and a table of what there is most of."""
    if options.embeddings or options.image_size:
        raise UserError(
            f"{options.model} labels pixels, of images of any size: leave out --embeddings and --image-size"
        )
    names = names_for(model.classes, model.config.num_classes)
    labelling, colours = Labelling(names, ignored=()), class_colours(len(names))
    out = options.out or Path("predictions")
    table = Table("image", "classes, by share of the pixels", box=None, padding=(0, 2, 0, 0))
    lines: list[str] = []
    taken = Counter[str]()
    for path, image, labels in labelled(model, options):
        shares = shares_of([labels], len(names))
        taken[path.stem] += 1  # images of several folders may share a name
        stem = path.stem if taken[path.stem] == 1 else f"{path.stem}-{taken[path.stem]}"
        with writing(out / "labels" / f"{stem}.png") as file:
            file.parent.mkdir(parents=True, exist_ok=True)
            label_picture(labels, labelling, colours).save(file)
            segmentation_picture(image, labels, names, path.name).save(out / f"{stem}.png")
        if len(lines) < NUM_SHOWN:
            most = ", ".join(f"{names[label]} {share:.0%}" for label, share in shares[: options.top])
            table.add_row(printable(path), printable(most))
        record = {names[label]: round(share, 6) for label, share in shares}
        lines.append(json.dumps({"path": str(path), "shares": record}) + "\n")
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
    if len(lines) > NUM_SHOWN:
        print(f"the first {NUM_SHOWN} of {len(lines):,} images; --json FILE writes all")
    print(f"{printable(out)}: {len(lines):,} pictures; labels/ has a PNG of class ids for each")
    if options.json:
        with writing(options.json):
            options.json.write_text("".join(lines))


def labelled(model: SegmenterModel, options: Predict) -> Iterator[tuple[Path, Image.Image, Labels]]:
    """Every image that can be read, with its labels [H, W] at its own size."""
    inference = replace(
        model.inference, mode=options.mode or model.inference.mode, flip=options.flip or model.inference.flip
    )
    device = choose_device(options.device)
    labels = labeller(model.to(device), inference, "fp32", device)
    places = [(images, i) for images in sources_of(options.images) for i in range(len(images))]
    bad: list[BadImageError] = []
    for images, i in watched(iter(places), "predicting", len(places)):
        try:
            with images.open(i) as picture:
                image = picture.decode()
        except BadImageError as error:
            bad.append(error)
            continue
        found = labels(fitted(image, *model.scale).to(device), (image.height, image.width))
        yield images.name(i), image, found[0].cpu().numpy().astype("uint16")
    tell_unreadable(bad, len(places))
