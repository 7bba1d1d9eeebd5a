"""Fetches and uploads models of the Hugging Face Hub, through huggingface_hub's own cache and offline mode.

Fetches config.json first, so that what spqt can't convert is refused before any weight; never code,
never pickles. Every failure of hub or network becomes an SpqtError without the address or token.
"""

import contextlib
import errno
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import SafetensorsFileMetadata, validate_repo_id

from spqt_cli.errors import ResourceError, SpqtError, UnsupportedError
from spqt_cli.format import checkpoint_files
from spqt_cli.format.config_json import CONFIG, INDEX, KEPT, read_config
from spqt_cli.format.folder import Folder
from spqt_cli.system import files

WEIGHTS = ("model*.safetensors", INDEX)
SMALL = (CONFIG, *KEPT, "README.md")


@dataclass
class Fetched:
    """A hub model's folder, its commit, and what must live as long as the folder is used."""

    folder: Path
    revision: str
    keep: object = None


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into an SpqtError that says what to do."""
    login = "accept its licence on the hub and log in: hf auth login"
    try:
        yield
    except errors.GatedRepoError:
        raise SpqtError(f"{repo} is gated", login) from None
    except errors.RevisionNotFoundError:
        raise SpqtError(f"{repo} has no such revision", "check --revision on the hub") from None
    except errors.RepositoryNotFoundError:
        raise SpqtError(
            f"{repo} is neither a path here nor a model on the hub that you may read",
            "check the name; for a private model: hf auth login",
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        state = "offline mode is on" if constants.is_offline_mode() else "the hub can't be reached"
        raise SpqtError(
            f"{repo} is no path here and not complete in the hub's cache, and {state}",
            "check the name, or connect and run again: it goes on",
        ) from None
    except errors.EntryNotFoundError:
        raise SpqtError(f"{repo} lacks a file that models have", "use another model") from None
    except errors.HFValidationError:
        raise SpqtError(f"{repo} is no name the hub allows", "give org/name") from None
    except (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError):
        raise SpqtError(f"{repo}: a shard is no sound safetensors file", "use another revision") from None
    except errors.LocalTokenNotFoundError:
        raise SpqtError(f"{repo} needs a login", "hf auth login, or set HF_TOKEN") from None
    except (errors.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ResourceError("the disk of the hub's cache is full", "free some space") from None
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            raise SpqtError(
                f"the hub refuses {repo} for this login", "hf auth login, or set HF_TOKEN"
            ) from None
        what = f"status {response.status_code}" if response is not None else type(error).__name__
        raise SpqtError(
            f"fetching {repo} failed ({what})", "run again: it goes on where it stopped"
        ) from None


def fetch(
    repo: str, revision: str | None, check: Callable[[dict[str, Any]], object], headers_only: bool
) -> Fetched:
    """The folder of a hub model: config.json is fetched and passed to `check` before anything else.

    headers_only: the folder's shards are stand-ins, whose headers were fetched by range reads.
    """
    folder = _snapshot(repo, revision, (CONFIG,))
    commit = folder.name
    if not (folder / CONFIG).exists():
        raise SpqtError(f"{repo} has no {CONFIG}", "use a repository in the hub's form")
    check(read_config(folder))
    if constants.is_offline_mode():
        return Fetched(_snapshot(repo, commit, (*SMALL, *WEIGHTS)), commit)
    with hub_errors(repo):
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=commit)
    _check_names(repo, names)
    if headers_only:
        return _stand_ins(repo, _snapshot(repo, commit, (*SMALL, INDEX)), names)
    return Fetched(_snapshot(repo, commit, (*SMALL, *WEIGHTS)), commit)


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    with hub_errors(repo):
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def _check_names(repo: str, names: list[str]) -> None:
    top = [Path(name) for name in names if "/" not in name]
    if any(path.match(WEIGHTS[0]) for path in top):
        return
    if any(path.match(pattern) for path in top for pattern in checkpoint_files.PICKLES):
        raise UnsupportedError(
            f"{repo} has only pickled weights, which spqt never opens", "use a repository with safetensors"
        )
    raise SpqtError(f"{repo} has no model*.safetensors", "use a repository with safetensors")


def _stand_ins(repo: str, snapshot: Path, names: list[str]) -> Fetched:
    """A folder like the model's whose shards have true headers and, as sparse files, no data."""
    keep = tempfile.TemporaryDirectory(prefix="spqt-headers-")
    folder = Path(keep.name) / repo.split("/")[1]
    folder.mkdir()
    for path in snapshot.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    for name in names:
        if Path(name).match(WEIGHTS[0]) and "/" not in name:
            with hub_errors(repo):
                found = huggingface_hub.HfApi().parse_safetensors_file_metadata(
                    repo, name, revision=snapshot.name
                )
            _write_stand_in(folder / name, found)
    return Fetched(folder, snapshot.name, keep)


def _write_stand_in(path: Path, found: SafetensorsFileMetadata) -> None:
    header = {
        name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": list(t.data_offsets)}
        for name, t in found.tensors.items()
    }
    text = json.dumps(header).encode()
    end = max((t.data_offsets[1] for t in found.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def download(repo: str, revision: str | None, *, trust_remote_code: bool = False) -> Folder:
    """A converted model on the hub, fetched and checked; its hashes are checked once after a download."""
    folder = Folder(_snapshot(repo, revision, (*SMALL, *WEIGHTS)), trust_remote_code=trust_remote_code)
    marker = _marker(repo, folder.path.name)
    if not marker.exists():
        folder.verify()
        with contextlib.suppress(OSError):  # without the marker the next run only checks again
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    return folder


def _marker(repo: str, commit: str) -> Path:
    return files.cache_folder() / "verified" / f"{repo.replace('/', '--')}-{commit}"


def check_upload(repo: str) -> None:
    """Refuse to begin work whose result can't be uploaded, for want of a name, a login or a line."""
    with hub_errors(repo):
        validate_repo_id(repo)
        huggingface_hub.HfApi().whoami()


def upload(folder: Folder, repo: str) -> None:
    """Put a converted folder on the hub, in a repository that is made if it does not exist."""
    api = huggingface_hub.HfApi()
    try:
        with hub_errors(repo):
            api.create_repo(repo, exist_ok=True)
            api.upload_folder(folder_path=str(folder.path), repo_id=repo, ignore_patterns=[".*", "*.py"])
    except SpqtError as error:
        raise SpqtError(
            f"uploading to {repo} failed: {error.cause}",
            f"the converted folder is complete; hf auth login, then: hf upload {repo} {folder}",
        ) from None
