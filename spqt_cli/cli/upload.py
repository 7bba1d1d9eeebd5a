"""--upload-repo of the commands that write a converted folder."""

from pathlib import Path

import typer


def check(repo: str | None) -> None:
    """Refuse, before the work, an upload that is bound to fail."""
    if repo is not None:
        from spqt_cli.convert import card

        card.check_upload(repo)


def put(folder: Path, repo: str | None, silent: bool) -> None:
    """Put a folder on the hub, where that was asked for, and say so."""
    if repo is not None:
        from spqt_cli.convert import card

        card.upload(folder, repo)
        if not silent:
            typer.echo(f"uploaded to {repo}", err=True)
