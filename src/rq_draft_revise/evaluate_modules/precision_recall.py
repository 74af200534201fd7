"""Precision and recall for `evaluate.load`."""

from rq_draft_revise import evaluate_modules
from rq_draft_revise.features import reference_features
from rq_draft_revise.metrics import precision_and_recall


class PrecisionRecall(evaluate_modules.FeatureMetric):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    `compute(reference=..., k=3, allow_few_samples=False, trust_reference=False)` returns `{"precision": ...,
    "recall": ...}`. The `reference` has to hold features, or as ADM's files images, from which they are computed.
    """

    def _compute(self, id, features, reference=None, k=3, allow_few_samples=False, trust_reference=False):
        features = self._gather(id, features, allow_few_samples)
        real = reference_features(self._load_reference(reference, trust_reference), self.network)
        return precision_and_recall(real.to(self.network.device), features.to(self.network.device), k)
