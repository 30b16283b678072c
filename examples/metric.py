"""The metrics of the tasks where no hub is reached: `evaluate.load("examples/metric.py", "accuracy")`.

Each is called as the Hub's metric of its name, and gives the same numbers under the same name.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

# Name → what computes it, and of which kind of numbers.
METRICS = {
    "accuracy": (accuracy_score, "int64"),
    "f1": (f1_score, "int64"),
    "matthews_correlation": (matthews_corrcoef, "int64"),
    "pearsonr": (lambda references, predictions: pearsonr(references, predictions).statistic, "float64"),
    "spearmanr": (lambda references, predictions: spearmanr(references, predictions).statistic, "float64"),
}


class TaskMetric(evaluate.Metric):
    """The metric that the configuration names."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value(METRICS[self.config_name][1])
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description=self.config_name, citation="", features=features)

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        compute, _ = METRICS[self.config_name]
        return {self.config_name: float(compute(references, predictions))}
