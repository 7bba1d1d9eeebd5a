"""The table of a dry run: like tensors in one line, 80 columns, nothing lost."""

from spqt_cli.convert import plan_table

ROWS = [
    ("model.embed_tokens.weight", "row-grouped", 5, 64, 19_460_000),
    ("model.layers.0.mlp.down_proj.weight", "zigzag", 4, 64, 500_000),
    ("model.layers.1.mlp.down_proj.weight", "zigzag", 4, 64, 700_000),
    ("model.layers.2.mlp.down_proj.weight", "zigzag", 5, 64, 900_000),
    ("model.norm.weight", "kept", 0, 0, 1_000),
    ("model.layers.3." + "very_long_name." * 6 + "weight", "kept", 0, 0, 1_000),
]


def test_layers_that_differ_in_numbers_alone_share_a_line():
    head, *lines = plan_table.lines(ROWS)
    assert head.split() == ["tensor", "count", "stored", "bits", "group", "MB"]
    assert [line.split()[0] for line in lines[:4]] == [
        "model.embed_tokens", "model.layers.*.mlp.down_proj", "model.layers.*.mlp.down_proj", "model.norm",
    ]  # fmt: skip
    assert lines[1].split()[1:] == ["2", "zigzag", "4", "64", "1.2"]
    assert lines[2].split()[1:] == ["1", "zigzag", "5", "64", "0.9"]
    assert lines[3].split()[1:] == ["1", "kept", "-", "-", "0.0"]


def test_eighty_columns():
    lines = plan_table.lines(ROWS)
    assert max(map(len, lines)) <= 80
    assert len(set(map(len, lines))) == 1
