"""The method in one process and a hundred lines: score the candidates, choose, train the picks.

    candidates -> packed row -> loss and gradient sketch of each sample     score
               -> loss strata, budgets, farthest points                    choose
               -> packed row of the picks -> one AdamW step                train

The data are counting games: "start, stride" and the numbers that follow. Run it as
`python examples/minimal.py`. What it leaves out is in the package: ranks, reuse of the scoring
forward, long data, checkpoints.
"""

import numpy as np
import torch
from transformers import LlamaConfig

from slap_ds.data.packing import Candidate, PackedRow, make_row
from slap_ds.models.load import load_model
from slap_ds.scoring import Curvature, Head, ScoreRequest, WeightedTokenLoss, score_head
from slap_ds.selection import ScoredBatch, Selection, make_selector, select

N, KEEP, VOCAB, CHUNK = 32, 0.6, 64, 512  # candidates a step, M / N, tokens, logits held at once


def draw(rng: np.random.Generator) -> list[Candidate]:
    """N games. A fixed small set of starts makes many of them alike, as instruction data are."""
    found = []
    for position in range(N):
        start, stride, length = rng.integers(0, 12), rng.integers(1, 5), rng.integers(6, 20)
        ids = np.concatenate([[start, stride], (start + stride * np.arange(1, length)) % VOCAB])
        mask = np.arange(len(ids)) >= 2  # the prompt is not trained
        found.append(Candidate(position, ids, mask))
    return found


def hidden_states(model, row: PackedRow) -> torch.Tensor:
    """(T, E); restarting positions and the lengths keep samples from seeing each other."""
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
    structure = {"sample_lengths": row.lengths, "cu_seq_lens_q": row.cu_seqlens}
    return model.model(**inputs, **structure).last_hidden_state[0]


@torch.no_grad()
def score(model, candidates: list[Candidate], curvature: Curvature) -> ScoredBatch:
    """Loss (N,) and Hessian-approximated gradient (N, E) of each, on the current weights."""
    row = make_row(candidates)
    hidden, head = hidden_states(model, row), Head(model.lm_head.weight, None)
    # The gradient by the final hidden states and the Hessian's diagonal, both in closed form.
    asked = ScoreRequest(sketch="head_input", diagonal="exact_head")
    sums = score_head(hidden, head, row.targets, row.sample, N, asked, chunk_tokens=CHUNK)
    curvature.update(sums.diagonal, int(sums.diagonal_tokens))
    sketch = curvature.precondition_(sums.gradient / sums.tokens[:, None])
    sketch /= sketch.norm(dim=1, keepdim=True)  # only directions count
    return ScoredBatch(loss=sums.loss / sums.tokens, sketch=sketch)


def train(model, optimizer, candidates: list[Candidate], selection: Selection) -> float:
    """One step on the picks; returns their loss in nats per trained token."""
    row = make_row([candidates[i] for i in selection.picks.tolist()])
    weights = selection.weights[row.sample]
    total = weights[row.targets >= 0].sum()
    loss = WeightedTokenLoss.apply(
        hidden_states(model, row), model.lm_head.weight, None, row.targets, weights, CHUNK
    )
    (loss / total).backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach() / total)


def main(steps: int = 60) -> list[float]:
    """Train; returns each step's mean loss over all candidates, before it trains on some."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = load_model(None, config, dtype="float32", attention="packed", seed=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    slap = {"strata": 4, "strata_by": "quantile", "budgets": "sampled", "temperature": 1.0}
    selector = make_selector({"method": "slap", "slap": slap})
    curvature = Curvature(decay=0.9, power=1.0, floor=1e-3)
    rng, losses = np.random.default_rng(1), []
    for step in range(steps):
        candidates = draw(rng)
        scored = score(model, candidates, curvature)
        generator = torch.Generator().manual_seed(step)
        selection = select(selector, scored, round(KEEP * N), generator)
        losses.append(float(scored.loss.mean()))
        trained = train(model, optimizer, candidates, selection)
        if step % 10 == 0:
            budgets = selection.stats["strata_budgets"]
            print(f"step {step:3d}  candidates {losses[-1]:.3f}  picks {trained:.3f}  {budgets}")
    return losses


if __name__ == "__main__":
    main()
