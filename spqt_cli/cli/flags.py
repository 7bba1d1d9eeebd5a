"""The flags that several commands share, and which model a command line names."""

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from spqt_cli.errors import UsageError


def values(*known: str) -> Callable[[str], list[str]]:
    """What a shell completes a flag's value with: those of `known` that begin as was typed."""
    return lambda incomplete: [one for one in known if one.startswith(incomplete)]


def presets(incomplete: str) -> list[str]:
    """Completes the name of a preset."""
    found = (item.name for item in resources.files("spqt_cli.configs").iterdir())
    return sorted(name[:-5] for name in found if name.endswith(".toml") and name.startswith(incomplete))


def models(incomplete: str) -> list[str]:
    """Completes a model's folder: folders here, or below what was typed, that hold a config.json.

    Others are completed with a slash, so that their content can be.
    """
    parent = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    prefix = incomplete[: incomplete.rfind("/") + 1]
    try:
        found = [path for path in parent.expanduser().iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError:
        return []
    names = [prefix + path.name + ("" if (path / "config.json").is_file() else "/") for path in found]
    return sorted(name for name in names if name.startswith(incomplete))


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A converted folder or hub id.",
        show_default=False,
        autocompletion=models,
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="The model, as an option.", autocompletion=models)
]
Words = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt.", show_default=False)]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; '-' reads stdin.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no statistics.")]
QuietAlone = Annotated[bool, typer.Option("--quiet", help="No progress.")]  # where -q is mlx-lm's --quantize
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Pipeline = Annotated[
    bool,
    typer.Option("--pipeline", help="Under mlx.launch: some layers on each machine, not a part of each."),
]
Preset = Annotated[
    str,
    typer.Option(
        help="default, mixed, small, fast, exact, a family (smollm2) or a .toml file; spqt presets tells.",
        autocompletion=presets,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Also draw it: .png, .svg or .html; '-' for the terminal.",
        readable=False,
    ),
]
OwnText = Annotated[
    int | None,
    typer.Option(
        min=0, help="To fit: texts of 512 tokens that the source writes [40; for full 72, on a GPU 448]."
    ),
]
TrainSteps = Annotated[
    int | None,
    typer.Option(
        min=1, help="To fit, full: steps of training [90 of 2 texts; on a GPU 400 of 8]. More is better."
    ),
]
FitData = Annotated[
    Path | None,
    typer.Option(help="To fit: UTF-8 text to add to its own.", readable=False),
]
FitSeed = Annotated[int, typer.Option(min=0, help="To fit: of the source's own text.")]
UploadRepo = Annotated[
    str | None, typer.Option(metavar="ORG/NAME", help="Hub repository to upload the result to.")
]
Adapter = Annotated[str | None, typer.Option(help="A folder of LoRA or DoRA adapters.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write; it must not exist.", readable=False)
]
# How text is drawn and prompts are run: of generate and chat; ranges are in decode/options.py.
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens to write; -1: no limit.")]
Dense = Annotated[bool, typer.Option("--dense", help="Skip nothing, exact zeros included, for comparison.")]
Sparsity = Annotated[
    float | None,
    typer.Option(
        help="Sparsity instead of the calibrated one, 0 to 0.95; 0 skips only exact zeros, without loss."
    ),
]
Temp = Annotated[float, typer.Option(help="Temperature; 0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling.")]
MinP = Annotated[float, typer.Option(help="Least probability, relative to the likeliest.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest; 0: from all.")]
MinTokensToKeep = Annotated[int, typer.Option(help="Least tokens that min-p keeps.")]
XtcProbability = Annotated[float, typer.Option(help="Chance of XTC sampling at each token.")]
XtcThreshold = Annotated[float, typer.Option(help="Probability above which XTC drops tokens.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: discourage repeats.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Above 0: discourage words said lately.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="The same, for each time they were said.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.")]
Stop = Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")]
SystemPrompt = Annotated[str | None, typer.Option(help="System message of the chat template.")]
ChatTemplateConfig = Annotated[str | None, typer.Option(help="JSON object for the chat template.")]
MaxKvSize = Annotated[int | None, typer.Option(help="Longest key-value cache, in tokens.")]
PrefillStepSize = Annotated[int, typer.Option(help="Prompt tokens run at a time.")]
Trust = Annotated[bool, typer.Option(help="Run code that comes with the model.")]


def optional(argument: str | None, option: str | None, usage: str) -> str | None:
    """The model that was named, None if none was. Raises UsageError for two. usage: a hint, the command."""
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"two models are given: {argument} and --model {option}", usage)
    return argument if argument is not None else option


def needed(argument: str | None, option: str | None, usage: str) -> str:
    """The model that was named. Raises UsageError unless it is exactly one."""
    model = optional(argument, option, usage)
    if model is None:
        raise UsageError("no model is given", usage)
    return model


def model_and_prompt(
    model: str | None, words: str | None, option: str | None, prompt: object
) -> tuple[str | None, str | None]:
    """The model and the prompt among arguments: beside --model a lone one is the prompt.

    option: of --model. prompt: of a flag that has the prompt; None without one.
    """
    alone = words is None and prompt is None and option not in (None, model)
    return (None, model) if alone else (model, words)


def with_texts(
    first: str | None, rest: Sequence[Path], options: Sequence[str], usage: str, *, shipped: bool = False
) -> tuple[list[str], list[Path]]:
    """The models and texts that a command's arguments name: MODEL TEXT..., or with --model texts alone.

    Beside --model a first argument that is no file is the model once more. Raises UsageError for another
    one, and where model or text is missing. shipped: a text is there already.
    """
    texts, models = list(rest), list(dict.fromkeys(options))
    if first is not None and models and first not in models and (not texts or Path(first).is_file()):
        texts.insert(0, Path(first))
    elif first is not None and first not in models:
        models = [needed(first, models[0] if models else None, usage)]
    if not models or not (texts or shipped):
        there = f", and there is only {first}" if first is not None else ""
        raise UsageError(f"a model and a text are needed{there}", usage)
    return models, texts
