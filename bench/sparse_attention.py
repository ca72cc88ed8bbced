"""Sparse attention that skips what a pattern leaves out, forward and backward, against dense causal attention of torch.

    python bench/sparse_attention.py --json FILE

Both sides are torch's fused kernel: theirs with ``is_causal`` over the whole sequence, ours group by group. fp32, one thread.
"""

from collections.abc import Callable

import torch
from harness import Case, arguments_parser, interleaved, report
from torch import Tensor

from mm.nn.attention import MultiHeadAttention
from mm.nn.masks import Fixed, Mask, Pattern, Strided, attention_mask

WIDTH, HEADS = 256, 4
PATTERNS: dict[str, Callable[[int], Pattern]] = {
    "strided, near": lambda stride: Strided(stride, "near"),
    "strided, far": lambda stride: Strided(stride, "far"),
    "fixed": lambda stride: Fixed(stride, 4),
}


def main() -> None:
    parser = arguments_parser(__doc__ or "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = []
    for length in arguments.lengths:
        query, key, value = torch.randn(3, 1, HEADS, length, WIDTH // HEADS).requires_grad_()
        attention = MultiHeadAttention(WIDTH, HEADS)

        def run(mask: Mask, q: Tensor = query, k: Tensor = key, v: Tensor = value, to: MultiHeadAttention = attention) -> None:
            result, _ = to.attend(q, k, v, mask, False, q)
            torch.autograd.grad(result.sum(), (q, k, v))

        for name, pattern in PATTERNS.items():
            sparse = attention_mask(length, causal=True, pattern=pattern(round(length**0.5)))
            assert sparse.groups is not None
            times = interleaved(lambda m=sparse: run(m), lambda: run(Mask(causal=True)), arguments.repeats)
            cases.append(Case(f"attention to {length} positions, {name}", "dense, causal", *times, "s"))
    report(cases, arguments.json)


if __name__ == "__main__":
    main()
