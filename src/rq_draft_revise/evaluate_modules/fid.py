"""FID for `evaluate.load`."""

from rq_draft_revise import evaluate_modules
from rq_draft_revise.metrics import check_num_samples, frechet_distance, moments


class FID(evaluate_modules.FeatureMetric):
    """Fréchet distance of the features of generated images and of a reference (Heusel et al. 2017).

    `compute(reference=..., allow_few_samples=False, trust_reference=False)` returns `{"fid": ...}`. `reference` is an
    npz of statistics, or a `ReferenceStatistics`.
    """

    def _compute(self, id, features, reference=None, allow_few_samples=False, trust_reference=False):
        features = self._gather(id, features, allow_few_samples)
        reference = self._load_reference(reference, trust_reference)
        if reference.num_samples is not None:
            check_num_samples(reference.num_samples, allow_few_samples, "reference")
        return {"fid": frechet_distance(reference.mean, reference.covariance, *moments(features))}
