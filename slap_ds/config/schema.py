"""Every setting of a run: one frozen `Config`, its defaults, meanings and what must fit together.

file.py reads it from YAML and overrides; `slap-ds settings` prints the text below each
setting. The DeepSpeed JSON stays a file of its own (deepspeed.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from slap_ds.config.methods import (
    CcsConfig,
    GreatsConfig,
    InfoBatchConfig,
    SampledConfig,
    SelectiveBackpropConfig,
    SlapConfig,
    UdsConfig,
)
from slap_ds.config.outputs import (
    CheckpointConfig,
    EvaluationConfig,
    ProfileConfig,
    TrackingConfig,
)
from slap_ds.config.section import PathText, Section
from slap_ds.errors import counted


class LoraConfig(Section):
    """`model.lora`: adapters beside frozen weights."""

    r: int = Field(16, ge=1)
    """Rank of the two matrices trained beside each adapted one."""
    alpha: int = Field(32, ge=1)
    """Scale: what they add is multiplied by alpha / r, with use_rslora by alpha / sqrt(r)."""
    target_modules: list[str] | None = Field(None, min_length=1)
    """Ends of the names of the linear layers to adapt; default: all of them, save the head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters; above 0 the scoring forward cannot be the training forward."""
    use_dora: bool = False
    """DoRA: train the length of each output's weights apart from their direction."""
    use_rslora: bool = False
    """rsLoRA: the scale that stays stable at high ranks."""
    start: PathText | None = None
    """An adapter folder in peft's format to continue from; its own rank, scale, targets and kind
    count, not those above."""


class ModelConfig(Section):
    """`model`: what is trained."""

    path: PathText | None = None
    """A Hugging Face model folder or hub name to start from."""
    config: dict[str, Any] | None = None
    """Instead of `path`: fields of a transformers config, `model_type` too, for fresh weights."""
    tokenizer: PathText | None = None
    """Tokenizer folder, hub name or tokenizer.json; default: `path`. `builtin:demo` ships here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype the model computes in; the optimizer keeps float32 master weights."""
    attention: str = "packed"
    """packed: each sample of a row by itself; or an attention implementation of transformers:
    sdpa, eager, flex_attention, flash_attention_2, _3 or _4 (their packages installed)."""
    kernels: Literal["torch", "liger"] = "torch"
    """liger: Liger's RMSNorm, SwiGLU and rotary embedding in the model's layers, on a GPU;
    needs `pip install 'slap_ds[liger]'`."""
    gradient_checkpointing: bool = True
    """Keep only block inputs in the forward and recompute the rest in the backward."""
    lora: LoraConfig | None = None
    """Train low-rank adapters beside frozen weights; null: full fine-tuning."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give one of model.path and model.config, and null for the other")
        if self.path is None and self.tokenizer is None:
            raise ValueError("model.config needs model.tokenizer as well")
        if self.path is None and self.lora is not None:
            raise ValueError("model.lora needs model.path: fresh weights are nothing to adapt")
        return self


class DataConfig(Section):
    """`data`: conversations, their template and their limits."""

    train: list[PathText] = Field(min_length=1)
    """Training files, folders, globs or hub names; `builtin:demo/train` ships in the package."""
    eval: list[PathText] = Field([])
    """Evaluation files, the same kinds."""
    format: str = "auto"
    """messages, sharegpt, alpaca, prompt_completion; auto recognises each row by its fields."""
    template: str = "auto"
    """A built-in name, or auto: the tokenizer's own chat template; ChatGLM and GLM-4 are known."""
    max_tokens: int = Field(1024, ge=2)
    """Longest sample, in tokens."""
    over_length: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer one: its end is cut off, or it is left out (counted either way)."""
    max_reject_share: float = Field(0.1, ge=0, le=1)
    """More bad rows than this share of all stop the run; below it they go to rejects.jsonl."""
    max_row_bytes: int = Field(16 * 2**20, ge=1)
    """A longer line is rejected unread."""
    max_depth: int = Field(64, ge=2, le=500)
    """A row whose lists and objects are nested deeper is rejected."""
    cache_dir: PathText | None = None
    """Tokenised data live here; default: $SLAP_CACHE_DIR, else ~/.cache/slap_ds."""


class BatchConfig(Section):
    """`batch`: sizes of the candidate batch and of packed rows."""

    candidates: int = Field(64, ge=1)
    """N: candidates drawn for one optimizer step, over all ranks."""
    rows_per_rank: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    """In place of candidates: as many as fill so many rows a rank (with engine.sequence_parallel
    those that share rows count as one) at the mean length of samples;
    auto: so many rows that more would hardly make a step cheaper in relation to full training."""
    micro_batch_tokens: int = Field(2048, ge=2)
    """Tokens of one packed row, the unit of a forward and backward."""
    score_micro_batch_tokens: int | None = Field(None, ge=2)
    """Tokens of one packed row in scoring, where no graph is kept; default: twice as many."""


class StepConfig(Section):
    """`step`: how scoring and training share a forward and the ranks."""

    forward: Literal["auto", "reuse", "separate"] = "auto"
    """reuse: the scoring forward is the training forward, only picks are recomputed and trained;
    separate: score, then train, with any model; auto: reuse where the model allows it."""
    balance: Literal["auto", "quota", "deal", "none"] = "auto"
    """How the picks' tokens are spread over ranks. deal: picks move (separate only); quota: picks
    stay where they were scored and no rank gets more than its share; none: they just stay.
    auto: quota with reuse, deal with separate."""
    quota_slack: float = Field(0.02, ge=0)
    """How far above the mean a rank's tokens may be under quotas."""
    boundaries: Literal["device", "host"] = "device"
    """Where reuse keeps the block inputs of all candidates between scoring and training."""


class SelectionConfig(Section):
    """`selection`: which candidates are trained."""

    method: str = "sampled"
    """The selector, a key of slap_ds.selection.SELECTORS (docs/baselines.md): sampled, slap,
    random, full, hard, easy, el2n, grand, ccs, moderate, infobatch, selective_backprop, rho_loss,
    divbs, adacore, k_center, uds, greats; or one from elsewhere (docs/api.md)."""
    keep: float = Field(0.6, gt=0, le=1)
    """Keep ratio M / N in (0, 1]; the pruning rate is 1 - keep."""
    warmup: float = Field(0.0, ge=0, le=1)
    """Share of the steps, at the start, that train all candidates."""
    cooldown: float = Field(0.0, ge=0, le=1)
    """Share of the steps, at the end, that train all candidates."""
    reference_losses: PathText | None = None
    """rho_loss: the file of each training sample's loss under a reference model, as written by
    `slap-ds losses`."""
    validation: list[PathText] = Field([])
    """greats: files, folders, globs or hub names of the samples whose loss should fall; none
    of them may be in data.eval."""
    slap: SlapConfig = SlapConfig()
    ccs: CcsConfig = CcsConfig()
    infobatch: InfoBatchConfig = InfoBatchConfig()
    selective_backprop: SelectiveBackpropConfig = SelectiveBackpropConfig()
    uds: UdsConfig = UdsConfig()
    greats: GreatsConfig = GreatsConfig()
    sampled: SampledConfig = SampledConfig()
    options: dict[str, Any] = Field({})
    """Settings of a selector from elsewhere, which it is made with."""


class ScoringConfig(Section):
    """`scoring`: what a candidate is judged by."""

    sketch: Literal["head_input", "head_kron", "hvp"] = "head_input"
    """What stands for a sample (docs/method.md). head_input: its gradient by the final hidden
    states; head_kron: its projected weight gradient; hvp: z * Hz of the head."""
    sketch_size: tuple[int, int] = (16, 16)
    """(a, b) of head_kron: a * b numbers."""
    sketch_dim: int | None = Field(None, ge=1, le=512)
    """D: head_input and hvp are projected to so many numbers by fixed random signs before they
    travel, which divides gather and choice by E / D; default: all E of the model's width."""
    sketch_norm: Literal["auto", "none", "unit"] = "auto"
    """unit: divide each sketch by its length, so that only directions differ; auto: unit for slap
    (none with selection.slap.preset paper), none for the other methods."""
    sketch_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which sketches travel between ranks."""
    curvature: Literal["exact_head", "hutchinson_head", "hutchinson_blocks", "none"] = "exact_head"
    """Diagonal of the Hessian that preconditions the sketch. exact_head: in closed form;
    hutchinson_head: estimated by probes; hutchinson_blocks: by double backward through blocks."""
    probes: int = Field(16, ge=1)
    """Random vectors of the Hutchinson sources and of hvp."""
    blocks: int = Field(1, ge=1)
    """How many of the last blocks hutchinson_blocks goes through."""
    curvature_tokens: float = Field(0.25, gt=0, le=1)
    """exact_head: share of the response tokens, drawn anew at each step, that it is the mean over;
    a quarter changes it by less than a step's own noise (docs/method.md)."""
    curvature_block: int = Field(1, ge=1)
    """Neighbouring dimensions that share one curvature, their mean; 1: each its own."""
    curvature_decay: float = Field(0.9, ge=0, lt=1)
    """Decay of the curvature's bias-corrected moving average over steps."""
    curvature_power: float = Field(1.0, ge=0)
    """Exponent of the curvature in the preconditioner."""
    curvature_floor: float = Field(1e-3, gt=0)
    """Smallest curvature, as a share of its mean over dimensions; keeps the division bounded."""
    chunk_tokens: int | None = Field(None, ge=1)
    """Tokens whose logits are held at once: peak extra memory is chunk_tokens * V * 12 bytes;
    default: 2,048 on a GPU, 512 on a CPU, whose caches are small."""

    def resolved(self, unit: bool) -> ScoringConfig:
        """`sketch_norm` auto replaced by what the method takes: `unit` sketches, or as they are."""
        if self.sketch_norm != "auto":
            return self
        return self.model_copy(update={"sketch_norm": "unit" if unit else "none"})

    def chunk_on(self, kind: str) -> int:
        """`chunk_tokens`, or its default on a device of this kind ("cuda", "cpu")."""
        return self.chunk_tokens or (512 if kind == "cpu" else 2048)

    @model_validator(mode="after")
    def _fitting(self) -> ScoringConfig:
        if self.sketch == "head_kron" and self.sketch_dim is not None:
            raise ValueError(
                "scoring.sketch_dim projects head_input and hvp; head_kron has the width that "
                "scoring.sketch_size gives it: set scoring.sketch_dim null"
            )
        if min(self.sketch_size) < 1:
            raise ValueError(f"sketch_size is {self.sketch_size}, expected two numbers >= 1")
        return self


class OptimizerConfig(Section):
    """`optimizer`: AdamW and its schedule."""

    kind: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW: torch's, or DeepSpeed's, which it compiles at the first start: DeepSpeedCPUAdam
    where the optimizer is offloaded or there is no GPU, FusedAdam on a GPU."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """The cosine ends at this share of the peak learning rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping by global norm; 0: off."""


class EngineConfig(Section):
    """`engine`: DeepSpeed or plain PyTorch, and how long ranks wait."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or torch: one process, plain PyTorch, for tests and debugging."""
    deepspeed: PathText | None = None
    """DeepSpeed JSON with "auto" values; default: the ZeRO-3 one that ships in the package."""
    sequence_parallel: int = Field(1, ge=1)
    """So many consecutive ranks share each row's tokens, for samples too long for one; the ranks
    must be a multiple of it, and the model's heads divide by it (docs/distributed.md)."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds without progress after which a rank ends and says who holds it up. A checkpoint may
    take longer while its files grow; ranks that have written theirs wait this long for others."""
    start_timeout_s: float = Field(3600.0, gt=0)
    """The same until the first step is done: reading data, building operators, loading weights."""
    stop_timeout_s: float = Field(120.0, gt=0)
    """Seconds from SIGTERM or SIGUSR1 to the end in any case, saved or not; a checkpoint that is
    being written is not cut off while its files grow."""
    deterministic: bool = False
    """On a GPU: kernels that give the same bits every time, where torch has them; slower. What has
    none is an error when it is met. CPUs need no such thing."""

    def groups(self, ranks: int) -> int:
        """Into how many groups that share their rows `ranks` ranks fall.

        Raises:
            ValueError: not evenly.
        """
        if ranks % self.sequence_parallel:
            raise ValueError(
                f"engine.sequence_parallel is {self.sequence_parallel}, which does not divide "
                f"{counted(ranks, 'rank')}: start a multiple of it, or set it to 1"
            )
        return ranks // self.sequence_parallel


class Config(Section):
    """A run."""

    run_dir: PathText
    """Folder of this run: resolved config, metrics, picks, checkpoints."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; each draws batch.candidates candidates."""
    epochs: float | None = Field(None, gt=0)
    """Instead of steps: passes over the candidates."""
    seed: int = Field(0, ge=0)
    """Seed of the order of candidates, of selection and of fresh weights."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field([])
    """Trackers that get losses, evaluations, speeds and what was selected (docs/trackers.md);
    accounts and servers are those of the environment."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    step: StepConfig = StepConfig()
    selection: SelectionConfig = SelectionConfig()
    scoring: ScoringConfig = ScoringConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("run_dir")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("run_dir is empty")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs, and null for the other")
        rows = {
            "batch.micro_batch_tokens": self.batch.micro_batch_tokens,
            "batch.score_micro_batch_tokens": self.score_row_tokens,
        }
        for key, tokens in rows.items():
            if tokens < self.data.max_tokens:
                raise ValueError(
                    f"{key} is {tokens}, less than data.max_tokens {self.data.max_tokens}: "
                    "a sample must fit into one row"
                )
        judged = self.checkpoint.best or self.evaluation.patience
        if judged and not (self.data.eval and self.evaluation.every):
            raise ValueError(
                "checkpoint.best and evaluation.patience go by evaluations: set evaluation.every "
                "and data.eval"
            )
        if self.evaluation.answers is not None and not self.data.eval:
            raise ValueError("evaluation.answers are answers to evaluation rows: set data.eval")
        if self.step.forward == "reuse" and self.step.balance == "deal":
            raise ValueError(
                "step.balance deal moves picks to other ranks, step.forward reuse keeps their "
                "activations where they were scored: choose quota or none"
            )
        if self.optimizer.kind == "deepspeed" and self.engine.kind == "torch":
            raise ValueError(
                "optimizer.kind deepspeed needs engine.kind deepspeed; engine.kind torch steps "
                "with torch's AdamW: set optimizer.kind torch"
            )
        if self.engine.sequence_parallel > 1 and (
            self.engine.kind == "torch" or self.model.attention != "packed"
        ):
            raise ValueError(
                f"engine.sequence_parallel {self.engine.sequence_parallel} needs engine.kind "
                "deepspeed (torch runs on one rank) and model.attention packed"
            )
        if self.engine.deterministic and self.model.attention.startswith(
            ("flex_attention", "flash_attention_3", "flash_attention_4")
        ):
            raise ValueError(
                "engine.deterministic: the backward of model.attention "
                f"{self.model.attention} adds in no fixed order: choose packed, sdpa, eager or "
                "flash_attention_2"
            )
        if self.step.forward == "reuse" and not self.model.gradient_checkpointing:
            raise ValueError("step.forward reuse needs model.gradient_checkpointing")
        if self.selection.warmup + self.selection.cooldown > 1:
            raise ValueError("selection.warmup + selection.cooldown exceed 1")
        return self

    @property
    def score_row_tokens(self) -> int:
        """Tokens of one packed row in scoring."""
        # Scoring keeps no graph, so its rows can be longer: fewer rows are fewer gathers of weights
        return self.batch.score_micro_batch_tokens or 2 * self.batch.micro_batch_tokens
