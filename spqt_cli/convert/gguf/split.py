"""A .gguf file that was split: the parts beside it joined into one header.

Owns what the names and `split.*` keys of parts must say. Any part may be given; the first has the metadata.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from spqt_cli.convert.gguf.file import Header, StoredTensor, read_header
from spqt_cli.errors import AGAIN, SpqtError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def read(path: Path) -> Header:
    """The checked header of a .gguf file, with the tensors of all parts where it is one of several."""
    header = read_header(path)
    count = _number(header, "split.count", 1)
    if count <= 1:
        return header
    named = PART.fullmatch(path.name)
    number = _number(header, "split.no", 0)
    if named is None or (int(named[2]), int(named[3])) != (number + 1, count):
        raise SpqtError(
            f"{path} is part {number + 1} of {count}, and its name says otherwise",
            f"call it MODEL-{number + 1:05d}-of-{count:05d}.gguf, as the other parts",
        )
    paths = [path.with_name(f"{named[1]}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    for i, part in enumerate(paths, 1):
        if not part.is_file():
            raise SpqtError(f"{part} is missing, part {i} of {count}", "download it too")
    return _joined([header if part == path else read_header(part) for part in paths])


def whole_name(path: Path) -> str:
    """The name of a file; of a part, that of the file that was split."""
    named = PART.fullmatch(path.name)
    return f"{named[1]}.gguf" if named else path.name


def _joined(parts: list[Header]) -> Header:
    tensors: dict[str, StoredTensor] = {}
    for i, part in enumerate(parts):
        found = (_number(part, "split.no", 0), _number(part, "split.count", 1))
        if found != (i, len(parts)):
            raise SpqtError(
                f"{part.path} says that it is part {found[0] + 1} of {found[1]}, not {i + 1} of {len(parts)}",
                AGAIN,
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise SpqtError(f"{part.path}: tensor {min(twice)} is in another part too", AGAIN)
        tensors |= part.tensors
    first = parts[0]
    wanted = _number(first, "split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise SpqtError(
            f"{first.path}: its {len(parts)} parts have {len(tensors)} tensors, not {wanted}", AGAIN
        )
    return dataclasses.replace(first, tensors=tensors, parts=tuple(part.path for part in parts))


def _number(header: Header, key: str, default: int) -> int:
    found: Any = header.metadata.get(key, default)
    if type(found) is not int or found < 0:
        raise SpqtError(f"{header.path} is damaged: {key} is {found!r:.40}", AGAIN)
    return found
