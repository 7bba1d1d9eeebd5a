"""A converted folder in mlx-lm without spqt: it ends with a line that says what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from spqt_cli.decode import session
from spqt_cli.format import contract
from spqt_cli.format.config_json import CONFIG
from spqt_cli.format.folder import Folder


def test_mlx_lm_alone_names_spqt(converted: Path):
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(converted), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(f"unexpected keyword argument '{contract.NEEDS}'")
    assert "pip install spqt" in contract.NEEDS


def test_the_key_comes_before_all_that_mlx_lm_would_name(converted: Path):
    config = json.loads((converted / CONFIG).read_text())
    for entry in contract.entries(config).values():
        unknown = [key for key in entry if key not in ("bits", "group_size", "mode")]
        assert unknown == [contract.NEEDS, "spqt"]


def test_a_folder_without_the_key_is_as_good(converted: Path, tmp_path: Path):
    folder = tmp_path / "older"
    shutil.copytree(converted, folder)
    config = json.loads((folder / CONFIG).read_text())
    for part in ("quantization", "quantization_config"):
        for entry in config[part].values():
            if isinstance(entry, dict):
                entry.pop(contract.NEEDS, None)
    (folder / CONFIG).write_text(json.dumps(config))
    assert contract.NEEDS not in (folder / CONFIG).read_text()
    assert session.load(Folder(folder)).model
