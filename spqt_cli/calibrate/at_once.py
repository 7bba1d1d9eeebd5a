"""Convert and calibrate as one job: the output appears with its thresholds, or not at all.

Both happen in a work folder beside the output. An interrupted job goes on where it stopped; where a
calibration is refused, the converted folder is published without thresholds, so that nothing is lost.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from spqt_cli.calibrate.calibrate import Calibration, OnProgress, calibrate
from spqt_cli.calibrate.options import CalibrateOptions
from spqt_cli.convert import source
from spqt_cli.convert.convert import ConvertOptions
from spqt_cli.convert.journal import Journal, job_id
from spqt_cli.errors import BusyError, ResourceError, SpqtError
from spqt_cli.system import files
from spqt_cli.version import __version__

Result = TypeVar("Result")
CALIBRATING = "calibrating"  # in the journal: how; another way begins that part anew


def run(
    output: Path,
    job: str,
    convert: Callable[[Path], Result],
    options: CalibrateOptions,
    on_progress: OnProgress,
    on_estimate: Callable[[float], None] = lambda _: None,
) -> tuple[Result | None, Calibration]:
    """What `convert` found, None where an earlier run had converted, and the calibration.

    job: names what is converted and how; only a run of the same name goes on with another's work. convert:
    writes the folder that it is given, whole or not at all. on_progress, on_estimate: as `calibrate`'s.
    Raises SpqtError and its kinds.
    """
    options.check()
    with files.claim(output):
        files.check_target(output)
        work = next((one for one in files.work_folders(output) if Journal.belongs(one, job)), None)
        work = work or files.new_work_folder(output)
        journal, folder = Journal(work, job), work / "model"
        result = None if folder.exists() else convert(folder)
        way = str(dataclasses.astuple(dataclasses.replace(options, restart=False)))
        again = journal.done.get(CALIBRATING) not in (None, way)
        journal.note(CALIBRATING, way)
        try:
            found = calibrate(folder, dataclasses.replace(options, restart=again), on_progress, on_estimate)
        except (BusyError, ResourceError):
            raise  # the same command goes on
        except SpqtError as error:
            _publish(folder, work, output)
            said = f"{output} is converted, not calibrated: spqt calibrate {output}"
            error.hint = "; ".join(filter(None, [error.hint, said]))
            raise
        _publish(folder, work, output)
    return result, dataclasses.replace(found, folder=output)


def _publish(folder: Path, work: Path, output: Path) -> None:
    files.publish(folder, output)
    with files.disk_errors(work):
        shutil.rmtree(work)


def name_of(source_name: str, wishes: ConvertOptions, fit: Any) -> str:
    """The name of a job: what is converted, with which options, and fitted how (a dataclass, or None)."""
    trust = source.Trust(wishes.trust_remote_code, wishes.allow_requantize, wishes.zigzag_experts)
    checkpoint = source.open_source(source_name, wishes.revision, trust)
    way = dataclasses.asdict(dataclasses.replace(wishes, force=False, sparsity=None, sparsity_from=""))
    fitted = None if fit is None else dataclasses.asdict(fit)
    return job_id({"convert": way, "fit": fitted, "stamps": checkpoint.stamps(), "spqt": __version__})
