"""Search in an index: images for a text, or texts for an image. The towers choose, the fusion encoder orders.

Source: ALBEF, arXiv 2107.07651, section 4.
"""

# Shapes: N of the index, k candidates, D width of the embeddings, n saved states of a tower, T text tokens, W width.

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimo3.errors import ConfigError, DataError
from unimo3.inference.exported_model import Loaded
from unimo3.inference.inputs import read_pixels, tokens
from unimo3.inference.predictors import Answers
from unimo3.inference.search_index import SearchIndex
from unimo3.objectives.retrieval import RetrievalLoss


class Search:
    """Ranks an index's entries for one query at a time.

    Args:
        rerank: candidates of the towers that the fusion encoder puts in order, before all others; 0: none. Images among
            them are read again.
        batch: pairs fused at a time.

    Raises:
        ConfigError: a number is below its least, or the index is of another width.
    """

    def __init__(self, loaded: Loaded, index: SearchIndex, rerank: int, batch: int):
        if rerank < 0:
            raise ConfigError(f"--rerank {rerank}: a number of candidates is needed, or 0 for none")
        if (width := index.embeds.shape[1]) != loaded.config.itc_size:
            raise ConfigError(
                f"--index: has vectors of width {width}, the model makes {loaded.config.itc_size}; remove it and make "
                "it again with python -m finetune.predict index"
            )
        self._loaded, self._index, self._rerank, self._batch = loaded, index, rerank, batch
        self._task = RetrievalLoss(loaded.model, seed=0)

    @torch.inference_mode()
    def find(self, query: str | Path, top: int) -> Answers:
        """The best entries for a text (of an index of images) or an image file (of one of texts).

        Returns:
            At most `top`: ``image`` or ``text``, ``match`` (a probability, None if only the towers ranked it) and
            ``similarity`` (a cosine).

        Raises:
            DataError: an image is missing, or none.
        """
        inputs = self._inputs(query)
        out = self._task(inputs)
        similarities = self._index.embeds @ out["embeds"][0].cpu()  # [N]
        order = similarities.sort(descending=True, stable=True).indices
        chosen, rest = order[: self._rerank], order[self._rerank :]
        answers: Answers = []
        if len(chosen):
            scores = self._fuse(out["states"], inputs.get("attention_mask"), chosen.tolist())
            ranks = scores.sort(descending=True, stable=True).indices
            answers = [self._answer(chosen[rank], similarities, scores[rank].sigmoid().item()) for rank in ranks[:top]]
        return answers + [self._answer(number, similarities, None) for number in rest[: top - len(answers)]]

    def _inputs(self, query: str | Path) -> dict[str, Tensor]:
        if isinstance(query, Path):
            return {"pixel_values": self._pixels([query])}
        return tokens(self._loaded, [query])

    def _pixels(self, paths: list[Path]) -> Tensor:
        """[rows, 3, S, S]."""
        return torch.stack([read_pixels(self._loaded, path) for path in paths]).to(self._loaded.device)

    def _fuse(self, states: Tensor, mask: Tensor | None, chosen: list[int]) -> Tensor:
        """Scores of the query with candidates, in logits, [k].

        Args:
            states: of the query, [1, n, tokens, W].
            mask: of the query if it is a text, [1, T].
        """
        parts = []
        for start in range(0, len(chosen), self._batch):
            numbers = chosen[start : start + self._batch]
            if self._index.kind == "images":
                try:
                    images = self._pixels([self._index.path(number) for number in numbers])
                except DataError as error:
                    raise DataError(f"{error}; it is in the index: put it back, or make the index again") from error
                assert mask is not None
                text, image = states, self._task({"pixel_values": images})["states"]
            else:
                made = tokens(self._loaded, [self._index.names[number] for number in numbers])
                mask = made["attention_mask"]
                text, image = self._task(made)["states"], states
            rows = len(numbers)
            batch = {
                "text_states": text.expand(rows, -1, -1, -1),
                "image_states": image.expand(rows, -1, -1, -1),
                "attention_mask": mask.expand(rows, -1),
            }
            parts.append(self._task(batch)["scores"].cpu())
        return torch.cat(parts)

    def _answer(self, number: Tensor, similarities: Tensor, match: float | None) -> dict[str, Any]:
        index = self._index
        if index.kind == "images":
            shown = {"image": str(index.path(int(number)))}
        else:
            shown = {"text": index.names[int(number)]}
        return {**shown, "match": match, "similarity": similarities[number].item()}
