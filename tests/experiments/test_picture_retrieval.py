"""Galleries of pictures, and the fraction of pairs that are in the right order."""

import torch

from experiments.picture_retrieval import aucs, galleries
from experiments.pictures import KINDS, kind_of


def test_galleries_are_of_one_kind_and_complete():
    kinds = ["noto", "emoji_one"] * 5 + ["noto"] * 3
    chosen = galleries(kinds, 4)
    assert [len(gallery) for gallery in chosen] == [4, 4, 4]
    assert len({number for gallery in chosen for number in gallery.tolist()}) == 12
    assert all(len({kinds[number] for number in gallery}) == 1 for gallery in chosen)
    # All variants and seeds are measured on the same ones.
    assert all(map(torch.equal, chosen, galleries(kinds, 4)))
    assert [kind_of(f"{kind}_1f34e_3.png") for kind in KINDS] == list(KINDS)


def test_auc_is_the_fraction_of_pairs_in_the_right_order():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 3.0]])
    is_right = torch.tensor([[True, False, True, False], [False, False, True, False]])
    # Of 2 x 2 pairs one is in the wrong order; an equal score is not the right order.
    assert aucs(scores, is_right).tolist() == [3 / 4, 2 / 3]
