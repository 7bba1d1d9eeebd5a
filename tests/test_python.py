"""spqt from Python, as README and docs/example.py show it; the package says that it is typed."""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import mlx_lm
import pytest

import spqt_cli
from spqt_cli.errors import SpqtError, UsageError
from tests import ROOT


def python(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def linked(calibrated: Path, folder: Path) -> Path:
    (folder / "my-model").symlink_to(calibrated)
    return folder


def test_the_snippet_of_the_readme_runs(calibrated: Path, tmp_path: Path):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = python("-c", snippet, folder=linked(calibrated, tmp_path))
    assert done.returncode == 0, done.stderr
    model, tokenizer = spqt_cli.load(str(calibrated))
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert done.stdout == mlx_lm.generate(model, tokenizer, prompt, max_tokens=64) + "\n"


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ is not part of a source archive")
def test_the_example_runs(calibrated: Path, tmp_path: Path):
    done = python(ROOT / "docs" / "example.py", folder=linked(calibrated, tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+\.\d tokens/s$", done.stdout, re.MULTILINE)


def test_what_load_returns_is_what_mlx_lm_takes(calibrated: Path):
    model, tokenizer = spqt_cli.load(str(calibrated), dense=True)
    prompts = [tokenizer.encode(text) for text in ("the quick", "a lazy dog")]
    alone = [
        [step.token for step in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=6)]
        for prompt in prompts
    ]
    batch = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=6, return_token_ids=True)
    assert batch.token_ids == alone
    assert len(alone[0]) == 6


def test_dense_and_a_sparsity_are_refused_together(calibrated: Path):
    with pytest.raises(UsageError, match="exclude one another"):
        spqt_cli.load(str(calibrated), dense=True, sparsity=0.4)


def test_a_traceback_shows_the_hint(tmp_path: Path):
    with pytest.raises(SpqtError) as caught:
        spqt_cli.load(str(tmp_path / "nothing"))
    assert "hint: " in "".join(traceback.format_exception(caught.value))


def test_a_draft_model_is_not_loaded_unseen(calibrated: Path):
    with pytest.raises(UsageError, match="draft_model"):
        spqt_cli.load(str(calibrated), draft_model=str(calibrated))


@pytest.mark.parametrize("statement", ["import spqt_cli.patch", "import spqt_cli; spqt_cli.load('x')"])
def test_without_mlx_the_install_command_is_in_the_error(statement: str, tmp_path: Path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ModuleNotFoundError('mlx', name='mlx')")
    done = python("-c", statement, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: MLX is not installed: pip install")


def test_a_type_checker_reads_our_types(tmp_path: Path):
    """mypy from outside: a wrong option and a wrong type are errors, which needs py.typed."""
    assert (Path(spqt_cli.__file__).parent / "py.typed").is_file()
    script = tmp_path / "script.py"
    script.write_text(
        "import spqt_cli\n"
        "model, tokenizer = spqt_cli.load('x', sparsity=0.4, dense=False)\n"
        "spqt_cli.load(3)\n"
        "spqt_cli.load('x', sparsty=0.4)\n"
    )
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n")
    done = python("-m", "mypy", "--config-file", config, script, folder=tmp_path)
    lines = [int(line) for line in re.findall(r"script\.py:(\d+): error", done.stdout)]
    assert lines == [3, 4], done.stdout + done.stderr
