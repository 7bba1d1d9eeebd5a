"""What the documents name exists: files, links, results, benchmark and test modules, make targets."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

if not (ROOT / "docs").is_dir():
    pytest.skip("docs/ is not part of a source archive", allow_module_level=True)

READ = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "*/README.md")
DOCUMENTS = sorted({path for pattern in READ for path in ROOT.glob(pattern) if ".venv" not in path.parts})
SOURCES = [
    path
    for folder in ("spqt_cli", "metal", "cpu", "configs", "tests", "benchmarks", "findings")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".h", ".cpp", ".metal", ".sh", ".toml"}
]
# A file of this repository by its ending.
NAMED = re.compile(r"(?<![\w./*-])(?:[\w.-]+/)*[\w.-]+\.(?:py|md|metal|h|cpp|sh|toml|json)\b(?!\w)")
ROOTED = re.compile(r"(?<![\w./-])(?:docs|benchmarks|metal|cpu|tests|findings|configs|spqt_cli)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)#:\s]+)[^):\s]*\)")
MODULE = re.compile(r"python -m ((?:benchmarks|tests|spqt_cli)[\w.]*\w)")
# Files of a model, of a checkpoint's repository or of the reader.
ELSEWHERE = re.compile(
    r"(config|tokenizer|tokenizer_config|mine|decode|host|prompts|result)\.json|llama\.cpp|tests\.metal"
)


def names(path: Path) -> Iterator[str]:
    """Every file name that a document writes."""
    text = path.read_text(encoding="utf-8")
    for pattern in (NAMED, ROOTED):
        yield from (name.rstrip(".") for name in pattern.findall(text))


def exists(name: str, near: Path) -> bool:
    """Whether a name is a path from the root or from `near`, or a file of that name is anywhere."""
    if (ROOT / name).exists() or (near / name).exists():
        return True
    return "/" not in name and any(name in known for known in BY_FOLDER.values())


BY_FOLDER = {
    folder: {path.name for path in (ROOT / folder).rglob("*") if path.is_file()}
    for folder in ("spqt_cli", "metal", "cpu", "configs", "tests", "benchmarks", "findings", "docs")
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_what_exists(path: Path) -> None:
    missing = {
        name for name in names(path) if not ELSEWHERE.fullmatch(name) and not exists(name, path.parent)
    }
    assert missing == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = LINK.findall(path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_commands_in_documents_exist() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    modules = {name.replace(".", "/") for name in MODULE.findall(text)}
    assert modules
    assert {
        name for name in modules if not (ROOT / f"{name}.py").is_file() and not (ROOT / name).is_dir()
    } == set()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ *)make ([a-z][\w-]*)", text, re.MULTILINE)) <= targets


def test_make_runs_tests_that_exist() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (named,) = re.findall(r"^NEWEST = (.*)$", text, re.MULTILINE)
    assert [one for one in named.split() if not (ROOT / "tests" / one).exists()] == []


def test_sources_name_documents_and_results_that_exist() -> None:
    rooted = re.compile(r"(?<![\w./-])(?:docs|benchmarks)/[\w./-]*\w\.(?:md|json|py)")
    missing = {
        (str(path.relative_to(ROOT)), name)
        for path in SOURCES
        if path.name != "test_documents.py"
        for name in rooted.findall(path.read_text(encoding="utf-8", errors="replace"))
        if not (ROOT / name).exists()
    }
    assert missing == set()


def test_every_result_is_named_by_a_document() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    results = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert {name for name in results if name not in text} == set()


def test_a_missing_name_is_found(tmp_path: Path) -> None:
    """The checks above can fail: names in prose, code and links, and bare ones."""
    page = tmp_path / "page.md"
    page.write_text("`gone.py`, docs/gone.md, `benchmarks/results/gone.json`, README.md, `cpu/pool.cpp`")
    gone = {name for name in names(page) if not exists(name, tmp_path)}
    assert gone == {"gone.py", "docs/gone.md", "benchmarks/results/gone.json"}


def test_the_readme_shows_the_steps_of_make_run() -> None:
    """Same commands, same flags, same values: what a reader types is what was shown."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    readme = (ROOT / "README.md").read_text().replace("\n    --", " --")
    for command in ("convert", "calibrate", "compare"):
        (made,) = re.findall(rf"^\t\$\(BIN\)/spqt {command} (.*)$", makefile, re.MULTILINE)
        (shown,) = re.findall(rf"^\$ spqt {command} (.*)$", readme, re.MULTILINE)
        made = made.replace("$(PROMPT)", re.findall(r"^PROMPT \?= (.*)$", makefile, re.MULTILINE)[0])
        assert _flags(made) == _flags(shown), command
    typed = re.findall(r"^spqt (?:convert|calibrate) .*$", readme, re.MULTILINE)
    assert "--fit gptq" in typed[0]
    assert "--sparsity 0.4" in typed[1]


def _flags(line: str) -> dict[str, str]:
    """Flag -> value; paths by what stands for them differ and are left out."""
    found = dict(re.findall(r'(--[\w-]+) ("[^"]*"|\S+)', line))
    return {name: value for name, value in found.items() if name not in ("--model", "--baseline")}
