"""Benches of detection and segmentation: what they count is done, and their parts are all of a step."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from itpn.bench import detect, segment
from itpn.bench.parts import Parts
from itpn.bench.steps import Runner
from itpn.data.views import paddings
from itpn.engine.clock import Clock
from itpn.errors import UserError
from itpn.heads.boxes import Objects
from itpn.recipes.lookup import load
from tests.toys import toy_detector

DETECT = """
from dataclasses import replace

from itpn.data.detection import DetectionDataConfig
from itpn.data.views import MultiScale
from itpn.nn.depth import LayerDecayConfig
from itpn.recipes.detect import demo
from tests.toys import toy_detector_config, toy_model

scale = MultiScale(short_sides=(64, 96), max_side=160, eval_short_side=96, num_short_sides=2)
config = replace(
    demo(),
    model=toy_model(drop_path=0.1, relative_position_bias=True),
    detector=toy_detector_config({cascade}),
    data=DetectionDataConfig(scale=scale, mask_size=28),
    layer_decay=LayerDecayConfig(rate=0.8),
)
"""
SEGMENT = """
from dataclasses import replace

from itpn.data.segmentation import SegmentationDataConfig
from itpn.heads.upernet import SegmenterConfig
from itpn.recipes.segment import demo
from tests.toys import toy_model

config = replace(
    demo(),
    model=toy_model(drop_path=0.1, relative_position_bias=True),
    segmenter=SegmenterConfig(num_classes=5, width=16, auxiliary_width=8, auxiliary_weight={auxiliary}),
    data=SegmentationDataConfig(crop=(64, 96)),
)
"""
DETECTOR = {
    "normalising, maps", "backbone", "pyramid", "proposals: network", "proposals: choice, NMS", "RoIAlign",
    "box heads", "mask heads", "matching, losses", "backward: heads", "backward: pyramid",
    "backward: backbone", "optimiser", "step",
}  # fmt: skip
SEGMENTER = {
    "normalising, resizing, accuracy", "backbone", "pyramid", "decode head", "auxiliary head", "losses",
    "backward: heads", "backward: pyramid", "backward: backbone", "optimiser", "step",
}  # fmt: skip
CPU = torch.device("cpu")


def figures_of(bench, path, text: str, words: str = ""):
    """What a toy config's bench writes."""
    config, out = path / "toy.py", path / "figures.json"
    config.write_text(text)
    bench.run(f"{config} --device cpu --device-batch 2 --steps 1 --json {out} {words}".split())
    return json.loads(out.read_text())


def forward_flops(model, batch) -> int:
    """Those of a training step's forward pass, as torch counts them while it runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("cascade", [False, True])
def test_figures_of_a_detector(tmp_path, capsys, cascade):
    text = DETECT.replace("{cascade}", str(cascade))
    figures = figures_of(detect, tmp_path, text, "--image-size 96 128 --profile")
    parts = figures["parts"]
    assert set(parts) == DETECTOR and min(parts.values()) > 0
    assert parts.pop("step") == pytest.approx(sum(parts.values()))  # one step: medians are its own times
    assert figures["image_size"] == [96, 128]
    assert figures["flops"] == figures["flops_per_image"] * figures["images_per_s"]
    assert figures["ratio"] == pytest.approx(figures["flops"] / figures["ceiling"])  # of one step
    assert {"matmul", "RoIAlign, NMS"} <= figures["kinds"].keys()
    shown = capsys.readouterr().out
    assert "2 images of 96 x 128" in shown and "of the ceiling" in shown
    num_boxes = 48 * (3 if cascade else 1)
    assert f"an image has {num_boxes:.1f} boxes in box heads" in shown


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_flops_of_a_detector_are_those_of_its_forward_pass(tmp_path, cascade, window):
    text = DETECT.replace("{cascade}", str(cascade))
    config = tmp_path / "toy.py"
    config.write_text(text)
    recipe = detect.with_backbone(load(config), window=window, num_global_blocks=1)
    subject = detect.subject(recipe, (96, 128), 3, CPU, 1)
    subject.model.maps(torch.zeros(1, 3, 96, 128))  # what resamples tables is made once, and kept
    done = forward_flops(subject.model, subject.batch)
    assert subject.flops_per_image() == pytest.approx(3 * done)
    note = subject.notes()[0]
    assert ("windows of 2 units" in note) == (window is not None)


def test_flops_of_a_detector_without_masks():
    detector = toy_detector(masks=False)
    assert detector.flops((64, 64), 10, 99) == detector.flops((64, 64), 10, 0)
    by_box = detector.flops((64, 64), 1, 0) - detector.flops((64, 64), 0, 0)
    convolution, hidden = 49 * 9 * 24 * 24, 49 * 24 * 48
    assert by_box == 6 * (convolution + hidden + 48 * (3 + 1 + 4 * 3))


def test_checkpointing_is_the_configs_unless_it_is_asked_for(tmp_path, capsys):
    text = DETECT.replace("{cascade}", "False")
    plain = figures_of(detect, tmp_path, text, "--image-size 64 64")
    again = figures_of(detect, tmp_path, text, "--image-size 64 64 --checkpointing --window 2")
    assert plain["notes"][0].endswith("all units see one another; all activations kept")
    assert again["notes"][0].endswith("attention in windows of 2 units; checkpointing")
    text = text.replace("drop_path=0.1", "checkpointing=True")
    kept = figures_of(detect, tmp_path, text, "--image-size 64 64 --keep-activations")
    assert kept["notes"][0].endswith("all activations kept")
    with pytest.raises(UserError, match="give only one of --checkpointing and --keep-activations"):
        figures_of(detect, tmp_path, text, "--checkpointing --keep-activations")


def test_the_published_sizes_one_after_another(tmp_path, capsys):
    text = DETECT.replace("{cascade}", "False")
    figures = figures_of(detect, tmp_path, text, "--published-sizes --objects 2")
    sizes = [tuple(each["image_size"]) for each in figures]
    recipe = load(tmp_path / "toy.py")
    assert sizes == [(h, w) for h, w in paddings(recipe.data.scale).tolist() if h <= w]
    work = [each["flops_per_image"] for each in figures]
    assert len(sizes) > 1 and work == sorted(work)
    assert capsys.readouterr().out.count("images/s") == len(sizes)


def test_made_up_objects_lie_in_their_images(tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(DETECT.replace("{cascade}", "False"))
    objects = detect.synthetic_objects(load(config), 4, (64, 96), 5, torch.Generator().manual_seed(0))
    corners, ends = objects["boxes"].split(2, dim=-1)
    assert corners.min() >= 0 and (ends <= torch.tensor([96, 64])).all()
    assert (ends - corners).min() >= 16 / 2**0.5
    assert objects["labels"].unique().tolist() == [0, 1, 2]
    # An ellipse fills pi / 4 of its box.
    assert objects["masks"].float().mean().item() == pytest.approx(0.785, abs=0.01)
    assert isinstance(Objects(objects["boxes"][0], objects["labels"][0], objects["masks"][0]), Objects)


@pytest.mark.parametrize("auxiliary", [0.4, 0.0])
def test_figures_of_a_segmenter(tmp_path, capsys, auxiliary):
    figures = figures_of(segment, tmp_path, SEGMENT.replace("{auxiliary}", str(auxiliary)))
    parts = figures["parts"]
    assert set(parts) == SEGMENTER - ({"auxiliary head"} if auxiliary == 0 else set())
    assert parts.pop("step") == pytest.approx(sum(parts.values()))
    assert "2 images of 64 x 96" in capsys.readouterr().out


@pytest.mark.parametrize("auxiliary", [0.4, 0.0])
def test_flops_of_a_segmenter_are_those_of_its_forward_pass(tmp_path, auxiliary):
    config = tmp_path / "toy.py"
    config.write_text(SEGMENT.replace("{auxiliary}", str(auxiliary)))
    subject = segment.subject(load(config), CPU, 1)
    done = forward_flops(subject.model.eval(), subject.batch)  # batch norm does not train on one image
    assert subject.flops_per_image() == 3 * done


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bench", ["detect", "segment"])
def test_the_backward_pass_is_cut_between_heads_pyramid_and_backbone(tmp_path, bench, checkpointing):
    """At each cut the parts behind it have all of their gradients, and those before it none."""
    text = DETECT.replace("{cascade}", "True") if bench == "detect" else SEGMENT.replace("{auxiliary}", "0.4")
    config = tmp_path / "toy.py"
    config.write_text(text)
    recipe = detect.with_backbone(load(config), checkpointing=checkpointing)
    made = {
        "detect": lambda: detect.subject(recipe, (64, 64), 3, CPU, 2),
        "segment": lambda: segment.subject(recipe, CPU, 2),
    }[bench]()
    with_gradients = {}

    class Watching(Clock):
        def mark(self, name: str) -> None:
            if name.startswith("backward"):
                with_gradients[name] = {
                    n: p.grad is not None for n, p in made.model.named_parameters() if p.requires_grad
                }

    made.clocked(Parts(Watching(CPU), "rest"))
    made.model(made.batch)["loss"].backward()
    heads, pyramid = (with_gradients[f"backward: {name}"] for name in ("heads", "pyramid"))
    for name, has in heads.items():
        assert has == (not name.startswith("model.")), name
    for name, has in pyramid.items():
        assert has == (not name.startswith("model.backbone.")), name


def test_a_step_moves_every_part(tmp_path):
    """The timed step is the real one: its optimiser changes backbone, pyramid and heads."""
    config = tmp_path / "toy.py"
    config.write_text(DETECT.replace("{cascade}", "False"))
    subject = detect.subject(load(config), (64, 64), 3, CPU, 2)
    before = {name: parameter.detach().clone() for name, parameter in subject.model.named_parameters()}
    scales = {group["lr_scale"] for group in subject.optimizer.param_groups}
    Runner(subject, torch.float32, 1).step()
    unmoved = [n for n, p in subject.model.named_parameters() if torch.equal(p, before[n])]
    assert not [name for name in unmoved if not name.endswith("bias")]
    assert len(scales) > 2  # layer decay, as in training


@pytest.mark.parametrize(
    ("bench", "words", "complaint"),
    [
        (detect, "mask-rcnn_itpn-bas", "there is no config file or name 'mask-rcnn_itpn-bas'; the nearest"),
        (segment, "upernot", "there is no config file or name 'upernot'"),
        (detect, "segment_demo", "is a Segment config, but a Detect config is needed"),
        (segment, "pretrain_demo", "is a Pretrain config, but a Segment config is needed"),
        (detect, "detect_demo --image-size 100 128", "--image-size 100 128: sides must be multiples of 32"),
        (detect, "detect_demo --image-size 32 128", "multiples of 32, 64 or more"),
        (detect, "detect_demo --objects 0", "--objects must be at least 1"),
        (detect, "detect_demo --window 0", "window must be at least 1"),
        (segment, "upernet_itpn-base_160k_ade20k-512 --steps 0", "at least 1"),
    ],
)
def test_mistakes_are_one_line(bench, words, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        bench.run(words.split())
    assert "\n" not in str(caught.value)


def test_one_crop_alone_under_batch_norm_is_an_error(tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(SEGMENT.replace("{auxiliary}", "0.4"))
    with pytest.raises(UserError, match="give --device-batch 2 or more"):
        segment.run([str(config), "--device", "cpu", "--device-batch", "1"])
