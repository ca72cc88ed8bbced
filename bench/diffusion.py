"""Pictures by diffusion with guidance: the suite's loop around a UNet against diffusers' pipeline around the same weights.

    python bench/diffusion.py --compile --json diffusion.json    (half an hour of one core; --steps 4 --widths 32 64 for a look)

All sides hold the same random UNet2DConditionModel (128, 256 and 256 channels, attention in heads of 64, 77 words of 256
numbers, 34.9 M weights) and make latents of 32 x 32 in 20 steps of DDIM at guidance scale 5, both halves in one batch, from the
same noise and the same features of a prompt and a negative one; nothing is decoded. In fp32 the latents must agree within 1e-3
of their spread, and all others must have a cosine of 0.99 to them, or no speed is reported.

A second part times a whole picture of a flow-matching transformer of the sizes of ``configs/flow.yaml`` with random weights,
from tokens to pixels, in the suite's own ways.

With ``--processor-time`` the seconds are those that this process computed, for a machine that others use, too.
"""

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Case, arguments_parser, report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

import mm
from mm.config import read_layers, validate
from mm.generators.denoiser import Compiled, Condition, joined
from mm.generators.diffusion import diffuse, gaussian_noise
from mm.generators.sampling import sample_generators
from mm.generators.unet import Unet, UnetConfig, build_unet
from mm.losses.diffusion import DiffusionPath
from mm.systems import build
from mm.systems.flow import Flow, FlowConfig
from mm.types import Sampling

SIDE, CHANNELS, WORDS, WORDS_WIDTH, HEAD_WIDTH, SEED = 32, 4, 77, 256, 64, 0
PATH = DiffusionPath("scaled_linear", 0.00085, 0.012)
"""Stable Diffusion's."""

HALF = (0.0, 0.5)
"""Part of the progress in which guidance acts, where not in all of it."""

AGREEMENT, COSINE = 1e-3, 0.99
Paint = Callable[[], Tensor]


def new_unet(widths: list[int]) -> Unet:
    """The UNet that all sides hold, in evaluation mode."""
    torch.manual_seed(0)
    plain = len(widths) - 1
    options = {
        "block_out_channels": widths,
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths],  # diffusers' name for the number of heads
        "down_block_types": ["CrossAttnDownBlock2D"] * plain + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * plain,
    }
    return build_unet(UnetConfig(options=options), (CHANNELS, SIDE, SIDE), WORDS_WIDTH, None).requires_grad_(False).eval()


def our_painter(unet: Unet, words: Tensor, sampling: Sampling, compiled: bool = False) -> Paint:
    """The suite's loop; what is computed of the words once belongs to a picture's time."""
    denoiser = Compiled(unet) if compiled else unet
    known = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)

    @torch.no_grad()
    def paint() -> Tensor:
        both = denoiser.prepare(joined(Condition(words[:1], known[:1]), Condition(words[1:], known[1:])))
        single = both[:1]

        def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
            return denoiser(x, time, both if guided else single)

        shape = (CHANNELS, SIDE, SIDE)
        *_, last = diffuse(denoise, PATH, "noise", shape, [SEED], sampling, device=words.device)
        return last.sample

    return paint


def their_painter(network: Any, words: Tensor, sampling: Sampling, compiled: bool = False) -> Paint:
    """diffusers' pipeline without text encoder and decoder, its scheduler at the moments of the suite's solver."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers import DDIMScheduler

    scheduler = DDIMScheduler(
        trained_betas=PATH.variances.float().numpy(), clip_sample=False, timestep_spacing="trailing", steps_offset=1
    )
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipeline: Any = StableDiffusionPipeline(**parts, unet=network, scheduler=scheduler, requires_safety_checker=False)  # pyright: ignore[reportArgumentType]
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet, dynamic=False, fullgraph=True)
    dtype = network.conv_in.weight.dtype
    prompt, negative = words.to(dtype).chunk(2)

    def paint() -> Tensor:
        noise = gaussian_noise(sample_generators([SEED]), (CHANNELS, SIDE, SIDE), words.device)
        [latents] = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            latents=noise.to(dtype),
            height=8 * SIDE,
            width=8 * SIDE,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="latent",
            return_dict=False,
        )[:1]
        return latents.float()

    return paint


def unet_painters(arguments: argparse.Namespace) -> tuple[dict[str, Paint], dict[str, Paint]]:
    """Ours and theirs by precision."""
    unet = new_unet(arguments.widths).to(arguments.device)
    words = torch.randn(2, WORDS, WORDS_WIDTH, generator=torch.Generator().manual_seed(1)).to(arguments.device)
    sampling = Sampling(guidance=5.0, steps=arguments.steps, solver="euler")
    half = replace(sampling, guidance_interval=HALF)
    short = copy.deepcopy(unet).to(torch.bfloat16)
    ours = {
        "fp32": our_painter(unet, words, sampling),
        "bf16": our_painter(short, words, sampling),
        "bf16, guidance in the first half only": our_painter(short, words, half),
    }
    network = new_unet(arguments.widths).network.to(arguments.device)  # with diffusers' own processors for its own words
    theirs = {
        "fp32": their_painter(network, words, sampling),
        "bf16": their_painter(copy.deepcopy(network).to(torch.bfloat16), words, sampling),
    }
    if arguments.compile:
        ours["bf16 compiled"] = our_painter(short, words, sampling, compiled=True)
        theirs["bf16 compiled"] = their_painter(copy.deepcopy(network).to(torch.bfloat16), words, sampling, compiled=True)
    return ours, theirs


def check(ours: Mapping[str, Paint], theirs: Mapping[str, Paint]) -> None:
    """Refuse to report the speed of other latents; those with guidance in a part only are other ones, which is only shown."""
    expected = theirs["fp32"]()
    for side, painters in (("ours", ours), ("diffusers", theirs)):
        for name, paint in painters.items():
            made = paint()  # also compiles
            error = ((made - expected).abs().max() / expected.std()).item()
            cosine = torch.cosine_similarity(made.flatten(), expected.flatten(), dim=0).item()
            print(f"{side} {name}: cosine {cosine:.5f}, largest difference {error:.1e} of the spread", flush=True)
            assert name != "fp32" or error < AGREEMENT, name
            assert "half" in name or cosine > COSINE, name


def timed(painters: Mapping[str, Paint], arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each, all called in turn so that they meet the same state of the machine."""
    clock = time.process_time if arguments.processor_time else time.perf_counter
    waits = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in painters}
    for _ in range(arguments.repeats):
        for name, paint in painters.items():
            waits()
            start = clock()
            paint()
            waits()
            seconds[name].append(clock() - start)
    for name, found in seconds.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in found)} s", flush=True)
    return {name: statistics.median(found) for name, found in seconds.items()}


def unet_cases(arguments: argparse.Namespace) -> list[Case]:
    """Every way of ours against every way of theirs."""
    ours, theirs = unet_painters(arguments)
    check(ours, theirs)
    everything = {f"ours {name}": paint for name, paint in ours.items()}
    everything |= {f"diffusers {name}": paint for name, paint in theirs.items()}
    seconds = timed(everything, arguments)
    return [
        Case(
            f"UNet, {SIDE} x {SIDE} latents, {arguments.steps} steps, {mine}",
            f"diffusers' pipeline, {other}",
            seconds[f"ours {mine}"],
            seconds[f"diffusers {other}"],
            "s",
        )
        for mine in ours
        for other in theirs
    ]


def flow_cases(arguments: argparse.Namespace) -> list[Case]:
    """One picture of a transformer, in the suite's own ways."""
    root = Path(__file__).resolve().parent.parent
    config = validate(FlowConfig, read_layers(root / "configs" / "flow.yaml")["system"], "configs/flow.yaml")
    parts = {name: mm.load(reference, device="cpu", precision="fp32").system for name, reference in config.parts().items()}
    torch.manual_seed(0)
    flow = build(config, parts)
    assert isinstance(flow, Flow)
    for parameter in flow.denoiser.parameters():  # a fresh one answers nothing but zeros
        torch.nn.init.normal_(parameter, std=0.03)
    text = mm.load("emoji-clip", device="cpu").processor.text(["red heart"]).to(torch.device(arguments.device))
    painters: dict[str, Paint] = {}
    for name, dtype in {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp32 compiled": torch.float32,
        "bf16 compiled": torch.bfloat16,
    }.items():
        if "compiled" in name and not arguments.compile:
            continue
        system = copy.deepcopy(flow).to(arguments.device).eval()
        system.cast_(dtype)
        if "compiled" in name:
            system.compile_sampling()
        painters[name] = lambda system=system: system.paint(text, [SEED], Sampling(steps=12))
        painters[name]()
    seconds = timed(painters, arguments)
    return [
        Case(f"Flow, 64 tokens, 12 steps, {name}", "ours fp32", found, seconds["fp32"], "s") for name, found in seconds.items()
    ]


def main() -> None:
    """Compare both networks."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 256], help="channels of the UNet's levels")
    parser.add_argument("--compile", action="store_true", help="also both sides compiled")
    parser.add_argument("--processor-time", action="store_true", help="seconds that this process computed, one thread on a CPU")
    parser.add_argument("--parts", nargs="+", choices=("unet", "flow"), default=("unet", "flow"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    found: list[Case] = []
    if "unet" in arguments.parts:
        found += unet_cases(arguments)
    if "flow" in arguments.parts:
        found += flow_cases(arguments)
    report(found, arguments.json)


if __name__ == "__main__":
    main()
