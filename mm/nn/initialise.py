"""Every initial weight of the suite's own networks, in one place."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, TokenEmbedding
from mm.nn.experts import Experts
from mm.nn.transformer import FeedForward, GatedFeedForward, Transformer

DRAWS = frozenset(
    [Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_]
)
"""What fills a tensor with first weights, and what takes long of making others of them."""


class Unfilled(TorchFunctionMode):
    """Within it, networks are built without drawing the weights that loaded ones are about to replace: these hold anything.

    What is computed from sizes, such as the angles of positions, is there as ever.
    """

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function in DRAWS:
            return args[0] if args else named["tensor"]
        return function(*args, **named)


def initialise(module: nn.Module) -> None:
    """Draw the weights of all transformers and embeddings inside ``module``.

    D is the input width of a layer and L the number of blocks of the transformer that it belongs to.

    | Parameter                             | Distribution                 | Why |
    |---------------------------------------|------------------------------|-----|
    | token vectors                         | normal, 0.02                 | GPT-2, CLIP |
    | learned positions                     | normal, 0.01                 | CLIP: weaker than the words |
    | attention query, key_value            | normal, D ** -0.5            | keeps the variance |
    | feed-forward input, gate              | normal, (2 D) ** -0.5        | CLIP |
    | attention and feed-forward output     | normal, (2 L width) ** -0.5  | 2 L branches add up to variance one |
    | router of experts                     | normal, 0.02                 | all experts nearly alike |
    | biases                                | 0                            | |
    | norms                                 | gain 1, bias 0               | torch's own |
    """
    for part in module.modules():
        if isinstance(part, LearnedPositions):
            nn.init.normal_(part.weight, std=0.01)
        elif isinstance(part, TokenEmbedding):
            nn.init.normal_(part.tokens.weight, std=0.02)
        elif isinstance(part, Transformer):
            for block in part.blocks:
                initialise_block(block, num_layers=len(part.blocks))


def initialise_block(block: nn.Module, num_layers: int) -> None:
    """Draw the weights of one block, or of anything else that is made of attention and feed-forward, of ``num_layers``."""
    for part in block.modules():
        if isinstance(part, MultiHeadAttention):
            _normal(part.query, part.query.in_features**-0.5)
            _normal(part.key_value, part.key_value.in_features**-0.5)
            _normal(part.output, (2 * num_layers * part.output.out_features) ** -0.5)
        elif isinstance(part, FeedForward | GatedFeedForward):
            _normal(part.input, (2 * part.input.in_features) ** -0.5)
            _normal(part.output, (2 * num_layers * part.output.out_features) ** -0.5)
            if isinstance(part, GatedFeedForward):
                _normal(part.gate, (2 * part.gate.in_features) ** -0.5)
        elif isinstance(part, Experts) and part.router is not None:
            _normal(part.router, 0.02)


def _normal(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
