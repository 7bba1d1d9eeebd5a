"""The model card of a converted folder, and its way to the hub."""

import json
from pathlib import Path
from typing import Any

from spqt_cli.convert.plan import Plan
from spqt_cli.convert.source import Checkpoint
from spqt_cli.decode import quality_warning
from spqt_cli.errors import SpqtError
from spqt_cli.format.config_json import read_config
from spqt_cli.system import files, sandbox

NAME = "README.md"
BEGIN, END = "<!-- spqt: results -->", "<!-- spqt: end of results -->"
LONGEST_CARD = 1 << 20  # bytes of a card whose results are written again
LICENCE_KEYS = ("license", "license_name", "license_link", "language")  # taken over from the source's card
LONGEST_FRONT = 1 << 16  # bytes of a card that are read, and of a value that is taken over


def text(config: dict[str, Any], checkpoint: Checkpoint, planned: Plan) -> str:
    """README.md of a converted folder: the same on every machine."""
    settings, versions = config["quantization"], config["spqt"]["versions"]
    tags = ["mlx", "spqt", f"{settings['bits']}-bit"]
    facts = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": tags}
    if checkpoint.repo:
        facts |= {"base_model": checkpoint.repo, "base_model_relation": "quantized"}
    facts |= _licence(checkpoint.folder / NAME) if checkpoint.gguf is None else {}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in facts.items())
    origin = (
        f"`{checkpoint.repo}` at revision `{checkpoint.revision}`" if checkpoint.repo else checkpoint.name
    )
    return f"""---
{front}
---
# {checkpoint.name.removesuffix(".gguf")}, {settings["bits"]} bit, Zigzag layout

Made from {origin} by spqt {versions["spqt"]} with MLX {versions["mlx"]}: {settings["bits"]} bits, groups of
{settings["group_size"]}; {planned.zigzag_share:.0%} of the weight bytes are in the Zigzag layout, in which
decoding can skip input channels.

{_section(config)}
Plain mlx-lm refuses this model. With spqt (on Linux `"spqt[cpu]"` or `"spqt[cuda13]"`), where MODEL is this
repository's id or a folder:

```bash
pip install spqt
spqt run MODEL "Why is the sky blue?"
```

```python
import mlx_lm
import spqt_cli

model, tokenizer = spqt_cli.load("MODEL")
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "Hello"}}], add_generation_prompt=True)
print(mlx_lm.generate(model, tokenizer, prompt))
```
"""


def update(folder: Path) -> None:
    """Put what config.json says of fit and calibration into the card, between the marks that `text` made.

    A card without them, or that is no text, is somebody's own and stays.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            card = file.read(LONGEST_CARD + 1).decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return
    before, begins, rest = card.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if begins and ends and len(card) <= LONGEST_CARD:
        section = _section(read_config(folder))
        files.replace_text(path, before + section + after.removeprefix("\n"))


def _section(config: dict[str, Any]) -> str:
    """The results between their marks, and the line's end."""
    section = config["spqt"]
    fit, calibration = section.get("fit"), section.get("calibration")
    lines = []
    if isinstance(fit, dict):
        lines.append(f"Fitted to its source ({fit.get('method')}), on {fit.get('windows')} texts.")
    if isinstance(calibration, dict):
        text = calibration.get("text") or {}
        lines.append(
            f"Calibrated to skip {calibration['sparsity']:.0%} of the input channels: "
            f"{calibration['realised']:.1%} of the weights on held-out text. KL to its own dense run there: "
            f"{calibration['kl']:.3f} nats per token ({quality_warning.judged(calibration['kl'])}); text: "
            f"{text.get('name')}, {calibration['tokens']} tokens."
        )
    else:
        lines.append("Not calibrated: decoding is dense until `spqt calibrate FOLDER`.")
    return "\n".join([BEGIN, "## Results", "", *lines, END, ""])


def _licence(path: Path) -> dict[str, Any]:
    """What the source's card says of licence and language, where it has a card that can be read."""
    import yaml

    try:
        with path.open("rb") as file:
            lines = file.read(LONGEST_FRONT).decode("utf-8", "replace").splitlines()
        end = lines.index("---", 1)
        with sandbox.bounded("the source's card"):  # a few lines of YAML can stand for billions of values
            front = yaml.safe_load("\n".join(lines[1:end])) if lines[0] == "---" else None
    except (OSError, ValueError, IndexError, RecursionError, SpqtError, yaml.YAMLError):
        return {}
    found = front if isinstance(front, dict) else {}
    return {key: found[key] for key in LICENCE_KEYS if _is_short(found.get(key))}


def _is_short(value: Any) -> bool:
    """True for a text or a list of texts; the items of a list may all be one text, so they are added up."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in texts) and sum(map(len, texts)) <= LONGEST_FRONT


def check_upload(repo: str) -> None:
    """Refuse an upload that is bound to fail, before the work."""
    from spqt_cli.format import hub

    hub.check_upload(repo)


def upload(folder: Path, repo: str) -> None:
    """Put a converted folder on the hub, once its parts are known to belong together."""
    from spqt_cli.format import hub
    from spqt_cli.format.folder import Folder

    hub.upload(Folder(folder), repo)
