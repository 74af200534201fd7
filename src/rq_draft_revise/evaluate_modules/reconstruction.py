"""Metrics of reconstructions for `evaluate.load`."""

import numpy as np
import torch
from datasets import Sequence, Value

from rq_draft_revise import evaluate_modules
from rq_draft_revise.metrics import check_num_samples, frechet_distance, moments, psnr, ssim


class Reconstruction(evaluate_modules.FeatureMetric):
    """rFID, PSNR, SSIM and, with `lpips`, LPIPS of an autoencoder's reconstructions beside their originals.

    `add_batch(predictions=reconstructions, references=originals)`; `compute(allow_few_samples=False)` returns
    `{"rfid": ..., "psnr": ..., "ssim": ..., "lpips": ...}`. The rFID is the Fréchet distance between the two, both as
    added: another number than the FID of generated images.

    Args:
        lpips: A `losses.PerceptualLoss`. By default there is no LPIPS.
    """

    def __init__(self, *args, lpips=None, **kwargs):
        self.lpips = lpips
        super().__init__(*args, **kwargs)

    def _columns(self):
        columns = super()._columns() | {"reference_features": Sequence(Value("float32"))}
        return columns | {name: Value("float64") for name in ("psnr", "ssim", "lpips")}

    def _rows(self, predictions, references):
        if references is None:
            raise ValueError("`references` must be given: the originals of the reconstructions.")
        originals = evaluate_modules.stack_images(references, "references")
        rows = {"psnr": psnr(predictions, originals), "ssim": ssim(predictions, originals)}
        distance = torch.full((len(predictions),), torch.nan)
        if self.lpips is not None:
            device = next(self.lpips.buffers()).device
            with torch.no_grad():
                pair = (images.to(device).float() / 127.5 - 1 for images in (predictions, originals))
                distance = self.lpips.metric(*pair).flatten().cpu()
        rows["lpips"] = distance
        rows |= super()._rows(predictions, None)
        rows["reference_features"] = super()._rows(originals, None)["features"]
        return rows

    def _compute(self, id, height, width, features, reference_features, psnr, ssim, lpips, allow_few_samples):
        features = self._gather(id, height, width, features, allow_few_samples)
        originals = torch.tensor(np.asarray(reference_features, dtype=np.float32))
        check_num_samples(len(originals), allow_few_samples, "references")
        results = {"rfid": frechet_distance(*moments(originals), *moments(features))}
        results |= {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}
        if self.lpips is not None:
            results["lpips"] = float(np.mean(lpips))
        return results
