"""What a ledger knows, as tables for people and other programs.

Enters: a study and its ledger, open in any way. Leaves: `losses.csv` and `trajectories.csv`, and on
demand a table of all proxies; each whole or as it was before. Does not write to the ledger.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regmix.data.mixtures import MixtureTable, read_index_table
from regmix.data.schedules import ScheduleTable
from regmix.errors import StudyError
from regmix.files import atomic_open
from regmix.study import Study
from regmix.swarm.ledger_reading import (
    AttemptRow,
    LedgerReader,
    ProxyRow,
    StackRow,
    loss_columns,
    write_csv,
)

# The columns of a proxy beside its index, weights and losses, where nothing is known yet.
_UNKNOWN: dict[str, Any] = {
    "state": "pending",
    "error": None,
    "stack": None,
    "attempts": 0,
    "worker": None,
    "machine": None,
    "device": None,
    "environment": None,
    "stack_seconds": None,
    "stack_tokens": None,
}


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


def write_proxies(study: Study, out: Path) -> int:
    """Write a row for each proxy of a study to `out`, CSV or Parquet by its name; returns how many.

    A proxy that no stack holds yet has its index, its state and its weights. Worker, machine,
    device and environment (versions, as JSON) are of the last attempt at its stack; seconds and
    tokens are the whole stack's. Raises `StudyError` for another kind of file.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise StudyError(f"{out}: neither .csv nor .parquet", cure="Name a file that ends so")
    rows = proxy_rows(study)
    if out.suffix == ".csv":
        # Python's shortest form of a float, as in losses.csv; None is an empty cell.
        write_csv(out, list(rows[0]), [list(row.values()) for row in rows])
        return len(rows)
    import pyarrow
    import pyarrow.parquet

    kinds = {name: pyarrow.string() for name in _UNKNOWN}
    for name in ("index", "attempts", "stack_tokens"):
        kinds[name] = pyarrow.int64()
    kinds["stack_seconds"] = pyarrow.float64()
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in rows[0]])
    with atomic_open(out) as stream:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), stream)
    return len(rows)


def proxy_rows(study: Study) -> list[dict[str, Any]]:
    """Return a table row for each proxy of a study, by index; what is not known is None."""
    table = MixtureTable.read_csv(study.mixtures_path)
    weights = {index: dict(table.mixture(row)) for row, index in enumerate(table.indices)}
    if study.schedules_path.is_file():
        for index in read_index_table(study.schedules_path, unique=False)[1]:
            weights.setdefault(index, {})
    known: dict[int, dict[str, Any]] = {}
    losses: dict[int, dict[str, float]] = {}
    if study.ledger_path.is_file():
        with LedgerReader.read(study.ledger_path) as ledger:
            losses = ledger.final_losses()
            stacks = {row.name: row for row in ledger.stack_rows()}
            attempts = {row.stack: row for row in ledger.attempts()}
            for proxy in ledger.proxies():
                weights[proxy.index] = proxy.weights
                stack = proxy.stack or ""
                known[proxy.index] = _known(proxy, stacks.get(stack), attempts.get(stack))
    targets = study.config.targets
    rows = []
    for index in sorted(weights):
        row = {"index": index, **_UNKNOWN, **known.get(index, {})}
        for domain in table.domains:
            row[f"train_{domain}"] = weights[index].get(domain)
        for target, column in zip(targets, loss_columns(targets), strict=True):
            row[column] = losses.get(index, {}).get(target)
        rows.append(row)
    return rows


def _known(proxy: ProxyRow, stack: StackRow | None, attempt: AttemptRow | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "state": proxy.state,
        "error": proxy.error,
        "stack": proxy.stack,
        "attempts": proxy.attempts,
    }
    if stack is not None:
        found.update(stack_seconds=stack.seconds, stack_tokens=stack.tokens)
    if attempt is not None:
        environment = json.dumps(attempt.environment, sort_keys=True)
        found.update(
            worker=attempt.worker,
            machine=attempt.machine,
            device=attempt.device,
            environment=environment,
        )
    return found
