"""Answers of tuned weights: for a question, a statement, a hypothesis or a search, or for a file of many.

    predict vqa --weights W --image F --text "what is it?"
    predict nlvr2 --weights W --image LEFT --image RIGHT --text "both are dogs"
    predict snli_ve --weights W --image F --text "a dog sleeps"
    predict retrieval --weights W --image F --text "a dog"          whether they match; several of one are ranked
    predict vqa ... --explain out.png                               and a picture of where the words read the image
    predict index --weights W --images FOLDER --out INDEX           once; or --texts FILE, one text a line
    predict retrieval --weights W --index INDEX --text "a dog"      searches images; a text index by --image
    predict TASK --weights W --input IN.jsonl --output OUT.jsonl    many at a time

One process, no launcher. A line of IN.jsonl is an object {"image": PATH, "text": ...}, of NLVR2 with a list of two
paths; with --index the text alone, or the image. Paths start from the file's folder; further fields are retained. A
line of OUT.jsonl has "line", its number, "input", and "answers" or, if that line is invalid, "error": the others are
answered all the same, all errors are reported at the end, and the exit status is 78. OUT.jsonl is written atomically.

Source: none.
"""

import logging

from finetune.predict_command import parse_arguments
from unimo3.errors import exit_with_status


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Predict, or make an index."""
    args = parse_arguments(argv, __doc__ or "")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    from finetune.predict_program import predict

    predict(args)


if __name__ == "__main__":
    main()
