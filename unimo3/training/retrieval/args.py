"""Settings of the evaluation of retrieval.

Source: ALBEF, arXiv 2107.07651, section 4 (128 candidates for Flickr30K, 256 for COCO).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankingArgs:
    """How texts and images are ranked for each other."""

    shortlist: int = 128
    """Candidates of each query that the towers choose and the fusion encoder puts in order. 0: all, which is exact and
    costs as many pairs as there are images times texts."""
    fold_images: int = 0
    """Images of a fold: recall is also reported as the mean over folds of this many images, ranked separately. COCO's
    5,000 test images are five folds of 1000. 0: none."""
    pair_batch: int = 64
    """Pairs a rank fuses at a time."""
    cache_gb: float = 24.0
    """Host memory of each rank for the towers' states, in 10^9 bytes: half for images of the rank, half for all texts,
    which every rank caches. States beyond it are computed again, images' once, texts' once for each cached part of
    the images. At least one batch of each is cached."""

    def validate(self) -> list[str]:
        """Return the errors of these settings, one line each."""
        errors = [
            f"ranking.{name}: {getattr(self, name)}: 0 or more is needed"
            for name in ("shortlist", "fold_images")
            if getattr(self, name) < 0
        ]
        if self.pair_batch < 1:
            errors.append(f"ranking.pair_batch: {self.pair_batch}: at least 1 is needed")
        if not 0 <= self.cache_gb < float("inf"):
            errors.append(f"ranking.cache_gb: {self.cache_gb}: 0 or a number of 10^9 bytes is needed")
        return errors

    def fold_errors(self, num_images: int) -> list[str]:
        """Return why `num_images` held-out images cannot be ranked so, one line per error."""
        if self.fold_images > 0 and num_images % self.fold_images:
            return [
                f"ranking.fold_images: {self.fold_images}: the {num_images} images of data.val are no whole number of "
                "folds; choose a divisor, or 0 for none"
            ]
        return []
