"""Answers chosen from a list: the classifier that a system which answers questions may end in.

Source: ViLT https://arxiv.org/abs/2102.03334, section 4.2: two layers with layer norm and GELU between them, trained with
binary cross-entropy on soft targets. The last bias starts at the odds of one right answer in the list, not near 1 : 1. Where
answers exclude each other, as the classes of visual entailment do, a softmax divides one belief among them.

Shapes: B questions, A answers, D width.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.errors import UserError
from mm.losses.answers import answer_loss, answer_targets, class_loss
from mm.types import Candidates, RankedAnswers

GREY = 128
"""Of 255."""


class AnswerList(nn.Module):
    """A classifier over answers.

    Args:
        width: D of the vectors that it reads.
        answers: What can be answered, normalised; empty while only their number is known.
        num_answers: A.
        exclusive: Whether a question has one right answer, and the others are wrong.
    """

    def __init__(self, width: int, answers: Sequence[str], num_answers: int, *, exclusive: bool = False) -> None:
        super().__init__()
        self.answers, self.exclusive = tuple(answers), exclusive
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
        loss = (class_loss if self.exclusive else answer_loss)(logits, targets)
        return {"answer": loss, "answer_accuracy": targets.gather(1, chosen).mean()}

    def rank(self, pooled: Float[Tensor, "b d"], candidates: Candidates | None, k: int) -> list[RankedAnswers]:
        """The ``k`` likeliest answers of each question, of equals the first. Raises `UserError` for unknown candidates."""
        words = self.answers if candidates is None else candidates.words
        unknown = [word for word in words if word not in self._places]
        if unknown:
            raise UserError(f"'{unknown[0]}' is none of the {len(self.answers)} answers that this model knows; leave it out")
        columns = torch.tensor([self._places[word] for word in words], device=pooled.device)
        score = functools.partial(torch.softmax, dim=1) if self.exclusive else torch.sigmoid
        return ranked(words, self(pooled)[:, columns], k, score)


def ranked(
    words: tuple[str, ...], logits: Float[Tensor, "b a"], k: int, score: Callable[[Tensor], Tensor]
) -> list[RankedAnswers]:
    """The ``k`` answers of each question with the highest logits, of equals the first; ``score`` turns a row into scores."""
    best = logits.sort(dim=1, descending=True, stable=True)
    rows = zip(best.indices[:, :k].tolist(), score(best.values)[:, :k].tolist(), strict=True)
    return [RankedAnswers(tuple(words[place] for place in places), tuple(scores)) for places, scores in rows]


def grey(image: Tensor) -> Tensor:
    """What a network sees that learns from the questions alone, in place of pictures of this shape and type."""
    return torch.full_like(image, GREY / 255 if image.is_floating_point() else GREY)
