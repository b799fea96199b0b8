"""Weights & Biases: a run's rows there too, where `--wandb PROJECT` asks for it."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from brc_fast.disk import read_json, replace_file
from brc_fast.errors import InputError, MissingExtraError

NAMES = "wandb.json"  # in the run's folder: the project, and the id by which a resumed run goes on
log = logging.getLogger(__name__)


def require_wandb() -> Any:
    """The module; MissingExtraError where it is not installed."""
    try:
        from wandb import init  # noqa: F401  (a folder wandb/, which W&B makes, can be imported, too)
    except ImportError as error:
        raise MissingExtraError("--wandb", "wandb") from error
    import wandb

    return wandb


class WandbRun:
    """Logs rows to a project, into the same run after a resume, and as WANDB_MODE says: online or offline.

    What goes wrong there is told once, and then nothing is logged any more: training goes on.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        wandb = require_wandb()

        def begin() -> None:
            self._run = wandb.init(
                project=project,
                id=_identity(project, folder),
                name=folder.name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )

        self._try(begin)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """One row at `step`, which is in the row, too. W&B leaves out what it has already, of steps that a
        resumed run makes anew."""
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, **row}, step=step))

    def close(self) -> None:
        if self._run is not None:
            self._try(lambda: self._run.finish())

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # of the network, the account, or a process of W&B's
            self._run = None
            told = " ".join(str(error).split()) or type(error).__name__
            log.warning("W&B: %s; the run goes on without it", told)


def _identity(project: str, folder: Path) -> str:
    """The id of this run in a project, made once."""
    file = folder / NAMES
    try:
        known = read_json(file)
        if known["project"] == project and re.fullmatch("[0-9a-f]{32}", known["id"]):
            return str(known["id"])
    except InputError:
        raise
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    identity = uuid.uuid4().hex
    replace_file(file, (json.dumps({"project": project, "id": identity}) + "\n").encode())
    return identity
