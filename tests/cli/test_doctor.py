"""`spqt doctor --selftest`: its table as it is made, its verdict, and its exit code."""

import json

import pytest
import typer

from spqt_cli.cli import doctor

RIGHT = {
    "kernel": "one launch",
    "shape": "1000x777",
    "bits": 4,
    "group": 64,
    "dtype": "float16",
    "worst error": "0.874",
    "pass": True,
}
WRONG = RIGHT | {"kernel": "bias", "worst error": "inf", "pass": False}


def test_each_row_is_printed_when_it_is_done(monkeypatch, capsys):
    printed = []

    def judged():
        for row in (RIGHT, WRONG):
            yield row
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(doctor, "judged", judged)
    with pytest.raises(typer.Exit) as ended:
        doctor.doctor(selftest=True, json_output=False)
    assert ended.value.exit_code == 6
    *_, empty, head, first = printed[0].splitlines()
    assert empty == ""
    assert head.split() == ["kernel", "shape", "bits", "group", "dtype", "worst", "error", "pass"]
    assert first.split()[-2:] == ["0.874", "True"]
    assert head.index("shape") == first.index("1000x777")
    assert printed[1].split() == ["bias", "1000x777", "4", "64", "float16", "inf", "False"]
    assert capsys.readouterr().out == "A KERNEL IS WRONG\n"


def test_json_is_one_line_with_all_rows(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "judged", lambda: iter([RIGHT, RIGHT]))
    doctor.doctor(selftest=True, json_output=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["kernels"] == [RIGHT, RIGHT]
    assert json.loads(line)["healthy"]


def test_without_a_self_test_no_kernel_is_judged(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "judged", lambda: pytest.fail("judged"))
    doctor.doctor(selftest=False, json_output=False)
    assert "backend" in capsys.readouterr().out


def test_what_becomes_of_experts_is_said(monkeypatch, capsys):
    from spqt_cli.backends import cpu

    if cpu.status()[0]:
        doctor.doctor(selftest=False, json_output=False)
        assert "experts      skipped by channel" in capsys.readouterr().out
    monkeypatch.setenv("SPQT_BACKEND", "stock")
    doctor.doctor(selftest=False, json_output=False)
    assert "experts      masked and read whole" in capsys.readouterr().out
