"""wav2vec 2.0 in transformers' and in torchaudio's layout: an encoder, with its pretraining or its CTC head where it has one.

torchaudio publishes weights without any file of settings; here a folder has ``model.safetensors``, a ``state_dict`` of its
``Wav2Vec2Model``, and a ``config.json`` with the arguments of ``wav2vec2_model`` and, where they differ from the defaults,
``sample_rate``, ``normalize_waveform`` and ``labels`` (with the blank first), as its bundles have them.

Sources: https://github.com/huggingface/transformers and https://github.com/pytorch/audio (formats of both).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from torch import Tensor

from mm.config import read_json
from mm.encoders.wav2vec2 import Wav2Vec2EncoderConfig
from mm.errors import CheckpointError
from mm.media.audio import AudioSpec
from mm.processor import Processor
from mm.published.huggingface import CONFIG_FILE, configuration, prepared, read_weights, renamed
from mm.published.huggingface_processor import tokenizer_settings
from mm.published.imported import Imported, one_line, pinned, put, take
from mm.systems.wav2vec2 import PretrainingConfig, Wav2Vec2Config
from mm.systems.wav2vec2_ctc import Wav2Vec2CtcConfig
from mm.tokenizers.text import UNKNOWN, Cleaning, TextTokenizer

MODEL_TYPE = "wav2vec2"
ALONE, CTC, PRETRAINING = "Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"
PREPARATION_FILE, VOCABULARY_FILE = "preprocessor_config.json", "vocab.json"

TORCHAUDIO_MARK = "extractor_mode"
"""An argument that only torchaudio's ``wav2vec2_model`` has."""

MAX_SECONDS = 30.0
"""Longer recordings are cut to this; neither layout states a limit."""

FIXED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "add_adapter": False,
    "adapter_attn_dim": None,
}
"""Settings of transformers that have one value here."""

OLD_NAMES = {
    "conv.weight_g": "conv.parametrizations.weight.original0",
    "conv.weight_v": "conv.parametrizations.weight.original1",
}
"""Of the position convolution, before torch 2."""

OBJECTIVE_NAMES = {
    "wav2vec2.masked_spec_embed": "mask_vector",
    "quantizer.codevectors": "quantizer.codebook",
    "quantizer.weight_proj.weight": "quantizer.logits.weight",
    "quantizer.weight_proj.bias": "quantizer.logits.bias",
    "project_q.weight": "code_projection.weight",
    "project_q.bias": "code_projection.bias",
    "project_hid.weight": "context_projection.weight",
    "project_hid.bias": "context_projection.bias",
}
"""Where what transformers pretrains by is here."""


def is_wav2vec2(folder: Path) -> bool:
    """Whether a folder holds wav2vec 2.0 in one of the two layouts."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return False
    values = read_json(path)
    return values.get("model_type") == MODEL_TYPE or TORCHAUDIO_MARK in values


def import_wav2vec2(folder: Path, state: Mapping[str, Tensor] | None = None) -> Imported:
    """A folder with ``config.json``, safetensors and, of transformers, how waves are prepared and a vocabulary.

    Args:
        folder: Where they are.
        state: All weights, where they were read already; None reads the folder's safetensors.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint needs what is not supported.
    """
    with one_line(folder):
        values = read_json(folder / CONFIG_FILE)
        given = prepared(read_weights(folder) if state is None else state)
        read = _from_torchaudio if TORCHAUDIO_MARK in values else _from_transformers
        return read(folder, values, given)


def _from_torchaudio(folder: Path, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Imported:
    audio = Wav2Vec2EncoderConfig(
        extractor=values["extractor_mode"],
        conv_layers=values["extractor_conv_layer_config"],
        conv_bias=values["extractor_conv_bias"],
        width=values["encoder_embed_dim"],
        layers=values["encoder_num_layers"],
        heads=values["encoder_num_heads"],
        hidden=values["encoder_ff_interm_features"],
        position_kernel=values["encoder_pos_conv_kernel"],
        position_groups=values["encoder_pos_conv_groups"],
        norm_first=values["encoder_layer_norm_first"],
        dropout=values["encoder_dropout"],
        projection_dropout=values["encoder_projection_dropout"],
        attention_dropout=values["encoder_attention_dropout"],
        hidden_dropout=values["encoder_ff_interm_dropout"],
        layer_drop=values["encoder_layer_drop"],
    )
    spec = AudioSpec(
        rate=int(values.get("sample_rate", 16_000)),
        normalise=bool(values.get("normalize_waveform", False)),
        max_seconds=MAX_SECONDS,
    )
    trunk = put({_today(name): tensor for name, tensor in state.items() if not name.startswith("aux.")}, "encoder.trunk.")
    card = {"source": str(folder), "format": "torchaudio", "architecture": "Wav2Vec2Model"}
    if values.get("aux_num_out") is None:
        return Imported(Wav2Vec2Config(audio=audio, objective=None), trunk, Processor(audio=spec), card)
    config = Wav2Vec2CtcConfig(audio=audio, vocab_size=int(values["aux_num_out"]))
    tokenizer = _tokenizer(values["labels"], pad=0, delimiter="|", unknown=UNKNOWN)
    return _recogniser(folder, config, trunk | put(take(state, "aux."), "head."), tokenizer, spec, card)


def _from_transformers(folder: Path, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> Imported:
    architecture = (values.get("architectures") or [ALONE])[0]
    if architecture not in (ALONE, CTC, PRETRAINING):
        raise CheckpointError(f"{folder}: {architecture} is not supported; there are {ALONE}, {CTC} and {PRETRAINING}")
    config = configuration(architecture, values, folder)
    for name, wanted in FIXED.items():
        if getattr(config, name) != wanted:
            raise CheckpointError(f"{folder}: {name} {getattr(config, name)!r} is not supported, only {wanted!r}")
    whole = renamed(architecture, config, state, folder)
    inner = whole if architecture == ALONE else take(whole, "wav2vec2.")
    trunk = {
        **put(take(inner, "feature_extractor."), "encoder.trunk.feature_extractor."),
        **put(take(inner, "feature_projection."), "encoder.trunk.encoder.feature_projection."),
        **put(take(inner, "encoder."), "encoder.trunk.encoder.transformer."),
    }
    audio, spec = _encoder(config), _preparation(folder)
    card = {"source": str(folder), "format": "transformers", "architecture": architecture, **pinned(folder)}
    if architecture == ALONE:
        return Imported(Wav2Vec2Config(audio=audio, objective=None), trunk, Processor(audio=spec), card)
    if architecture == PRETRAINING:
        objective = {new: whole[old] for old, new in OBJECTIVE_NAMES.items()}
        return Imported(
            Wav2Vec2Config(audio=audio, objective=_objective(config)), trunk | objective, Processor(audio=spec), card
        )
    recogniser = Wav2Vec2CtcConfig(
        audio=audio, vocab_size=config.vocab_size, blank=config.pad_token_id, dropout=config.final_dropout
    )
    tokenizer = _vocabulary(folder, config.pad_token_id)
    return _recogniser(folder, recogniser, trunk | put(take(whole, "lm_head."), "head."), tokenizer, spec, card)


def _recogniser(
    folder: Path,
    config: Wav2Vec2CtcConfig,
    state: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    spec: AudioSpec,
    card: Mapping[str, Any],
) -> Imported:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: vocabulary ({tokenizer.vocab_size} ids) and head ({config.vocab_size}) do not belong together"
        )
    processor = Processor(tokenizer=tokenizer, context_length=config.context_length, audio=spec)
    return Imported(config, state, processor, card)


def _encoder(config: Any) -> Wav2Vec2EncoderConfig:
    return Wav2Vec2EncoderConfig(
        extractor=f"{config.feat_extract_norm}_norm",  # pyright: ignore[reportArgumentType]
        conv_layers=tuple(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        conv_bias=config.conv_bias,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        position_kernel=config.num_conv_pos_embeddings,
        position_groups=config.num_conv_pos_embedding_groups,
        norm_first=config.do_stable_layer_norm,
        dropout=config.hidden_dropout,
        projection_dropout=config.feat_proj_dropout,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.activation_dropout,
        layer_drop=config.layerdrop,
    )


def _objective(config: Any) -> PretrainingConfig:
    return PretrainingConfig(
        codebooks=config.num_codevector_groups,
        codes=config.num_codevectors_per_group,
        code_width=config.codevector_dim,
        width=config.proj_codevector_dim,
        negatives=config.num_negatives,
        temperature=config.contrastive_logits_temperature,
        diversity=config.diversity_loss_weight,
    )


def _preparation(folder: Path) -> AudioSpec:
    values = read_json(folder / PREPARATION_FILE)
    return AudioSpec(
        rate=int(values.get("sampling_rate", 16_000)),
        normalise=bool(values.get("do_normalize", True)),
        max_seconds=MAX_SECONDS,
    )


def _vocabulary(folder: Path, pad: int) -> TextTokenizer:
    """The tokenizer of a CTC head: ``vocab.json``, and which of its tokens is the space."""
    settings, tokens = tokenizer_settings(folder), read_json(folder / VOCABULARY_FILE)
    if sorted(map(str, tokens.values())) != sorted(map(str, range(len(tokens)))):
        raise CheckpointError(f"{folder / VOCABULARY_FILE}: its ids are not 0 to {len(tokens) - 1}; that is not supported")
    ordered = sorted(tokens, key=lambda token: tokens[token])
    delimiter = str(settings.get("word_delimiter_token") or "|")
    return _tokenizer(ordered, pad=pad, delimiter=delimiter, unknown=str(settings.get("unk_token") or UNKNOWN))


def _tokenizer(tokens: Sequence[str], *, pad: int, delimiter: str, unknown: str) -> TextTokenizer:
    """Letters that the vocabulary has in one case alone are taken in either."""
    vocabulary = [" " if token == delimiter else token for token in tokens]
    known = set(vocabulary)
    letters = [token for token in vocabulary if len(token) == 1 and token.swapcase() != token]
    only = [token for token in letters if len(token.swapcase()) == 1 and token.swapcase() not in known]
    other_case = normalizers.Sequence([normalizers.Replace(token.swapcase(), token) for token in only])
    return TextTokenizer.of_characters(
        vocabulary, pad=pad, cleaning=Cleaning(lowercase=False, nfc=False), unknown=unknown, normalizer=other_case
    )


def _today(name: str) -> str:
    return next((name.replace(old, new) for old, new in OLD_NAMES.items() if name.endswith(old)), name)
