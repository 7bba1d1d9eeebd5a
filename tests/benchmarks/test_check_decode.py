"""The step-by-step check of a model, on a tiny one, where loading runs a step as it does on a GPU."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from spqt_cli.backends import select
from spqt_cli.decode import kernel_check, phase

check_decode = pytest.importorskip("benchmarks.check_decode", reason="benchmarks/ is no part of an archive")


def test_every_run_where_loading_checks_kernels(calibrated: Path, tmp_path: Path, monkeypatch) -> None:
    def check(model):
        with phase.decoding():
            mx.eval(model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model)))

    monkeypatch.setattr(kernel_check, "check", check)
    for name in ("prepare", "prepare_gated", "prepare_head", "prepare_tail"):
        monkeypatch.setattr(select, name, getattr(select, name))
    output = tmp_path / "check.json"
    command = ["check_decode", "--model", str(calibrated), "--steps", "4", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [*command, "float16", "--output", str(output)])
    check_decode.main()
    result = json.loads(output.read_text())
    for dtype in ("float32", "float16"):
        runs = result[dtype]["reference_stock"]
        assert runs["kernels_same_masks"]["channels_that_differ"] == 0
        assert runs["kernels_same_masks"]["mean_kl"] < 1e-3
        assert result[dtype]["launches"]["counts_equal"]
