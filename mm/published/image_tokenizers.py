"""Published picture tokenizers: folders of diffusers' VQModel, VQGANs of taming-transformers, OpenAI's dVAE.

Sources (formats of their weights): https://github.com/huggingface/diffusers, https://github.com/CompVis/taming-transformers,
https://github.com/openai/DALL-E.
"""

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from mm.config import StrictConfig, read_json, read_yaml, validate
from mm.errors import CheckpointError, UserError
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.published.imported import Imported, put, read_safetensors, take
from mm.systems.published_vq import PublishedVqConfig
from mm.tokenizers.library_image import (
    DvaeConfig,
    LibraryImageTokenizerConfig,
    VqModelConfig,
    build_library_image_tokenizer,
)

VQ_MODEL, VQ_MODEL_WEIGHTS = "VQModel", "diffusion_pytorch_model"
NOT_OF_THE_NETWORK = ("scaling_factor", "force_upcast", "lookup_from_codebook")
"""Of a VQModel's ``config.json``: for diffusion on its latents, for its precision, and for the argument of its ``decode``."""

NO_SIDE, USUAL_SIDE = 32, 256
"""diffusers writes a ``sample_size`` of 32 where nobody gave one, also for tokenizers of 256 pixels, which most are."""

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".pkl", ".bin")
DVAE_HALVES = ("encoder", "decoder")
DVAE_WEIGHT = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.(?:res_path\.conv_(\d+)|id_path)\.")

VQGAN_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
"""Beside them a checkpoint holds losses, the discriminator and averages of the weights."""

SCORES = "quantize.proj."
"""The convolution of a GumbelVQ that scores the codes."""

VQGAN_NAMES = {
    r"\.down\.(\d+)\.": r".down_blocks.\1.",
    r"\.up\.(\d+)\.": r".up_blocks.\1.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"_blocks\.(\d+)\.block\.": r"_blocks.\1.resnets.",
    r"_blocks\.(\d+)\.attn\.": r"_blocks.\1.attentions.",
    r"\.downsample\.": ".downsamplers.0.",
    r"\.upsample\.": ".upsamplers.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"^quantize\.embed\.": "quantize.embedding.",
}
"""Names of taming-transformers, and what VQModel calls them; the stages of the decoder it counts the other way round."""

ATTENTION = re.compile(r"\.attentions\.(\d+)\.(\w+)\.")
ATTENTION_NAMES = {
    "norm": "group_norm",
    **dict.fromkeys(("q", "query"), "to_q"),
    **dict.fromkeys(("k", "key"), "to_k"),
    **dict.fromkeys(("v", "value"), "to_v"),
    **dict.fromkeys(("proj_out", "proj_attn"), "to_out.0"),
}
"""Names of taming-transformers, where they are 1 x 1 convolutions, and of diffusers' first releases."""

STAND_INS = (
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
"""Classes that the pickles of OpenAI and of taming-transformers name beside plain tensors."""

UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)
"""What torch raises for files that are no checkpoint, or a damaged one."""


def import_tokenizer_folder(folder: Path, *, trusted: bool = False) -> Imported | None:
    """A folder with a published picture tokenizer as a model of the suite, or None; errors as for `import_image_tokenizer`."""
    found = import_image_tokenizer(folder, trusted=trusted)
    if found is None:
        return None
    config = PublishedVqConfig(tokenizer=found.config)
    processor = Processor(image=ImageSpec(size=config.picture_side))
    return Imported(config=config, state=put(found.state, "tokenizer."), processor=processor, card=found.card)


@dataclass(frozen=True)
class ImportedImageTokenizer:
    """A published picture tokenizer in the suite's terms.

    Args:
        config: Builds it, see `mm.tokenizers.library_image.build_library_image_tokenizer`.
        state: Its weights in fp32; complete.
        card: Where it came from.
    """

    config: LibraryImageTokenizerConfig
    state: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)


class _Ddconfig(StrictConfig):
    """Sizes of taming's encoder and decoder; values that change the network to one that VQModel is not are left out."""

    ch: int = Field(ge=1)
    ch_mult: tuple[int, ...]
    num_res_blocks: int = Field(ge=1)
    attn_resolutions: tuple[int, ...]
    resolution: int = Field(ge=1)
    z_channels: int = Field(ge=1)
    in_channels: Literal[3]
    out_ch: Literal[3]
    double_z: Literal[False]
    dropout: float = 0.0
    resamp_with_conv: Literal[True] = True
    give_pre_end: Literal[False] = False
    attn_type: Literal["vanilla"] = "vanilla"
    tanh_out: Literal[False] = False


class _TamingConfig(StrictConfig):
    """What a checkpoint's YAML says of the network below ``model.params``, beside what it says of training."""

    model_config = ConfigDict(extra="ignore")

    ddconfig: _Ddconfig
    n_embed: int
    embed_dim: int
    remap: None = None


def import_image_tokenizer(
    path: Path, *, image_size: int | None = None, trusted: bool = False
) -> ImportedImageTokenizer | None:
    """A published picture tokenizer; None for a folder that holds none.

    Args:
        path: A folder of diffusers' VQModel; a folder with ``encoder`` and ``decoder`` of OpenAI's dVAE, or one of these
            files; a folder with weights and YAML of a VQGAN, or the weights, with the YAML beside them or in ``configs``.
        image_size: Side of its pictures in pixels; None takes what the checkpoint says.
        trusted: The user's word that whoever wrote a pickled file is trusted.

    Raises:
        UserError: A file is pickled and not trusted.
        CheckpointError: A file is missing or damaged, or does not fit what it is said to be.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    given = {} if image_size is None else {"image_size": image_size}
    for reader in (_import_vq_model, _import_dvae, _import_vqgan):
        imported = reader(path, given, trusted)
        if imported is not None:
            _check(imported, path)
            return imported
    if path.is_file():
        raise CheckpointError(
            f"{path}: no picture tokenizer that is known; a VQGAN needs its YAML beside it, a dVAE both encoder and decoder"
        )
    return None


def _import_vq_model(path: Path, given: Mapping[str, int], trusted: bool) -> ImportedImageTokenizer | None:
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if not file.is_file() or (path.is_file() and path.stem != VQ_MODEL_WEIGHTS):
        return None
    values = {key: value for key, value in read_json(file).items() if key not in NOT_OF_THE_NETWORK}
    if values.get("_class_name") != VQ_MODEL:
        return None
    for side in ("in_channels", "out_channels"):
        if values.pop(side, 3) != 3:
            raise CheckpointError(f"{file}: {side} is not 3; only tokenizers of colour pictures are supported")
    stated = values.pop("sample_size", NO_SIDE)
    config = validate(
        VqModelConfig,
        {
            **{key: value for key, value in values.items() if not key.startswith("_")},
            "vq_embed_dim": values.get("vq_embed_dim") or values.get("latent_channels"),
            "image_size": USUAL_SIDE if stated == NO_SIDE else stated,
            **given,
        },
        str(file),
    )
    weights = next((f for f in (folder / (VQ_MODEL_WEIGHTS + suffix) for suffix in WEIGHTS) if f.is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: holds no weights; expected {VQ_MODEL_WEIGHTS}.safetensors")
    state = dict(attention_name(name, tensor) for name, tensor in _read(weights, trusted).items())
    return ImportedImageTokenizer(config, put(state, "network.model."), {"source": str(path), "format": "diffusers"})


def _import_dvae(path: Path, given: Mapping[str, int], trusted: bool) -> ImportedImageTokenizer | None:
    """The sizes are read off the shapes of the weights."""
    folder = path if path.is_dir() else path.parent
    files = [next((f for f in (folder / (half + suffix) for suffix in WEIGHTS) if f.is_file()), None) for half in DVAE_HALVES]
    if files[0] is None or files[1] is None or (path.is_file() and path.stem not in DVAE_HALVES):
        return None
    encoder, decoder = ({_dvae_name(name): t for name, t in _read(file, trusted).items()} for file in files if file)
    try:
        stem = take(encoder, "stem.")
        codes = (decoder.pop("stem.weight").flatten(1).T + decoder.pop("stem.bias")).contiguous()
        sizes = {
            "vocab_size": len(encoder["head.weight"]),
            "width": len(stem["weight"]),
            "code_width": codes.shape[1],
            "num_blocks": len({name.split(".")[2] for name in encoder if name.startswith("groups.0.")}),
        }
    except (LookupError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: these are not the weights of OpenAI's dVAE: {error}") from None
    encoder = {name: tensor for name, tensor in encoder.items() if not name.startswith("stem.")}
    state = {**put(stem, "stem."), **put(encoder, "encoder."), "codes.weight": codes, **put(decoder, "decoder.")}
    config = validate(DvaeConfig, {**sizes, **given}, str(folder))
    return ImportedImageTokenizer(config, put(state, "network."), {"source": str(path), "format": "dall_e"})


def _dvae_name(name: str) -> str:
    """From ``blocks.group_1.block_1.res_path.conv_1.w`` to ``groups.0.0.convolutions.0.weight``, and the like."""
    name = DVAE_WEIGHT.sub(_dvae_place, name).replace("blocks.input.", "stem.").replace("blocks.output.conv.", "head.")
    layer, _, kind = name.rpartition(".")
    return f"{layer}.{ {'w': 'weight', 'b': 'bias'}.get(kind, kind) }"


def _dvae_place(match: re.Match[str]) -> str:
    group, block, convolution = (None if number is None else int(number) - 1 for number in match.groups())
    return f"groups.{group}.{block}." + ("shortcut." if convolution is None else f"convolutions.{convolution}.")


def _import_vqgan(path: Path, given: Mapping[str, int], trusted: bool) -> ImportedImageTokenizer | None:
    """The sizes are read from the YAML; whether it is a GumbelVQ from the weights."""
    folder = path.absolute().parent if path.is_file() else path
    places = (folder, (folder.parent if path.is_file() else folder) / "configs")
    described = {file: _params(file) for place in places for file in sorted(place.glob("*.yaml"))}
    described = {file: params for file, params in described.items() if "ddconfig" in params}
    if not described:
        return None
    files = [path] if path.is_file() else [f for f in sorted(path.glob("**/*")) if f.suffix in WEIGHTS]
    if len(described) > 1 or len(files) != 1:
        raise CheckpointError(
            f"{path}: there are {len(files)} files of weights and {len(described)} YAML files of a VQGAN; "
            "give the weights themselves, with one YAML beside them"
        )
    (file, params), *_ = described.items()
    taming = validate(_TamingConfig, params, f"{file} (model.params)")
    weights = {name: tensor for name, tensor in _read(files[0], trusted).items() if name.startswith(VQGAN_PARTS)}
    scores = take(weights, SCORES)
    config = validate(VqModelConfig, {**_sizes(taming), "scored": bool(scores), **given}, str(file))
    last = len(config.block_out_channels) - 1
    model = dict(_vqgan(name, tensor, last) for name, tensor in weights.items() if not name.startswith(SCORES))
    state = {**put(model, "network.model."), **put(scores, "network.scores.")}
    return ImportedImageTokenizer(config, state, {"source": str(path), "format": "taming-transformers"})


def _params(file: Path) -> dict[str, Any]:
    """``model.params`` of a YAML, where there is such a thing."""
    values: Any = read_yaml(file)
    for key in ("model", "params"):
        values = values.get(key)
        if not isinstance(values, dict):
            return {}
    return values


def _sizes(taming: _TamingConfig) -> dict[str, Any]:
    """Of the VQModel that is the same network: a stage attends where its grid has one of the sides that are listed."""
    network = taming.ddconfig
    attended = [network.resolution >> stage in network.attn_resolutions for stage in range(len(network.ch_mult))]
    return {
        "image_size": network.resolution,
        "num_vq_embeddings": taming.n_embed,
        "vq_embed_dim": taming.embed_dim,
        "latent_channels": network.z_channels,
        "block_out_channels": [network.ch * multiple for multiple in network.ch_mult],
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(attended)],
        "layers_per_block": network.num_res_blocks,
    }


def _vqgan(name: str, tensor: Tensor, last: int) -> tuple[str, Tensor]:
    """A weight under VQModel's name; ``last`` is the number of the coarsest stage."""
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{last - int(match[1])}.", name)
    for theirs, ours in VQGAN_NAMES.items():
        name = re.sub(theirs, ours, name)
    return attention_name(name, tensor)


def attention_name(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A weight under today's name where it is of attention, 1 x 1 convolutions as matrices; any other as it is."""
    match = ATTENTION.search(name)
    part = ATTENTION_NAMES.get(match[2]) if match else None
    if match is None or part is None:
        return name, tensor
    return ATTENTION.sub(f".attentions.{match[1]}.{part}.", name), tensor.flatten(1) if tensor.ndim == 4 else tensor


def _check(imported: ImportedImageTokenizer, where: Path) -> None:
    """Names and shapes of the weights against the network of the configuration, before it takes any memory."""
    try:
        with torch.device("meta"):
            expected = build_library_image_tokenizer(imported.config).state_dict()
    except UserError as error:
        raise CheckpointError(f"{where}: {error}") from None
    missing, unexpected = sorted(expected.keys() - imported.state.keys()), sorted(imported.state.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(f"{where}: does not fit its configuration; missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in imported.state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{where}: '{name}' is {tuple(tensor.shape)}, its configuration says {tuple(expected[name].shape)}"
            )


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled ``state_dict`` or of a pickled module of ``dall_e``; nothing in the file is executed.

    torch's restricted unpickler reads it, to which every class of these libraries is one that does nothing.

    Raises:
        CheckpointError: It cannot be read, asks for anything else, or holds no weights.
    """
    try:
        with torch.serialization.safe_globals([(_StandIn, name) for name in STAND_INS]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, _StandIn):
            return dict(_parameters(content))
    except (*UNREADABLE, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as the weights of a picture tokenizer: {_reason(error)}") from None
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: holds no weights")
    return state


def _reason(error: Exception) -> str:
    """What matters of torch's long messages."""
    message = str(error) or type(error).__name__
    if asked := re.search(r"GLOBAL (\S+)", message):
        return f"it asks for '{asked[1]}'"
    if "Only persistent_load of storage" in message:
        return "it is a module as torch saved it before 1.6; open it with its own library and save its state_dict()"
    return message.splitlines()[0]


class _StandIn:
    """In place of a class of another library while a pickle is read: what was saved of an instance, and no behaviour."""


def _parameters(module: _StandIn, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters of a pickled module and of those in it, by their names."""
    values = vars(module)
    for name, value in values["_parameters"].items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
    for name, child in values["_modules"].items():
        yield from _parameters(child, f"{prefix}{name}.")


def _read(path: Path, trusted: bool) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    elif trusted:
        state = read_pickled(path)
    else:
        raise UserError(
            f"{path}: is not safetensors but pickled, which can hold a program; if you trust whoever wrote it, "
            "add --i-trust-this-file to mm convert"
        )
    return {name: tensor.detach().float() for name, tensor in state.items()}
