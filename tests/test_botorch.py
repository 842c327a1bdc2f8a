"""The Gaussian process against GPyTorch and BoTorch, where they are installed (extra `botorch`)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regmix.decision.regressors.gp import Feature, GaussianProcess, GPModel, Process
from regmix.decision.runs import read_runs

pytest.importorskip("botorch", reason="needs BoTorch: pip install regmix-fast[botorch]")

NUM_DOMAINS = 17


def draws(num: int, seed: int) -> np.ndarray:
    """Mixtures as published tables hold them: rounded, many domains absent."""
    raw = np.random.default_rng(seed).dirichlet(np.full(NUM_DOMAINS, 0.3), num).round(3)
    return np.asarray(raw / raw.sum(1, keepdims=True))


def losses(weights: np.ndarray, seed: int) -> np.ndarray:
    """A power law of effective data, a bonus for two domains together, and noise [N, 1]."""
    rng = np.random.default_rng(7)
    rates = rng.lognormal(0, 1, NUM_DOMAINS)
    law = 1.5 + 1.2 * (0.05 + weights @ rates) ** -0.4
    together = 0.2 * np.sqrt(weights[:, 0] * weights[:, 1])
    noise = np.random.default_rng(seed).normal(0, 0.01, len(weights))
    return np.asarray(law - together + noise)[:, None]


@pytest.fixture(scope="module")
def model() -> GPModel:
    weights = draws(64, 0)
    return GaussianProcess().fit(weights, losses(weights, 1))


def exact_gp(process: Process, target: np.ndarray) -> Any:
    """The same process in GPyTorch, with the hyperparameters that ours has found."""
    import gpytorch
    import torch

    class Same(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self, rows: torch.Tensor, values: torch.Tensor) -> None:
            likelihood = gpytorch.likelihoods.GaussianLikelihood(
                noise_constraint=gpytorch.constraints.GreaterThan(0.0)
            )
            super().__init__(rows, values, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            matern = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=NUM_DOMAINS)
            self.covar_module = (
                gpytorch.kernels.ScaleKernel(matern) + gpytorch.kernels.LinearKernel()
            )

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    kernel = process.kernel
    same = Same(torch.from_numpy(process.feature.rows), torch.from_numpy(target)).double()
    scale, linear = same.covar_module.kernels
    scale.base_kernel.lengthscale = torch.from_numpy(kernel.lengths)
    scale.outputscale = kernel.matern
    linear.variance = kernel.linear
    same.likelihood.noise = kernel.noise + kernel.jitter
    return same.eval()


@pytest.mark.parametrize("feature", [0, 1])
def test_posterior_equals_that_of_gpytorch(model: GPModel, feature: int) -> None:
    import gpytorch
    import torch

    process, points = model.processes[0][feature], draws(40, 3)
    logs = np.log(losses(draws(64, 0), 1)[:, 0])
    target = (logs - logs.mean()) / logs.std()
    exact = gpytorch.settings.fast_computations(False, False, False)
    with torch.no_grad(), exact, gpytorch.settings.cholesky_jitter(double_value=0.0):
        found = exact_gp(process, target)(torch.from_numpy(process.feature(points)))
        mean, covariance = found.mean.numpy(), found.covariance_matrix.numpy()
    assert np.abs(process.mean(points) - mean).max() < 1e-6
    assert np.abs(process.variance(points) - np.diag(covariance)).max() < 1e-6
    assert np.abs(process.covariance(points, points) - covariance).max() < 1e-6


def predicted_by_botorch(feature: Feature, targets: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Fit BoTorch's default model to targets [K, M] on our feature; return its mean [N, M]."""
    import torch
    from botorch import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    with warnings.catch_warnings(), torch.no_grad():
        # It advises to scale inputs to the unit cube; these features are compared as they are.
        warnings.simplefilter("ignore")
        theirs = SingleTaskGP(torch.from_numpy(feature.rows), torch.from_numpy(targets))
        with torch.enable_grad():
            fit_gpytorch_mll(ExactMarginalLogLikelihood(theirs.likelihood, theirs))
        return np.asarray(theirs.posterior(torch.from_numpy(feature(points))).mean.numpy())


def test_published_runs_are_predicted_as_well_as_by_botorch(shared: Path) -> None:
    folder = shared / "published_runs"
    runs = read_runs(folder / "train_mixture_1m.csv", folder / "train_pile_loss_1m.csv")
    runs = runs.select(["pile_cc", "github", "dm_mathematics"])
    weights, true = np.asarray(runs.weights), np.asarray(runs.losses)
    order = np.random.default_rng(0).permutation(len(runs))
    seen, unseen = order[:64], order[64:]
    ours = GaussianProcess().fit(weights[seen], true[seen])
    logs = np.log(true[seen])
    average, spread = logs.mean(0), logs.std(0)
    parts = [
        predicted_by_botorch(process.feature, (logs - average) / spread, weights[unseen])
        for process in ours.processes[0]
    ]
    theirs = np.exp(average + spread * (parts[0] + parts[1]) / 2)
    errors = [
        np.sqrt(((predicted - true[unseen]) ** 2).mean(0))
        for predicted in (ours.mean(weights[unseen]), theirs)
    ]
    assert (errors[1] < 0.5 * true.std(0)).all()
    assert (errors[0] / errors[1]).mean() < 1.1
