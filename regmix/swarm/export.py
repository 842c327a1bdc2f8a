"""What a ledger knows, as tables for people and other programs.

Enters: a study and its ledger, open in any way. Leaves: `losses.csv` and `trajectories.csv`, each
whole or as it was before. Trains nothing and does not write to the ledger.
"""

from __future__ import annotations

from regmix.data.schedules import ScheduleTable
from regmix.study import Study
from regmix.swarm.ledger_reading import LedgerReader


def export(study: Study, ledger: LedgerReader) -> None:
    """Write what the ledger knows as tables: `losses.csv` and `trajectories.csv`.

    Proxies that follow a schedule are in the latter only: no one mixture gave their losses.
    """
    training, targets = study.config.proxy, study.config.targets
    scheduled: frozenset[int] = frozenset()
    if study.schedules_path.is_file():
        scheduled = frozenset(ScheduleTable.read_csv(study.schedules_path).indices)
    ledger.export_losses(study.losses_path, targets, without=scheduled)
    if training.eval_every is not None or training.eval_steps is not None:
        ledger.export_trajectories(study.trajectories_path, targets)
