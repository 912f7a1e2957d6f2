"""Draws the model into model.svg, next to this file: ``python docs/pictures/model.py``.

Source: none.
"""

from pathlib import Path

WIDTH, HEIGHT = 860, 372
LAYERS = 3
INK, SOFT = "#1f2933", "#9aa5b1"
TEXT, IMAGE, GATE = "#2f6f9f", "#b5651d", "#f2c14e"
# Left edges of the columns, from the text tower to the image tower; one box is as wide in all of them.
COLUMNS = {"text tower": 20, "text": 225, "image": 485, "image tower": 690}
BOX_WIDTH, BOX_HEIGHT, STEP, BOTTOM = 150, 40, 88, 248


class Drawing:
    """An SVG file under construction."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: float, y: float, label: str, color: str, height: float = BOX_HEIGHT, fill: str = "white") -> None:
        """A rounded box with a line of text."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{height}" rx="6" fill="{fill}" stroke="{color}" '
            'stroke-width="1.6"/>'
        )
        self.label(x + BOX_WIDTH / 2, y + height / 2 + 4, label)

    def label(self, x: float, y: float, text: str, size: int = 13, color: str = INK, anchor: str = "middle") -> None:
        """A line of text."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}">{text}</text>'
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK, width: float = 1.4) -> None:
        """A line with a head."""
        self.parts.append(
            f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{color}" '
            f'stroke-width="{width}" marker-end="url(#{color[1:]})"/>'
        )

    def gate(self, x: float, y: float) -> None:
        """A learned weight of each level."""
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="9" fill="{GATE}" stroke="{INK}"/>')
        self.label(x, y + 4, "g", 12)

    def svg(self) -> str:
        """The file."""
        heads = "".join(
            f'<marker id="{color[1:]}" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9" refX="8" '
            f'refY="4.5" orient="auto"><path d="M0,0 L9,4.5 L0,9 z" fill="{color}"/></marker>'
            for color in (INK, SOFT, TEXT, IMAGE)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, '
            'sans-serif">\n<title>UNIMO-3: each fusion layer reads the other modality at all levels up to its own'
            f'</title>\n<defs>{heads}</defs>\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def row(layer: int) -> float:
    """Upper edge of a fusion layer's boxes; layer 1 is the lowest."""
    return BOTTOM - STEP * (layer - 1)


def draw() -> str:
    """The model with three fusion layers."""
    drawing = Drawing()
    for name, color in (("text", TEXT), ("image", IMAGE)):
        x, tower = COLUMNS[name], COLUMNS[f"{name} tower"]
        height = row(1) - row(LAYERS) + BOX_HEIGHT
        encoder = "text tower (RoBERTa)" if name == "text" else "image tower (ViT)"
        drawing.box(tower, row(LAYERS), encoder, color, height)
        inner, outer = (tower + BOX_WIDTH, x) if name == "text" else (tower, x + BOX_WIDTH)
        for layer in range(1, LAYERS + 1):
            y = row(layer) + BOX_HEIGHT / 2
            drawing.box(x, row(layer), f"{name} layer {layer}", color)
            drawing.arrow((inner, y), (outer, y), SOFT)
            if layer > 1:
                drawing.arrow((x + BOX_WIDTH / 2, row(layer - 1)), (x + BOX_WIDTH / 2, row(layer) + BOX_HEIGHT), color)
        drawing.label(tower + BOX_WIDTH / 2, BOTTOM + 75, "words" if name == "text" else "patches")
        drawing.arrow((tower + BOX_WIDTH / 2, BOTTOM + 60), (tower + BOX_WIDTH / 2, BOTTOM + BOX_HEIGHT), color)
    drawing.label((COLUMNS["text tower"] + BOX_WIDTH + COLUMNS["text"]) / 2, row(LAYERS) - 12, "bridges", 12, SOFT)
    drawing.label((COLUMNS["image"] + BOX_WIDTH + COLUMNS["image tower"]) / 2, row(LAYERS) - 12, "bridges", 12, SOFT)
    left, right = COLUMNS["text"] + BOX_WIDTH, COLUMNS["image"]
    for layer in range(1, LAYERS + 1):
        y = row(layer) + BOX_HEIGHT / 2
        for level in range(1, layer + 1):
            is_partner = level == layer
            below = row(level) + BOX_HEIGHT - 4
            color, width = (IMAGE, 2.4) if is_partner else (SOFT, 1.3)
            drawing.arrow((right, below), (left + 20, y + (6 if is_partner else 2)), color, width)
        drawing.gate(left + 10, y)
    top = row(LAYERS) - 62
    drawing.box(COLUMNS["text"], top, "MLM", INK, 30)
    drawing.box(COLUMNS["image"], top, "ITM", INK, 30)
    drawing.arrow((COLUMNS["text"] + 75, row(LAYERS)), (COLUMNS["text"] + 75, top + 30), TEXT)
    drawing.arrow((COLUMNS["image"] + 75, row(LAYERS)), (COLUMNS["image"] + 75, top + 30), IMAGE)
    drawing.arrow((COLUMNS["text"] + 130, row(LAYERS)), (COLUMNS["image"] + 20, top + 30), TEXT)
    drawing.label(WIDTH / 2, BOTTOM + 62, "ITC compares the towers", 12)
    drawing.label(
        WIDTH / 2,
        BOTTOM + 86,
        "A text layer reads the inputs of image layers: its own (in-layer, thick) and all earlier ones (cross-layer);",
        12,
    )
    drawing.label(
        WIDTH / 2, BOTTOM + 103, "a learned gate g weighs them. Image layers read the text stream in the same way.", 12
    )
    return drawing.svg()


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
