"""Answers chosen from a list: the classifier that a system which answers questions may end in.

Source: ViLT https://arxiv.org/abs/2102.03334, section 4.2: two layers with layer norm and GELU between them, trained with
binary cross-entropy on soft targets. The last bias starts at the odds of one right answer in the list, not near 1 : 1.

Shapes: B questions, A answers, D width.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.errors import UserError
from mm.losses.answers import answer_loss, answer_targets
from mm.types import Candidates, RankedAnswers


class AnswerList(nn.Module):
    """A classifier over answers.

    Args:
        width: D of the vectors that it reads.
        answers: What can be answered, normalised; empty while only their number is known.
        num_answers: A.
    """

    def __init__(self, width: int, answers: Sequence[str], num_answers: int) -> None:
        super().__init__()
        self.answers = tuple(answers)
        self._places = {answer: place for place, answer in enumerate(self.answers)}
        hidden = 2 * width
        last = nn.Linear(hidden, num_answers)
        nn.init.constant_(last.bias, -math.log(num_answers))
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), last)

    def forward(self, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b a"]:
        """Logits of each answer being called right, fp32."""
        return self.layers(pooled).float()

    def losses(self, pooled: Float[Tensor, "b d"], answers: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
        """``answer``, the loss, and ``answer_accuracy``: how right the likeliest answers are, given the right ones."""
        logits, targets = self(pooled), answer_targets(answers, self._places).to(pooled.device)
        chosen = logits.detach().argmax(1, keepdim=True)
        return {"answer": answer_loss(logits, targets), "answer_accuracy": targets.gather(1, chosen).mean()}

    def rank(self, pooled: Float[Tensor, "b d"], candidates: Candidates | None, k: int) -> list[RankedAnswers]:
        """The ``k`` likeliest answers of each question, of equals the first. Raises `UserError` for unknown candidates."""
        words = self.answers if candidates is None else candidates.words
        unknown = [word for word in words if word not in self._places]
        if unknown:
            raise UserError(f"'{unknown[0]}' is none of the {len(self.answers)} answers that this model knows; leave it out")
        columns = torch.tensor([self._places[word] for word in words], device=pooled.device)
        best = self(pooled).sigmoid()[:, columns].sort(dim=1, descending=True, stable=True)
        rows = zip(best.indices[:, :k].tolist(), best.values[:, :k].tolist(), strict=True)
        return [RankedAnswers(tuple(words[place] for place in places), tuple(scores)) for places, scores in rows]
