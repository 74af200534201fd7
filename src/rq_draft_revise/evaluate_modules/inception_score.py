"""The Inception Score for `evaluate.load`."""

from rq_draft_revise import evaluate_modules
from rq_draft_revise.metrics import inception_score


class InceptionScore(evaluate_modules.FeatureMetric):
    """exp of the mean KL divergence between a classifier's answer and its mean answer (Salimans et al. 2016).

    `compute(allow_few_samples=False)` returns `{"inception_score": ..., "inception_score_std": ...}`, mean and
    standard deviation over the splits of the protocol.
    """

    column = "logits"

    def _compute(self, id, height, width, logits, allow_few_samples):
        logits = self._gather(id, height, width, logits, allow_few_samples)
        mean, std = inception_score(logits, **self.protocol.inception_score)
        return {"inception_score": mean, "inception_score_std": std}
