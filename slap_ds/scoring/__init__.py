"""Per-sample loss, gradient sketch and curvature from one pass over the head."""

from slap_ds.scoring.curvature import Curvature
from slap_ds.scoring.head import HeadScores, WeightedTokenLoss, score_head
from slap_ds.scoring.scorer import Scorer, Scores, Wants

__all__ = [
    "Curvature",
    "HeadScores",
    "Scorer",
    "Scores",
    "Wants",
    "WeightedTokenLoss",
    "score_head",
]
