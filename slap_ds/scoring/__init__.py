"""Per-sample loss, gradient sketch and curvature from one pass over the head."""

from slap_ds.scoring.blocks import Recorded, Tail, recorded, score_tail, tail_parameters
from slap_ds.scoring.curvature import Curvature
from slap_ds.scoring.head import HeadScores, score_head
from slap_ds.scoring.plan import ScoringPlan
from slap_ds.scoring.probes import token_subset
from slap_ds.scoring.request import ScoreRequest
from slap_ds.scoring.response import Response
from slap_ds.scoring.scorer import Scorer, Scores, collect, first_occurrence
from slap_ds.scoring.softmax import Head
from slap_ds.scoring.token_loss import WeightedTokenLoss

__all__ = [
    "Curvature",
    "Head",
    "HeadScores",
    "Recorded",
    "Response",
    "ScoreRequest",
    "Scorer",
    "Scores",
    "ScoringPlan",
    "Tail",
    "WeightedTokenLoss",
    "collect",
    "first_occurrence",
    "recorded",
    "score_head",
    "score_tail",
    "tail_parameters",
    "token_subset",
]
