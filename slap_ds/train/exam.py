"""`evaluation.answers`: the model in training answers some evaluation rows, and is marked.

    questions, the same batches on any number of ranks -> dealt out -> greedy answers
    -> gathered -> metrics by task, by rank 0 -> told to all ranks

Under ZeRO-3 every forward needs all ranks: they answer as many batches each, and in each batch as
many tokens as the longest answer has. Nothing is drawn, and what is trained stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slap_ds.answers.greedy import Generated, answer_batch, batches, greedy
from slap_ds.answers.metrics import Answer, group_metrics, sample_metrics
from slap_ds.answers.questions import Answering, Question, read_questions
from slap_ds.config.outputs import ANSWERS
from slap_ds.config.schema import Config
from slap_ds.data.encoding import Template
from slap_ds.data.samples import Rules
from slap_ds.data.templates import make_template
from slap_ds.distributed.comm import Comm
from slap_ds.engine import Engine
from slap_ds.train.inputs import Inputs


@dataclass(frozen=True)
class Exam:
    """The questions of a run, the same at every evaluation."""

    questions: list[Question]
    tasks: list[str]  # of each question
    batches: list[list[int]]  # positions of the questions that are answered together
    max_new_tokens: int
    tokenizer: Any
    template: Template

    def take(self, engine: Engine, comm: Comm, step: int) -> dict[str, Any]:
        """{ANSWERS: {task: {"count", "stopped", metric: value, ...}}} of the current weights, the
        same on every rank; all ranks call this."""
        mine = self.batches[comm.rank :: comm.world]
        answers: dict[int, Generated] = {}
        with engine.answering() as (lm, together), greedy(lm, self.template):

            def answer(prompts: Sequence[Sequence[int]], most: int) -> list[Generated]:
                parts = (lm, self.tokenizer, self.template, prompts, most)
                return answer_batch(*parts, engine.device, together)

            for batch in mine:
                prompts = [self.questions[i].prompt for i in batch]
                found = answer(prompts, self.max_new_tokens)
                answers |= dict(zip(batch, found, strict=True))
            if together and len(mine) < len(self.batches[:: comm.world]):
                answer([self.template.stop_ids[:1]], 1)  # for those who have one batch more
        told = comm.texts(step, "answers", json.dumps(answers))
        known = {int(i): Generated(*a) for text in told for i, a in json.loads(text).items()}
        marks = ""
        if comm.rank == 0:  # another rank may have other libraries
            marks = json.dumps(self.marks([known[i] for i in range(len(self.questions))]))
        return {ANSWERS: json.loads(comm.texts(step, "marks of answers", marks)[0])}

    def marks(self, answers: Sequence[Generated]) -> dict[str, dict[str, float]]:
        """Metrics of the answers to all questions, by task."""
        found: dict[str, dict[str, float]] = {}
        for task in sorted(set(self.tasks)):
            at = [i for i, name in enumerate(self.tasks) if name == task]
            given = [Answer(task, self.questions[i].references, answers[i].text) for i in at]
            metrics = group_metrics(given, [sample_metrics(answer) for answer in given])
            found[task] = {
                "count": len(at),
                "stopped": sum(answers[i].stopped for i in at) / len(at),
                **{name: float(metric["value"]) for name, metric in metrics.items()},
            }
        return found


def read_exam(config: Config, inputs: Inputs) -> Exam:
    """The questions that a config with `evaluation.answers` asks for, of its evaluation rows.

    Raises:
        ValueError: no prompt leaves room for an answer, or a library that marks them is missing.
    """
    settings, store = config.evaluation.answers, inputs.eval
    assert settings is not None
    assert store is not None
    how = Answering(settings.samples, settings.max_new_tokens, settings.batch_tokens)
    template = make_template(config.data.template, inputs.tokenizer)
    positions = getattr(inputs.model_config.get_text_config(), "max_position_embeddings", None)
    rules = Rules.of(config.data, template)
    questions, _ = read_questions(store, config.data.eval, rules, how, positions)
    lengths = [len(question.prompt) for question in questions]
    exam = Exam(
        questions,
        [store.names["task"][store.task[question.index]] for question in questions],
        batches(lengths, how.max_new_tokens, how.batch_tokens),
        how.max_new_tokens,
        inputs.tokenizer,
        template,
    )
    # A library that is missing is missed now, not after the first steps.
    exam.marks([Generated(question.references[0], True) for question in questions])
    return exam
