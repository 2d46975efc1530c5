"""`itpn predict` with a segmenter: a class for every pixel, as pictures and as label PNGs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from itpn.commands.predicting import Predict, sources_of, tell_unreadable
from itpn.data.aligned import fitted
from itpn.data.classes import names_for
from itpn.data.labels import Labelling, Labels, label_picture
from itpn.data.picture import BadImageError
from itpn.data.progress import watched
from itpn.data.source import Images
from itpn.engine.distributed import choose_device
from itpn.errors import UserError, printable
from itpn.models import SegmenterModel
from itpn.outputs import claim, distinct, writing
from itpn.show.segment import class_colours, segmentation_picture, shares_of
from itpn.tasks.segment import labeller

NUM_SHOWN = 100
"""Images in the table on the terminal."""


def segment(model: SegmenterModel, options: Predict) -> None:
    """Pictures, label PNGs, and a table of what there is most of."""
    if options.embeddings or options.image_size:
        raise UserError(
            f"{options.model} is a segmenter, which takes images of any size: leave out --embeddings "
            "and --image-size"
        )
    names = names_for(model.classes, model.config.num_classes)
    labelling, colours = Labelling(names, ignored=()), class_colours(len(names))
    out = options.out or Path("predictions")
    table = Table("image", "classes, by share of the pixels", box=None, padding=(0, 2, 0, 0))
    lines: list[str] = []
    places = [(images, i) for images in sources_of(options.images) for i in range(len(images))]
    stems = distinct(images.name(i) for images, i in places)
    files = [folder / f"{stem}.png" for folder in (out, out / "labels") for stem in stems]
    claim(("--json", options.json), *(("--out", path) for path in files))
    for path, stem, image, labels in labelled(model, options, places, stems):
        shares = shares_of([labels], len(names))
        with writing(out / "labels" / f"{stem}.png") as file:
            label_picture(labels, labelling, colours).save(file)
        with writing(out / f"{stem}.png") as file:
            segmentation_picture(image, labels, names, path.name).save(file)
        if len(lines) < NUM_SHOWN:
            most = ", ".join(f"{names[label]} {share:.0%}" for label, share in shares[: options.top])
            table.add_row(printable(path), printable(most))
        record = {names[label]: round(share, 6) for label, share in shares}
        lines.append(json.dumps({"path": str(path), "shares": record}) + "\n")
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
    if len(lines) > NUM_SHOWN:
        print(f"showing the first {NUM_SHOWN} of {len(lines):,} images; --json FILE writes all")
    print(f"{printable(out)}: {len(lines):,} pictures; labels/ has a PNG of class ids for each")
    if options.json:
        with writing(options.json, "--json") as file:
            file.write_text("".join(lines))


def labelled(
    model: SegmenterModel, options: Predict, places: Sequence[tuple[Images, int]], stems: Sequence[str]
) -> Iterator[tuple[Path, str, Image.Image, Labels]]:
    """Every image that can be read, with its stem and its labels [H, W] at its own size."""
    inference = replace(
        model.inference, mode=options.mode or model.inference.mode, flip=options.flip or model.inference.flip
    )
    device = choose_device(options.device)
    labels = labeller(model.to(device), inference, "fp32", device)
    bad: list[BadImageError] = []
    named = zip(places, stems, strict=True)
    for (images, i), stem in watched(named, "predicting", len(places)):
        try:
            with images.open(i) as picture:
                image = picture.decode()
        except BadImageError as error:
            bad.append(error)
            continue
        found = labels(fitted(image, *model.scale).to(device), (image.height, image.width))
        yield images.name(i), stem, image, found[0].cpu().numpy().astype("uint16")
    tell_unreadable(bad, len(places))
