"""Decoding with guidance against transformers: its generate(), a hand loop with batched guidance, its compiled static cache.

    python bench/decode.py --compile --json decode.json    (about 40 minutes on two cores; --layers 2 --tokens 32 for a look)

All sides hold the same random GPT-2 (12 layers, 768 wide, 12 heads, GPT-2's vocabulary) and continue the same prompts greedily
by 256 tokens at guidance scale 3, the unconditional prompts being other tokens of the same length. In fp32 all must choose the
same tokens, or no speed is reported.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Case, arguments_parser, interleaved, report
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

from mm.generators.autoregressive import Compiled, NextToken, generate
from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, TokenEmbedding
from mm.nn.linear import Linear
from mm.nn.masks import attention_mask
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.types import Sampling

GUIDANCE = 3.0
PROMPT_LENGTH = 32
Decode = Callable[[Tensor, Tensor], Tensor]
"""Prompts and unconditional prompts ``(B, T)`` to new ids ``(B, N)``."""


class Gpt2(nn.Module):
    """GPT-2 of the suite's own parts, with the weights of transformers' one."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        config = theirs.config

        def make_block(_: int) -> Block:
            return Block(
                attention=MultiHeadAttention(config.n_embd, config.n_head),
                feed_forward=FeedForward(config.n_embd, 4 * config.n_embd, nn.GELU("tanh")),
                norm=norm,
            )

        norm = functools.partial(nn.LayerNorm, config.n_embd, eps=config.layer_norm_epsilon)
        positions = LearnedPositions(config.n_positions, config.n_embd)
        self.embedding = TokenEmbedding(config.vocab_size, config.n_embd, positions=positions)
        self.transformer = Transformer(make_block, config.n_layer, final_norm=norm())
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.embedding.tokens.weight
        self.load_state_dict(self._renamed(theirs.transformer.state_dict(), config.n_embd))
        self.requires_grad_(False).eval()
        self.prompt_length = PROMPT_LENGTH

    @staticmethod
    def _renamed(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
        """Their names and layouts to ours: (in, out) matrices are transposed, query, key and value are split."""
        renamed = dict.fromkeys(("embedding.tokens.weight", "head.weight"), state["wte.weight"])
        renamed["embedding.positions.weight"] = state["wpe.weight"]
        places = {
            "ln_1": "attention_residual.norm",
            "attn.c_proj": "attention.output",
            "ln_2": "feed_forward_residual.norm",
            "mlp.c_fc": "feed_forward.input",
            "mlp.c_proj": "feed_forward.output",
            "ln_f": "transformer.final_norm",
        }
        for name, given in state.items():
            part, kind = name.rsplit(".", 1)
            tensor = given.t().contiguous() if given.ndim == 2 else given
            if part == "ln_f":
                renamed[f"{places[part]}.{kind}"] = tensor
            elif part.startswith("h."):
                _, layer, part = part.split(".", 2)
                block = f"transformer.blocks.{layer}"
                if part == "attn.c_attn":
                    renamed[f"{block}.attention.query.{kind}"] = tensor[:width]
                    renamed[f"{block}.attention.key_value.{kind}"] = tensor[width:]
                else:
                    renamed[f"{block}.{places[part]}.{kind}"] = tensor
        return renamed

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def prefill(self, prompt: Tensor, prefix: Tensor, num_tokens: int) -> tuple[Tensor, list[KVCache]]:
        ids = torch.cat([prompt, prefix], 1)
        caches = self.transformer.caches(len(ids), prompt.shape[1] + num_tokens)
        hidden = self.transformer(self.embedding(ids), mask=attention_mask(ids.shape[1], causal=True), caches=caches)
        return self.logits(hidden[:, -1]), caches

    def step(self, ids: Tensor, index: int | Tensor, caches: list[KVCache]) -> Tensor:
        position = self.prompt_length + index
        assert isinstance(self.embedding.positions, LearnedPositions)
        x = self.embedding.tokens(ids) + self.embedding.positions.weight[position]
        return self.logits(self.transformer(x[:, None], caches=caches, position=position)[:, 0])


def peer_model(layers: int, vocabulary: int) -> Any:
    """transformers' GPT-2 with random weights, large enough that greedy choices are not all the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, vocab_size=vocabulary, initializer_range=0.05, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


def ours(model: NextToken, tokens: int) -> Decode:
    sampling = Sampling(guidance=GUIDANCE, temperature=0.0)

    def decode(prompt: Tensor, unconditional: Tensor) -> Tensor:
        return generate(model, prompt, range(len(prompt)), sampling, tokens, unconditional=unconditional)

    return decode


def their_generate(model: Any, tokens: int) -> Decode:
    """Two passes a step, as generate() does guidance."""

    def decode(prompt: Tensor, unconditional: Tensor) -> Tensor:
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            negative_prompt_ids=unconditional,
            guidance_scale=GUIDANCE,
            max_new_tokens=tokens,
            do_sample=False,
        )
        return ids[:, prompt.shape[1] :]

    return decode


def hand_loop(step: Callable[..., Any], prefill: Callable[..., Any], make_cache: Callable[[], Any], tokens: int) -> Decode:
    """What one writes by hand around transformers' model: both halves in one batch, its cache."""

    @torch.inference_mode()
    def decode(prompt: Tensor, unconditional: Tensor) -> Tensor:
        cache, ids, forward, chosen = make_cache(), torch.cat([prompt, unconditional]), prefill, []
        for _ in range(tokens):
            output = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            conditional, free = output.logits[:, -1].float().chunk(2)
            token = (free + GUIDANCE * (conditional - free)).argmax(-1, keepdim=True)
            chosen.append(token)
            ids, forward = torch.cat([token, token]), step
        return torch.cat(chosen, 1)

    return decode


def peers(model: Any, tokens: int, compiled: bool) -> dict[str, Decode]:
    """What ours is compared with."""
    from transformers import DynamicCache, StaticCache

    decoders = {
        "generate()": their_generate(model, tokens),
        "hand loop": hand_loop(model, model, lambda: DynamicCache(config=model.config), tokens),
    }
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT_LENGTH + tokens)

        def emptied() -> Any:
            cache.reset()
            return cache

        step = torch.compile(model.forward, dynamic=False, fullgraph=True)
        decoders["compiled static cache"] = hand_loop(step, model, emptied, tokens)
    return decoders


def agree(decoders: dict[str, Decode], prompt: Tensor, unconditional: Tensor, must: bool) -> None:
    """Refuse to report a speed at which other tokens were chosen; in bf16 rounding may choose others, which is only shown."""
    results = {name: decode(prompt, unconditional) for name, decode in decoders.items()}  # also compiles
    expected = results["generate()"]
    for name, ids in results.items():
        share = (ids == expected).float().mean().item()
        print(f"batch {len(prompt)}: {name}: {share:.1%} of generate()'s tokens, {len(ids.unique())} different", flush=True)
        assert share == 1 or not must, name


def cases(arguments: argparse.Namespace, batch_size: int, dtype: torch.dtype) -> list[Case]:
    """All comparisons at one batch size in one precision."""
    theirs = peer_model(arguments.layers, arguments.vocabulary)
    model = Gpt2(theirs).to(arguments.device, dtype)
    theirs = theirs.to(arguments.device, dtype)
    own = {"ours": ours(model, arguments.tokens)}
    if arguments.compile:
        own["ours compiled"] = ours(Compiled(model), arguments.tokens)
    others = peers(theirs, arguments.tokens, arguments.compile)
    generator = torch.Generator().manual_seed(1)
    shape = (2, batch_size, PROMPT_LENGTH)
    prompts = torch.randint(arguments.vocabulary, shape, generator=generator).to(arguments.device)
    agree({**own, **others}, *prompts, must=dtype == torch.float32)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    found = []
    for (name, decode), (peer, other) in itertools.product(own.items(), others.items()):
        times = interleaved(lambda run=decode: run(*prompts), lambda run=other: run(*prompts), arguments.repeats)
        rates = [batch_size * arguments.tokens / seconds for seconds in times]
        what = f"{name}, batch {batch_size}, {precision}, {arguments.layers} layers, {arguments.tokens} tokens"
        found.append(Case(what, f"transformers {peer}", *rates, "tokens/s", True))
        print(f"{what} / {peer}: {found[-1].ratio:.2f}", flush=True)
    return found


def main() -> None:
    """Compare at all batch sizes and precisions."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="also ours compiled and transformers' compiled static cache")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    found: list[Case] = []
    for batch_size, precision in itertools.product(arguments.batches, arguments.precisions):
        torch._dynamo.reset()
        found += cases(arguments, batch_size, getattr(torch, precision))
    report(found, arguments.json)


if __name__ == "__main__":
    main()
