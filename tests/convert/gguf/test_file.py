"""Hostile .gguf files: each ends in one SpqtError that names the file, with little memory taken."""

import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from spqt_cli.convert.gguf import checkpoint as gguf
from spqt_cli.convert.gguf.file import read_header
from spqt_cli.errors import SpqtError, UnsupportedError
from tests.conftest import random_weights, tiny_config
from tests.lib.writing_gguf import write_file, write_model

STRING, ARRAY, U8, U32, U64 = 8, 9, 0, 4, 10
F32 = 0


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def header(keys: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys + tensors)


def counts(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def array(kind: int, count: int) -> bytes:
    """A header whose one key declares an array, and ends there."""
    return header([key("a", ARRAY, struct.pack("<IQ", kind, count))], [])


HUGE = (1 << 64) - 1
DAMAGED = {
    "empty": (b"", "not a GGUF file"),
    "a pointer instead of the file": (b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF file"),
    "a web page": (b"<!DOCTYPE html><html>", "not a GGUF file"),
    "only the magic": (b"GGUF", "ends early"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "ends early"),
    "absurd tensor count": (counts(HUGE, 0), "more than"),
    "absurd key count": (counts(0, HUGE), "more than"),
    "keys missing": (counts(0, 5), "ends early"),
    "string longer than the file": (counts(0, 1, struct.pack("<Q", 1 << 40)), "ends early"),
    "string of 2^64": (counts(0, 1, struct.pack("<Q", HUGE)), "ends early"),
    "key not UTF-8": (counts(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "UTF-8"),
    "unknown value type": (header([key("a", 77, b"")], []), "unknown value type 77"),
    "array of 2^63": (array(U8, 1 << 63), "more than"),
    "array of strings of 2^40": (
        array(STRING, 1 << 40),
        "more than",
    ),
    "array longer than the file": (
        array(U64, 1 << 21),
        "ends early",
    ),
    "nested array": (array(ARRAY, 1), "nested"),
    "key twice": (header([key("a", U32, struct.pack("<I", 1))] * 2, []), "stands twice"),
    "alignment of 3": (header([key("general.alignment", U32, struct.pack("<I", 3))], []), "power of two"),
    "alignment of 0": (header([key("general.alignment", U32, struct.pack("<I", 0))], []), "power of two"),
    "alignment as text": (header([key("general.alignment", STRING, text("32"))], []), "power of two"),
    "no dimensions": (header([], [tensor("t", ())]), "0 dimensions"),
    "nine dimensions": (header([], [tensor("t", (1,) * 9)]), "9 dimensions"),
    "a length of 0": (header([], [tensor("t", (0, 4))]), "shape"),
    "lengths that overflow": (header([], [tensor("t", (1 << 32, 1 << 32, 1 << 32))]), "shape"),
    "tensor past the end": (header([], [tensor("t", (1 << 20,))]), "ends at byte"),
    "offset past the end": (header([], [tensor("t", (4,), offset=1 << 62)]), "ends at byte"),
    "offset that wraps": (header([], [tensor("t", (4,), offset=HUGE - 31)]), "ends at byte"),
    "offset out of line": (header([], [tensor("t", (4,), offset=7)]) + bytes(99), "no multiple"),
    "tensor over another": (header([], [tensor("t", (8,)), tensor("u", (8,))]) + bytes(199), "over another"),
    "tensor twice": (
        header([], [tensor("t", (8,)), tensor("t", (8,), offset=32)]) + bytes(199),
        "stands twice",
    ),
    "rows that split a block": (header([], [tensor("t", (33,), kind=8)]) + bytes(99), "no multiple of 32"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, fault: str) -> None:
    data, words = DAMAGED[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(SpqtError) as caught:
        gguf.open_checkpoint(path)
    assert str(path) in caught.value.cause
    assert words in caught.value.cause
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header([], [], version=1), "version 1"),
        (header([], [], version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header([], [tensor("t", (256,), kind=999)]) + bytes(4096), "unknown type 999"),
    ],
)
def test_what_no_reader_here_knows_is_unsupported(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=words):
        gguf.open_checkpoint(path)


def test_a_type_that_cannot_be_unpacked_is_unsupported(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    data = path.read_bytes()
    place = data.index(text("output_norm.weight")) + len(text("output_norm.weight")) + 4 + 8
    path.write_bytes(data[:place] + struct.pack("<I", 26) + data[place + 4 :])  # I32: as long as F32
    with pytest.raises(UnsupportedError, match=r"output_norm\.weight has the type I32"):
        gguf.open_checkpoint(path)


def test_an_unreadable_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpqtError, match="can't be read"):
        gguf.open_checkpoint(tmp_path / "missing.gguf")


def test_giant_counts_take_no_memory(tmp_path: Path) -> None:
    """A sparse file of 1 TB makes every count plausible by size; nothing of that size is read."""
    path = tmp_path / "giant.gguf"
    path.write_bytes(array(U8, 1 << 39))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    for kind, count in ((U8, 1 << 39), (U8, 1 << 22), (STRING, 1 << 39)):
        path_data = header([key("a", ARRAY, struct.pack("<IQ", kind, count)), key("b", STRING, b"")], [])
        with path.open("r+b") as file:
            file.write(path_data)
        with pytest.raises(SpqtError):
            gguf.open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def tiny(folder: Path) -> Path:
    """A small whole model."""
    config = tiny_config("llama")
    weights = {name: np.array(w) for name, w in random_weights(config, 0).items()}
    return write_model(folder / "tiny.gguf", "llama", config, weights)


def use(path: Path, folder: Path) -> None:
    """All that convert does with a file."""
    checkpoint = gguf.open_checkpoint(path)
    for name in checkpoint.names():
        assert checkpoint.read(name).shape == checkpoint.shape(name)
    gguf.write_tokenizer(path, folder)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    data = path.read_bytes()
    use(path, tmp_path)
    chance = random.Random(0)
    for length in [*range(0, 400, 7), *(chance.randrange(len(data) - 1) for _ in range(60))]:
        path.write_bytes(data[:length])
        with pytest.raises(SpqtError):
            use(path, tmp_path)


def test_changed_bytes_never_end_in_a_traceback(tmp_path: Path) -> None:
    """400 files with a few bytes of the header changed: each is read or refused."""
    path = tiny(tmp_path)
    data = path.read_bytes()
    end = read_header(path).tensors["token_embd.weight"].start
    chance = random.Random(1)
    causes = []
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(end)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(changed)
        try:
            use(path, tmp_path)
        except SpqtError as error:
            causes.append(error.cause)
    assert len(causes) > 100
    assert [cause for cause in causes if str(path) not in cause] == []


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    def keys(writer: GGUFWriter) -> None:
        writer.add_string("general.name", "Ünïcode ▁")
        writer.add_float32("general.f", 0.1)
        writer.add_float64("general.d", 0.1)
        writer.add_int8("general.i", -7)
        writer.add_uint64("general.u", 1 << 60)
        writer.add_bool("general.b", True)
        writer.add_array("general.list", [1.5, -2.5])
        writer.add_array("general.words", ["a", "", "ß"])

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    keys(writer)
    for i, shape in enumerate([(3,), (5, 32), (2, 3, 64)]):
        writer.add_tensor(f"t{i}", np.ones(shape, np.float16))
    path = write_file(writer, tmp_path / "x.gguf")
    found, wanted = read_header(path), GGUFReader(path)
    named = {k: f.contents() for k, f in wanted.fields.items() if not k.startswith("GGUF.")}
    assert found.metadata.keys() == named.keys()
    for name, value in named.items():
        assert np.array_equal(found.metadata[name], value), name
    for tensor_ in wanted.tensors:
        stored = found.tensors[tensor_.name]
        assert (stored.start, stored.nbytes) == (tensor_.data_offset, tensor_.n_bytes)
        assert stored.shape == tuple(int(d) for d in reversed(tensor_.shape))
