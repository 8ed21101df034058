"""The command ``eval``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import make_console


def evaluate(
    folder: Annotated[Path, Parameter(help="folder of a run, made by feedbackpath train")],
    *,
    which: Annotated[Literal["last", "best"], Parameter(help="checkpoint")] = "last",
    data_dir: Annotated[Path | None, Parameter(help="folder of the data files, if not the run's")] = None,
    device: Annotated[str, Parameter(help="torch device")] = "cpu",
) -> int:
    """Measure a trained network again: errors on validation and test data, angles and gains."""
    from feedbackpath.jobs.evaluate import evaluate as job

    changes: dict[str, Any] = {"data_dir": data_dir} if data_dir else {}
    found = job(folder, which, device=device, devices=1, num_nodes=1, **changes)
    console = make_console()
    epochs = len(found.run.history)
    console.print(
        f"{found.run.rule} seed {found.run.seed}, {epochs} epoch{'s' if epochs != 1 else ''}, "
        f"{which} checkpoint of {folder}",
    )
    name, unit = found.metric.name, found.metric.unit
    console.print(f"validation {name} {found.validation:.2f}{unit}, test {name} {found.test:.2f}{unit}")
    for layer, angle in found.matrix_angle_deg.items():
        console.print(f"  {layer}: matrix angle {angle:.2f}°, gain {found.gain[layer]:.3f}")
    return DONE
