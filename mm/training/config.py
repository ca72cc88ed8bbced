"""How a run is trained: length, optimizer, precision, checkpoints."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mm.config import StrictConfig
from mm.errors import ConfigError


class ParallelConfig(StrictConfig):
    """How processes share a training; torchrun says how many there are. Checkpoints are the same whatever is said here.

    Args:
        data: What processes with different samples hold: the whole network (``ddp``), or shares of weights, gradients and
            optimizer state, gathered block by block where they are needed (``fsdp``).
        replicas: With fsdp, number of groups of processes that hold the network once each (hybrid sharding); divides theirs.
        tensor: Number of processes that compute each layer of a transformer together, by heads and hidden features.
        pipeline: Number of processes that hold consecutive layers of each transformer.
        microbatches: With a pipeline, parts of a process's batch that are on their way at once.
        schedule: With a pipeline, whether a stage keeps the activations of all microbatches for the backward pass (``gpipe``),
            or those of one at a time, computing them again, one forward pass and one backward pass in turn (``1f1b``).
        contrastive: Whether contrastive losses compare with the features of all processes ``gathered`` in each of them, or
            pass them around in a ``ring``, in memory that does not grow with their number; ``auto`` chooses by their size.
        recompute: What the backward pass computes again instead of keeping it: nothing (``none``), all but the results of
            matrix products and attention (``selective``), or whole blocks (``full``).
        offload: Whether the optimizer's state waits on the CPU and comes to the accelerator part by part, when it is needed.
        timeout_seconds: How long a process waits for the others in a step, validation or save before it gives up.
    """

    data: Literal["ddp", "fsdp"] = "ddp"
    replicas: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    microbatches: int = Field(default=1, ge=1)
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    contrastive: Literal["auto", "gathered", "ring"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    offload: bool = False
    timeout_seconds: float = Field(default=1800.0, gt=0)

    @property
    def model_size(self) -> int:
        """Processes that share one copy of the network and see the same samples."""
        return self.tensor * self.pipeline

    @property
    def by_block(self) -> bool:
        """Whether blocks are gathered, shared out or computed again one by one, which cannot be compiled together."""
        return self.data == "fsdp" or self.model_size > 1 or self.recompute != "none"

    def data_size(self, world_size: int) -> int:
        """Number of parts of the global batch. Raises `ConfigError` for a number of processes that cannot be shared out."""
        if world_size % self.model_size:
            raise ConfigError(
                f"parallel.tensor {self.tensor} times parallel.pipeline {self.pipeline} does not divide the {world_size} "
                "processes; start another number of them with torchrun, or change these"
            )
        size = world_size // self.model_size
        if size % self.replicas:
            raise ConfigError(
                f"parallel.replicas {self.replicas} does not divide the {size} processes with samples of their own"
            )
        return size

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.replicas > 1 and self.data == "ddp":
            raise ValueError("replicas is for data: fsdp; processes of data: ddp are all replicas")
        if self.pipeline > 1 and self.data == "fsdp":
            raise ValueError("pipeline goes with data: ddp; its stages hold layers of their own already")
        if self.microbatches > 1 and self.pipeline == 1:
            raise ValueError("microbatches is for a pipeline; to fit a large batch into memory set train.accumulate")
        if self.schedule == "1f1b" and self.microbatches == 1:
            raise ValueError(
                "schedule: 1f1b is for a pipeline of several microbatches; set microbatches, twice the stages or more"
            )
        return self


class TrainConfig(StrictConfig):
    """Everything about optimisation that is the same for all systems.

    Args:
        steps: Optimizer steps of the whole run.
        batch_size: Samples of a step, over all processes.
        accumulate: Number of slices that each process computes one after the other, to fit a large batch into memory. Exact for
            systems that cache gradients (contrastive ones), an average of slice losses otherwise.
        optimizer: ``adamw``, or ``muon``: orthogonalised momentum for the matrices inside the network, AdamW for the rest. The
            same ``lr`` serves both.
        lr: Peak learning rate.
        betas: AdamW's averaging rates of the gradient and of its square.
        eps: AdamW's constant in the denominator.
        weight_decay: Decoupled decay of matrices (https://arxiv.org/abs/1711.05101).
        schedule: Course of the learning rate after warm-up: half a cosine or a line down to ``final_lr``, or constant.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
        final_lr: Learning rate at the end, as a fraction of ``lr``.
        clip_norm: Largest global gradient norm; 0 does not clip.
        ema_decay: Decay of the moving average of weights that evaluation uses; 0 keeps no average.
        precision: bf16 autocast or fp32; auto takes bf16 where the hardware computes it.
        compile: Compile the encoders with torch.compile, whole (true) or each block by itself (``blocks``), which compiles
            those that are alike once. Where processes share out a network, or blocks are computed again, it is always by block.
        seed: Seed of data order, augmentation, dropout.
        device: Where to train; auto prefers CUDA, then MPS, then CPU.
        checkpoint_every_steps: Save every so many steps; 0 saves by minutes only.
        checkpoint_every_minutes: Save when so long has passed since the last save; 0 saves by steps only.
        keep_last: Number of complete checkpoints to keep.
        log_every: Steps between lines of ``metrics.jsonl``.
        validate_every: Steps between validations; 0 validates at the end only.
        max_nonfinite: Stop after so many consecutive steps whose loss or gradient is NaN or infinite; each is skipped.
        log_ids: Write the ids of the consumed samples to ``ids.jsonl``.
        tensorboard: Write TensorBoard files to ``tensorboard/``, where it is installed.
        energy: How energy is known: ``auto`` takes the processors' counters, else an estimate from the device's power;
            ``codecarbon`` is the library of that name.
        carbon_intensity: Kilograms of CO2 of a kilowatt hour where the training runs; default: the world's mean.
    """

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, ge=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool | Literal["blocks"] = False
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    checkpoint_every_steps: int = Field(default=0, ge=0)
    checkpoint_every_minutes: float = Field(default=10.0, ge=0)
    keep_last: int = Field(default=2, ge=1)
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=0, ge=0)
    max_nonfinite: int = Field(default=10, ge=1)
    log_ids: bool = True
    tensorboard: bool = True
    energy: Literal["auto", "codecarbon"] = "auto"
    carbon_intensity: float = Field(default=0.445, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in 0 <= beta < 1")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} splits a batch of {self.batch_size} into more slices than samples")
        return self
