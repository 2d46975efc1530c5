"""Files that are damaged, or made to harm: one line says so, nothing of theirs runs, nothing grows."""

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from itpn.errors import UserError
from itpn.weights.convert import read_foreign

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.ones(4)}


def torch_bytes(content, *, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zip_bytes(data, *, compression=zipfile.ZIP_STORED, **more):
    """As torch.save writes, by hand: its pickle and the other entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **more}.items():
            archive.writestr(f"a/{name}", content)
    return buffer.getvalue()


def refused(tmp_path, content, match):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        read_foreign(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert "weights_only" not in message
    assert len(message) < 600


class Runs:
    """Its pickle asks the reader for a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_pickle(size, stride, *, numel=1, offset=0, kind="FloatStorage"):
    """{"a": a tensor of these claims}, in torch's opcodes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.storage.__dict__.get(kind, torch.FloatStorage), "0", "cpu", numel) * (
                item == "STORAGE"
            ) or None

    rebuild = Runs(torch._utils._rebuild_tensor_v2, "STORAGE", offset, size, stride, False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": rebuild})
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "function", [eval, exec, subprocess.check_call, subprocess.Popen, getattr, __import__]
)
def test_no_call_is_made(tmp_path, function, zipped):
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')"
    argument = ["touch", str(marker)] if function.__module__ == "subprocess" else code
    (tmp_path / "file.pth").write_bytes(
        torch_bytes({"model": STATE, "x": Runs(function, argument)}, zipped=zipped)
    )
    found = read_foreign(tmp_path / "file.pth")
    assert found.tensors.keys() == STATE.keys()
    assert found.placeholders[0].endswith(f".{function.__qualname__}")
    assert found.left_out["x"].startswith("an object of")
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_names_of_the_system_are_refused(tmp_path, zipped):
    marker = tmp_path / "marker"
    content = {"model": STATE, "x": Runs(os.system, f"touch {marker}")}
    refused(tmp_path, torch_bytes(content, zipped=zipped), "system, as an attack would")
    assert not marker.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"c__builtin__\neval\nX\x03\x00\x00\x00a+b\x85R.",
        b"c__builtin__\nbytearray\nK\x05\x85R.",
        b"(X\x02\x00\x00\x00lsios\nsystem\n.",
        b"\x8c\x02os\x8c\x06system\x93)R.",
        b"\x82\x01.",
        b"}q\x00X\x05\x00\x00\x00modelh\x00s.",  # contains itself
        b"(" * 1000 + b".",
        b")" + b"\x85" * 100_000 + b"}q\x00.",
        b"}" + b")" + b"\x85" * 100_000 + b"Ns.",  # a key that Python cannot hash in its stack
        b"})" + b"q\x00h\x00\x86" * 60 + b"Ns.",  # a key of 2^60 items
        b"]q\x00" + b"]a" * 10,
        b"t.",
        b".",
        b"N.",
        b"]" * 3_000_000 + b".",
        b"X\xff\xff\xff\xffa.",
        b"X\x05\x00\x00\x00modelQ.",
        b"h\x07.",
        b"K\x05R.",
        b"Nb.",
        b"NNs.",
        b"".join(b"cm%d\nf\n0" % i for i in range(2000)) + b"N.",
        b"cmodule\n" + b"n" * 100_000 + b"\n)R.",
        b"cbad\xff\nname\n.",
        b"c\n\n.",
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_by_hand(tmp_path, body, zipped):
    data = b"\x80\x02" + body
    start = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    refused(tmp_path, zip_bytes(data) if zipped else start + data + pickle.dumps([], 2), "file.pth: .")


@pytest.mark.parametrize("depth", [10, 100_000])
def test_nested_lists_and_dicts_do_no_harm(tmp_path, depth):
    nest = b"]" * depth + b"a" * (depth - 1)
    data = torch_bytes(STATE)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    body = parts.pop("data.pkl")[:-1] + b"X\x04\x00\x00\x00deep" + nest + b"s."
    refused(tmp_path, zip_bytes(body, **parts), "no data for a.bias where torch.save puts it")
    del parts[".format_version"]  # without it torch does not compute places, but looks them up
    path = tmp_path / "file.pth"
    path.write_bytes(zip_bytes(body, **parts))
    found = read_foreign(path)
    assert found.tensors.keys() == STATE.keys()
    assert found.left_out == {"deep": "a value of type list, no tensor"}


@pytest.mark.parametrize(
    ("claims", "match"),
    [
        ({"size": (10**9,), "stride": (0,)}, r"up to a \[1000000000\]"),
        ({"size": (2**32, 2**32), "stride": (0, 0)}, "."),
        ({"size": (10**9,), "stride": (1,)}, r"a \[1000000000\] needs 4,000,000,000 bytes, the file has 4"),
        ({"size": (4,), "stride": (1,)}, r"a \[4\] needs 16 bytes, the file has 4"),
        ({"size": (4,), "stride": (1,), "numel": 4}, r"a \[4\] needs 16 bytes, the file has 4"),
        ({"size": (1,), "stride": (1,), "offset": 1}, r"a \[1\] needs 8 bytes, the file has 4"),
        ({"size": (1,), "stride": (1,), "numel": 10**15, "offset": 10**14}, "needs"),
        ({"size": (-1,), "stride": (1,)}, "."),
        ({"size": (2,), "stride": (-1,)}, "."),
        ({"size": (1,), "stride": (1,), "offset": -1}, "."),
        ({"size": (1,), "stride": (1,), "numel": -5}, "."),
        ({"size": "ab", "stride": (1,)}, "."),
        ({"size": (1,), "stride": (1,), "numel": "many"}, "."),
    ],
    ids=str,
)
def test_shapes_that_lie(tmp_path, claims, match):
    refused(tmp_path, zip_bytes(tensor_pickle(**claims), **{"data/0": b"\0\0\x80\x3f"}), match)


def test_true_claims_by_hand_are_read(tmp_path):
    (tmp_path / "a").write_bytes(zip_bytes(tensor_pickle((1,), (1,)), **{"data/0": b"\0\0\x80\x3f"}))
    assert read_foreign(tmp_path / "a").tensors["a"].tolist() == [1.0]


def test_a_shape_that_lies_in_the_older_format(tmp_path):
    content = torch_bytes({"a": torch.ones(4)}, zipped=False)
    refused(tmp_path, content.replace(b"K\x04\x85", b"M\x00\x80\x85"), "cannot be read")
    refused(tmp_path, torch_bytes({"a": torch.ones(1).expand(10**9)}, zipped=False), r"a \[1000000000\]")


def test_one_storage_many_times(tmp_path):
    weight = torch.ones(1000)
    refused(tmp_path, torch_bytes({f"a{i}": weight.view(10, 100) for i in range(2000)}), "repeat themselves")


@pytest.mark.parametrize(
    "name",
    [
        "torch._utils\n_rebuild_qtensor",
        "torch._utils\n_rebuild_device_tensor_from_cpu_tensor",
        "torch._utils\n_rebuild_wrapper_subclass",
        "torch._tensor\n_rebuild_from_type_v2",
        "torch\nTensor",
        "torch.cuda\nFloatTensor",
        "builtins\nbytearray",
    ],
)
def test_what_takes_memory_without_limit_is_refused(tmp_path, name):
    refused(tmp_path, zip_bytes(b"\x80\x02c" + name.encode() + b"\n."), "sparse, quantised or special")


def test_sparse_tensors_are_refused(tmp_path):
    refused(tmp_path, torch_bytes({"a": torch.eye(3).to_sparse()}), "sparse, quantised or special")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_without_data_are_refused(tmp_path, zipped):
    content = STATE | {"b": torch.ones(2, 3, device="meta")}
    refused(tmp_path, torch_bytes(content, zipped=zipped), ".")


@pytest.mark.parametrize(
    "content", [[1], torch.ones(3), 5, None, {}, {"a": 1}, {"weights": STATE}, {3: torch.ones(1)}]
)
def test_no_weights_by_name(tmp_path, content):
    refused(tmp_path, torch_bytes(content), "no weights by name")


def test_a_whole_module_is_not_looked_up(tmp_path):
    refused(tmp_path, torch_bytes(torch.nn.Linear(2, 2)), r"an object of torch\.nn\.modules\.linear\.Linear")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        (b"just some text", "is no file of"),
        (b"\x1f\x8b" + bytes(100), "is no file of"),
        (b"PK\x03\x04", "cannot be read"),
        (b"\x80", "cannot be read"),
        (b"\x80\x02", "cannot be read"),
        (pickle.dumps(STATE, 4), "protocol 4"),
        (pickle.dumps({"a": 1}, 2), "cannot be read"),
        (zip_bytes(b"\x80\x02}.").replace(b"data.pkl", b"text.pkl"), "none of torch.save"),
    ],
)
def test_other_files(tmp_path, content, match):
    refused(tmp_path, content, match)


def test_other_things_than_files(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        read_foreign(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_foreign(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        read_foreign(tmp_path / "pipe")


def test_archives_of_other_kinds(tmp_path):
    refused(tmp_path, zip_bytes(b"\x80\x02}.", **{"constants.pkl": b"\x80\x02)."}), "TorchScript")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(tmp_path, buffer.getvalue(), "is no file of")


def test_zip_bombs(tmp_path):
    zeros = bytes(1 << 24)
    bomb = zip_bytes(b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED, **{"data/0": zeros})
    refused(tmp_path, bomb, "is compressed")
    stored = bomb.replace(b"\x08\x00", b"\x00\x00")
    refused(tmp_path, stored, "is compressed|overlaps|cannot be read")
    refused(tmp_path, b"PK\x03\x04" + zip_bytes(b"\x80\x02}."), "before its first entry")


def test_entries_on_top_of_one_another(tmp_path):
    content = bytearray(zip_bytes(b"\x80\x02}.", **{"data/0": bytes(100), "data/1": bytes(100)}))
    first = content.index(b"PK\x03\x04", 1)
    last = content.rindex(b"PK\x01\x02")
    content[last + 42 : last + 46] = struct.pack("<I", first)
    refused(tmp_path, bytes(content), "overlaps")


def test_two_entries_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for _ in range(2):
                archive.writestr("a/data.pkl", b"\x80\x02}.")
    refused(tmp_path, buffer.getvalue(), "of one name")


def safetensors_of(header, data=bytes(8)):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 40) + b'{"a":1}',
        struct.pack("<Q", 100) + b"{",
        safetensors_of({"a": entry(0, 4), "b": entry(2, 6)}),
        safetensors_of({"a": entry(0, 4), "b": entry(4, 1 << 40, (1 << 38,))}),
        safetensors_of({"a": entry(0, 8)}),
        safetensors_of({"a": entry(4, 0), "b": entry(4, 8)}),
        safetensors_of({"a": entry(0, 8, (1 << 62, 1 << 62))}),
        safetensors_of({"a": entry(0, 4)}),
        safetensors_of({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}),
        safetensors_of(b"{" * 100_000),
        safetensors_of(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        safetensors_of({}, b""),
        safetensors_of({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}),
    ],
    ids=lambda content: repr(content[8:40]),
)
def test_safetensors_that_lie(tmp_path, content):
    refused(tmp_path, content, "safetensors|no weights by name|as weights")


VALID = {
    "zip": torch_bytes({"model": STATE, "x": Runs(getattr, 1), "epoch": 3}),
    "legacy": torch_bytes({"model": STATE, "x": Runs(getattr, 1), "epoch": 3}, zipped=False),
    "safetensors": safetensors_bytes(STATE),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "file"


def read_or_refuse(path, content):
    path.write_bytes(content)
    try:
        found = read_foreign(path)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert sum(tensor.numel() for tensor in found.tensors.values()) <= len(content)
        assert all(isinstance(tensor.sum().item(), (int, float)) for tensor in found.tensors.values())


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
def test_flipped_bits(damaged, kind, data):
    content = bytearray(VALID[kind])
    for place, bit in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7)), max_size=8)
    ):
        content[place] ^= 1 << bit
    read_or_refuse(damaged, bytes(content))


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
def test_replaced_and_cut_bytes(damaged, kind, data):
    content = VALID[kind]
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    read_or_refuse(damaged, content[:start] + data.draw(st.binary(max_size=12)) + content[end:])


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
def test_cut_short(damaged, kind, data):
    read_or_refuse(damaged, VALID[kind][: data.draw(st.integers(0, len(VALID[kind]) - 1))])
