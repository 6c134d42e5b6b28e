"""What a study runs: STUDY.yaml -> `Study` -> cells -> one run's `Config` each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from slap_ds.config.file import read_config, read_yaml, validated
from slap_ds.config.schema import Config
from slap_ds.config.section import Section

PLAIN = "plain"
# What a method and its opponent have the same of, and "all": the reference's whole run.
BASES = ("cost", "candidates", "samples", "response_tokens", "seconds", "all")


class Noise(Section):
    """Wrong answers."""

    source: str | None = None
    """The source whose rows get wrong answers; default: every source, each within itself."""
    share: float = Field(gt=0, le=1)
    """Share of a source's rows; their answers are shuffled among themselves, and their source is
    named `SOURCE (noise)`."""


class Duplicates(Section):
    """Copies of rows."""

    times: int = Field(ge=2)
    """How often a row stands in the data then; the copies' source is named `SOURCE (copies)`."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of each source's rows."""
    edited: float = Field(0.0, ge=0, lt=1)
    """Share of the words (of scripts without spaces, characters) of every message of a copy that
    are dropped, doubled or swapped with the next: near-duplicates; 0: exact copies."""


class Variant(Section):
    """A change of the training data."""

    noise: Noise | None = None
    """Wrong answers in one source."""
    duplicates: Duplicates | None = None
    """Rows that stand in the data several times."""


class StudyData(Section):
    """Rows of the base model, of the cells and of their evaluation."""

    train: list[str] = Field(min_length=1)
    """Files, folders or patterns; `{data}` in them is the folder given by --data."""
    eval: list[str] = Field(min_length=1)
    """Evaluation files, the same kinds."""
    base: list[str] = Field([])
    """Training files of the base model, where it shall not see the cells' sources."""
    base_per_source: int | None = Field(None, ge=1)
    """At most so many rows of each source of `base`; default: all."""
    per_source: int | None = Field(None, ge=1)
    """At most so many training rows of each source, drawn at random; default: all."""
    rows: dict[str, int] = Field({})
    """Source -> at most so many of its rows, instead of per_source."""
    base_share: float = Field(0.0, ge=0, lt=1)
    """Share of these rows that trains the base model; the cells get the others."""
    eval_per_source: int | None = Field(None, ge=1)
    """At most so many evaluation rows of each source; default: all."""
    seed: int = Field(0, ge=0)
    """Seed of these draws and of the variants."""


class Base(Section):
    """The model that all cells start from."""

    path: str | None = None
    """A Hugging Face model folder or hub name that all cells start from."""
    config: str | None = None
    """Instead: the config of a pre-training run that is done once."""
    overrides: dict[str, Any] = Field({})
    """Settings changed in `config`, by dotted key."""
    vocabulary: int | None = Field(None, ge=260)
    """Pieces of a byte-level BPE that is trained on the base model's rows and takes the place of
    `model.tokenizer`; a small one keeps the head of a small model as cheap as a large model's."""
    losses: bool = False
    """Also write the loss of every training row of a cell under this model, for rho_loss, to
    `{study}/base/losses.jsonl`."""

    @model_validator(mode="after")
    def _one(self) -> Base:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path and config")
        if self.path is not None and self.vocabulary is not None:
            raise ValueError("a model at `path` has its vocabulary: leave out `vocabulary`")
        return self


class Block(Section):
    """Every combination of these is a cell; what occurs twice is run once."""

    methods: list[str] = Field(min_length=1)
    """Labels of `methods`."""
    keep: list[float] = Field(min_length=1)
    """Keep ratios; the reference method keeps all, whatever stands here."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of a run: order of the candidates, selection."""
    cost: list[float] | None = Field(None, min_length=1)
    """Shares of the cost of training all candidates for the config's steps, in analytic FLOPs: each
    cell takes as many steps as its share buys; default: the config's steps, whatever they cost."""
    strata: list[int] | None = Field(None, min_length=1)
    """Numbers of strata K; default: the config's."""
    variants: list[str] = Field([PLAIN], min_length=1)
    """Names of `variants`; `plain` is the data as they are."""


class Answers(Section):
    """Greedy answers of every cell's model, with exact match, F1, chrF and ROUGE-L."""

    samples: int = Field(ge=1)
    """Rows that are answered of each task, a fixed random subset."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer."""


class Study(Section):
    """A study file: data, base model, methods and the grid of cells."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Names the folder of the study."""
    data: StudyData | None = None
    """Where rows come from; default: what the config files name."""
    base: Base
    """The model that all cells start from."""
    config: str
    """The config of a cell, beside the study file or by its path."""
    overrides: dict[str, Any] = Field({})
    """Settings changed in all cells, by dotted key."""
    methods: dict[str, dict[str, Any]]
    """Label -> settings, by dotted key; `{study}` in them is the study's folder, whose
    data/base.jsonl holds the rows that no cell trains."""
    variants: dict[str, Variant] = Field({})
    """Label -> what is done to the training data."""
    grid: list[Block] = Field(min_length=1)
    """What is run."""
    reference: str = "full"
    """The method the others are compared with; it trains all candidates."""
    against: list[str] = Field(["random"])
    """Methods that the others are compared with beside the reference, at the same keep ratio; those
    that the study does not have are left out."""
    margin: float = Field(0.02, ge=0)
    """A method is not worse if its loss is surely less than this above the reference, in nats."""
    min_gain: float = Field(10.0, ge=0)
    """Verdicts are refused where the reference gains less than this many margins over the base."""
    measure: Literal["all", "sources"] = "all"
    """What the tables lead with. all: the mean over all response tokens of the evaluation; sources:
    the mean over its sources, each of which then counts the same."""
    tolerance: float = Field(0.03, gt=0, lt=1)
    """How far a cell's cost may be from its share, as a part of it."""
    answers: Answers | None = None
    """Let every cell's model answer evaluation rows; default: losses only."""
    keep_checkpoints: bool = False
    """Write each cell's last checkpoint; default: a cell leaves its measurements only."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        wrong = []
        known = {"methods": set(self.methods), "variants": {PLAIN, *self.variants}}
        for number, block in enumerate(self.grid):
            for field, names in known.items():
                wrong += [
                    f"grid.{number}.{field}: {name!r} is not among {', '.join(sorted(names))}"
                    for name in getattr(block, field)
                    if name not in names
                ]
            wrong += [
                f"grid.{number}.keep: {keep:g} is not in (0, 1]"
                for keep in block.keep
                if not 0 < keep <= 1
            ]
            wrong += [
                f"grid.{number}.cost: {cost:g} is not above 0"
                for cost in block.cost or []
                if cost <= 0
            ]
        if self.reference not in self.methods:
            known_methods = ", ".join(sorted(self.methods))
            wrong.append(f"reference: {self.reference!r} is not among {known_methods}")
        method = self.methods.get(self.reference, {}).get("selection.method")
        if self.reference in self.methods and method != "full":
            wrong.append(
                f"methods.{self.reference}: the reference trains all candidates, "
                f"set selection.method: full (found {method!r})"
            )
        if self.variants and self.data is None:
            wrong.append("variants: they are made of `data`, which is missing")
        if PLAIN in self.variants:
            wrong.append(f"variants: {PLAIN!r} is the name of the data as they are")
        if self.data is not None and self.base.config is not None:
            if not self.data.base_share and not self.data.base:
                wrong.append(
                    "data.base_share is 0 and data.base empty: base.config has no rows to train on"
                )
            if self.data.base_share and self.data.base:
                wrong.append("data.base_share: the base model's rows are those of data.base")
        if self.base.vocabulary is not None and self.data is None:
            wrong.append("base.vocabulary: it is made of the rows of `data`, which is missing")
        if wrong:
            raise ValueError("\n  ".join(wrong))
        return self


@dataclass(frozen=True, order=True)
class Cell:
    """One run of the grid."""

    method: str
    keep: float
    strata: int | None
    variant: str
    seed: int
    cost: float | None = None  # share of full training's; None: the config's steps

    @property
    def name(self) -> str:
        parts = [self.method, f"keep{self.keep:g}"]
        parts += [f"k{self.strata}"] if self.strata is not None else []
        parts += [self.variant] if self.variant != PLAIN else []
        parts += [f"cost{self.cost:g}"] if self.cost is not None else []
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def group(self) -> tuple[str, float, int | None, str, float | None]:
        """What cells have in common that differ in their seeds."""
        return (self.method, self.keep, self.strata, self.variant, self.cost)

    @property
    def group_name(self) -> str:
        return self.name.rpartition("-seed")[0]


def read_study(path: str, data_dir: str | None) -> Study:
    """The study of a YAML file; paths of config files in it are relative to it.

    Raises:
        ValueError: listing every mistake, by dotted key; `{data}` occurs and there is no folder.
        FileNotFoundError: no such file or folder.
    """
    raw = read_yaml(path)
    if "{data}" in json.dumps(raw):
        if data_dir is None:
            raise ValueError(
                f"{path} reads from {{data}}: name that folder with --data, or in SLAP_DATA_DIR"
            )
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f"no data folder at {data_dir!r}")
        raw = _filled(raw, "{data}", data_dir)
    study = validated(Study, raw, path)
    here = Path(path).parent
    base = study.base
    if base.config is not None:
        base = base.model_copy(update={"config": str(here / base.config)})
    return study.model_copy(update={"config": str(here / study.config), "base": base})


def _filled(value: Any, name: str, text: str) -> Any:
    if isinstance(value, str):
        return value.replace(name, text)
    if isinstance(value, list):
        return [_filled(item, name, text) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, name, text) for key, item in value.items()}
    return value


def plan(study: Study) -> list[Cell]:
    """The cells of the grid, each once: seed by seed, so that a study cut short compares some."""
    cells = []
    for block in study.grid:
        strata: list[int | None] = [*block.strata] if block.strata else [None]
        costs: list[float | None] = [*block.cost] if block.cost else [None]
        product = itertools.product(
            block.methods, block.keep, strata, block.variants, block.seeds, costs
        )
        cells += [_settled(study, Cell(*combination)) for combination in product]
    return sorted(dict.fromkeys(cells), key=lambda cell: cell.seed)


def _settled(study: Study, cell: Cell) -> Cell:
    if study.methods[cell.method].get("selection.method") == "full":
        # Of all candidates, the whole cost is the config's steps.
        return replace(cell, keep=1.0, strata=None, cost=None if cell.cost == 1 else cell.cost)
    return cell


def cell_config(study: Study, cell: Cell, folder: Path, steps: int | None = None) -> Config:
    """The config of one cell of the study in `folder`; `steps` instead of the config's."""
    own = _filled(study.methods[cell.method], "{study}", str(folder))
    changes: dict[str, Any] = {**study.overrides, **own}
    changes["run_dir"] = str(folder / "cells" / cell.name)
    changes["seed"] = cell.seed
    changes["selection.keep"] = cell.keep
    if cell.strata is not None:
        changes["selection.slap.strata"] = cell.strata
    if steps is not None:
        changes["steps"], changes["epochs"] = steps, None
    if study.data is not None:
        changes["data.train"] = [str(data_file(folder, f"train-{cell.variant}"))]
        changes["data.eval"] = [str(data_file(folder, "eval"))]
    changes["model.path"] = study.base.path or str(folder / "base" / "model")
    changes["model.config"] = None
    changes["checkpoint.every"] = 0
    changes["checkpoint.last"] = study.keep_checkpoints or study.answers is not None
    changes["evaluation.keep_losses"] = True
    return read_config(study.config, flags(changes))


def base_config(study: Study, folder: Path) -> Config | None:
    """The config of the pre-training run, if there is one."""
    if study.base.config is None:
        return None
    changes = {**study.base.overrides, "run_dir": str(folder / "base" / "run")}
    if study.data is not None:
        changes["data.train"] = [str(data_file(folder, "base"))]
        changes["data.eval"] = [str(data_file(folder, "eval"))]
    if study.base.vocabulary is not None:
        changes["model.tokenizer"] = str(vocabulary_file(folder))
        changes["model.config.vocab_size"] = study.base.vocabulary
    return read_config(study.base.config, flags(changes))


def all_configs(study: Study, cells: Sequence[Cell], folder: Path) -> dict[Cell, Config]:
    """Every cell's config.

    Raises:
        ValueError: the mistakes of all of them, each once.
    """
    configs, mistakes = {}, []
    for cell in cells:
        try:
            configs[cell] = cell_config(study, cell, folder)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return configs


def data_file(folder: Path, name: str) -> Path:
    """Where the study keeps the rows called `name`."""
    return folder / "data" / f"{name}.jsonl"


def vocabulary_file(folder: Path) -> Path:
    """Where the study keeps the tokenizer that it has made."""
    return folder / "base" / "tokenizer.json"


def flags(changes: dict[str, Any]) -> list[str]:
    """Overrides as the command line has them; JSON is YAML."""
    return [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
