"""Draft-and-Revise with Contextual RQ-Transformer, speaking the diffusers API.

Every component is imported here: diffusers looks up the module paths that `model_index.json` records among the modules
that are imported already.
"""

__version__ = "0.1.0"

from .contextual_rq_transformer import ContextualRQTransformerModel
from .pipeline_draft_and_revise import DraftAndRevisePipeline
from .pipeline_draft_and_revise_inpaint import DraftAndReviseInpaintPipeline
from .pipeline_rq_transformer import RQTransformerPipeline
from .rq_transformer import RQTransformerModel
from .rqvae import RQVAEModel
from .scheduling_draft_and_revise import DraftAndReviseScheduler


__all__ = [
    "ContextualRQTransformerModel",
    "DraftAndReviseInpaintPipeline",
    "DraftAndRevisePipeline",
    "DraftAndReviseScheduler",
    "RQTransformerModel",
    "RQTransformerPipeline",
    "RQVAEModel",
]
