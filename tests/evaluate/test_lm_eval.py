"""lm-eval through mlx-lm's wrapper, with a stand-in for the lm_eval package: thresholds act there."""

import json
from pathlib import Path

import pytest

from spqt_cli.decode import layers, session
from spqt_cli.evaluate import multiple_choice, questions
from spqt_cli.measure import probes
from tests.cli.test_commands import assert_error, process

CONTEXT, ENDINGS = "the quick brown", (" fox jumps over", " dog")

# As much of lm-eval as mlx-lm's wrapper touches: a task's name says what is asked of the model.
STAND_IN = {
    "lm_eval/__init__.py": f"""
class Request:
    def __init__(self, *args):
        self.args = args


def simple_evaluate(model, tasks, **options):
    if tasks == ["choice"]:
        asked = [Request({CONTEXT!r}, ending) for ending in {ENDINGS!r}]
        found = model.loglikelihood(asked[:1] + [Request("", " dog")] + asked[1:])
    elif tasks == ["rolling"]:
        found = model.loglikelihood_rolling([Request("the quick brown fox")])
    else:
        found = model.generate_until([Request({CONTEXT!r}, {{"until": ["zzz"], "max_gen_toks": 6}})])
    return {{"results": {{"task": found}}}}
""",
    "lm_eval/api/__init__.py": "",
    "lm_eval/api/model.py": "class LM:\n    pass\n",
    "lm_eval/api/registry.py": "def register_model(name):\n    return lambda found: found\n",
    "lm_eval-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: lm_eval\nVersion: 0\n",
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def ask(task: str, path: Path, stand_in: Path, **environment: str):
    result = process(
        "mlx-lm", "evaluate", "--model", path, "--tasks", task, "--no-apply-chat-template",
        "--output-dir", stand_in, PYTHONPATH=str(stand_in), **environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    return json.loads(result.stdout.decode().partition("Results:\n")[2])


def test_choices_are_scored_as_decoded(calibrated, stand_in):
    sparse = ask("choice", calibrated, stand_in)
    dense = ask("choice", calibrated, stand_in, SPQT_SPARSITY="0")
    loaded = session.load(calibrated)
    values = {path: one.threshold.item() for path, one in layers.zigzag_layers(loaded.model).items()}
    question = questions.Question(CONTEXT, tuple(ending[1:] for ending in ENDINGS), 0, 1)
    encoded = multiple_choice.encode(question, loaded.tokenizer, None, Path("questions.jsonl"))
    with probes.probing(loaded.model) as harness:
        cache = multiple_choice.after_context(loaded.model, encoded)
        for found, masking in ((sparse, probes.Masking(values)), (dense, None)):
            expected = multiple_choice.ending_scores(loaded.model, cache, encoded, harness, masking)
            assert [found[0][0], found[2][0]] == pytest.approx(expected.tolist(), rel=1e-5)
    assert abs(sparse[0][0] - dense[0][0]) > 0.01
    assert sparse[0][1] is False  # random weights: not the greedy continuation
    assert sparse[1][0] < 0  # no context at all


def test_texts_are_written_with_channels_skipped(calibrated, stand_in):
    sparse, dense = (ask("text", calibrated, stand_in, SPQT_SPARSITY=share) for share in ("0.9", "0"))
    assert sparse != dense


def test_whole_texts_are_refused(calibrated, stand_in):
    command = ("mlx-lm", "evaluate", "--model", calibrated, "--tasks", "rolling", "--output-dir", stand_in)
    assert_error(process(*command, PYTHONPATH=str(stand_in)), 4, "spqt eval TEXT")
    assert ask("rolling", calibrated, stand_in, SPQT_SPARSITY="0")[0] < 0


def test_source_models_are_left_to_mlx_lm(checkpoint, stand_in):
    assert ask("choice", checkpoint, stand_in)[0][0] < 0


def test_without_the_extra_one_line(calibrated, tmp_path):
    # A name that can't be imported hides an installed lm_eval, too.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['lm_eval'] = None\n")
    result = process("mlx-lm", "evaluate", "--model", calibrated, "--tasks", "x", PYTHONPATH=str(tmp_path))
    assert_error(result, 4, "pip install 'spqt[lm-eval]'")
