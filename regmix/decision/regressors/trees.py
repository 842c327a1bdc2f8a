"""Gradient-boosted trees (LightGBM), the paper's regressor.

Enters: weights [K, D], losses [K, M]. Leaves: predicted mean and standard deviation [N, M]. The
paper's settings (1,000 rounds, learning rate 0.01, seed 42) without its early stop on the test
set. Trees are trained by LightGBM and evaluated here: walking them for 100,000 mixtures takes a
fifth of the time of its own predictor, and none of its start-up cost for a few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from regmix.decision.parallel import in_threads

# The rows that walk one tree together: few enough to stay in the first-level cache.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of one target, flat: node i sends a row left where x[feature] <= threshold.

    A child >= 0 is a node, a child < 0 the leaf ~child; both count within the whole forest.
    roots [num_trees] are nodes, or leaves in the same notation for trees without a split.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    leaf: np.ndarray
    roots: np.ndarray

    @classmethod
    def parse(cls, text: str) -> Forest:
        """Read the numerical trees of LightGBM's text format."""
        columns: dict[str, list[np.ndarray]] = {
            key: []
            for key in ("split_feature", "threshold", "left_child", "right_child", "leaf_value")
        }
        roots, num_nodes, num_leaves = [], 0, 0
        for section in text.split("\n\n"):
            if not section.lstrip().startswith("Tree="):
                continue
            fields = dict(line.split("=", 1) for line in section.split("\n") if "=" in line)
            tree = {key: np.array(fields.get(key, "").split(), dtype=float) for key in columns}
            for key in ("left_child", "right_child"):
                child = tree[key]
                tree[key] = np.where(child >= 0, child + num_nodes, child - num_leaves)
            for key, values in tree.items():
                columns[key].append(values)
            has_split = len(tree["threshold"]) > 0
            roots.append(num_nodes if has_split else ~num_leaves)
            num_nodes += len(tree["threshold"])
            num_leaves += len(tree["leaf_value"])
        flat = {key: np.concatenate(values) for key, values in columns.items()}
        return cls(
            flat["split_feature"].astype(np.int32),
            flat["threshold"],
            flat["left_child"].astype(np.int32),
            flat["right_child"].astype(np.int32),
            flat["leaf_value"],
            np.array(roots, dtype=np.int32),
        )

    def predict(self, weights: np.ndarray) -> np.ndarray:
        """Return the sum of the trees [N] at weights [N, D]."""
        rows = np.ascontiguousarray(weights, dtype=np.float64)
        total = np.zeros(len(rows))
        _walk()(
            rows,
            self.feature,
            self.threshold,
            self.left,
            self.right,
            self.leaf,
            self.roots,
            total,
        )
        return total


@functools.cache
def _walk() -> Callable[..., None]:
    """Compile the walk over a forest (about a second, once a process)."""
    import numba

    @numba.njit(nogil=True)
    def walk(
        rows: Any,
        feature: Any,
        threshold: Any,
        left: Any,
        right: Any,
        leaf: Any,
        roots: Any,
        total: Any,
    ) -> None:
        for start in range(0, len(rows), _BLOCK):
            stop = min(start + _BLOCK, len(rows))
            for root in roots:
                for row in range(start, stop):
                    node = root
                    while node >= 0:
                        if rows[row, feature[node]] <= threshold[node]:
                            node = left[node]
                        else:
                            node = right[node]
                    total[row] += leaf[~node]

    return walk


@dataclass(frozen=True, eq=False)
class TreesModel:
    """One forest per target; scale [M], the spread of the losses in nats."""

    # The search judges few of its draws by it, and the others by a stand-in.
    is_costly: ClassVar[bool] = True

    forests: tuple[Forest, ...]
    scale: np.ndarray

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        _walk()
        chunks = np.array_split(weights, max(1, min(64, len(weights) // 256)))
        work = [(forest, chunk) for forest in self.forests for chunk in chunks]
        parts = in_threads(lambda item: item[0].predict(item[1]), work)
        columns = [parts[k * len(chunks) : (k + 1) * len(chunks)] for k in range(len(self.forests))]
        return np.stack([np.concatenate(column) for column in columns], axis=1)

    def select(self, columns: Sequence[int]) -> TreesModel:
        """Return the model of these targets only."""
        chosen = list(columns)
        return TreesModel(
            tuple(self.forests[column] for column in chosen),
            self.scale[chosen],
        )

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M]; trees do not know where they are unsure.

        The latter is the losses' spread: whoever uses it scales it to the held-out errors.
        """
        mean = self.mean(weights)
        return mean, np.broadcast_to(self.scale, mean.shape).copy()


@dataclass(frozen=True, kw_only=True)
class Trees:
    """LightGBM as in the paper.

    samples_per_leaf: None takes the paper's 20 from 240 runs on and K // 12, at least 3, below:
    with 20 no tree can split fewer than 40 runs, and 64 runs lose 3 points of rank correlation.
    """

    name: str = "lightgbm"
    num_rounds: int = 1000
    learning_rate: float = 0.01
    seed: int = 42
    samples_per_leaf: int | None = None

    def fewest_runs(self, num_domains: int) -> int:
        """Return the number of runs below which this regressor refuses."""
        return 20 if self.samples_per_leaf is None else 2 * self.samples_per_leaf

    def fit(self, weights: np.ndarray, losses: np.ndarray) -> TreesModel:
        """Fit every target."""
        # Targets side by side, each on one thread: the same bits on any number of cores.
        forests = in_threads(lambda column: self._train(weights, column), list(losses.T))
        return TreesModel(tuple(forests), losses.std(0))

    def _train(self, weights: np.ndarray, loss: np.ndarray) -> Forest:
        import lightgbm

        per_leaf = self.samples_per_leaf or max(3, min(20, len(weights) // 12))
        settings = {
            "objective": "regression",
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "min_data_in_leaf": per_leaf,
            "feature_pre_filter": False,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        data = lightgbm.Dataset(weights, loss, params=settings)
        booster = lightgbm.train(settings, data, self.num_rounds)
        return Forest.parse(booster.model_to_string())
