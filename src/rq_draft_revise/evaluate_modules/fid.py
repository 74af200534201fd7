"""FID for `evaluate.load`."""

from rq_draft_revise import evaluate_modules
from rq_draft_revise.metrics import check_num_samples, frechet_distance, moments


class FID(evaluate_modules.FeatureMetric):
    """Fréchet distance of the features of generated images and of a reference (Heusel et al. 2017).

    `compute(reference=..., allow_few_samples=False, trust_reference=False)` returns `{"fid": ...}`. `reference` is an
    npz of statistics, or a `ReferenceStatistics`.
    """

    def _options(self, reference=None, allow_few_samples=False, trust_reference=False):
        reference = self._load_reference(reference, trust_reference)
        if reference.num_samples is not None:
            check_num_samples(reference.num_samples, allow_few_samples, "reference")
        return {
            "reference": reference,
            "allow_few_samples": allow_few_samples,
            "trust_reference": trust_reference,
        }

    def _compute(self, id, height, width, features, reference, allow_few_samples, trust_reference):
        features = self._gather(id, height, width, features, allow_few_samples, reference, trust_reference)
        return {"fid": frechet_distance(reference.mean, reference.covariance, *moments(features))}
