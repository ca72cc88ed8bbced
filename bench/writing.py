"""Writing against transformers' generate(): the same GPT-2, the same prompts, greedily and by beam search.

    python bench/writing.py --compile --json writing.json    (about 15 minutes on two cores; --layers 2 --tokens 16 for a look)

Both sides hold the same random GPT-2 (12 layers, 768 wide, 12 heads, GPT-2's vocabulary) and continue the same prompts by 64
tokens without guidance. In fp32 both must choose the same tokens, or no speed is reported.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import PROMPT_LENGTH, Gpt2, peer_model
from harness import Case, arguments_parser, interleaved, report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

from mm.generators.language_model import LanguageModel, LanguageModelConfig, build_language_model
from mm.generators.writing import CompiledSteps, Continues, write
from mm.types import Decoding

Continue = Callable[[Tensor], Tensor]
"""Prompts ``(B, T)`` to new ids ``(B, N)``."""


def our_model(theirs: Any) -> LanguageModel:
    """The suite's language model with the weights of transformers' one."""
    config = theirs.config
    model = build_language_model(
        LanguageModelConfig(
            vocab_size=config.vocab_size,
            context_length=config.n_positions,
            width=config.n_embd,
            layers=config.n_layer,
            heads=config.n_head,
            activation="gelu_tanh",
        )
    )
    state = Gpt2(theirs).state_dict()
    del state["head.weight"]
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def ours(model: LanguageModel, steps: Continues, decoding: Decoding) -> Continue:
    @torch.no_grad()
    def run(prompts: Tensor) -> Tensor:
        lengths = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
        logits, state = model.prefill(model.embed(prompts), lengths, decoding.max_tokens)
        written = write(steps, logits, state, decoding, range(len(prompts)), end=None)
        return torch.tensor([text.ids for text in written])

    return run


def generate(model: Any, decoding: Decoding) -> Continue:
    """transformers' way; its search stops where ours does."""
    search = {"early_stopping": "never", "length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}

    def run(prompts: Tensor) -> Tensor:
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=decoding.max_tokens,
            num_beams=decoding.beams,
            do_sample=False,
            **search,
        )
        return ids[:, prompts.shape[1] :].cpu()

    return run


def cases(arguments: argparse.Namespace, batch_size: int, dtype: torch.dtype) -> list[Case]:
    """All comparisons at one batch size in one precision."""
    theirs = peer_model(arguments.layers, arguments.vocabulary)
    model = our_model(theirs).to(arguments.device, dtype)
    theirs = theirs.to(arguments.device, dtype)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(arguments.vocabulary, (batch_size, PROMPT_LENGTH), generator=generator).to(arguments.device)
    steps: dict[str, Continues] = {"ours": model}
    if arguments.compile:
        steps["ours compiled"] = CompiledSteps(model)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    found = []
    for beams, (name, step) in itertools.product(arguments.beams, steps.items()):
        decoding = Decoding(max_tokens=arguments.tokens, beams=beams)
        own, other = ours(model, step, decoding), generate(theirs, decoding)
        share = (own(prompts) == other(prompts)).float().mean().item()  # also compiles
        assert share == 1 or dtype != torch.float32, f"{share:.1%} of the tokens are those of generate()"
        times = interleaved(lambda run=own: run(prompts), lambda run=other: run(prompts), arguments.repeats)
        rates = [batch_size * arguments.tokens / seconds for seconds in times]
        way = "greedy" if beams == 1 else f"{beams} beams"
        what = f"{name}, {way}, batch {batch_size}, {precision}, {arguments.layers} layers, {arguments.tokens} tokens"
        found.append(Case(what, "transformers generate()", *rates, "tokens/s", True))
        print(f"{what}: {found[-1].ratio:.2f}, {share:.1%} of generate()'s tokens", flush=True)
    return found


def main() -> None:
    """Compare at all batch sizes and precisions."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--beams", type=int, nargs="+", default=[1])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="also ours compiled")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    found: list[Case] = []
    for batch_size, precision in itertools.product(arguments.batches, arguments.precisions):
        torch._dynamo.reset()
        found += cases(arguments, batch_size, getattr(torch, precision))
    report(found, arguments.json)


if __name__ == "__main__":
    main()
