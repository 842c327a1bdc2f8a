"""The regressors by name.

Enters: a name. Leaves: a regressor, or an error that names the nearest one. Fits nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from regmix.decision.regressors.gp import GaussianProcess
from regmix.decision.regressors.interface import Regressor
from regmix.decision.regressors.laws import LawRegressor
from regmix.decision.regressors.linear import Linear
from regmix.decision.regressors.loglinear import LogLinearLaw
from regmix.decision.regressors.powerlaw import PowerLaw
from regmix.decision.regressors.trees import Trees
from regmix.errors import ConfigError, LossTableError, nearest

# The seed is the study's; LightGBM keeps the paper's own, 42.
REGRESSORS: dict[str, Callable[[int], Regressor]] = {
    "linear": lambda seed: Linear(),
    "lightgbm": lambda seed: Trees(),
    "loglinear": lambda seed: LawRegressor(law=LogLinearLaw(), seed=seed),
    "powerlaw": lambda seed: LawRegressor(law=PowerLaw(), seed=seed),
    "gp": lambda seed: GaussianProcess(seed=seed),
}


def make_regressor(name: str, seed: int) -> Regressor:
    """Return a regressor by name; `ConfigError` names the nearest one."""
    if name not in REGRESSORS:
        known = [*REGRESSORS, "auto"]
        raise ConfigError(
            f"unknown regressor '{name}' ({nearest(name, known)})",
            cure=f"Use one of {', '.join(known)}",
        )
    return REGRESSORS[name](seed)


def check_enough_runs(regressor: Regressor, num_runs: int, num_domains: int) -> None:
    """Raise `LossTableError`, with the number needed, where there are too few runs."""
    needed = regressor.fewest_runs(num_domains)
    if num_runs < needed:
        other = "" if regressor.name == "linear" else ", or use --regressor linear"
        raise LossTableError(
            f"{num_runs} runs are too few for the regressor '{regressor.name}' on {num_domains} "
            f"domains",
            cure=f"Train at least {needed} proxies{other}",
        )
