"""A folder in the format of Stable Diffusion, written by diffusers, with small random weights."""

import json
from pathlib import Path
from typing import Any

import torch

LENGTH, VOCABULARY, SIDE = 12, 514, 16
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": SIDE,
    "scaling_factor": 0.4,
}
UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 16,
    "sample_size": SIDE // 2,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def tiny_vae(**options: Any) -> Any:
    """An AutoencoderKL with 4 latents of 8 x 8 for 16 x 16 pixels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return spread(AutoencoderKL(**VAE | options))


def tiny_pipeline(activation: str = "quick_gelu", scheduler: dict[str, Any] | None = None, **unet: Any) -> Any:
    """A StableDiffusionPipeline whose parts all make a difference."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tiny_tokenizer(),
        unet=spread(UNet2DConditionModel(**UNET | unet)),
        scheduler=PNDMScheduler(**SCHEDULER | (scheduler or {})),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_tokenizer() -> Any:
    """CLIP's tokenizer without merges, except for one."""
    from transformers import CLIPTokenizer

    from mm.tokenizers.text import _byte_characters

    letters = [chr(point) for point in _byte_characters()]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=LENGTH)


def write_folder(folder: Path, **options: Any) -> Path:
    """The folder of such a pipeline; like published ones it has an option that another scheduler would miss."""
    tiny_pipeline(**options).save_pretrained(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample": False}))
    return folder


def spread(module: Any) -> Any:
    """Every vector of weights moved, so that exchanged norms and forgotten biases show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_((0.3 if parameter.ndim == 1 else 0.05) * torch.randn(parameter.shape, generator=generator))
    return module.eval()
