import errno
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from itpn.data import limits, picture
from itpn.data.picture import BadImageError, load_image, open_bytes, open_picture
from tests.data.dirty import bmp, png

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason_of(path: Path) -> str:
    with pytest.raises(BadImageError) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_colour_comes_through(tmp_path: Path, suffix: str) -> None:
    path = saved(
        Image.fromarray(COLOURS), tmp_path / f"x.{suffix}", **{"lossless": True} if suffix == "webp" else {}
    )
    assert np.array_equal(pixels(path), COLOURS)


@pytest.mark.parametrize("suffix", ["png", "tif", "gif", "jpg"])
def test_grey_and_bilevel_are_repeated(tmp_path: Path, suffix: str) -> None:
    grey = Image.fromarray(COLOURS[..., 0])
    for name, image in (("grey", grey), ("bilevel", grey.point(lambda v: 255 * (v > 99)).convert("1"))):
        loaded = pixels(saved(image, tmp_path / f"{name}.{suffix}"))
        assert (loaded == loaded[..., :1]).all()
        if suffix != "jpg":
            assert np.array_equal(loaded[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_full_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(values), tmp_path / f"x.{suffix}")
    assert pixels(path)[0, :, 0].tolist() == np.rint(values[0] / 257).astype(int).tolist()


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 0, 255, 256, 32768, 65279, 65535)
    (tmp_path / "x.png").write_bytes(png(2, 1, 16, 2, row))
    assert pixels(tmp_path / "x.png").tolist() == [[[0, 0, 1], [128, 254, 255]]]


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (6, 8, 1), dtype=np.uint8)
    expected = (COLOURS * (alpha / 255) + 255 * (1 - alpha / 255)).round()
    rgba = Image.fromarray(np.concatenate([COLOURS, alpha], axis=2))
    assert np.abs(pixels(saved(rgba, tmp_path / "x.png")) - expected).max() <= 1
    assert np.abs(pixels(saved(rgba, tmp_path / "x.tif")) - expected).max() <= 1
    grey = pixels(saved(rgba.convert("LA"), tmp_path / "grey.png"))
    assert (grey[alpha[..., 0] < 2] > 250).all()


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(saved(image, tmp_path / "x.png")).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    clear = saved(image, tmp_path / "y.png", transparency=1)
    assert pixels(clear).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert pixels(saved(image, tmp_path / "z.gif", transparency=1))[0, 1].tolist() == [255, 255, 255]


def test_a_colour_key_in_rgb_is_transparent(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    loaded = pixels(saved(image, tmp_path / "x.png", transparency=tuple(int(v) for v in COLOURS[2, 3])))
    assert loaded[2, 3].tolist() == [255, 255, 255]
    assert np.array_equal(loaded[0], COLOURS[0])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_other_colour_spaces_look_alike(tmp_path: Path, mode: str, suffix: str) -> None:
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    loaded = pixels(saved(flat.convert(mode), tmp_path / f"x.{suffix}"))
    assert np.abs(loaded.astype(int) - (200, 100, 50)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_rotation_is_applied_as_pillow_does(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(COLOURS), tmp_path / f"x.{suffix}", exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(pixels(path), np.asarray(expected))
    assert expected.size == ((6, 8) if orientation >= 5 else (8, 6))
    with open_picture(path) as opened:
        assert opened.size == expected.size


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white", "red")]
    path = saved(frames[0], tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert pixels(path).max() == 0


def test_a_multi_picture_jpeg_is_a_jpeg(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
    path = saved(frames[0], tmp_path / "x.jpg", format="MPO", save_all=True, append_images=frames[1:])
    with open_picture(path) as opened:
        assert np.asarray(opened.cut((0, 0, 64, 64), (16, 16))).max() < 4


def test_the_content_counts_not_the_suffix(tmp_path: Path) -> None:
    path = saved(Image.fromarray(COLOURS), tmp_path / "mislabelled.jpg", format="PNG")
    assert np.array_equal(pixels(path), COLOURS)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_cut_is_a_crop_of_the_upright_image(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    path = saved(noise, tmp_path / f"x.{suffix}", exif=exif)
    upright = load_image(path)
    width, height = upright.size
    for left, top in ((0, 0), (width - 20, 0), (0, height - 20), (7, 11)):
        with open_picture(path) as opened:
            cut = opened.cut((left, top, 20, 20), (20, 20)).permute(1, 2, 0)
        assert np.array_equal(cut, np.asarray(upright)[top : top + 20, left : left + 20])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(8, 24), (24, 8), (64, 24)])
def test_a_cut_of_any_size_is_the_upright_crop_scaled(
    tmp_path: Path, orientation: int, suffix: str, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(COLOURS).resize((301, 201), Image.Resampling.BICUBIC)
    path = saved(smooth, tmp_path / f"x.{suffix}", exif=exif)
    box = (21, 10, 150, 103)
    crop = load_image(path).crop((21, 10, 171, 113))
    expected = np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    with open_picture(path) as opened:
        cut = opened.cut(box, size).permute(1, 2, 0).numpy()
    assert cut.shape == (*size, 3) and np.abs(cut - expected).mean() < 2


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("size", "factor"), [(201, 1), (51, 1), (50, 4), (26, 4), (25, 8), (7, 8)])
def test_a_scaled_decode_leaves_the_box_no_smaller_than_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, orientation: int, size: int, factor: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.new(mode, (401, 301)), tmp_path / "x.jpg", exif=exif)
    shapes = []
    resized = picture._resized
    monkeypatch.setattr(picture, "_resized", lambda part, *a: shapes.append(part.shape) or resized(part, *a))
    with open_picture(path) as opened:
        width, height = opened.size
        opened.cut((width - 200, height - 250, 200, 250), (size, size))
    ((height, width, _),) = shapes
    assert round((200 * 250 / (height * width)) ** 0.5) == factor
    assert factor == 1 or min(height, width) >= size


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [40, 90])
def test_a_cut_of_a_jpeg_is_what_pillow_reads(tmp_path: Path, mode: str, size: int) -> None:
    """Whichever library decodes it, at its full size or not."""
    smooth = Image.fromarray(COLOURS).resize((401, 301), Image.Resampling.BICUBIC)
    path = saved(smooth.convert(mode), tmp_path / "x.jpg", quality=95)
    left, top, width, height = box = (101, 50, 250, 203)
    plain = load_image(path).crop((left, top, left + width, top + height))
    expected = np.asarray(plain.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    with open_picture(path) as opened:
        cut = opened.cut(box, (size, size)).permute(1, 2, 0).numpy()
    assert np.abs(cut - expected).mean() < 1


def test_an_odd_jpeg_is_left_to_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.fromarray(COLOURS).resize((64, 64)), tmp_path / "x.jpg")
    refused = []
    decode = simplejpeg.decode_jpeg

    def spied(*arguments: object, **options: object) -> np.ndarray:
        try:
            return decode(*arguments, **options)
        except ValueError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spied)
    data = path.read_bytes()
    with open_bytes(data[:-2] + bytes(9) + data[-2:], path) as odd, open_bytes(data, path) as plain:
        assert torch.equal(odd.cut((0, 0, 64, 64), (64, 64)), plain.cut((0, 0, 64, 64), (64, 64)))
    assert len(refused) == 1


def test_the_fast_decoder_gets_no_other_size_than_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(Image.fromarray(COLOURS), tmp_path / "x.jpg")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda *a, **o: (60_000, 60_000, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **o: pytest.fail("decoded"))
    with open_picture(path) as opened:
        assert opened.cut((0, 0, 8, 6), (6, 6)).shape == (3, 6, 6)


def test_bytes_are_read_as_files_are(tmp_path: Path) -> None:
    path = saved(Image.fromarray(COLOURS), tmp_path / "x.png")
    with open_bytes(path.read_bytes(), Path("a.tar/x.png")) as opened:
        assert np.array_equal(np.asarray(opened.decode()), COLOURS)
    for data, reason in ((b"", "empty"), (jpeg()[:1000], "truncated")):
        refused = pytest.raises(BadImageError, match=rf"a\.tar/x\.jpg: .*{reason}")
        with refused, open_bytes(data, Path("a.tar/x.jpg")) as opened:
            opened.cut((0, 0, 64, 64), (64, 64))


def test_broken_exif_does_not_spoil_a_sound_image(tmp_path: Path) -> None:
    path = saved(
        Image.fromarray(COLOURS), tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40
    )
    assert pixels(path).shape == COLOURS.shape


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("1", (12_000, 12_000)), tmp_path / "big.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "12,000 x 12,000" in reason_of(path)
    monkeypatch.setattr(limits, "MAX_PIXELS", 1 << 40)
    (tmp_path / "huge.bmp").write_bytes(bmp(40_000, 40_000))
    assert "more pixels than the limit" in reason_of(tmp_path / "huge.bmp")


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImageError(Path("a.jpg"), "because")))
    assert (error.path, error.reason) == (Path("a.jpg"), "because")


@pytest.mark.parametrize(
    "lack",
    [MemoryError(), OSError(errno.EMFILE, "files"), OSError(errno.ENFILE, ""), OSError(errno.ENOMEM, "")],
)
def test_a_lack_of_memory_or_handles_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise lack

    path = saved(Image.fromarray(COLOURS), tmp_path / "x.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(lack)) as caught:
        load_image(path)
    assert caught.value is lack


def test_scaling_a_sound_image_cannot_be_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes")

    path = saved(Image.fromarray(COLOURS), tmp_path / "x.png")
    monkeypatch.setattr(picture, "_resized", fail)
    with open_picture(path) as opened, pytest.raises(RuntimeError, match="not enough memory"):
        opened.cut((0, 0, 8, 6), (4, 4))
