"""What a run file may say: one frozen section a stage, strict about keys, types, ranges and what goes together.

`runfile.py` reads and writes it. This module imports neither torch nor any stage, so that `bigtune --help` and a bad
run file answer at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator


def _path(value: Any) -> Any:
    if value == "":
        raise ValueError("an empty path; name a file or folder")  # Python takes it for the current folder
    return Path(value) if isinstance(value, str) else value


FilePath = Annotated[Path, Strict(False), BeforeValidator(_path)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
ROLES = ("system", "user", "assistant", "tool")


def _supervise(value: Any) -> Any:
    if value in ("all", "last"):
        return value
    if isinstance(value, list | tuple) and value and all(role in ROLES for role in value):
        return tuple(value)
    raise ValueError(f"{value!r}; allowed: all, last, or a list of {', '.join(ROLES)}")


def _holdout(value: Any) -> Any:
    fraction = isinstance(value, float) and 0 < value < 1
    if value is None or fraction or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r}; give a fraction between 0 and 1, or a number of rows")


def _checkpointing(value: Any) -> Any:
    if value in ("none", "full") or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"{value!r}; allowed: none, full, or a number k, for every k-th layer")


def _timeout(value: Any) -> Any:
    if value in ("auto", None) or (type(value) in (int, float) and value > 0):
        return value
    raise ValueError(f"{value!r}; give seconds above 0, auto or none")


class Section(BaseModel):
    """Base of the sections: immutable, no unknown key, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _new_tokens(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not all(isinstance(token, str) and token.strip() for token in value):
        raise ValueError(f"{value!r}; give a list of tokens, as in ['<tool>', '</tool>']")
    if len(set(value)) < len(value):
        raise ValueError(f"{value!r}; a token is given twice")
    return tuple(value)


class Model(Section):
    """The pretrained model to start from."""

    path: FilePath = Field(description="Hugging Face directory with safetensors, config and tokenizer")
    add_tokens: Annotated[tuple[str, ...], BeforeValidator(_new_tokens)] = Field(
        default=(), description="special tokens that tokenizer and embeddings get; see docs/lora.md"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python files of the model's folder, which may do anything"
    )


def _target_modules(value: Any) -> Any:
    if value == "all-linear":
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ValueError(f"{value!r}; give all-linear, or a list of names, as in [q_proj, v_proj]")


class Adapter(Section):
    """LoRA: the model is frozen, and small matrices beside its linear layers are trained."""

    rank: int = Field(default=16, ge=1, description="width of the matrices")
    alpha: float = Field(default=32.0, gt=0, description="what they add is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what goes into them")
    target_modules: Annotated[Any, BeforeValidator(_target_modules)] = Field(
        default="all-linear", description="layers that get them, by name; `all-linear`: all but the output layer"
    )
    modules_to_save: Annotated[tuple[str, ...], Strict(False)] = Field(
        default=(), description="modules that are trained whole, by name, as in `[embed_tokens, lm_head]`"
    )
    use_rslora: bool = Field(default=False, description="scale by alpha / √rank")


class Source(Section):
    """Raw data: files, or a data set of the `datasets` library. The format is recognised by the rows' keys."""

    path: FilePath | None = Field(
        default=None,
        description="file, glob, folder, or folder of `save_to_disk`: JSONL, JSON array, CSV, TSV, Parquet, Arrow, "
        "plain text, and gzip or zstd of these",
    )
    dataset: str | None = Field(default=None, description="data set by name, from the hub or the local cache")
    config: str | None = Field(default=None, description="configuration of the data set")
    split: str | None = Field(default=None, description="split of the data set; needed where it has several")
    fields: dict[str, str] = Field(
        default={}, description="key of a known format: key of the rows, as in `{instruction: task.text, output: gold}`"
    )
    roles: dict[str, str] = Field(default={}, description="name of a role in the rows: system, user, assistant or tool")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path or dataset")
        if self.config is not None and self.dataset is None:
            raise ValueError("config goes with dataset")
        return self

    @property
    def name(self) -> str:
        """What reports call it."""
        return str(self.path) if self.path is not None else str(self.dataset)


class TrainingSource(Source):
    """A source with its part in the mixture."""

    weight: float | None = Field(
        default=None, gt=0, description="share of an epoch's tokens, relative to the other sources; all of them or none"
    )
    max_documents: int | None = Field(default=None, ge=1, description="so many, drawn under the seed; none: all")


Sources = Annotated[tuple[Source, ...], Strict(False), Field(min_length=1, description="each as `{path: …}`")]
TrainingSources = Annotated[
    tuple[TrainingSource, ...], Strict(False), Field(min_length=1, description="each as `{path: …}`")
]


class Clean(Section):
    """What is left out of the training documents. Each step is off unless asked for, and counted and listed."""

    exact_duplicates: bool = Field(default=False, description="remove rows that say the same as an earlier one")
    near_duplicates: float | None = Field(
        default=None, gt=0, lt=1, description="remove rows whose estimated Jaccard similarity to an earlier is as high"
    )
    decontaminate: int | None = Field(
        default=None,
        ge=4,
        description="remove rows that share so many words in a row with one of evaluate.sources or data.holdout; "
        "often 13",
    )
    min_tokens: int | None = Field(default=None, ge=1, description="remove shorter documents")
    max_tokens: int | None = Field(default=None, ge=1, description="remove longer documents")
    min_answer_characters: int | None = Field(
        default=None, ge=1, description="remove rows whose answers together are shorter"
    )
    same_answer_at_most: int | None = Field(
        default=None, ge=1, description="keep so many rows of those whose answer is word for word the same"
    )
    max_repetition: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="remove rows with an answer that repeats itself: share of repeated 4-grams",
    )

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"no document has min_tokens {self.min_tokens:,} and max_tokens {self.max_tokens:,}; "
                "lower the first, or raise the second"
            )
        return self


class Data(Section):
    """What is trained on, and how it is cut into rows."""

    sources: TrainingSources
    sequence_length: int = Field(default=1024, ge=8, description="tokens a packed row")
    chat_template: str | None = Field(
        default=None,
        description="a Jinja file, or a name of bigtune/data/templates; none: the tokenizer's own, or `plain`",
    )
    supervise: Annotated[Any, BeforeValidator(_supervise)] = Field(
        default="all", description="assistant turns that are learnt, or a list of roles; a row's own marks come first"
    )
    special_tokens: Literal["text", "parse"] = Field(
        default="text", description="text of a row that spells a special token stays text, or becomes the token"
    )
    on_bad_row: Literal["error", "skip"] = Field(default="error", description="skipped ones are counted by reason")
    on_long_document: Literal["drop", "truncate", "split", "error"] = Field(
        default="drop", description="a document longer than a row; each is counted"
    )
    clean: Clean = Clean()
    holdout: Annotated[float | int | None, BeforeValidator(_holdout)] = Field(
        default=None,
        description="fraction or number of rows kept from training, for `bigtune evaluate`; chosen by their content",
    )
    mixture: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="with weights, an epoch ends with the first source that is used up, or with the last",
    )
    min_supervised: float = Field(
        default=0.001, ge=0, lt=1, description="share of supervised tokens below which a run is refused"
    )
    stream: bool = Field(default=False, description="read, tokenize and pack while training, instead of preparing")
    workers: int | None = Field(default=None, ge=1, description="processes that tokenize; none: one a core")
    store: FilePath | None = Field(
        default=None, description="prepared documents; default: OUTPUT/data; a stream has none"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a weight, or none")
        if self.mixture == "all_exhausted" and not any(weighted):
            raise ValueError("mixture: all_exhausted goes with weights; give every source one, or drop it")
        only_long = (self.clean.min_tokens or 0) > self.sequence_length
        if only_long and self.on_long_document in ("drop", "error"):
            raise ValueError(
                f"clean.min_tokens {self.clean.min_tokens:,} keeps what is longer than sequence_length "
                f"{self.sequence_length:,}, and on_long_document: {self.on_long_document} lets none of it in; "
                "lower the first, raise the second, or set on_long_document: truncate or split"
            )
        if self.stream:
            self._refuse_what_needs_a_store()
        return self

    def _refuse_what_needs_a_store(self) -> None:
        """What cannot be done while reading, and why."""
        needs = {
            "sources.weight": (any(source.weight for source in self.sources), "the number of tokens of each source"),
            "sources.max_documents": (any(s.max_documents for s in self.sources), "all rows, to draw from them"),
            "holdout as a number of rows": (type(self.holdout) is int, "all rows, to find the lowest hashes"),
            "clean.exact_duplicates": (self.clean.exact_duplicates, "the rows before, however many"),
            "clean.near_duplicates": (self.clean.near_duplicates, "the rows before, however many"),
            "clean.same_answer_at_most": (self.clean.same_answer_at_most, "the answers before, however many"),
        }
        for key, (asked, why) in needs.items():
            if asked:
                raise ValueError(
                    f"stream reads each row once, in bounded memory, but {key} needs {why}; "
                    "drop it, or set data.stream: false"
                )
        if self.clean.decontaminate and self.holdout is not None:
            raise ValueError(
                "stream reads each row once, but clean.decontaminate with holdout needs all rows, to compare with "
                "those held out; name such rows in evaluate.sources in place of holdout, or set data.stream: false"
            )
        if self.store is not None:
            raise ValueError(
                "stream prepares no documents, and store is where they lie; drop it, or set data.stream: false"
            )


ADAM: Mapping[str, Any] = {"betas": (0.9, 0.95), "epsilon": 1e-8}
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": ADAM, "adamw_8bit": ADAM, "adam": ADAM, "lion_8bit": {"betas": (0.9, 0.99)}, "sgd": {"momentum": 0.9},
}  # fmt: skip
"""The settings that each optimizer has beside those of all, with their defaults."""


class Optim(Section):
    """The optimizer, its schedule and clipping. docs/optimizers.md tells the optimizers apart."""

    name: Literal["adamw", "adamw_8bit", "lion_8bit", "sgd", "adam", "adafactor", "muon"] = Field(
        default="adamw",
        description="8-bit: states of matrices in blocks of 256, of the rest in 32 bits; the last two are refused, "
        "with the reason",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="the highest of the schedule")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="after the warmup; wsd: constant, then linear over the last decay_steps"
    )
    warmup_steps: int = Field(default=0, ge=0, description="over which the learning rate rises from 0")
    decay_steps: int | None = Field(default=None, ge=1, description="of wsd; none: a tenth of the steps")
    final_learning_rate: float = Field(
        default=0.0, ge=0, le=1, description="what the schedule falls towards, as a fraction of learning_rate"
    )
    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] | None = Field(
        default=None,
        description="decay of the first and the second moment; none: 0.9, 0.95, or of lion_8bit 0.9, 0.99",
    )
    epsilon: float | None = Field(
        default=None, gt=0, description="of the Adams: added to the root of the second moment; none: 1e-8"
    )
    momentum: Fraction | None = Field(default=None, description="of sgd; none: 0.9")
    weight_decay: float = Field(default=0.0, ge=0, description="of the matrices alone")
    max_grad_norm: float = Field(default=1.0, ge=0, description="clips the global norm; 0 turns it off")

    @model_validator(mode="before")
    @classmethod
    def _own_settings(cls, given: Any) -> Any:
        """Fill in what the optimizer needs; refuse what it has no use for, rather than ignore it."""
        name = given.get("name", "adamw") if isinstance(given, dict) else None
        own = OPTIMIZERS.get(name) if isinstance(name, str) else None
        if own is None:
            return given
        for key in ("betas", "epsilon", "momentum"):
            if key not in own and given.get(key) is not None:
                raise ValueError(f"{key} is no setting of {name}, which has {' and '.join(own)}; remove it")
        return {**given, **{key: value for key, value in own.items() if given.get(key) is None}}

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps is no setting of schedule: {self.schedule}; remove it, or set schedule: wsd")
        if self.final_learning_rate and self.schedule == "constant":
            raise ValueError("final_learning_rate is no setting of schedule: constant, which never falls; remove it")
        return self


class Loss(Section):
    """What is minimised beside the cross-entropy of the supervised tokens."""

    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of each label that is spread over the vocabulary"
    )
    z_loss: float = Field(default=0.0, ge=0, description="times the squared log of the softmax's denominator")
    router_aux_loss: float | None = Field(
        default=None, ge=0, description="times the imbalance of a mixture's experts; none: as the model's config says"
    )


class Train(Section):
    """How long and in which batches. Batches are counted in packed rows."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps; give this or epochs")
    epochs: int | None = Field(default=None, ge=1, description="passes over the documents; give this or steps")
    micro_batch: int = Field(default=1, ge=1, description="rows a rank computes at once")
    global_batch: int = Field(default=8, ge=1, description="rows a step, over all ranks")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="auto: bfloat16 on CUDA and where this CPU multiplies it faster; masters are float32",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the order of documents, and of dropout")
    activation_checkpointing: Annotated[Any, BeforeValidator(_checkpointing)] = Field(
        default="none",
        description="layers whose activations are computed again in the backward pass, to save memory: none, full, "
        "or k for every k-th",
    )
    max_skipped_steps: int | None = Field(
        default=5,
        ge=1,
        description="steps in a row skipped for a loss or gradient that is not finite, at which the run stops; "
        "none: it never does",
    )
    step_timeout_seconds: Annotated[float | Literal["auto"] | None, BeforeValidator(_timeout)] = Field(
        default="auto",
        description="a step that takes longer ends the run with the stacks of all ranks; the first may take 600 "
        "more; auto: ten times the longest step so far, two minutes at least, an hour for the first; none: no limit",
    )

    time_limit_minutes: float | None = Field(
        default=None,
        gt=0,
        description="the run saves and stops before so many have passed; none: before the end of its Slurm job",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.micro_batch > self.global_batch:
            raise ValueError(
                f"micro_batch {self.micro_batch:,} is more than the {self.global_batch:,} rows of global_batch; "
                "lower the first, or raise the second"
            )
        return self


class Checkpoint(Section):
    """When checkpoints are written, and which are kept. The last step is always saved."""

    enabled: bool = Field(
        default=True, description="false: none is written, whatever asks for one; for trials that nobody goes on from"
    )
    every_steps: int | None = Field(default=None, ge=1, description="none: at the end alone")
    every_minutes: float | None = Field(
        default=None, gt=0, description="after the first step that ends so long after the last save began"
    )
    asynchronous: bool = Field(
        default=True, description="write beside the training, from a copy in memory; where that has no room, it waits"
    )
    keep_last: int | None = Field(default=None, ge=1, description="older ones are removed; none: all are kept")
    keep_every: int | None = Field(
        default=None, ge=1, description="with keep_last: those of every so manieth step stay as well"
    )
    keep_best: bool = Field(
        default=False,
        description="with keep_last: the one of the least held-out loss, which each save then computes, stays as well",
    )
    replicas: int = Field(
        default=0,
        ge=0,
        le=1,
        description="without shared storage, 1 copies each host's shards to the next: a dead host then loses nothing",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        for key in ("keep_every", "keep_best"):
            if getattr(self, key) and self.keep_last is None:
                raise ValueError(f"{key} goes with keep_last; without that, all checkpoints are kept")
        return self


class CodeRuns(Section):
    """Leave to run code that models write, for the metric `code`; docs/evaluate.md says what the sandbox holds."""

    sandbox: Literal["bubblewrap", "limits"] = Field(
        description="bubblewrap: no network, files read-only; limits: time and memory alone"
    )
    timeout_seconds: float = Field(default=10.0, gt=0, description="of each answer with its tests")
    memory_gib: float = Field(default=1.0, gt=0, description="of each process")


class Evaluate(Section):
    """How a model is scored."""

    sources: Sources | None = Field(default=None, description="held-out rows; default: those of data.holdout")
    shots_from: Sources | None = Field(
        default=None, description="rows to draw few-shot examples from; default: data.sources"
    )
    shots: int = Field(default=0, ge=0, description="examples before each question")
    prompt: Literal["chat", "plain"] = Field(
        default="chat", description="the chat template, or plain text for a model that knows none"
    )
    metrics: Annotated[tuple[str, ...], Strict(False)] = Field(
        default=("exact_match",),
        min_length=1,
        description="how answers are scored, the one that counts first: exact_match, number (the last one, after #### "
        "where present), token_f1, rouge1, rouge2, rougeL, chrf, constraints and constraints_share (as IFEval's rows "
        "have them), code (runs the row's tests), or a function of your own as module:function",
    )
    code: CodeRuns | None = None
    max_rows: int | None = Field(default=None, ge=1, description="so many rows, drawn under the seed; none: all")
    max_new_tokens: int = Field(default=256, ge=1, description="tokens an answer may have")
    batch_size: int = Field(default=32, ge=1, description="questions that are answered at once")


class Launch(Section):
    """What becomes of a run whose worker or host fails."""

    max_restarts: int = Field(
        default=0,
        ge=0,
        description="start again from the latest checkpoint so many times, without hosts that failed twice; not for "
        "what would fail again, as a mistake in the data",
    )


class Run(Section):
    """One run, from raw data to a merged model."""

    model: Model
    data: Data
    adapter: Adapter | None = None
    optim: Optim = Optim()
    loss: Loss = Loss()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate | None = None
    launch: Launch = Launch()
    deepspeed: str = Field(default="zero3", description="a preset of ds_configs/, or the path of a JSON file")
    output: FilePath = Field(description="folder of the run: checkpoints, metrics, logs, documents")

    @model_validator(mode="after")
    def _known_length(self) -> Self:
        if self.data.stream and self.train.epochs is not None:
            raise ValueError("train.epochs needs the number of rows, which data.stream does not know; give train.steps")
        return self

    @model_validator(mode="after")
    def _held_out_rows(self) -> Self:
        if self.held_out or self.data.holdout is not None:
            return self
        if self.checkpoint.keep_best:
            raise ValueError(
                "checkpoint.keep_best needs held-out rows; name some in evaluate.sources, or set data.holdout"
            )
        if self.evaluate is not None:
            raise ValueError("evaluate.sources is missing; name held-out rows there, or set data.holdout")
        if self.data.clean.decontaminate:
            # A stream cannot compare with its own rows.
            mend = "name them in evaluate.sources" + (", or set data.holdout" if not self.data.stream else "")
            raise ValueError(f"data.clean.decontaminate compares with held-out rows, and there are none; {mend}")
        return self

    @property
    def held_out(self) -> tuple[Source, ...]:
        """The sources of held-out rows that the evaluate section names."""
        return (self.evaluate.sources if self.evaluate else None) or ()

    @property
    def store(self) -> Path:
        """Where the prepared documents lie."""
        return self.data.store or self.output / "data"
