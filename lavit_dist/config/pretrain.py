"""Pretraining of the language model: sizes, data, batches and parallel layout. Defaults are those of LaVIT-7B where it has them."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeFloat

from lavit_dist.config.base import Seed, config
from lavit_dist.config.documents import DocumentsConfig
from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.config.mixture import CurriculumConfig, SourceConfig, WeighBy, check_mixture
from lavit_dist.config.model import LlamaConfig
from lavit_dist.config.parameters import NewRows, ParametersConfig
from lavit_dist.config.training import (
    CheckpointConfig,
    Checks,
    ChecksConfig,
    FaultsConfig,
    LoggingConfig,
    OptimizerConfig,
    check_schedules,
)
from lavit_dist.errors import check


@config
class ParallelConfig:
    """How the model and its optimizer are cut over processes; data-parallel size is what remains of them."""

    tensor_parallel_size: int = 1
    """Processes that share each layer (Megatron)."""
    pipeline_parallel_size: int = 1
    """Consecutive groups of layers that run on different processes (DeepSpeed PipelineModule)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What data-parallel ranks share out: 1 optimizer state, 2 also gradients, 3 also weights (DeepSpeed ZeRO). At its start a process has
    its tensor and pipeline share of the weights whole, except under 3."""
    sequence_parallel: bool = False
    """Share what lies between the matrices out to tensor-parallel processes along the sequence, which saves memory at the same
    traffic (Korthikanti et al. 2022)."""
    gather_twice: bool = False
    """Under sequence parallelism keep only a share of the inputs of a block's matrices, and gather the rest again in the backward
    pass, as megatron-core does: less memory, a quarter more of tensor parallelism's traffic. Blocks that are recomputed in full don't keep them anyway."""
    offload_optimizer: bool = False
    """Keep optimizer state and step in host memory (ZeRO-Offload)."""
    offload_parameters: bool = False
    """Keep weights in host memory until a layer needs them (ZeRO-3 alone)."""

    def validate(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            check(getattr(self, name) >= 1, f"parallel.{name} {getattr(self, name)} must be at least 1.")
        check(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "parallel.sequence_parallel shares the sequence out to tensor-parallel processes, but parallel.tensor_parallel_size is 1;"
            " set parallel.sequence_parallel to false, or parallel.tensor_parallel_size to 2 or more.",
        )
        check(
            not self.gather_twice or self.sequence_parallel,
            "parallel.gather_twice concerns what sequence parallelism gathers, but parallel.sequence_parallel is false; set"
            " parallel.gather_twice to false, or parallel.sequence_parallel to true.",
        )
        self._check_zero()

    def _check_zero(self) -> None:
        check(
            self.zero_stage < 2 or self.pipeline_parallel_size == 1,
            f"parallel.zero_stage {self.zero_stage} can't be combined with parallel.pipeline_parallel_size"
            f" {self.pipeline_parallel_size}, whose micro-batches need whole gradients; set parallel.zero_stage to 0 or 1, or"
            " parallel.pipeline_parallel_size to 1.",
        )
        check(
            not self.offload_optimizer or self.zero_stage > 0,
            "parallel.offload_optimizer moves the optimizer state that ZeRO shares out, but parallel.zero_stage is 0; set"
            " parallel.zero_stage to 1, or parallel.offload_optimizer to false.",
        )
        check(
            not self.offload_optimizer or self.pipeline_parallel_size == 1,
            "parallel.offload_optimizer can't be combined with parallel.pipeline_parallel_size"
            f" {self.pipeline_parallel_size}, whose stages are there to make the state fit; set parallel.offload_optimizer to false, or"
            " parallel.pipeline_parallel_size to 1.",
        )
        check(
            not self.offload_parameters or self.zero_stage == 3,
            "parallel.offload_parameters moves the weights that ZeRO-3 gathers layer by layer, but parallel.zero_stage is"
            f" {self.zero_stage}; set parallel.zero_stage to 3, or parallel.offload_parameters to false.",
        )


@config
class ActivationCheckpointingConfig:
    """Which activations are computed again in the backward pass instead of kept: memory for time."""

    mode: Literal["none", "selective", "full"] = "none"
    """`selective` recomputes attention from queries, keys and values (Korthikanti et al. 2022); today's kernels never keep scores, so
    this saves no more than their output and copies. `full` recomputes whole blocks: a third more computation."""
    every: int = 1
    """Recompute in every n-th block: 2 keeps the activations of every other one."""

    def validate(self) -> None:
        check(self.every >= 1, f"activation_checkpointing.every {self.every} must be at least 1.")
        check(
            self.mode != "none" or self.every == 1,
            f"activation_checkpointing.every {self.every} does nothing where activation_checkpointing.mode is none; set the mode to"
            " selective or full, or leave every at 1.",
        )

    def recomputes(self, index: int) -> bool:
        """Whether block `index`, from 0, is one of those."""
        return self.mode != "none" and (index + 1) % self.every == 0


@config
class PretrainConfig:
    """Training of LLaMA on packed rows of text and visual codes."""

    run_dir: str
    """Folder of the run."""
    ids: str | None = None
    """All that the run trains on: one split of an id set, as data_prep/pretokenize.py writes it (such as ids/train), a folder, or a URL
    that fsspec can reach (s3://bucket/ids/train)."""
    id_cache: IdCacheConfig = IdCacheConfig()
    """Where shards are kept, if `ids`, or that of a source, is the URL of a store."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several id sets by name, in place of `ids`. A resumed run may change this, `curriculum` and `weigh_by`: that begins a phase at its
    first row. A run that was begun with `ids` goes on as a mixture where it calls that set `ids` here."""
    curriculum: tuple[CurriculumConfig, ...] = ()
    """Other weights of the sources from later steps on, in order."""
    weigh_by: WeighBy = "tokens"
    """What the sources' weights are shares of: tokens, that is, rows, which are full but for a percent; or documents, whose mean number
    in a row of the source's first epoch then divides its weight."""
    text_tokenizer: str
    """Hugging Face tokenizer folder that the ids were made with."""
    visual_tokenizer: str | None = None
    """Folder of the visual tokenizer that the ids were made with; if given, its digest is compared with theirs."""
    init_from: str | None = None
    """Hugging Face LLaMA folder whose weights the run starts from: a text model, or an earlier run's export; None draws them anew."""
    new_rows: NewRows | None = None
    """How rows that init_from lacks, those of [IMG], [/IMG] and codes, begin; None is `projected` where visual_tokenizer is given, which
    learns fastest (benchmarks/new_rows.md), and `normal`, the second, elsewhere. Ignored, with a warning, where init_from is an export."""
    parameters: ParametersConfig = ParametersConfig()
    model: LlamaConfig = LlamaConfig()
    parallel: ParallelConfig = ParallelConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: bool = False
    """Compile each block with torch.compile; the first steps wait for it, and CPUs need a C++ compiler."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    checks: Checks = ChecksConfig()
    seed: Seed = 0
    """Seed of the initial weights, of the order of documents and of what is chosen per document."""
    total_steps: int
    """Optimizer steps."""
    global_batch_size: int
    """Rows per optimizer step, over all processes."""
    micro_batch_size: int
    """Rows per forward pass of one process."""
    plan_cache: str | None = None
    """Folder that keeps packing plans, each named by all that decides it; None is
    ~/.cache/lavit_dist/plans, which runs over the same ids share."""
    seq_len: int = 2048
    """Tokens per row."""
    caption_dropout: float = 0.1
    """Share of documents that lose their caption, for classifier-free guidance."""
    documents: DocumentsConfig = DocumentsConfig()
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting (PaLM took 1e-4); 0 is none."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the model; bf16 keeps master weights, gradients and optimizer state in fp32. The masters start from the initial
    weights rounded to bf16, those of an fp32 init_from too: DeepSpeed casts the model before it copies them."""
    attention: Literal["torch", "transformer_engine"] = "torch"
    """Kernels of attention: torch's variable-length one on GPUs in half precision (elsewhere documents in batches of like length), or
    Transformer Engine's, which must be installed."""
    num_threads: int | None = None
    """CPU threads per process; None leaves the choice to PyTorch."""

    def validate(self) -> None:
        self._check_counts()
        check_mixture(self.ids, self.sources, self.curriculum, self.weigh_by, self.total_steps)
        self._check_start()
        self._check_parallel()

    def _check_counts(self) -> None:
        for name in ("total_steps", "global_batch_size", "micro_batch_size", "seq_len"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1.")
        check_schedules({"total_steps": (self.optimizer, self.total_steps)})
        check(0 <= self.caption_dropout < 1, f"caption_dropout {self.caption_dropout} must lie in [0, 1).")
        check(
            self.seq_len <= self.model.max_position_embeddings,
            f"seq_len {self.seq_len} is longer than model.max_position_embeddings {self.model.max_position_embeddings}, which a"
            " document as long as a row would exceed; lower seq_len or raise model.max_position_embeddings.",
        )
        check(
            self.global_batch_size % self.micro_batch_size == 0,
            f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; choose"
            f" {max(1, round(self.global_batch_size / self.micro_batch_size)) * self.micro_batch_size} or another multiple.",
        )

    def _check_start(self) -> None:
        check(
            self.init_from is not None or self.new_rows is None,
            f"new_rows {self.new_rows} has a meaning beside init_from alone; set init_from, or leave new_rows out.",
        )
        check(
            self.new_rows != "projected" or self.visual_tokenizer is not None,
            "new_rows projected needs the codes of the visual tokenizer; set visual_tokenizer, or new_rows to normal.",
        )

    def _check_parallel(self) -> None:
        check(
            self.optimizer.name == "adamw",
            f"optimizer.name {self.optimizer.name} needs every matrix whole on its rank, but the language model's are sharded; choose adamw.",
        )
        tensor, pipeline = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size
        shared = {name: getattr(self.model, name) for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size")}
        nearest = max(size for size in range(1, tensor + 1) if all(count % size == 0 for count in shared.values()))
        for name, count in shared.items():
            check(
                count % tensor == 0,
                f"model.{name} {count} can't be shared out to parallel.tensor_parallel_size {tensor} processes; set"
                f" parallel.tensor_parallel_size to {nearest}, which divides the model's heads and channels.",
            )
        check(
            not self.parallel.sequence_parallel or self.seq_len % tensor == 0,
            f"seq_len {self.seq_len} can't be shared out to parallel.tensor_parallel_size {tensor} processes, as"
            f" parallel.sequence_parallel asks; choose {max(1, round(self.seq_len / tensor)) * tensor}, or set"
            " parallel.sequence_parallel to false.",
        )
        check(
            pipeline <= self.model.num_layers,
            f"parallel.pipeline_parallel_size {pipeline} is more than model.num_layers {self.model.num_layers}; every stage needs a"
            f" layer, so choose at most {self.model.num_layers}.",
        )
        check(
            self.precision == "fp32" or self.parallel.zero_stage > 0,
            "precision bf16 needs the fp32 master weights that ZeRO keeps, but parallel.zero_stage is 0; set it to 1, or"
            " precision to fp32.",
        )
        every = self.activation_checkpointing.every
        check(
            every <= self.model.num_layers,
            f"activation_checkpointing.every {every} is more than model.num_layers {self.model.num_layers}, so that no block would be"
            f" recomputed; choose at most {self.model.num_layers}.",
        )
        check(
            not self.compile or self.parallel.zero_stage < 3,
            "compile can't be combined with parallel.zero_stage 3, whose weights come and go between a block's operators; set"
            " compile to false, or parallel.zero_stage to 2.",
        )
