"""Masking of words for masked language modeling.

Source: BERT, arXiv 1810.04805: of the chosen tokens 80 % become <mask>, 10 % a random token, 10 % stay.
"""

import functools
from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class Masking:
    """Draws which tokens to predict.

    Attributes:
        probability: fraction of a text's tokens to predict; at least one is.
        mask_id: id of <mask>.
        special_ids: never predicted, and never drawn as random tokens.
        vocab_size: entries to draw random tokens from.
    """

    probability: float
    mask_id: int
    special_ids: frozenset[int]
    vocab_size: int

    @functools.cached_property
    def _special(self) -> np.ndarray:
        return np.isin(np.arange(self.vocab_size), list(self.special_ids))

    @functools.cached_property
    def _ordinary(self) -> np.ndarray:
        """Ids that random tokens are drawn from; made once, it takes a millisecond with RoBERTa's vocabulary."""
        return np.flatnonzero(~self._special)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mask one text.

        Args:
            ids: [T] token ids, padding included.

        Returns:
            The masked ids [T], and labels [T] that are -100 wherever nothing is to be predicted.
        """
        candidates = np.flatnonzero(~self._special[ids])
        masked, labels = ids.copy(), np.full_like(ids, IGNORED)
        if not len(candidates):
            return masked, labels
        chance, kind = rng.random((2, len(candidates)))
        is_chosen = chance < self.probability
        if not is_chosen.any():
            is_chosen[chance.argmin()] = True
        chosen, kind = candidates[is_chosen], kind[is_chosen]
        labels[chosen] = ids[chosen]
        masked[chosen[kind < 0.8]] = self.mask_id
        replaced = chosen[(kind >= 0.8) & (kind < 0.9)]
        if len(replaced):
            masked[replaced] = rng.choice(self._ordinary, size=len(replaced))
        return masked, labels
