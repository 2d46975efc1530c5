"""Tar shards: what is read back is what was written, in an order that only seed and epoch decide."""

import io
import multiprocessing
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from itpn import cli
from itpn.commands.shard import _written_beside
from itpn.data.images import find_images
from itpn.data.loader import DataConfig, MicroBatches, TrainSamples, eval_loader, train_loader
from itpn.data.picture import BadImageError
from itpn.data.randomness import block_permutation
from itpn.data.source import Images
from itpn.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIZE, SEED, BATCH = 16, 7, 4

Batch = dict[str, Tensor]


def shard(source: Path, out: Path, *options: str) -> Path:
    assert cli.main(["shard", str(source), str(out), *options]) == 0
    return out


@pytest.fixture(scope="module")
def sharded(class_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The thirteen images of the class folders, in seven shards."""
    return shard(class_folders, tmp_path_factory.mktemp("sharded") / "out", "--per-shard", "2")


@pytest.fixture(scope="module")
def images(sharded: Path) -> Images:
    return find_images(sharded)


def jpeg(value: int = 0, size: int = 20) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def error_of(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        find_images(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Writing


def test_folder_to_shards_and_back(class_folders: Path, images: Images) -> None:
    folder = find_images(class_folders)
    assert images.description.startswith("13 images in 2 classes in 7 shards under ")
    assert images.class_names == folder.class_names == ("cat", "dog")
    assert sorted(images.names) == list(folder.names)
    assert images.labels is not None and folder.labels is not None
    for i, name in enumerate(images.names):
        j = list(folder.names).index(name)
        assert images.labels[i] == folder.labels[j]
        assert images.read(i) == folder.read(j) == (class_folders / "train" / name).read_bytes()
        with images.open(i) as ours, folder.open(j) as theirs:
            assert ours.size == (40, 30)
            assert np.array_equal(np.asarray(ours.decode()), np.asarray(theirs.decode()))
    assert images.name(2) == Path("train-000001.tar") / images.names[2]
    assert len(set(images.labels[:7].tolist())) == 2  # the folder has seven cats first


def test_the_same_seed_writes_the_same_bytes(class_folders: Path, sharded: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in sorted(folder.glob("*.tar"))]

    again = shard(class_folders, tmp_path / "again", "--per-shard", "2")
    other = shard(class_folders, tmp_path / "other", "--per-shard", "2", "--seed", "1")
    assert content(again / "train") == content(sharded / "train") != content(other / "train")


def test_members_are_pairs_of_the_webdataset_layout(sharded: Path) -> None:
    with tarfile.open(sharded / "train/train-000000.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    keys = sorted({name.split(".")[0] for name in found})
    assert sorted(found) == sorted(key + suffix for key in keys for suffix in (".jpg", ".cls"))
    assert all(found[f"{key}.cls"] == str(int(key.startswith("dog"))).encode() for key in keys)
    assert (sharded / "train/classes.txt").read_text() == "cat\ndog\n"


def test_names_become_keys_of_their_own(tmp_path: Path) -> None:
    names = ["a.b.jpg", "a.c.jpg", "a_b.png", "../up.jpg", "кот/图.jpg", "x" * 180 + ".jpg"]
    (tmp_path / "in").mkdir()
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(20 * i))
    (tmp_path / "in/list.txt").write_text("\n".join(names))
    out = shard(tmp_path / "in", tmp_path / "out", "--list", str(tmp_path / "in/list.txt"))
    images = find_images(out)
    assert len(set(images.names)) == len(names)
    assert {"a_c.jpg", "up.jpg", "кот/图.jpg", "x" * 180 + ".jpg"} < set(images.names)
    assert {images.read(i) for i in range(len(names))} == {jpeg(20 * i) for i in range(len(names))}


def test_unreadable_files_are_named_and_left_out(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (tmp_path / "in" / split).mkdir(parents=True)
        (tmp_path / "in" / split / "good.jpg").write_bytes(jpeg())
    (tmp_path / "in/train/empty.jpg").touch()
    (tmp_path / "in/train/page.jpg").write_text("<html>")
    images = find_images(shard(tmp_path / "in", tmp_path / "out"), "val")
    assert images.labels is None and list(images.names) == ["good.jpg"]
    said = capsys.readouterr()
    assert "train: 1 images in 1 shards; 2 unreadable files left out" in said.out
    assert f"itpn train pretrain_own-data --data.root {tmp_path / 'out'}" in said.out
    assert sorted(line.split("/")[-1].split(":")[0] for line in said.err.splitlines()) == [
        "empty.jpg",
        "page.jpg",
    ]


def test_shards_keep_to_the_given_size(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0)
    for i in range(7):
        image = Image.fromarray(pixels.integers(0, 256, (300, 350, 3), dtype=np.uint8))
        image.save(tmp_path / "in" / f"{i}.png")  # about 315 kB
    shards = sorted((shard(tmp_path / "in", tmp_path / "out", "--megabytes", "1") / "train").glob("*.tar"))
    assert [path.stat().st_size > 900_000 for path in shards] == [True, True, False]
    assert all(path.stat().st_size <= 1_000_000 for path in shards)


def test_mistakes_of_the_command(
    class_folders: Path, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").touch()
    for arguments, words in {
        (str(class_folders), str(sharded)): "not empty",
        (str(class_folders), str(tmp_path / "out"), "--per-shard", "0"): "--per-shard",
        (str(tmp_path / "nowhere"), str(tmp_path / "out")): "does not exist",
        (str(tmp_path / "bad"), str(tmp_path / "out")): "none of 1 images can be read",
        (str(class_folders), str(tmp_path / "bad/a.jpg/out")): "cannot write",
    }.items():
        assert cli.main(["shard", *arguments]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]  # nothing half-written


def test_two_starts_that_write_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="cannot write"), _written_beside(out) as slow:
        (slow / "train").mkdir(parents=True)
        with _written_beside(out) as fast:
            (fast / "train").mkdir(parents=True)
            (fast / "train/done").touch()
        assert (slow / "train").is_dir()
    assert list(tmp_path.iterdir()) == [out] and (out / "train/done").exists()


def test_a_list_is_written_without_val(class_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(class_folders)
    (tmp_path / "val").symlink_to(class_folders)
    images = find_images(tmp_path)
    (tmp_path / "list").write_text("".join(f"train/{images.names[i]}\n" for i in range(3)))
    shard(tmp_path, tmp_path / "out", "--list", str(tmp_path / "list"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
    assert len(find_images(tmp_path / "out")) == 3


# The order


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    per_block=st.integers(1, 9),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 5),
)
def test_block_shuffle_keeps_blocks_together(sizes: list[int], per_block: int, seed: int, epoch: int) -> None:
    order = block_permutation(seed, epoch, sizes, per_block)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order.numpy()].tolist()
    seen: set[int] = set()
    blocks: list[set[int]] = [set()]
    for shard_id in shard_of:
        if shard_id in seen and shard_id not in blocks[-1]:
            raise AssertionError("a shard of an earlier block comes again")
        if shard_id not in blocks[-1] and len(blocks[-1]) == per_block:
            blocks.append(set())
        blocks[-1].add(shard_id)
        seen.add(shard_id)
    assert torch.equal(order, block_permutation(seed, epoch, sizes, per_block))
    with_empty = block_permutation(seed, epoch, [0, *sizes, 0], per_block)
    assert sorted(with_empty.tolist()) == list(range(sum(sizes)))


def test_blocks_are_of_eight_shards_and_change_with_the_epoch(tmp_path: Path) -> None:
    for i in range(20):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{j}.jpg": jpeg() for j in range(3)})
    images = find_images(tmp_path)
    orders = [images.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        shards = (order // 3).tolist()
        blocks = [set(shards[start:end]) for start, end in ((0, 24), (24, 48), (48, 60))]
        assert [len(block) for block in blocks] == [8, 8, 4] and len(set.union(*blocks)) == 20
        assert shards[:24] != sorted(shards[:24], key=shards.index)  # mixed inside, not shard after shard
    assert len({tuple(order.tolist()) for order in orders}) == 4


# Loading


def draw(generator: torch.Generator) -> Batch:
    return {"keep": torch.randperm(9, generator=generator)[None, :3]}


def batches(images: Images, count: int, workers: int = 0, **options: int) -> list[Batch]:
    arguments = {"seed": SEED, "batch_size": BATCH, "micro_batch": BATCH} | options
    config = DataConfig(workers=workers)
    loader = train_loader(images, config, image_size=(SIZE, SIZE), draw=draw, **arguments)  # type: ignore[arg-type]
    return list(islice(loader, count))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for name in theirs[0]:
        assert torch.equal(torch.cat([b[name] for b in ours]), torch.cat([b[name] for b in theirs]))


@pytest.fixture(scope="module")
def steps(images: Images) -> list[Batch]:
    return batches(images, 8)


def test_an_epoch_follows_the_block_shuffle(images: Images, steps: list[Batch]) -> None:
    for epoch in range(2):
        shown = torch.cat([batch["index"] for batch in steps[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(shown, images.order(SEED, epoch)[:12])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.sampled_from([0, 1, 3]),
    world_size=st.sampled_from([1, 2]),
    micro_batch=st.sampled_from([1, 2]),
    start_step=st.integers(0, 7),
)
def test_batches_are_the_same_for_any_workers_ranks_and_start(
    images: Images, steps: list[Batch], workers: int, world_size: int, micro_batch: int, start_step: int
) -> None:
    count = min(2, 8 - start_step)
    micro_steps = count * BATCH // (micro_batch * world_size)
    split = {"world_size": world_size, "micro_batch": micro_batch, "start_step": start_step}
    ranks = [batches(images, micro_steps, workers, rank=rank, **split) for rank in range(world_size)]
    in_order = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
    assert_equal(in_order, steps[start_step : start_step + count])


def test_workers_may_be_spawned(images: Images, steps: list[Batch]) -> None:
    samples = TrainSamples(images, DataConfig(), (SIZE, SIZE), draw, SEED)
    loader: DataLoader[tuple[Batch, list[int]]] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=None,
        sampler=MicroBatches(images, SEED, BATCH, BATCH),
        num_workers=1,
        multiprocessing_context="spawn",
    )
    batch, bad = next(iter(loader))
    assert bad == []
    assert_equal([batch], steps[:1])


def test_evaluation_sees_every_image_with_its_label(images: Images) -> None:
    shown = list(eval_loader(images, image_size=(SIZE, SIZE), batch_size=5, workers=2))
    index = torch.cat([batch["index"] for batch in shown])
    assert sorted(index.tolist()) == list(range(13)) and images.labels is not None
    assert torch.equal(torch.cat([batch["labels"] for batch in shown]), images.labels[index])


def read_all(images: Images, expected: list[bytes]) -> None:
    assert [images.read(i) for i in range(len(images))] == expected


def test_few_shards_are_open_at_a_time_and_forks_read_on(tmp_path: Path) -> None:
    for i in range(60):
        write_tar(tmp_path / f"{i:02d}.tar", {f"{i}.jpg": jpeg(i)})
    images, before = find_images(tmp_path), len(os.listdir("/dev/fd"))
    expected = [jpeg(i) for i in range(60)]
    read_all(images, expected)
    assert len(os.listdir("/dev/fd")) <= before + 20
    context = multiprocessing.get_context("fork")
    forks = [context.Process(target=read_all, args=(images, expected)) for _ in range(2)]
    for process in forks:
        process.start()
    read_all(images, expected)
    for process in forks:
        process.join(60)
        assert process.exitcode == 0


def test_a_shard_that_changes_or_goes_is_a_bad_image_not_wrong_pixels(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {"a.jpg": jpeg(i)})
    images = find_images(tmp_path)
    assert images.read(0) == jpeg(0)  # from now on the shard is open
    write_tar(tmp_path / "0.tar", {"b.jpg": jpeg(7), "c.jpg": jpeg()})
    (tmp_path / "1.tar").unlink()
    for i, words in enumerate(
        (r"^0\.tar/a\.jpg: 0\.tar was changed after it was indexed", r"^1\.tar/a\.jpg: No such file or dir")
    ):
        with pytest.raises(BadImageError, match=words), images.open(i):
            pass


def test_unreadable_images_in_shards_are_replaced_and_named(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {f"{i}.jpg": jpeg(i, 40) if i % 4 else b"<html>" for i in range(8)} | {"8.jpg": b""},
    )
    heard: set[str] = set()
    loader = train_loader(
        find_images(tmp_path), DataConfig(workers=0), image_size=(SIZE, SIZE), draw=draw, seed=0,
        batch_size=8, micro_batch=8, on_bad=lambda bad: heard.add(str(bad.path)),
    )  # fmt: skip
    shown = torch.cat([batch["index"] for batch in islice(loader, 4)])
    assert heard == {"a.tar/0.jpg", "a.tar/4.jpg", "a.tar/8.jpg"}
    assert not torch.isin(shown, torch.tensor([0, 4, 8])).any()
