"""wav2vec 2.0 folders of transformers and torchaudio give these libraries' features, losses and texts, padded or not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchaudio.models import wav2vec2_model
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

import mm
from mm.encoders.wav2vec2 import draw_negatives, span_mask
from mm.errors import CheckpointError
from mm.nn.product_quantize import ProductQuantizer
from mm.run.recognition import transcribe
from mm.systems.wav2vec2 import Wav2Vec2
from mm.systems.wav2vec2_ctc import Wav2Vec2Ctc
from mm.types import AudioBatch, Batch

TOLERANCE = 1e-4
NORMS = ["group", "layer"]
LABELS = ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "T", "A", "O", "N", "'"]


def config(norm: str, **changes: Any) -> Wav2Vec2Config:
    large = norm == "layer"
    return Wav2Vec2Config(
        vocab_size=len(LABELS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        feat_extract_norm=norm,
        conv_dim=(16, 16, 24),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        conv_bias=large,
        do_stable_layer_norm=large,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        num_codevectors_per_group=6,
        num_codevector_groups=2,
        codevector_dim=16,
        proj_codevector_dim=12,
        pad_token_id=0,
        ctc_loss_reduction="mean",
        **changes,
    )


def folder_of(folder: Path, kind: Any, norm: str, **changes: Any) -> tuple[Path, Any]:
    """A small random checkpoint as transformers writes it, and the model itself."""
    torch.manual_seed(0)
    model = kind(config(norm, **changes)).eval()
    with torch.no_grad():  # gains and biases that are not trivial
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "masked" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if kind is Wav2Vec2ForPreTraining:
            model.quantizer.codevectors.uniform_()
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=norm == "layer", return_attention_mask=norm == "layer").save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(LABELS)}))
    return folder, model


def clips(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [(0.3 * random.standard_normal(length) + 0.1).astype(np.float32) for length in lengths]


def references(folder: Path, model: Any, sounds: list[np.ndarray], norm: str) -> list[Tensor]:
    """What transformers gives for each clip: in a padded batch with its mask, or alone where its model wants no mask."""
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    if norm == "layer":
        batch = extractor(sounds, sampling_rate=16_000, padding=True, return_tensors="pt")
        states = model(batch.input_values, attention_mask=batch.attention_mask).last_hidden_state
        counts = model._get_feat_extract_output_lengths(batch.attention_mask.sum(1))
        return [state[:count] for state, count in zip(states, counts.tolist(), strict=True)]
    return [model(extractor(s, sampling_rate=16_000, return_tensors="pt").input_values).last_hidden_state[0] for s in sounds]


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_features_of_a_padded_batch_are_transformers(tmp_path: Path, norm: str) -> None:
    folder, reference = folder_of(tmp_path / "m", Wav2Vec2Model, norm)
    model = mm.load(folder, precision="fp32")
    assert isinstance(model.system, Wav2Vec2)
    assert model.processor.audio_spec.normalise == (norm == "layer")
    sounds = clips(900, 411, 1500, 411)
    encoded = model.system.encode_audio(model.processor.audios(sounds))
    for row, expected in enumerate(references(folder, reference, sounds, norm)):
        ours = encoded.tokens[row][encoded.mask[row]]
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("labelled", [False, True])
@torch.no_grad()
def test_torchaudio_folders_give_its_outputs(tmp_path: Path, norm: str, labelled: bool) -> None:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "extractor_mode": f"{norm}_norm",
        "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (24, 2, 2)],
        "extractor_conv_bias": norm == "layer",
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 48,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": norm == "layer",
        "encoder_layer_drop": 0.05,
        "aux_num_out": len(LABELS) if labelled else None,
    }
    reference = wav2vec2_model(**arguments).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    settings = arguments | {"normalize_waveform": norm == "layer"} | ({"labels": LABELS} if labelled else {})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = mm.load(tmp_path, precision="fp32")
    sounds = model.processor.audios(clips(900, 411, 1500))
    if isinstance(model.system, Wav2Vec2Ctc):
        ours, mask = model.system.log_shares(sounds)
    else:
        assert isinstance(model.system, Wav2Vec2)
        encoded = model.system.encode_audio(sounds)
        ours, mask = encoded.tokens, encoded.mask
    whole, counts = reference(sounds.waves, sounds.lengths)  # with its mask, in one batch
    for row, length in enumerate(sounds.lengths.tolist()):
        expected = whole[row, : counts[row]] if norm == "layer" else reference(sounds.waves[row : row + 1, :length])[0][0]
        expected = expected.log_softmax(-1) if labelled else expected
        assert (ours[row][mask[row]] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("norm", NORMS)
def test_recognition_is_transformers(tmp_path: Path, norm: str) -> None:
    folder, reference = folder_of(tmp_path / "m", Wav2Vec2ForCTC, norm)
    model = mm.load(folder, precision="fp32")
    assert model.capabilities == {"transcribes"}
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    tokenizer = Wav2Vec2CTCTokenizer(folder / "vocab.json")
    sounds = clips(3000, 1411, 2500)
    written = transcribe(model, sounds, beams=1)
    for one, sound in zip(written, sounds, strict=True):
        with torch.no_grad():
            logits = reference(extractor(sound, sampling_rate=16_000, return_tensors="pt").input_values).logits
        assert one.text == tokenizer.decode(logits[0].argmax(-1))
    assert any(one.text for one in written)
    words = "TEA ATE NONE'A"
    assert model.processor.tokenizer.encode(words) == tokenizer(words).input_ids
    assert model.processor.tokenizer.encode("tea ate") == tokenizer("TEA ATE").input_ids, "which has capitals alone"

    system = model.system
    assert isinstance(system, Wav2Vec2Ctc)
    audio = model.processor.audios(sounds if norm == "layer" else sounds[:1])
    text = model.processor.text(["TEA", "ATE NONE", "A"][: len(audio)])
    labels = text.ids.where(text.valid(), -100)
    with torch.no_grad():
        ours = system.loss(Batch(tuple("abc")[: len(audio)], audio=audio, text=text), 0)
        theirs = reference(audio.waves, attention_mask=audio.valid().long(), labels=labels).loss
    assert abs(float(ours.total) - float(theirs)) < TOLERANCE


@pytest.mark.parametrize("norm", NORMS)
def test_losses_with_equal_masks_and_negatives_are_transformers(tmp_path: Path, norm: str) -> None:
    folder, reference = folder_of(tmp_path / "m", Wav2Vec2ForPreTraining, norm)
    model = mm.load(folder, precision="fp32")
    system = model.system
    assert isinstance(system, Wav2Vec2)
    sounds = clips(900, 700) if norm == "layer" else clips(900, 900)
    audio = model.processor.audios(sounds)
    torch.manual_seed(0)
    hidden = span_mask(system.encoder.frame_mask(audio), 0.65, 4)
    negatives = draw_negatives(hidden, 7)
    offsets = torch.arange(len(hidden))[:, None, None] * hidden.shape[1]
    losses = system.judged(audio, hidden, negatives)
    theirs = reference(
        audio.waves,
        attention_mask=audio.valid().long(),
        mask_time_indices=hidden,
        sampled_negative_indices=negatives + offsets,
    )
    count = hidden.sum()
    assert abs(float(losses.parts["contrastive"]) - float(theirs.contrastive_loss.detach() / count)) < TOLERANCE
    assert abs(float(1 - losses.parts["code_use"]) - float(theirs.diversity_loss.detach() / count)) < TOLERANCE
    penalty = 10 * losses.parts["features"]  # which transformers does not have
    assert abs(float((losses.total - penalty).detach()) - float(theirs.loss.detach() / count)) < TOLERANCE
    losses.total.sub(penalty).backward()
    (theirs.loss / count).backward()
    ours = dict(system.named_parameters())
    for mine, other in (
        ("mask_vector", reference.wav2vec2.masked_spec_embed),
        ("context_projection.weight", reference.project_hid.weight),
        ("quantizer.codebook", reference.quantizer.codevectors),
        (
            "encoder.trunk.encoder.transformer.layers.0.attention.q_proj.weight",
            reference.wav2vec2.encoder.layers[0].attention.q_proj.weight,
        ),
    ):
        gradient = ours[mine].grad
        assert gradient is not None
        assert other.grad.abs().max() > 1e-6
        assert (gradient - other.grad).abs().max() < TOLERANCE


@torch.no_grad()
def test_codes_drawn_from_the_same_noise_are_transformers() -> None:
    torch.manual_seed(0)
    reference = Wav2Vec2GumbelVectorQuantizer(config("layer")).train()
    reference.codevectors.uniform_()
    ours = ProductQuantizer(24, groups=2, codes=6, width=16).train()
    ours.logits.load_state_dict(reference.weight_proj.state_dict())
    ours.codebook.copy_(reference.codevectors)
    ours.temperature = reference.temperature = 0.8
    features, counted = torch.randn(3, 9, 24), torch.rand(3, 9) < 0.5
    torch.manual_seed(1)
    codes, perplexity = reference(features, counted)
    torch.manual_seed(1)
    found = ours(features, counted)
    torch.testing.assert_close(found.codes, codes, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.perplexity, perplexity, atol=1e-4, rtol=0)


def test_old_names_of_the_position_convolution_are_read(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "m", Wav2Vec2Model, "group")
    before = mm.load(folder, precision="fp32").system.state_dict()
    state = load_file(folder / "model.safetensors")
    prefix = "encoder.pos_conv_embed.conv."
    for new, old in (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v")):
        if prefix + new in state:
            state[prefix + old] = state.pop(prefix + new)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    after = mm.load(folder, precision="fp32").system.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_batch_of_waves_alone_is_what_the_audio_batch_says(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "m", Wav2Vec2Model, "layer")
    model = mm.load(folder, precision="fp32")
    [sound] = clips(640)
    assert isinstance(model.system, Wav2Vec2)
    spoiled = model.processor.audios([sound])
    waves = torch.cat([spoiled.waves, 5 * torch.ones(1, 300)], dim=1)  # what is behind the end must not count
    with torch.no_grad():
        whole = model.system.encode_audio(spoiled).pooled
        assert (model.system.encode_audio(AudioBatch(waves, spoiled.lengths)).pooled - whole).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_act": "relu"}, "hidden_act"), ({"add_adapter": True}, "add_adapter"), ({"layer_norm_eps": 1e-3}, "eps")],
)
def test_what_is_not_supported_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder, _ = folder_of(tmp_path / "m", Wav2Vec2Model, "group", **change)
    with pytest.raises(CheckpointError, match=message):
        mm.load(folder)


def test_missing_files_and_pickles_are_told(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "m", Wav2Vec2ForCTC, "group")
    (folder / "vocab.json").rename(folder / "elsewhere.json")
    with pytest.raises(mm.errors.UserError, match=r"vocab\.json: no such file"):
        mm.load(folder)
    (folder / "elsewhere.json").rename(folder / "vocab.json")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(mm.errors.UserError, match=r"preprocessor_config\.json: no such file"):
        mm.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        mm.load(folder)
