"""The CLIP score for `evaluate.load`."""

import numpy as np
from datasets import Value

from rq_draft_revise import evaluate_modules
from rq_draft_revise.features import CLIPEmbeddings
from rq_draft_revise.metrics import clip_score


class CLIPScore(evaluate_modules.ImageMetric):
    """Mean cosine similarity of images and their captions by CLIP ViT-B/32.

    `add_batch(predictions=images, references=captions)`; `compute()` returns `{"clip_score": ...}`.

    Args:
        clip: A `features.CLIPEmbeddings`, or what it is made from: a Hub id or a folder.
        device: Where it runs.
    """

    def __init__(self, *args, clip="openai/clip-vit-base-patch32", device="cpu", **kwargs):
        self.clip = clip if isinstance(clip, CLIPEmbeddings) else CLIPEmbeddings(clip)
        self.clip.to(device)
        super().__init__(*args, **kwargs)

    def _columns(self):
        return {"similarity": Value("float64")}

    def _rows(self, predictions, references):
        if references is None or len(references) != len(predictions):
            raise ValueError("`references` must be given: a caption for each of `predictions`.")
        return {"similarity": clip_score(*self.clip(predictions, list(references))).numpy()}

    def _compute(self, id, similarity):
        self._check_ids(id)
        return {"clip_score": float(np.mean(similarity))}
