"""What finetune.predict does, by its checked arguments.

Source: none.
"""

import argparse
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from finetune.tasks import config_class
from unimo3.atomic_write import replace_bytes
from unimo3.errors import ConfigError, DataError
from unimo3.inference.exported_model import Loaded, load
from unimo3.inference.inputs import Prepared, Row, checked_text, prepare, tokens
from unimo3.inference.lines import Answerer, answer_file, count_lines, encoded, error_message, images_of, text_of
from unimo3.inference.predictors import Answers, Predictor
from unimo3.inference.search import Search
from unimo3.inference.search_index import embed_images, embed_texts, images_in, open_search_index, save
from unimo3.model.downstream import Unimo3ForImageAndTextRetrieval
from unimo3.texts import is_blank, plain

log = logging.getLogger(__name__)

# With byte-order marks, which a file made of several has inside too.
_NUM_ERRORS_SHOWN = 10
_RERANK = 32


def predict(args: argparse.Namespace) -> None:
    """Predict, or make an index."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.task == "index":
        make_index(args)
        return
    task = config_class(args.task).task
    loaded = load(args.weights, task.model_class(), args.device, args.dtype)
    predictor = task.predictor(loaded)
    find = _searcher(args, loaded)
    if args.input is not None:
        answer_lines(args, predictor, task.num_images, find)
        return
    texts = [checked_text(text, "--text") for text in args.text]
    if find is not None:
        answers = find(texts[0] if texts else args.image[0], args.top)
    elif predictor.searches and (len(args.image) > 1 or len(texts) > 1):
        answers = rank(loaded, args.image, texts, args.batch, args.top)
    else:
        prepared = prepare(loaded, Row(tuple(args.image), texts[0]))
        (answers,) = predictor.predict([prepared], args.top)
        show(answers, args)
        if args.explain is not None:
            explain(loaded, prepared, answers, args.explain)
        return
    show(answers, args)


def explain(loaded: Loaded, prepared: Prepared, answers: Answers, path: Path) -> None:
    """``--explain``."""
    # Here, since a prediction alone needs no pictures.
    from unimo3.inference.explain import draw_explanation, read_attention, words_of

    images = prepared.pixels.to(loaded.device)[None]  # [1, I, 3, S, S]
    inputs = tokens(loaded, [prepared.text]) | {"pixel_values": images[:, 0] if images.shape[1] == 1 else images}
    words = words_of(loaded.processor.tokenizer, inputs["input_ids"][0].tolist(), plain(prepared.text))
    readings = read_attention(loaded.model, inputs, words)
    content = io.BytesIO()
    draw_explanation(prepared.pixels, readings, [prepared.text, *_lines(answers)]).save(content, "PNG")
    replace_bytes(path, content.getvalue())


def _searcher(args: argparse.Namespace, loaded: Loaded) -> Callable[[str | Path, int], Answers] | None:
    """The search in ``--index``, if there is one."""
    if getattr(args, "index", None) is None:
        return None
    index = open_search_index(args.index, Path(args.weights))
    if index.kind == "images" and args.image:
        raise ConfigError(f"--image {args.image[0]}: {args.index} contains images, which a text searches; give --text")
    if index.kind == "texts" and args.text:
        raise ConfigError(
            f"--text '{args.text[0]}': {args.index} contains texts, which an image searches; give --image"
        )
    args.searched = index.kind
    return Search(loaded, index, _RERANK if args.rerank is None else args.rerank, args.batch).find


def make_index(args: argparse.Namespace) -> None:
    """``predict index``."""
    texts = [] if args.texts is None else _read_texts(args.texts)
    names, skipped = (texts, []) if texts else images_in(args.images)
    loaded = load(args.weights, Unimo3ForImageAndTextRetrieval, args.device, args.dtype)
    errors: list[str] = []
    with progress(len(names), "text" if texts else "image") as bar:
        if texts:
            index = embed_texts(loaded, texts, args.batch, bar.update)
        else:
            index, errors = embed_images(loaded, args.images, names, args.batch, bar.update)
    save(index, Path(args.weights), args.out)
    print(f"{args.out}: {len(index.names)} {index.kind}")
    if skipped:
        log.warning("%s: skipped %d files that are no images:\n  %s", args.images, len(skipped), _first(skipped))
    if errors:
        raise DataError(
            f"{args.images}: {len(errors)} of {len(names)} files could not be decoded; {args.out} has the others:\n  "
            + _first(errors)
        )


def _first(lines: list[str]) -> str:
    """The first of many lines, and how many more there are."""
    num_more = len(lines) - _NUM_ERRORS_SHOWN
    return "\n  ".join([*lines[:_NUM_ERRORS_SHOWN], *[f"and {num_more} more"] * (num_more > 0)])


def _read_texts(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--texts {path}: cannot be read ({error}); name a UTF-8 file with one text a line"
        ) from error
    if "\0" in content:
        raise ConfigError(f"--texts {path}: has zero bytes, as UTF-16 does; save it as UTF-8")
    texts = [plain(line) for line in content.split("\n") if not is_blank(line)]
    if not texts:
        raise ConfigError(f"--texts {path}: contains no text; write one a line")
    return texts


def rank(loaded: Loaded, images: list[Path], texts: list[str], batch: int, top: int) -> Answers:
    """Several images for a text, or several texts for an image, all of them fused.

    Raises:
        DataError: an image is missing, or none.
    """
    if len(texts) == 1:
        index, errors = embed_images(loaded, Path(), [str(path) for path in images], batch)
        if errors:
            raise DataError("; ".join(errors))
        return Search(loaded, index, len(images), batch).find(texts[0], top)
    index = embed_texts(loaded, texts, batch)
    return Search(loaded, index, len(texts), batch).find(images[0], top)


def answer_lines(
    args: argparse.Namespace,
    predictor: Predictor,
    num_images: int,
    find: Callable[[str | Path, int], Answers] | None,
) -> None:
    """``--input``; see the text of `finetune.predict`. `num_images` is that of a row."""
    folder = args.input.parent
    how: Answerer[Any]
    if find is None:

        def row(line: dict[str, Any]) -> Any:
            return prepare(predictor.loaded, Row(images_of(line, num_images, folder), text_of(line)))

        how = Answerer(row, lambda rows: predictor.predict(rows, args.top), args.batch)
    else:

        def query(line: dict[str, Any]) -> str | Path:
            return text_of(line) if args.searched == "images" else images_of(line, 1, folder)[0]

        # One at a time: each is a batch of candidates, and one whose image is missing does not fail the others.
        how = Answerer(query, lambda queries: [find(queries[0], args.top)], 1)
    with progress(count_lines(args.input), "line") as bar:
        num_lines, errors = answer_file(args.input, args.output, how, bar.update)
    print(f"{args.output}: {num_lines - len(errors)} of {num_lines} lines answered")
    if errors:
        raise DataError(error_message(args.input, args.output, num_lines, errors))


def progress(total: int, unit: str) -> Any:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())


def show(answers: Answers, args: argparse.Namespace) -> None:
    """Print answers, the best first."""
    if args.json:
        asked = {"image": [str(path) for path in args.image], "text": args.text}
        print(encoded({"task": args.task, "input": asked, "answers": answers}))
        return
    print(*_lines(answers), sep="\n")


def _lines(answers: Answers) -> list[str]:
    """Answers for people."""
    lines = []
    for answer in answers:
        numbers = {name: value for name, value in answer.items() if name in ("score", "match", "similarity")}
        words = [str(value) for name, value in answer.items() if name not in numbers]
        fields = [
            f"{value:.4f}" if name == "score" else f"{name} {'-' if value is None else f'{value:.4f}'}"
            for name, value in numbers.items()
        ]
        lines.append("  ".join(fields + words))
    return lines
