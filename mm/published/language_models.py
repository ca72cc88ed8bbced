"""Language models in transformers' layout: GPT-2, OPT, LLaMA, and Mistral and Qwen 2, whose weights are named as LLaMA's.

A setting that would change what a model computes and is not known here is refused, not passed over. Of Mistral with a sliding
window as much is read as fits into one window, which is where it computes the same.

Source: https://github.com/huggingface/transformers (formats of its configurations and weights).
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import read_json
from mm.encoders.library_towers import portable, quiet_transformers
from mm.errors import CheckpointError
from mm.generators.language_model import LanguageModelConfig
from mm.processor import TOKENIZER_FILE, Processor
from mm.published.huggingface import CONFIG_FILE, LANGUAGE_MODELS, read_weights
from mm.published.huggingface_processor import UNCHANGED, write_tokenizer
from mm.published.imported import Imported, one_line, pinned, put, reason, widened
from mm.systems.language_model import LanguageConfig
from mm.tokenizers.text import TextTokenizer

KINDS = ("weight", "bias")
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
OPT_NORM_EPS = 1e-5
OPT_FIRST_POSITION = 2
"""OPT's first rows of positions are never used."""

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""In older files; computed anew."""

NEUTRAL = frozenset(
    {
        *("transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "use_cache"),
        *("id2label", "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "pretraining_tp"),
        *("output_attentions", "output_hidden_states", "return_dict", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("initializer_range", "init_std", "attn_pdrop", "embd_pdrop", "attention_dropout", "layerdrop", "layer_types"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("reorder_and_upcast_attn", "max_window_layers"),
    }
)
"""Settings that say nothing of what the network computes once it is trained, or are about ids, which are read elsewhere."""


@dataclass(frozen=True)
class Publisher:
    """How one kind of language model is written.

    Args:
        prefix: Of all names but the head's; left out in some files.
        used: Settings that are honoured.
        sizes: Settings to the network, but for the vocabulary and the head.
        weights: Weights without prefix, and the network, to its weights without the head.
    """

    prefix: str
    used: frozenset[str]
    sizes: Callable[[Any], dict[str, Any]]
    weights: Callable[[Mapping[str, Tensor], LanguageModelConfig], dict[str, Tensor]]


def is_language_model(folder: Path) -> bool:
    """Whether a folder holds a language model in transformers' layout."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") in LANGUAGE_MODELS


def import_language_model(folder: Path, state: Mapping[str, Tensor] | None = None) -> Imported:
    """A folder with ``config.json``, safetensors and a tokenizer.

    Args:
        folder: Where they are.
        state: All weights, where they were read already; None reads the folder's safetensors.

    Raises:
        CheckpointError: A file is missing or damaged, or the model computes something that is not supported.
    """
    with one_line(folder):
        return _import_language_model(folder, state)


def _import_language_model(folder: Path, state: Mapping[str, Tensor] | None) -> Imported:
    kind = read_json(folder / CONFIG_FILE)["model_type"]
    publisher, settings = PUBLISHERS[kind], _settings(kind, folder)
    tied = settings.tie_word_embeddings
    network = LanguageModelConfig.model_validate(publisher.sizes(settings) | {"vocab_size": settings.vocab_size, "tied": tied})
    given = widened(read_weights(folder) if state is None else state)
    plain = {name.removeprefix(publisher.prefix): tensor for name, tensor in given.items() if not name.endswith(BUFFERS)}
    read = _Read(plain)
    weights = publisher.weights(read, network)
    if not tied:
        weights["head.weight"] = read["lm_head.weight"]
    elif "lm_head.weight" in plain and not torch.equal(read["lm_head.weight"], weights["embedding.tokens.weight"]):
        raise CheckpointError(f"{folder}: its head is said to be its word vectors and is not; one of both is damaged")
    left_out = sorted(plain.keys() - read.names)
    if any(name.startswith(("h.", "layers.")) for name in left_out):
        raise CheckpointError(f"{folder}: has weights that this {kind} does not use, {left_out[:3]}; that is not supported")
    tokenizer = _tokenizer(folder, settings)
    if tokenizer.vocab_size > network.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer ({tokenizer.vocab_size} ids) and network ({network.vocab_size}) do not belong together"
        )
    return Imported(
        config=LanguageConfig(network=network),
        state=put(weights, "network."),
        processor=Processor(tokenizer=tokenizer, context_length=network.context_length),
        card={
            "source": str(folder),
            "format": "transformers",
            "architecture": kind,
            **pinned(folder),
            **({"left_out": left_out} if left_out else {}),
        },
    )


class _Read(Mapping[str, Tensor]):
    """Weights that remember which of them were asked for."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return self._state[name]

    def __iter__(self) -> Any:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _settings(kind: str, folder: Path) -> Any:
    """transformers' own object, because it fills in what the file leaves out, if all of it can be honoured."""
    values = read_json(folder / CONFIG_FILE)
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f'{folder}: this layout needs transformers; pip install "mm-suite[hub]"') from None
    try:
        with quiet_transformers():
            cls = getattr(transformers, LANGUAGE_MODELS[kind])
            settings, usual = cls.from_dict(portable(values)), cls().to_dict()
    except Exception as error:  # validation errors of several libraries
        raise CheckpointError(f"{folder / CONFIG_FILE}: is no configuration of {kind}: {reason(error)}") from None
    if values.get("quantization_config"):
        raise CheckpointError(f"{folder}: its weights are quantized; take the checkpoint that they were made from")
    used = PUBLISHERS[kind].used | {"vocab_size", "tie_word_embeddings"}
    for name, value in settings.to_dict().items():
        if name in usual and name not in NEUTRAL | used and value != usual[name]:
            raise CheckpointError(f"{folder}: a {kind} with {name} {value}; that is not supported")
    return settings


def _tokenizer(folder: Path, settings: Any) -> TextTokenizer:
    """What transformers makes of the folder's files. Every text ends with the network's end, so that training teaches it."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / TOKENIZER_FILE
        write_tokenizer(folder, path)
        ends = settings.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        pad = settings.pad_token_id if settings.pad_token_id is not None and settings.pad_token_id >= 0 else end
        return TextTokenizer.from_file(path, pad=pad or 0, end=end, cleaning=UNCHANGED)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"a language model with the activation {name}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gpt2_sizes(settings: Any) -> dict[str, Any]:
    return {
        "context_length": settings.n_positions,
        "width": settings.n_embd,
        "layers": settings.n_layer,
        "heads": settings.n_head,
        "hidden_width": settings.n_inner,
        "activation": _activation(settings.activation_function),
        "norm_eps": settings.layer_norm_epsilon,
        "dropout": settings.resid_pdrop,
    }


def _gpt2_weights(state: Mapping[str, Tensor], network: LanguageModelConfig) -> dict[str, Tensor]:
    result = {"embedding.tokens.weight": state["wte.weight"], "embedding.positions.weight": state["wpe.weight"]}
    for kind in KINDS:
        result[f"transformer.final_norm.{kind}"] = state[f"ln_f.{kind}"]
        for layer in range(network.layers):
            old, new = f"h.{layer}.", f"transformer.blocks.{layer}."
            joined = _turned(state[f"{old}attn.c_attn.{kind}"])
            result |= {
                f"{new}attention.query.{kind}": joined[: network.width],
                f"{new}attention.key_value.{kind}": joined[network.width :],
                f"{new}attention.output.{kind}": _turned(state[f"{old}attn.c_proj.{kind}"]),
                f"{new}attention_residual.norm.{kind}": state[f"{old}ln_1.{kind}"],
                f"{new}feed_forward.input.{kind}": _turned(state[f"{old}mlp.c_fc.{kind}"]),
                f"{new}feed_forward.output.{kind}": _turned(state[f"{old}mlp.c_proj.{kind}"]),
                f"{new}feed_forward_residual.norm.{kind}": state[f"{old}ln_2.{kind}"],
            }
    return result


def _turned(tensor: Tensor) -> Tensor:
    """GPT-2 keeps its matrices the other way round."""
    return tensor.t().contiguous()


def _opt_sizes(settings: Any) -> dict[str, Any]:
    if settings.word_embed_proj_dim != settings.hidden_size:
        raise CheckpointError(
            f"an OPT whose words have {settings.word_embed_proj_dim} values in a network of {settings.hidden_size}, as that of "
            "350 million parameters; take another size"
        )
    return {
        "context_length": settings.max_position_embeddings,
        "width": settings.hidden_size,
        "layers": settings.num_hidden_layers,
        "heads": settings.num_attention_heads,
        "hidden_width": settings.ffn_dim,
        "activation": _activation(settings.activation_function),
        "norm_eps": OPT_NORM_EPS,
        "bias": settings.enable_bias,
        "dropout": settings.dropout,
    }


def _opt_weights(state: Mapping[str, Tensor], network: LanguageModelConfig) -> dict[str, Tensor]:
    result = {
        "embedding.tokens.weight": state["embed_tokens.weight"],
        "embedding.positions.weight": state["embed_positions.weight"][OPT_FIRST_POSITION:],
    }
    linear = {"q_proj": "attention.query", "out_proj": "attention.output"}
    for kind in KINDS:
        result[f"transformer.final_norm.{kind}"] = state[f"final_layer_norm.{kind}"]
        for layer in range(network.layers):
            old, new = f"layers.{layer}.", f"transformer.blocks.{layer}."
            result[f"{new}attention_residual.norm.{kind}"] = state[f"{old}self_attn_layer_norm.{kind}"]
            result[f"{new}feed_forward_residual.norm.{kind}"] = state[f"{old}final_layer_norm.{kind}"]
            if kind == "weight" or network.bias:
                result |= {f"{new}{ours}.{kind}": state[f"{old}self_attn.{theirs}.{kind}"] for theirs, ours in linear.items()}
                result[f"{new}attention.key_value.{kind}"] = _key_value(state, f"{old}self_attn.", kind)
                result[f"{new}feed_forward.input.{kind}"] = state[f"{old}fc1.{kind}"]
                result[f"{new}feed_forward.output.{kind}"] = state[f"{old}fc2.{kind}"]
    return result


def _key_value(state: Mapping[str, Tensor], prefix: str, kind: str) -> Tensor:
    return torch.cat([state[f"{prefix}{side}_proj.{kind}"] for side in "kv"])


def _llama_sizes(settings: Any) -> dict[str, Any]:
    width, heads = settings.hidden_size, settings.num_attention_heads
    if (head_width := getattr(settings, "head_dim", None) or width // heads) * heads != width:
        raise CheckpointError(f"{heads} heads of {head_width} values in a network of {width}; that is not supported")
    if settings.hidden_act != "silu":
        raise CheckpointError(f"a gated feed-forward with {settings.hidden_act} instead of silu; that is not supported")
    rotary = dict(settings.rope_parameters)
    window = getattr(settings, "sliding_window", None) if getattr(settings, "use_sliding_window", True) else None
    return {
        "context_length": min(settings.max_position_embeddings, window or settings.max_position_embeddings),
        "width": width,
        "layers": settings.num_hidden_layers,
        "heads": heads,
        "kv_heads": settings.num_key_value_heads,
        "hidden_width": settings.intermediate_size,
        "activation": "swiglu",
        "norm": "rms",
        "norm_eps": settings.rms_norm_eps,
        "positions": "rotary",
        "rotary_base": rotary["rope_theta"],
        "rotary_scaling": _scaling(rotary),
        "bias": getattr(settings, "attention_bias", settings.model_type == "qwen2"),
    }


def _scaling(rotary: Mapping[str, Any]) -> dict[str, Any] | None:
    kind, part = rotary.get("rope_type", "default"), rotary.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "llama3") or part != 1.0:
        raise CheckpointError(f"rotary positions of the kind '{kind}', of {part} of each head; that is not supported")
    if kind == "default":
        return None
    return {
        "factor": rotary["factor"],
        "low": rotary["low_freq_factor"],
        "high": rotary["high_freq_factor"],
        "trained_length": rotary["original_max_position_embeddings"],
    }


def _llama_weights(state: Mapping[str, Tensor], network: LanguageModelConfig) -> dict[str, Tensor]:
    result = {"embedding.tokens.weight": state["embed_tokens.weight"], "transformer.final_norm.weight": state["norm.weight"]}
    for layer in range(network.layers):
        old, new = f"layers.{layer}.", f"transformer.blocks.{layer}."
        for kind in KINDS if network.bias else KINDS[:1]:
            result[f"{new}attention.query.{kind}"] = state[f"{old}self_attn.q_proj.{kind}"]
            result[f"{new}attention.key_value.{kind}"] = _key_value(state, f"{old}self_attn.", kind)
        result |= {
            f"{new}attention.output.weight": state[f"{old}self_attn.o_proj.weight"],
            f"{new}attention_residual.norm.weight": state[f"{old}input_layernorm.weight"],
            f"{new}feed_forward.gate.weight": state[f"{old}mlp.gate_proj.weight"],
            f"{new}feed_forward.input.weight": state[f"{old}mlp.up_proj.weight"],
            f"{new}feed_forward.output.weight": state[f"{old}mlp.down_proj.weight"],
            f"{new}feed_forward_residual.norm.weight": state[f"{old}post_attention_layernorm.weight"],
        }
        if network.bias:  # Qwen 2 has none here
            name = f"{old}self_attn.o_proj.bias"
            result[f"{new}attention.output.bias"] = state[name] if name in state else torch.zeros(network.width)
    return result


LLAMA = Publisher(
    prefix="model.",
    used=frozenset(
        {
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
            *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias"),
            *("rope_parameters", "rope_theta", "rope_scaling", "sliding_window"),
        }
    ),
    sizes=_llama_sizes,
    weights=_llama_weights,
)
PUBLISHERS: Mapping[str, Publisher] = {
    "gpt2": Publisher(
        prefix="transformer.",
        used=frozenset(
            {
                *("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"),
                *("layer_norm_epsilon", "resid_pdrop"),
            }
        ),
        sizes=_gpt2_sizes,
        weights=_gpt2_weights,
    ),
    "opt": Publisher(
        prefix="model.decoder.",
        used=frozenset(
            {
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "word_embed_proj_dim"),
                *("max_position_embeddings", "activation_function", "enable_bias", "dropout"),
            }
        ),
        sizes=_opt_sizes,
        weights=_opt_weights,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
}
