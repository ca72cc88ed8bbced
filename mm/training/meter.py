"""What one training step costs, read off its operations: FLOPs, bytes moved, live memory. No formula of any network is in here.

FLOPs are those of `torch.utils.flop_counter`, which counts matrix products, convolutions and attention; attention on the CPU,
which it leaves out, is counted by its formulas, too. Memory is that of tensors: every storage from the operation that makes it
to the moment when nothing holds it. Scratch memory that a kernel takes and gives back inside is not seen.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Phase = Literal["forward", "backward", "recompute", "update"]
"""Of a step; ``recompute`` is what the backward pass computes again instead of having kept it."""

Kind = Literal["kept", "gradients", "split", "activations"]
"""Of memory: what outlives a step (weights, averages, optimizer state), gradients, activations of modules that tensor
parallelism splits, all other tensors."""

SPLIT_PARTS = frozenset({"attention", "cross_attention", "feed_forward", "attn", "mlp"})
"""Names, here and in timm, of the parts of a transformer block whose weights and activations tensor parallelism splits."""

PASSES: tuple[Phase, ...] = ("forward", "backward", "recompute")
"""All but the optimizer's work."""

LOW_PRECISION_BYTES = 2

_aten = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Args:
        phase: When it ran.
        flops: Of its matrix products; a multiplication and an addition are 2.
        num_bytes: Read and written, each tensor once.
        low_precision: Whether it computes in 16 bits.
        split: Whether tensor parallelism splits it.
    """

    phase: Phase
    flops: int
    num_bytes: int
    low_precision: bool
    split: bool


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive after an operation, beside what outlives the step."""

    phase: Phase
    gradients: int
    split: int
    activations: int


@dataclass
class Cost:
    """What ran under a `Meter`.

    Args:
        operations: All kernels.
        moments: Memory after each of them that changed it.
        exchanged: Bytes that the split parts hand to what is not split, in a forward pass: what tensor parallelism sums.
    """

    operations: list[Operation] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    exchanged: int = 0

    def flops(self, *phases: Phase) -> int:
        """FLOPs of some phases, of all where none is named."""
        return sum(operation.flops for operation in self.operations if not phases or operation.phase in phases)

    def peak(self, *phases: Phase, gradients: float = 1.0, activations: float = 1.0, split: float = 1.0) -> float:
        """Most bytes at any moment of some phases (of all where none is named), beside what outlives the step.

        Args:
            phases: Some of `Phase`.
            gradients: Factor of the bytes of gradients.
            activations: Of the activations that tensor parallelism leaves whole.
            split: Of those that it splits.
        """
        moments = [moment for moment in self.moments if not phases or moment.phase in phases]
        return max((m.gradients * gradients + m.activations * activations + m.split * split for m in moments), default=0.0)

    @property
    def activations(self) -> int:
        """Most bytes of activations at any moment of forward and backward pass."""
        return round(self.peak(*PASSES, gradients=0.0))


class Meter(TorchDispatchMode):
    """Measures what runs inside, be the tensors real or without data.

    Args:
        module: The network; its tensors and ``kept`` outlive the step.
        kept: Further tensors that do.
    """

    def __init__(self, module: nn.Module | None = None, kept: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.cost = Cost()
        self._updating = False
        self._bytes: dict[Kind, int] = {"kept": 0, "gradients": 0, "split": 0, "activations": 0}
        self._live: dict[int, tuple[Kind, int]] = {}
        self._depth = 0
        self._module = module
        self._hooks: list[Any] = []
        own = [] if module is None else [*module.parameters(), *module.buffers()]
        for tensor in (*own, *kept):
            self._hold(tensor, "kept")
        gradients = [p.grad for p in own if p.grad is not None]
        for tensor in gradients:
            self._hold(tensor, "gradients")

    @property
    def kept_bytes(self) -> int:
        """Bytes of all that outlives the step."""
        return self._bytes["kept"]

    def begin_update(self) -> None:
        """What runs from now on belongs to the optimizer."""
        self._updating = True

    def end_update(self) -> None:
        """No more."""
        self._updating = False

    def __enter__(self) -> "Meter":
        if self._module is not None:
            for name, part in self._module.named_modules():
                if name.rpartition(".")[2] in SPLIT_PARTS:
                    self._hooks.append(part.register_forward_pre_hook(self._enter_part))
                    self._hooks.append(part.register_forward_hook(self._leave_part))
            for parameter in self._module.parameters():
                if parameter.requires_grad:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hold_gradient))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for an attribute of a tensor
            return func(*args, **kwargs)
        result = self.call(func, args, kwargs)
        outputs = tensors_in(result)
        split = self._depth > 0
        if not func.is_view and func is not _aten._unsafe_view.default:
            self.cost.operations.append(self._operation(func, args, kwargs, result, outputs, split))
        for tensor in outputs:
            self._hold(tensor, "split" if split else "activations", known=True)
        self._note()
        return result

    def _operation(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any, outputs: list[Tensor], split: bool
    ) -> Operation:
        inputs = tensors_in(args)
        formula = _FORMULAS.get(func._overloadpacket)
        size = next((tensor.dtype.itemsize for tensor in inputs if tensor.is_floating_point()), 0)
        return Operation(
            phase=self._phase,
            flops=0 if formula is None else int(formula(*args, **kwargs, out_val=result)),
            num_bytes=sum(map(_extent, {id(tensor): tensor for tensor in (*inputs, *outputs)}.values())),
            low_precision=size == LOW_PRECISION_BYTES,
            split=split,
        )

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)

    @property
    def _phase(self) -> Phase:
        if self._updating:
            return "update"
        if torch._C._current_graph_task_id() < 0:
            return "forward"
        return "recompute" if torch.is_grad_enabled() else "backward"

    def _hold(self, tensor: Tensor, kind: Kind, *, known: bool = False) -> None:
        """Count a tensor's storage until it is freed; with ``known`` one that is counted already stays what it is."""
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._live:
            before, size = self._live[place]
            if known and storage.nbytes() == size:
                return
            kind = before if known else kind
            self._bytes[before] -= size
        else:
            weakref.finalize(storage, self._release, place).atexit = False
        self._live[place] = kind, storage.nbytes()
        self._bytes[kind] += storage.nbytes()

    def _release(self, place: int) -> None:
        kind, size = self._live.pop(place)
        self._bytes[kind] -= size

    def _hold_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._hold(parameter.grad, "gradients")
        self._note()

    def _note(self) -> None:
        now = Moment(self._phase, self._bytes["gradients"], self._bytes["split"], self._bytes["activations"])
        if not self.cost.moments or self.cost.moments[-1] != now:
            self.cost.moments.append(now)

    def _enter_part(self, *_: Any) -> None:
        self._depth += 1

    def _leave_part(self, module: nn.Module, args: Any, result: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.cost.exchanged += sum(map(_extent, tensors_in(result)))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, list | tuple) else []


def _extent(tensor: Tensor) -> int:
    """Bytes that a kernel touches: an expanded tensor is stored once."""
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())
