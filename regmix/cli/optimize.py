"""`regmix-fast optimize`: the best mixture under constraints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regmix.decision.optimum import Optimum
    from regmix.study import Study


@click.command()
@click.argument("study", required=False)
@click.option("--mixtures", type=click.Path(), help="Table of mixtures, instead of a study.")
@click.option("--losses", type=click.Path(), help="Table of losses, instead of a study.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="YAML file to write.  [default: the study's]"
)
@click.option("--objective", help="Target, mean, worst or a=0.5,b=0.5.  [default: the study's]")
@click.option(
    "--tokens",
    help="Tokens of the large run, for example 25B: limits the epochs.  [default: the study's]",
)
@click.option("--max-epochs", type=float, default=4, show_default=True, help="Epochs of a domain.")
@click.option(
    "--available", multiple=True, metavar="DOMAIN=TOKENS", help="Tokens that exist, with --losses."
)
@click.option("--lower", multiple=True, metavar="DOMAIN=W", help="Smallest weight; repeatable.")
@click.option("--upper", multiple=True, metavar="DOMAIN=W", help="Largest weight; repeatable.")
@click.option(
    "--kl",
    type=float,
    default=0.0,
    show_default=True,
    help="Nats of loss that a nat of KL(mixture || prior) costs, for example 0.05.",
)
@click.option(
    "--guard",
    help="natural, uniform, unimax, best observed or a YAML file: no target may get worse than it.",
)
@click.option(
    "--guard-tolerance", type=float, metavar="NATS", help="By more than this.  [default: 0.01]"
)
@click.option(
    "--prior", help="natural, uniform or a YAML file.  [default: natural; runs' mean with --losses]"
)
@click.option("--baseline", "files", multiple=True, help="YAML file to compare with; repeatable.")
@click.option(
    "--method",
    type=click.Choice(["exact", "simulate"]),
    default="exact",
    show_default=True,
    help="simulate is the paper's: the mean of the best 128 of 100,000 draws.",
)
@click.option(
    "--regressor",
    help="auto, gp, powerlaw, loglinear, lightgbm or linear.  [default: as fit, else auto]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Seed of fit and search.  [default: as fit, else 0]"
)
@click.option(
    "--extrapolate", is_flag=True, help="Allow weights above the largest that any run had."
)
@click.option(
    "--segments",
    type=click.IntRange(min=2),
    help="Choose a mixture for each of so many equal parts of the run too.",
)
@click.option("--partial", is_flag=True, help="Go on without the proxies that have no losses yet.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    study: str | None,
    mixtures: str | None,
    losses: str | None,
    out: Path | None,
    objective: str | None,
    tokens: str | None,
    max_epochs: float,
    available: tuple[str, ...],
    lower: tuple[str, ...],
    upper: tuple[str, ...],
    kl: float,
    guard: str | None,
    guard_tolerance: float | None,
    prior: str | None,
    files: tuple[str, ...],
    method: str,
    regressor: str | None,
    seed: int | None,
    extrapolate: bool,
    segments: int | None,
    partial: bool,
    as_json: bool,
) -> None:
    """Find the mixture of STUDY with the lowest predicted loss.

    \b
    Examples:
      regmix-fast optimize study --tokens 25B --max-epochs 4
      regmix-fast optimize study --objective worst --guard natural --guard-tolerance 0.02
      regmix-fast optimize --mixtures train_mixture_1m.csv --losses train_pile_loss_1m.csv \\
          --objective pile_cc --prior human.yaml --out optimum.yaml
    """
    import contextlib

    from regmix.cli.decide import open_source, wanted_objective
    from regmix.cli.segments import (
        plan_for,
        refuse_unplanned,
        schedule_path,
        show_plan,
        write_plan,
    )
    from regmix.cli.words import parse_count, parse_pairs
    from regmix.decision.records import optimum_record, write_optimum
    from regmix.decision.reuse import groups_of, optimize_frozen, reduce_runs, reused_baseline
    from regmix.decision.runs import read_runs
    from regmix.decision.searching.guard import TOLERANCE_NATS
    from regmix.decision.surrogate import fit
    from regmix.decision.tradeoffs import tradeoffs_of, write_tradeoffs
    from regmix.errors import ConfigError

    if guard_tolerance is not None and guard is None:
        raise ConfigError(
            "--guard-tolerance says by how much, but not worse than what",
            cure="Add the mixture, for example --guard natural, or leave the tolerance out",
        )
    opened, mixtures_path, losses_path = open_source(study, mixtures, losses)
    budget = parse_count(tokens) if tokens else opened.config.target_tokens if opened else None
    if available and budget is None:
        raise ConfigError(
            "--available limits epochs only for a run of known length",
            cure="Add its tokens, for example --tokens 25B, or leave --available out",
        )
    planned = refuse_unplanned(opened, kl=kl, guard=guard) if segments is not None else None
    runs = read_runs(mixtures_path, losses_path, partial=partial)
    used, used_seed = _settings_of_fit(opened, regressor, seed)
    groups = groups_of(opened, runs)
    short = reduce_runs(runs, groups)
    model = fit(short.weights, short.losses, regressor=used, seed=used_seed)
    reference, files = _guard_of(guard, files)
    given, remarks = _mixtures_of(files)
    start, more = _prior_of(prior, opened)
    best, notes = optimize_frozen(
        model,
        groups,
        objective=wanted_objective(objective, opened, runs.targets),
        prior=start,
        lower=parse_pairs(lower),
        upper=parse_pairs(upper),
        available_tokens=_available(available, opened) if budget else None,
        budget_tokens=budget,
        max_epochs=max_epochs,
        kl=kl,
        guard=reference,
        guard_tolerance=TOLERANCE_NATS if guard_tolerance is None else guard_tolerance,
        baselines={**reused_baseline(opened), **given},
        method=method,
        extrapolate=extrapolate,
        seed=used_seed,
    )
    plan = None
    if planned is not None and segments is not None:
        plan = plan_for(
            planned,
            wanted_objective(objective, opened, runs.targets),
            segments,
            lower=parse_pairs(lower),
            upper=parse_pairs(upper),
            available_tokens=_available(available, opened) if budget else None,
            budget_tokens=budget,
            max_epochs=max_epochs,
            extrapolate=extrapolate,
            seed=used_seed,
        )
    path = out or (opened.optimum_path if opened else None)
    if path is not None:
        with opened.decision_lock() if opened else contextlib.nullcontext():
            write_optimum(path, best, model, plan)
            if len(model.targets) > 1:
                write_tradeoffs(path, tradeoffs_of(best, model, groups))
            if plan is not None:
                write_plan(path, plan)
    if as_json:
        click.echo(json.dumps(optimum_record(best, model, plan)))
        return
    for run in runs.dropped:
        click.echo(f"Left out: run {run.index}, {run.reason}")
    for remark in (*remarks, *more, *notes):
        click.echo(remark)
    _show(best)
    click.echo(f"Surrogate: {model.reason}")
    if plan is not None:
        show_plan(plan)
    if path is not None:
        also = "" if plan is None else f", {schedule_path(path)}"
        click.echo(f"Written: {path}, {path.with_suffix('.json')}{also}")
    follow = (
        f"regmix-fast train {study or ''} --mixture optimum --mixture natural"
        if opened
        else "regmix-fast export --help"
    )
    click.echo(f"Next: {follow}".rstrip())


def _settings_of_fit(
    study: Study | None, regressor: str | None, seed: int | None
) -> tuple[str, int]:
    """Return regressor and seed: those given, else those that `fit` used in this study."""
    from regmix.files import read_json

    path = study.surrogate_path / "fit.json" if study else None
    stored = read_json(path) if path is not None and path.is_file() else {}
    if not isinstance(stored, dict):
        stored = {}
    used_seed = stored.get("seed", 0) if seed is None else seed
    return regressor or str(stored.get("regressor", "auto")), int(used_seed)


def _mixtures_of(files: tuple[str, ...]) -> tuple[dict[str, Mapping[str, float]], list[str]]:
    from regmix.data.mixtures import read_mixture_yaml
    from regmix.errors import ConfigError

    found: dict[str, Mapping[str, float]] = {}
    remarks = []
    for name in files:
        mixture = read_mixture_yaml(name, normalise=True)
        if Path(name).stem in found:
            raise ConfigError(
                f"--baseline {name}: another baseline is called '{Path(name).stem}' too",
                cure="Rename one of the files: their names tell the baselines apart",
            )
        found[Path(name).stem] = mixture
        remarks += _scaled(name, mixture.requested_sum)
    return found, remarks


def _guard_of(guard: str | None, files: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Return the guard's name, and the files of baselines: a file that guards is one of them."""
    if guard is None or Path(guard).suffix not in (".yaml", ".yml"):
        return guard, files
    return Path(guard).stem, files if guard in files else (*files, guard)


def _scaled(name: str, total: float) -> list[str]:
    if abs(total - 1) <= 0.01:
        return []
    return [f"{name}: its weights sum to {total:.4f}; scaled to 1"]


def _prior_of(
    name: str | None, study: Study | None
) -> tuple[Mapping[str, float] | str | None, list[str]]:
    from regmix.data.mixtures import read_mixture_yaml
    from regmix.errors import ConfigError

    if name in (None, "natural"):
        if study is not None:
            return study.config.prior, []
        if name == "natural":
            raise ConfigError(
                "bare tables do not say what the natural mixture is",
                cure="Give it as a YAML file: --prior natural.yaml",
            )
        return None, ["No prior given: the mean of the runs stands in for it"]
    if name == "uniform":
        return "uniform", []
    mixture = read_mixture_yaml(str(name), normalise=True)
    return mixture, _scaled(str(name), mixture.requested_sum)


def _available(pairs: tuple[str, ...], study: Study | None) -> dict[str, float]:
    from regmix.cli.words import parse_count
    from regmix.errors import ConfigError

    if study is not None and not pairs:
        return {domain: float(tokens) for domain, tokens in study.config.available_tokens.items()}
    if not pairs:
        raise ConfigError(
            "--tokens limits epochs, which needs the tokens that exist",
            cure="Give --available DOMAIN=TOKENS for every domain, or leave --tokens out",
        )
    found = {}
    for pair in (part for text in pairs for part in text.split(",")):
        name, equals, number = pair.partition("=")
        if not equals:
            raise ConfigError(f"'{pair}' is not DOMAIN=TOKENS", cure="Write for example web=2B")
        if name.strip() in found:
            raise ConfigError(
                f"--available: '{name.strip()}' is given twice", cure="Give each domain once"
            )
        found[name.strip()] = float(parse_count(number))
    return found


def _show(best: Optimum) -> None:
    from rich.table import Table

    from regmix.display import console

    table = Table(title=f"Optimum for {best.objective.name}", title_justify="left")
    others = [entry for entry in best.baselines if entry.name != "uniform"][:1]
    headings = ["weight", "90% interval", *(entry.name for entry in others)]
    if best.epochs is not None:
        headings.append("epochs")
    table.add_column("domain")
    for heading in headings:
        table.add_column(heading, justify="right")
    intervals = dict(zip(best.domains, best.interval.tolist(), strict=True))
    for name, weight in sorted(best.mixture.items(), key=lambda pair: (-pair[1], pair[0])):
        low, high = intervals[name]
        cells = [f"{weight:.2%}", f"{low:.1%} to {high:.1%}"]
        cells += [f"{entry.weights[name]:.2%}" for entry in others]
        if best.epochs is not None:
            cells.append(f"{best.epochs[name]:.2f}")
        table.add_row(name, *cells)
    console().print(table)
    _show_gains(best)
    _show_terms(best)


def _show_gains(best: Optimum) -> None:
    from rich.table import Table

    from regmix.display import console

    table = Table(title="Predicted objective, at the proxies' scale", title_justify="left")
    table.add_column("mixture")
    for heading in ("loss, nats", "optimum's gain, nats", "90% interval", "better", "allowed"):
        table.add_column(heading, justify="right")
    table.add_row("optimum", f"{best.loss:.4f}", "", "", "", "yes")
    for entry in best.baselines:
        interval = entry.gain_interval
        table.add_row(
            entry.name,
            f"{entry.loss:.4f}",
            f"{entry.gain:+.4f}",
            f"{interval.low:+.4f} to {interval.high:+.4f}",
            f"{entry.better:.0%}",
            "yes" if entry.feasible else "no",
        )
    console().print(table)
    expected = best.loss_interval
    click.echo(
        f"A new proxy on the optimum: {best.loss:.4f} nats, 90% interval {expected.low:.4f} to "
        f"{expected.high:.4f}"
    )
    saved = f"A better mixture might still save {best.shortfall_nats:.4f} nats"
    if best.noise_nats is not None:
        saved += f"; between seeds a loss moves by {best.noise_nats:.4f} nats"
    click.echo(saved)


def _show_terms(best: Optimum) -> None:
    """Say what penalty and guard came to, the verdict, and where the limits may be too tight."""
    if best.divergence_nats is not None and best.kl > 0:
        click.echo(
            f"KL from the prior: {best.divergence_nats:.3f} nats, "
            f"a penalty of {best.kl * best.divergence_nats:.4f} nats"
        )
    if best.guard is not None and best.guard_changes is not None:
        name, change = max(best.guard_changes.items(), key=lambda pair: pair[1])
        click.echo(
            f"Guard: no target more than {best.guard.tolerance_nats:g} nats above "
            f"'{best.guard.name}'; the nearest is {name}, at {change:+.4f} nats"
        )
    for remark in best.remarks:
        click.echo(remark)
    click.echo(f"Verdict: {best.verdict}")
    if best.epochs is None:
        click.echo("Epochs are not limited: say how long the large run is, --tokens 25B")
    if best.at_edge:
        click.echo(
            f"At the largest weight of any run: {', '.join(best.at_edge)}. More may be better "
            "still: draw mixtures beyond it, or allow the guess with --extrapolate"
        )
