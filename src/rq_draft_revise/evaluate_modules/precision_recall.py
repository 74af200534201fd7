"""Precision and recall for `evaluate.load`."""

from rq_draft_revise import evaluate_modules
from rq_draft_revise.features import reference_features
from rq_draft_revise.metrics import precision_and_recall


class PrecisionRecall(evaluate_modules.FeatureMetric):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    `compute(reference=..., k=3, allow_few_samples=False, trust_reference=False)` returns `{"precision": ...,
    "recall": ...}`. The `reference` has to hold features, or as ADM's files images, from which they are computed; of
    10,000 real images at least, unless `allow_few_samples`.
    """

    def _options(self, reference=None, k=3, allow_few_samples=False, trust_reference=False):
        reference = self._load_reference(reference, trust_reference)
        reference.check_num_features(allow_few_samples)
        if not 1 <= k < reference.num_features:
            raise ValueError(
                f"`k` must lie in [1, {reference.num_features - 1}], as `reference` has {reference.num_features} "
                f"features, got {k}."
            )
        return {
            "reference": reference,
            "k": k,
            "allow_few_samples": allow_few_samples,
            "trust_reference": trust_reference,
        }

    def _compute(self, id, height, width, features, reference, k, allow_few_samples, trust_reference):
        features = self._gather(id, height, width, features, allow_few_samples, reference, trust_reference)
        real = reference_features(reference, self.network)
        return precision_and_recall(real.to(self.network.device), features.to(self.network.device), k)
