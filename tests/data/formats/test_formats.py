"""One file a format: each file with a converter is registered under its name."""

import importlib
import pkgutil
import re

import pytest

from tests.data.formats.conftest import error_of
from unimo3.data import formats
from unimo3.data.formats import CONVERTERS

FIRST_FILES = {
    "cc3m": "Train_GCC-training.tsv",
    "coco": "dataset_coco.json",
    "flickr30k": "dataset_flickr30k.json",
    "nlvr2": "train.json",
    "pairs": "",
    "sbu": "sbu-captions-all.json",
    "snli_ve": "snli_ve_train.jsonl",
    "sugarcrepe": "add_att.json",
    "vg": "region_descriptions.json",
    "vqav2": "v2_OpenEnded_mscoco_train2014_questions.json",
    "winoground": "examples.jsonl",
}


def test_every_file_with_a_converter_is_entered_under_its_name():
    converters = {}
    for module in pkgutil.iter_modules(formats.__path__):
        converter = getattr(importlib.import_module(f"{formats.__name__}.{module.name}"), "convert", None)
        if converter is not None:
            converters[module.name] = converter
    assert converters == CONVERTERS
    assert converters.keys() == FIRST_FILES.keys()


@pytest.mark.parametrize("name", sorted(FIRST_FILES.keys() - {"pairs"}))
def test_an_empty_source_names_the_file_that_is_missing(name, tmp_path):
    (tmp_path / "VG_100K").mkdir()
    expected = f"{tmp_path / FIRST_FILES[name]}: cannot be read (No such file or directory); --src must name"
    assert re.match(re.escape(expected), error_of(name, tmp_path))
