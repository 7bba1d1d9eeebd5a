"""What --json prints fits docs/json-schemas.json, command by command; and nothing else is on stdout."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spqt_cli.adapt import peft
from spqt_cli.cli import main, worker
from tests import ROOT
from tests.adapt import test_peft
from tests.cli.test_commands import spqt

jsonschema = pytest.importorskip("jsonschema")
FILE = ROOT / "docs" / "json-schemas.json"
if not FILE.exists():
    pytest.skip("docs/ is not part of a source archive", allow_module_level=True)
SCHEMAS: dict[str, Any] = json.loads(FILE.read_text())
TEXT = "pack my box with five dozen liquor jugs " * 300
QUESTION = {"ctx": "the quick", "endings": ["brown fox", "lazy dog"], "label": 0}
NO_JSON = {"serve"}  # an HTTP server


class Places:
    """Folders and files that commands are run on; `own` may be changed."""

    def __init__(self, source: Path, converted: Path, calibrated: Path, folder: Path) -> None:
        self.source, self.converted, self.calibrated = source, converted, calibrated
        self.new, self.text, self.questions = (folder / name for name in ("new", "text.txt", "q.jsonl"))
        self.own = folder / "own"
        shutil.copytree(calibrated, self.own)
        self.text.write_text(TEXT)
        self.questions.write_text(json.dumps(QUESTION) + "\n")

    def preset(self) -> Path:
        path = self.own.parent / "tiny.toml"
        path.write_text("[quantization]\ngroup_size = 32\n[calibration]\ntokens = 1024\nmethod = 'fast'\n")
        return path


def a_peft_adapter(at: Places) -> Path:
    folder = at.own.parent / "peft"
    test_peft.write(folder)
    return folder


def an_adapter(at: Places) -> Path:
    return peft.convert(a_peft_adapter(at), at.own.parent / "adapter").output


Line = Callable[[Places], list[object]]
TIMES = ["-p", 4, "-g", 2, "-r", 2]
LINES: dict[str, Line] = {
    "convert": lambda at: [
        "convert", at.source, "-o", at.new, "--q-group-size", 32, "--dry-run", "--fit", "gptq", "--calibrate",
    ],
    "convert --calibrate": lambda at: [
        "convert", at.source, "-o", at.new, "--sparsity", 0.3, "--preset", at.preset(),
    ],
    "fit": lambda at: ["fit", at.converted, at.source, "-o", at.new, "--own-text", 2],
    "adapter": lambda at: ["adapter", a_peft_adapter(at), "-o", at.new],
    "fuse": lambda at: ["fuse", at.converted, an_adapter(at), "-o", at.new],
    "calibrate": lambda at: ["calibrate", at.own, "--sparsity", 0.3, "--tokens", 1024, "--method", "fast"],
    "calibrate --remove": lambda at: ["calibrate", at.own, "--remove"],
    "generate": lambda at: ["generate", at.calibrated, "fox", "-m", 3],
    "run": lambda at: ["run", at.calibrated, "fox", "-m", 3],
    "chat": lambda at: ["chat", at.calibrated, "-m", 3],
    "compare": lambda at: ["compare", at.calibrated, "-p", "fox", "-m", 3, "--sparsity", "0,0.4"],
    "eval": lambda at: ["eval", at.calibrated, at.text, "--windows", 2],
    "eval of several": lambda at: [
        "eval", at.calibrated, at.text, "--windows", 2, "--shipped", "--baseline", at.source,
    ],
    "eval of questions": lambda at: ["eval", at.calibrated, at.questions],
    "bench": lambda at: ["bench", at.calibrated, *TIMES],
    "list": lambda at: ["list", at.own.parent],
    "inspect": lambda at: ["inspect", at.calibrated],
    "inspect --plan": lambda at: ["inspect", at.calibrated, "--plan", 2],
    "verify": lambda at: ["verify", at.calibrated],
    "presets": lambda at: ["presets"],
    "profile": lambda at: ["profile"],
    "doctor": lambda at: ["doctor", "--selftest"],
    "error": lambda at: ["inspect", at.new],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.MARK, str(os.getpid()))


@pytest.fixture
def places(checkpoint: Path, converted: Path, calibrated: Path, tmp_path: Path) -> Places:
    return Places(checkpoint, converted, calibrated, tmp_path)


def printed(name: str, places: Places) -> Any:
    result = spqt(*LINES[name](places), "--json", stdin=b"fox\n" if name == "chat" else b"")
    assert result.returncode == (3 if name == "error" else 0), result.stderr.decode()
    (line,) = result.stdout.decode().splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", LINES)
def test_what_is_printed_fits_its_schema(name: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "doctor":  # the whole self-test has a test of its own
        from spqt_cli.cli import doctor

        rows = doctor.judged()
        monkeypatch.setattr(doctor, "judged", lambda: iter([next(rows)]))
    jsonschema.validate(printed(name, places), SCHEMAS[name])


def test_every_command_has_a_schema() -> None:
    assert {name.split(" ", maxsplit=1)[0] for name in SCHEMAS} - {"error"} == main.COMMANDS.keys() - NO_JSON
    assert SCHEMAS.keys() == LINES.keys()
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_a_schema_can_fail(places: Places) -> None:
    found = printed("generate", places)
    for change in ({"text": 3}, {"surprise": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found, **change}, SCHEMAS["generate"])
    lacking = copy.deepcopy(found)
    del lacking["sparsity"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(lacking, SCHEMAS["generate"])
