"""Shows which levels of the image the words read, and which levels of the text the image reads.

    python examples/inspect_gates.py WEIGHTS IMAGE TEXT

Level 0 is the input of the first fusion layer; the last level of a row is the layer's own, the in-layer partner.
"""

import argparse
from pathlib import Path

# Before transformers; the Auto classes open what these two define.
import unimo3.model.processor
import unimo3.model.unimo3  # noqa: F401

# isort: split
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor


def table(name: str, gates: list[Tensor | None]) -> str:
    """The mean weight of each level, a fusion layer a row.

    Args:
        gates: of each layer [B, tokens, heads, levels]; None where a layer has one level and no gate.
    """
    lines = [name]
    for layer, weights in enumerate(gates, 1):
        means = [1.0] if weights is None else weights.float().mean(dim=(0, 1, 2)).tolist()
        lines.append(f"  layer {layer}: " + "  ".join(f"level {level} {mean:.2f}" for level, mean in enumerate(means)))
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder that pretrain.export wrote")
    parser.add_argument("image", type=Path)
    parser.add_argument("text")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.weights)
    model = AutoModel.from_pretrained(args.weights).float().eval()
    batch = processor(images=[Image.open(args.image)], text=[args.text], return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, output_gates=True)
    print(table("words read the image", output.text_gates))
    print(table("the image reads the words", output.image_gates))


if __name__ == "__main__":
    main()
