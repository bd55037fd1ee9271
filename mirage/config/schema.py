"""Every setting of a run, with its type, range, default and one sentence: the recipe tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mirage.endpoint.config import EndpointConfig

Structured = Literal["json_schema", "json_object", "prompt"]
ModuleGroup = Literal["vision", "projector", "language"]
Family = Literal["internvl", "qwen2_vl"]
PictureView = Literal["all", "one", "black", "none"]
AnswerView = Literal["full", "reply", "refusal", "helpful"]
SourceFormat = Literal[
    "rows",
    "rows_parquet",
    "mis_train",
    "sharegpt",
    "messages",
    "vlguard",
    "spa_vl",
    "beavertails_v",
    "think_in_safety",
    "table",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TinyConfig(_Section):
    """A small model of the real architecture, built here from nothing; research sizes that learn in minutes."""

    hidden_size: int = Field(default=160, gt=0, multiple_of=8)
    """Width of the language model."""
    num_layers: int = Field(default=3, gt=0)
    """Decoder layers of the language model."""
    num_heads: int = Field(default=4, gt=0)
    """Attention heads of the language model and of the vision tower."""
    num_kv_heads: int = Field(default=4, gt=0)
    """Key/value heads of the language model."""
    intermediate_size: int = Field(default=480, gt=0)
    """Feed-forward width of the language model."""
    vision_hidden_size: int = Field(default=96, gt=0)
    """Width of the vision tower."""
    vision_layers: int = Field(default=2, gt=0)
    """Layers of the vision tower."""
    vocab_size: int = Field(default=1024, ge=320)
    """Size of the byte-level BPE vocabulary, special tokens included; trained on the dataset's own text."""
    init_std: float = Field(default=0.08, gt=0)
    """Standard deviation of the language model's initial weights (0.02 never learns to look at this size)."""
    vision_init_std: float = Field(default=0.06, gt=0)
    """Standard deviation of the vision tower's initial weights."""
    warmup_steps: int = Field(default=400, ge=0)
    """Steps in which the vision tower learns to tell the training pictures apart before step 0; 0 for none."""
    warmup_lr: float = Field(default=3e-3, gt=0)
    """Learning rate of that vision warm-up."""


class LoraConfig(_Section):
    """Low-rank adapters."""

    rank: int = Field(default=16, gt=0)
    """Rank of each adapter."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[ModuleGroup, ...] = ("language",)
    """Module groups whose linear layers get adapters."""


class ModelConfig(_Section):
    """Which model, where its weights are, and which parts are trained."""

    family: Family
    """Architecture family: internvl or qwen2_vl."""
    path: str | None = None
    """Local folder with the weights, a hub id (this and attention=kernels alone fetch there), or shipped:internvl."""
    revision: str | None = None
    """Hub revision of `path`."""
    tiny: TinyConfig | None = None
    """Build a small model instead of loading `path`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "kernels"] = "auto"
    """Attention kernels. auto: flash-attn where it is installed and fits the GPU and type, SDPA otherwise. kernels: a
    flash-attn build from the hub, through the package of that name."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with the weights, and log it. MIRage needs none; models, configs, processors and
    evaluations never run any."""
    train: tuple[ModuleGroup, ...] = ("projector", "language")
    """Module groups trained in full (with `lora`: beside the adapters, and saved with them). Paper: both of these."""
    lora: LoraConfig | None = None
    """Low-rank adapters instead of full training of their target groups."""
    cache_vision_features: Literal["off", "memory", "disk"] = "off"
    """Run the frozen vision tower once a picture, before step 1, and keep what it gives in memory or on disk."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: hold the frozen language layers under adapters in NF4 (bitsandbytes, a GPU, train.zero_stage 1 or 2)."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> ModelConfig:
        if self.tiny is not None and self.path is not None:
            raise ValueError("give either model.path or model.tiny, not both")
        if self.lora is not None and set(self.lora.targets) & set(self.train):
            both = ", ".join(sorted(set(self.lora.targets) & set(self.train)))
            raise ValueError(
                f"model.lora.targets and model.train both name {both}; a group is trained in full or by adapter"
            )
        if self.lora is None and not self.train:
            raise ValueError("nothing would be trained: model.train is empty and model.lora is null")
        if self.cache_vision_features != "off" and "vision" in {*self.train, *(self.lora.targets if self.lora else ())}:
            raise ValueError(
                f"model.cache_vision_features={self.cache_vision_features} needs a frozen vision tower, and "
                "model.train or model.lora.targets names vision: its features change with every step. Set it to off"
            )
        if self.quantize != "none" and (self.lora is None or "language" in self.train):
            raise ValueError(
                "model.quantize=4bit freezes the language model: set model.lora, and leave language out of model.train"
            )
        return self


class PreprocessingConfig(_Section):
    """How pictures and chat become tokens. Travels in every checkpoint; evaluation reads it from there."""

    image_size: int = Field(default=448, gt=0, multiple_of=28)
    """InternVL: edge of a tile, pixels."""
    max_tiles: int = Field(default=6, ge=1)
    """InternVL: tiles shared by all images of a sample; each gets max(1, max_tiles // num_images), thumbnail extra."""
    thumbnail: bool = True
    """InternVL: add the whole picture as one more tile when it was cut."""
    min_pixels: int = Field(default=256 * 28 * 28, gt=0)
    """Qwen2-VL: smallest area a picture is scaled to, pixels."""
    max_pixels: int = Field(default=1280 * 28 * 28, gt=0)
    """Qwen2-VL: largest area a picture is scaled to, pixels."""
    system_prompt: str | None = None
    """System message when a row has none; null takes the family's published default, '' leaves it out."""
    number_images: bool = True
    """InternVL: write 'Image-1: ' before each picture of a sample with several."""

    @model_validator(mode="after")
    def _pixel_range(self) -> PreprocessingConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"preprocessing.min_pixels={self.min_pixels} is above preprocessing.max_pixels={self.max_pixels}"
            )
        return self


class ColumnsConfig(_Section):
    """Which column of a table is what (format table)."""

    question: str = "question"
    """Column of the question."""
    answer: str = "answer"
    """Column of the answer."""
    image: str | None = "image"
    """Column of the picture or list of pictures, paths or embedded bytes; null for a table of text."""
    thought: str | None = None
    """Column of reasoning that goes before the answer, as a paragraph of its own."""
    category: str | None = None
    """Column of the category."""


class SourceConfig(_Section):
    """One part of the training mixture."""

    split: str = "train"
    """Split to take: train, train_twins, train_general (dataset folders); the split in the names of Parquet files."""
    path: Path | None = None
    """Dataset folder or file; null takes data.dir."""
    format: SourceFormat = "rows"
    """rows: a dataset folder; the others are published layouts, which docs/data.md describes. Never guessed."""
    image_dir: Path | None = None
    """Folder that a published file's image paths start from; null takes the file's own folder."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the columns of a table (format table)."""
    pictures: PictureView = "all"
    """all: as they are; one: one picture, other objects in words; black: all in words and one black picture; none."""
    answers: AnswerView = "full"
    """full: as they are; reply: the last part alone; refusal: one refusal to all that is risky; helpful: help."""
    max_samples: int | None = Field(default=None, gt=0)
    """Take this many rows, drawn by the seed; null takes all."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Take so many rows, drawn by the seed, that they are this share of the whole mixture."""
    epochs: float = Field(default=1.0, gt=0, le=1000)
    """Times the source is seen in one pass over the mixture: 2 is twice; 0.5 is half of its rows, drawn by the seed."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the draw; null takes train.seed."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of each sample's loss."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in metrics and ledger; null takes the split. Sources of one name share their curves."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> SourceConfig:
        if self.share is not None and self.max_samples is not None:
            raise ValueError("give either max_samples or share, not both")
        if self.share is not None and self.epochs != 1:
            raise ValueError("give either epochs or share, not both: both say how much of the mixture the source is")
        if self.seed is not None and self.share is None and self.max_samples is None and self.epochs.is_integer():
            raise ValueError("seed has no effect without max_samples, share or a fraction in epochs")
        if self.format != "table" and self.columns != ColumnsConfig():
            raise ValueError("columns have no effect without format=table")
        if self.format in ("rows", "rows_parquet") and self.image_dir is not None:
            raise ValueError(f"image_dir has no effect with format={self.format}, whose rows say where pictures are")
        return self


class LrGroupsConfig(_Section):
    """Peak learning rates of parts of the model; null takes train.lr. The schedule applies to each."""

    vision: float | None = Field(default=None, gt=0)
    """Vision tower (model.train names vision)."""
    projector: float | None = Field(default=None, gt=0)
    """Projector (model.train names projector)."""
    language: float | None = Field(default=None, gt=0)
    """Language model (model.train names language), embeddings included unless they have a rate of their own."""
    embeddings: float | None = Field(default=None, gt=0)
    """Token embeddings and output head (model.train names language)."""
    lora: float | None = Field(default=None, gt=0)
    """Low-rank adapters, wherever they sit (model.lora)."""


class DataConfig(_Section):
    """What is trained on and how it is packed."""

    dir: Path = Path("data/mis")
    """Dataset folder that sources and evaluations use unless they name their own; `make datagen` writes one."""
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Parts of the mixture, joined."""
    pack_tokens: int = Field(default=8192, gt=0)
    """Most tokens in one packed row; a longer sample is an error that names it."""
    on_too_long: Literal["error", "drop"] = "error"
    """A sample longer than pack_tokens: stop, or leave it out and list it in ledger.jsonl."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop, or leave it out and list it in ledger.jsonl."""
    max_left_out: int = Field(default=0, ge=0)
    """Most samples that may be left out before the run stops."""
    check_pictures: Literal["header", "whole"] = "header"
    """How each picture is checked before the run: by its header, or decoded once, which finds those cut off."""
    num_workers: int | None = Field(default=None, ge=0)
    """Processes a rank that decode pictures; null: one a core beside its own, 1 to 8; 0: the training process."""
    picture_cache_bytes: int = Field(default=256 * 1024**2, ge=0)
    """Memory per process for preprocessed pictures, so that one used again is not decoded again."""
    tile_cache: str = "off"
    """Folder where resized pictures are kept over epochs and runs; auto: in the cache ($MIRAGE_CACHE); off: none."""
    tile_cache_bytes: int = Field(default=64 * 1024**3, gt=0)
    """Most bytes of that folder; what older runs left goes first, and beyond that pictures are not kept."""

    @field_validator("sources")
    @classmethod
    def _some_source(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if not value:
            raise ValueError("data.sources is empty; name at least one split")
        shares = [source.share for source in value if source.share is not None]
        if sum(shares) >= 1 or len(shares) == len(value):
            raise ValueError("the shares of data.sources leave nothing for a source without one")
        return value


class TrainConfig(_Section):
    """Optimisation."""

    lr: float = Field(default=5e-6, gt=0)
    """Peak learning rate."""
    epochs: float = Field(default=2, gt=0)
    """Passes over the mixture."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimiser steps; null runs all epochs."""
    batch_samples: int | None = Field(default=128, gt=0)
    """Samples in one optimiser step, over all ranks; the same whatever the number of GPUs. Null: see batch_packs."""
    batch_packs: int | None = Field(default=None, gt=0)
    """Packs of data.pack_tokens in one optimiser step, over all ranks: fuller rows. Needs batch_samples=null."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    lr_groups: LrGroupsConfig = LrGroupsConfig()
    """Peak learning rates of parts of the model."""
    warmup_ratio: float | None = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0. Null: see warmup_steps."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps in which the learning rate rises from 0. Needs warmup_ratio=null."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW decay of weight matrices and token embeddings; norms, biases, class tokens, position tables have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    loss_reduction: Literal["token", "sample", "square"] = "token"
    """Weight of a token: 1, 1/n or 1/sqrt(n) with n the sample's supervised tokens (square is InternVL's)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; optimiser state is fp32 either way."""
    zero_stage: Literal[1, 2, 3] = 3
    """DeepSpeed ZeRO stage: sharded are optimiser state (1), gradients too (2), weights too (3)."""
    offload_optimizer: bool = False
    """Keep optimiser state in CPU memory."""
    offload_parameters: bool = False
    """Keep weights in CPU memory too, and bring each layer's to the GPU when it runs. Needs train.zero_stage=3."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    checkpoint_layers: int | None = Field(default=None, gt=0)
    """First decoder layers that recompute; the rest keep activations. Null: all. A trained tower always recomputes."""
    compile: Literal["off", "language", "vision", "all"] = "off"
    """Compile feed-forward blocks and RMS norms of these towers' layers with torch.compile. Not under ZeRO-3."""
    deterministic: bool = False
    """Only kernels that give the same bits each time; an operation without one stops the run. Slower on a GPU."""
    profile: bool = False
    """Record a few steps with torch's profiler into the folder profile/ of run_dir; these steps are slower."""
    loss_chunk_tokens: int = Field(default=2048, gt=0)
    """Supervised positions whose logits exist at one time."""
    loss_kernel: Literal["auto", "torch", "liger"] = "auto"
    """What computes head and loss; auto is torch. Liger is slower and holds fewer logits at a time."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, of adapters' initial weights and of a tiny model."""
    log_every: int = Field(default=1, gt=0)
    """Optimiser steps between two lines of metrics."""

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> TrainConfig:
        if self.batch_packs is None and self.batch_samples is None:
            raise ValueError("train.batch_samples and train.batch_packs are both null: one says what a step is")
        if self.batch_packs is not None and self.batch_samples is not None:
            raise ValueError(
                f"a step is either train.batch_samples={self.batch_samples} samples or "
                f"train.batch_packs={self.batch_packs} packs; set train.batch_samples=null to count packs"
            )
        return self

    @model_validator(mode="after")
    def _one_length_of_the_warmup(self) -> TrainConfig:
        if self.warmup_ratio is None and self.warmup_steps is None:
            raise ValueError("train.warmup_ratio and train.warmup_steps are both null; 0 means no warm-up")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                f"the warm-up is either train.warmup_ratio={self.warmup_ratio:g} of the steps or "
                f"train.warmup_steps={self.warmup_steps}; set train.warmup_ratio=null to count steps"
            )
        return self

    @model_validator(mode="after")
    def _memory_settings_have_an_effect(self) -> TrainConfig:
        if self.checkpoint_layers is not None and not self.gradient_checkpointing:
            raise ValueError("train.checkpoint_layers has no effect with train.gradient_checkpointing=false")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"train.offload_parameters needs train.zero_stage=3; stage {self.zero_stage} keeps whole weights on "
                "every GPU"
            )
        if self.offload_parameters and not self.offload_optimizer:
            raise ValueError(
                "train.offload_parameters needs train.offload_optimizer=true, whose state is the larger part"
            )
        if self.compile != "off" and self.zero_stage == 3:
            raise ValueError(
                f"train.compile={self.compile} gains nothing under train.zero_stage=3: the hooks that gather each "
                "weight break the compiled graphs into single operations; set train.zero_stage=2, or train.compile=off"
            )
        return self


class CheckpointConfig(_Section):
    """When checkpoints are written and how many stay."""

    every_steps: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; null writes one an epoch. The last step is always written."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints kept; older ones are removed unless an evaluation holds them. Step 0's stays."""
    save_failed_weights: bool = False
    """Where the loss or a gradient is not a number, keep the weights before that step for `mirage replay`."""


class _ServerConfig(_Section):
    """A model behind an OpenAI-compatible server."""

    base_url: str
    """Address up to and with the version, e.g. http://127.0.0.1:8000/v1; without user name, password or key."""
    model: str = Field(min_length=1)
    """The model's name as the server knows it."""
    api_key_env: str | None = Field(default=None, min_length=1)
    """Environment variable that holds the key; null for local servers that want none."""
    concurrency: int = Field(default=32, ge=1)
    """Most calls in flight; fewer while the server says that it is overloaded."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """Longest one HTTP request may take."""
    deadline_seconds: float = Field(default=900.0, gt=0)
    """Longest one call may take with its retries and waits."""
    max_attempts: int = Field(default=6, ge=1)
    """Requests for one call that may fail by a fault before it is given up."""
    send_temperature: bool = True
    """Ask for temperature 0; false for models that take no temperature, which are then not greedy."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The request field of the longest reply; hosted reasoning models want max_completion_tokens."""
    extra_json: str | None = None
    """Further request fields as a JSON object in quotes, e.g. {"top_p": 1}; part of the identity, so no secrets."""
    price_per_million_prompt_tokens_usd: float | None = Field(default=None, ge=0)
    """US dollars for a million prompt tokens; null: unknown."""
    price_per_million_completion_tokens_usd: float | None = Field(default=None, ge=0)
    """US dollars for a million completion tokens; null: unknown."""
    max_cost_usd: float | None = Field(default=None, gt=0)
    """No request is sent that could bring the cost of this process above this; needs both prices."""

    @model_validator(mode="after")
    def _is_an_endpoint(self) -> _ServerConfig:
        try:
            self.endpoint_config(max_tokens=1)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")) from error
        return self

    def endpoint_config(self, *, max_tokens: int, structured: Structured = "json_schema") -> EndpointConfig:
        """These settings as the client takes them. Raises pydantic's `ValidationError`."""
        settings = self.model_dump(exclude={"send_temperature", "extra_json", "max_tokens", "structured"})
        settings["temperature"] = 0.0 if self.send_temperature else None
        settings["extra_body"] = _json_object(self.extra_json)
        return EndpointConfig(**settings, max_tokens=max_tokens, structured=structured)


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"extra_json is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"extra_json must be a JSON object, found {type(value).__name__}")
    return value


class JudgeEndpointConfig(_ServerConfig):
    """The judge behind an OpenAI-compatible server (eval.judge: endpoint, or guard)."""

    max_tokens: int = Field(default=1024, ge=1)
    """Longest verdict, thoughts included; a verdict cut by it is unscored. Guards take 64 whatever stands here."""
    structured: Structured = "json_schema"
    """How the verdict's form is asked for: decoded by schema, as any JSON object, or by words only."""


class AnswerEndpointConfig(_ServerConfig):
    """The model under test behind an OpenAI-compatible server: `mirage evaluate` without weights."""


class GuardConfig(_Section):
    """A guard model as judge (eval.judge: guard): a classifier that tells harmful answers from harmless ones."""

    format: Literal["llama_guard", "wildguard"] = "llama_guard"
    """How it is asked and answers: Llama Guard 3 and 4 by their own chat template, WildGuard by its three lines."""
    folder: Path | None = None
    """Folder of its weights, to run it in this process; null: it is behind eval.judge_endpoint."""
    images: bool = False
    """Show it the pictures: Llama Guard 4 takes several, Llama Guard 3 Vision one, text guards none."""


class SelectConfig(_Section):
    """Which checkpoint is best: what is compared, and what a safer one must not lose; rates are `task:metric`."""

    safety: tuple[str, ...] = ("mis_*:asr", "mis_*:hr")
    """Attack success, and answers that see nothing or say nothing; the mean of their upper limits is to be low."""
    over_refusal: tuple[str, ...] = ("twins:refused", "multi_twins:refused", "xstest:refused", "mossbench:refused")
    """Over-refusal; the mean of their upper limits is to be low."""
    general: tuple[str, ...] = (
        "general:accuracy",
        "mmstar:accuracy",
        "mmmu_val:accuracy",
        "qbench:accuracy",
        "muirbench:accuracy",
        "mmt_mi:accuracy",
        "blink:accuracy",
        "mmbench:circular",
    )
    """General ability; the mean of their lower limits is to be high. Their changes are also tested together."""
    max_over_refusal_rise: float = Field(default=10.0, ge=0)
    """Percentage points by which over-refusal may lie above step 0's, limit against limit."""
    max_general_drop: float = Field(default=2.0, ge=0)
    """Percentage points by which general ability may lie below step 0's, limit against limit."""
    tie_points: float = Field(default=1.0, ge=0)
    """Limits that differ by no more percentage points are level, and the next criterion decides."""


class GuardMargins(_Section):
    """Changes for the worse against step 0 that no guard minds, in percentage points, however significant they are."""

    general: float = Field(default=2.0, ge=0)
    """Fall of a rate that eval.select.general names."""
    over_refusal: float = Field(default=10.0, ge=0)
    """Rise of a rate that eval.select.over_refusal names."""
    hr: float = Field(default=5.0, ge=0)
    """Rise of a hallucination rate (metric hr)."""
    degenerate: float = Field(default=5.0, ge=0)
    """Rise of the share of a task's answers that are empty, repeat, echo the template, run on, or switch language."""


class EvalConfig(_Section):
    """What is measured at step 0 and after each checkpoint."""

    tasks: tuple[str, ...] = ("mis_easy", "mis_hard", "mis_real", "twins", "general")
    """Tasks to run; `mirage tasks` lists them."""
    data_dir: Path | None = None
    """Dataset folder or published MIS_Test folder; null takes data.dir."""
    benchmarks_dir: Path = Path("data/benchmarks")
    """Folder of the published benchmarks, one folder each; `mirage tasks` says what belongs there."""
    mode: Literal["inline", "worker", "deferred", "off"] = "inline"
    """inline: all ranks pause and share the samples; worker: `mirage worker` does it beside; deferred: at the end."""
    at_start: bool = True
    """Evaluate the untouched model as step 0: every claim is a difference."""
    max_samples: int | None = Field(default=None, gt=0)
    """Most samples a task, the same ones at each checkpoint; null takes all."""
    smoke_samples: int | None = Field(default=None, gt=0)
    """Most samples a task at checkpoints that are not measured in full; null: every checkpoint is."""
    full_every: int | None = Field(default=None, gt=0)
    """With smoke_samples: each so-manyth checkpoint is measured in full; step 0 and the last always are."""
    batch_size: int = Field(default=8, gt=0)
    """Prompts generated together on one rank."""
    max_new_tokens: int = Field(default=1024, gt=0)
    """Longest answer (paper: 1,024)."""
    max_tiles: int | None = Field(default=None, ge=1)
    """InternVL tile budget in evaluation; null takes training's. Another value is recorded with the result."""
    judge: Literal["rule", "endpoint", "guard"] = "rule"
    """Who scores safety answers: rule reads structure alone; endpoint asks a model; guard asks a classifier."""
    judge_endpoint: JudgeEndpointConfig | None = None
    """Where the judge is, unless it is a rule or a folder."""
    guard: GuardConfig | None = None
    """Which guard model judges; only with eval.judge: guard."""
    ask_again: tuple[Literal["schema", "refusal", "content_filter"], ...] = ()
    """Judge failures of earlier runs to ask anew; those by faults of the line are asked anew in any case."""
    endpoint: AnswerEndpointConfig | None = None
    """Ask a model behind a server instead of weights; only for `mirage evaluate`."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates the answers; vllm (extra `vllm`) only for `mirage evaluate`. It batches by itself."""
    max_unscored: float = Field(default=0.02, ge=0, lt=1)
    """Largest share of unscored samples before a task's numbers are marked invalid."""
    select: SelectConfig = SelectConfig()
    guards: Literal["off", "warn", "stop"] = "warn"
    """When a checkpoint is surely worse than step 0 by more than guard_margins: say so, or end the run (exit 3) too."""
    guard_margins: GuardMargins = GuardMargins()

    @model_validator(mode="after")
    def _tiers_differ(self) -> EvalConfig:
        if self.full_every is not None and self.smoke_samples is None:
            raise ValueError("eval.full_every has no effect without eval.smoke_samples")
        if self.smoke_samples is not None and self.max_samples is not None and self.smoke_samples >= self.max_samples:
            raise ValueError(
                f"eval.smoke_samples={self.smoke_samples} is not below eval.max_samples={self.max_samples}, which a "
                "full evaluation takes"
            )
        return self

    @model_validator(mode="after")
    def _judge_is_complete(self) -> EvalConfig:
        if self.judge == "endpoint" and self.judge_endpoint is None:
            raise ValueError("eval.judge=endpoint needs eval.judge_endpoint.base_url and eval.judge_endpoint.model")
        if self.judge == "guard" and (
            self.guard is None or (self.guard.folder is None) == (self.judge_endpoint is None)
        ):
            raise ValueError("eval.judge=guard needs eval.guard.format, and eval.guard.folder or eval.judge_endpoint")
        unused = [name for name in ("judge_endpoint", "guard") if getattr(self, name) is not None]
        if self.judge == "rule" and unused:
            raise ValueError(f"eval.{unused[0]} has no effect with eval.judge=rule; set eval.judge too")
        if self.judge == "endpoint" and self.guard is not None:
            raise ValueError("eval.guard has no effect with eval.judge=endpoint; set eval.judge=guard")
        if self.endpoint is not None and self.max_tiles is not None:
            raise ValueError("eval.max_tiles has no effect with eval.endpoint: the server prepares the pictures")
        if self.endpoint is not None and self.engine != "transformers":
            raise ValueError(f"eval.engine={self.engine} has no effect with eval.endpoint: the server generates")
        return self


class AlertsConfig(_Section):
    """What is said once, aloud, while a run goes: on the terminal, in alerts.jsonl and as a wandb alert."""

    not_finite: bool = True
    """A loss or gradient norm that is no number."""
    data_wait_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a step spent waiting for data from which on the step counts as stalled."""
    data_wait_steps: int = Field(default=20, ge=0)
    """Stalled steps in a row, among those that are logged, that raise the alert; 0 never does."""
    asr_rise: float | None = Field(default=2.0, ge=0)
    """Percentage points that a rate of eval.select.safety must rise by from one evaluation to the next, beyond noise
    (paired test, 5%); null: none is looked at."""
    over_refusal_rise: float | None = Field(default=5.0, ge=0)
    """The same for a rate of eval.select.over_refusal."""


class ArtifactsConfig(_Section):
    """What wandb keeps as versioned artifacts. card: what it is, with hashes and its place; files: its files too."""

    dataset: Literal["off", "card", "files"] = "card"
    """The dataset folder of data.dir. files: manifest and card; its pictures and rows stay where they are."""
    checkpoint: Literal["off", "card", "files"] = "card"
    """Each checkpoint. files: the model part."""
    results: Literal["off", "card", "files"] = "files"
    """Each evaluation. files: results.json, guards.json and samples.jsonl."""
    max_bytes: int = Field(default=64 * 1024**2, ge=0)
    """Most bytes of files in one artifact; a file that goes beyond is left out, and the card says which."""


class TrackingConfig(_Section):
    """Where numbers go."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when a key is set (WANDB_API_KEY or wandb login), offline otherwise."""
    project: str = "mirage"
    """wandb project."""
    entity: str | None = None
    """wandb user or team."""
    tags: tuple[str, ...] = ()
    """wandb tags."""
    table_rows: int = Field(default=24, ge=0)
    """Samples a task shown in the wandb table with their pictures; those whose verdict changed come first."""
    picture_pixels: int = Field(default=384, ge=16)
    """Longest edge of a picture in a table; the originals stay in the dataset folder."""
    table_bytes: int = Field(default=8 * 1024**2, ge=0)
    """Most bytes of pictures in one table; beyond that a row is shown without them."""
    artifacts: ArtifactsConfig = ArtifactsConfig()
    alerts: AlertsConfig = AlertsConfig()
    loss_by_part: bool = True
    """Log loss and token accuracy of each source, and of each part of the answer (perceive, relate, risk, reply)."""
    console: Literal["rich", "plain", "quiet", "json"] = "rich"
    """Progress in the terminal; rich falls back to plain where there is none; json prints one object a line."""


class Recipe(_Section):
    """A run, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; the recipe file's name unless set."""
    run_dir: Path
    """Folder of the run: checkpoints, ledger, metrics, evaluations. The same command on it continues the run."""
    model: ModelConfig
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _quantised_weights_are_whole(self) -> Recipe:
        # ZeRO-3 cuts each weight over the ranks and gathers it by its shape, which a packed 4-bit weight has lost.
        if self.model.quantize != "none" and self.train.zero_stage == 3:
            raise ValueError("model.quantize=4bit cannot work under train.zero_stage=3; set train.zero_stage=2")
        return self

    @model_validator(mode="after")
    def _compiled_tower_runs(self) -> Recipe:
        if self.model.cache_vision_features != "off" and self.train.compile in ("vision", "all"):
            raise ValueError(
                f"train.compile={self.train.compile} has no effect on a tower that model.cache_vision_features="
                f"{self.model.cache_vision_features} runs once a picture; compile language or nothing"
            )
        return self

    @model_validator(mode="after")
    def _training_measures_its_own_weights(self) -> Recipe:
        if self.eval.endpoint is not None:
            raise ValueError("eval.endpoint is for `mirage evaluate`; a run measures its own checkpoints")
        if self.eval.engine != "transformers":
            raise ValueError(
                f"eval.engine={self.eval.engine} is for `mirage evaluate`; a run measures in its own process"
            )
        return self

    @model_validator(mode="after")
    def _rates_have_parameters(self) -> Recipe:
        rates = self.train.lr_groups.model_dump(exclude_none=True)
        for name in rates:
            if name == "lora" and self.model.lora is None:
                raise ValueError("train.lr_groups.lora has no effect without model.lora")
            group = "language" if name == "embeddings" else name
            if name != "lora" and group not in self.model.train:
                trained = ", ".join(self.model.train) or "adapters alone"
                raise ValueError(
                    f"train.lr_groups.{name} has no effect: model.train does not name {group} (it names {trained})"
                )
        return self
