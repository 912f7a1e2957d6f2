"""What img2dataset downloads from a list of URLs is indexed and trained on as it is."""

import http.server
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from tests.data.conftest import coco, draw_jpeg  # noqa: F401  (fixture)
from tests.data.mutations import result_of
from tests.finetune.conftest import pretrained, tokenizer  # noqa: F401  (fixtures)
from tests.integration.conftest import MODEL
from tests.spawn import ROOT
from tests.waiting import PATIENCE_S
from unimo3.data.index import ShardIndex
from unimo3.data.sample_texts import captions_of, content_of
from unimo3.training.metrics import read_metrics

# In an environment of its own: it needs an older webdataset. `make` has a target for it.
TOOL = ROOT / ".venv" / "img2dataset" / "bin" / "img2dataset"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not TOOL.exists() and not os.environ.get("REQUIRE_IMG2DATASET"),
        reason=f"needs img2dataset; type: make {TOOL.relative_to(ROOT)}",
    ),
]

NUM_URLS = 30
# Of each ten URLs one is missing and one is no image; one of all answers too late.
MISSING, TEXT, LATE = 3, 5, 14


def caption(number: int) -> str:
    return f'photo {number}, a "red"\ndog' if number % 7 == 0 else f"photo {number}"


def is_good(number: int) -> bool:
    return number % 10 not in (MISSING, TEXT) and number != LATE


@pytest.fixture(scope="module")
def url():
    """A web server of photos; its address."""
    end = threading.Event()

    class Photos(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            number = int(Path(self.path).stem)
            if number == LATE:
                end.wait(PATIENCE_S)  # the client leaves before
                return
            if number % 10 == MISSING:
                self.send_error(404)
                return
            body = b"not a photo" if number % 10 == TEXT else draw_jpeg(number, 40 + number, 64)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Photos)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    end.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def downloaded(url, tmp_path_factory):
    """What img2dataset writes of all URLs, ten a shard."""
    folder = tmp_path_factory.mktemp("img2dataset")
    urls = [{"url": f"{url}/{number}.jpg", "caption": caption(number)} for number in range(NUM_URLS)]
    (folder / "urls.json").write_text(json.dumps(urls))
    options = {
        "url_list": folder / "urls.json",
        "input_format": "json",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": folder / "out",
        "number_sample_per_shard": 10,
        "image_size": 32,
        "processes_count": 1,
        "thread_count": 16,
        "timeout": 10,
    }
    command = [str(TOOL), *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(
        command, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def test_downloads_are_indexed_and_trained_on(downloaded, pretrained, program, tmp_path):  # noqa: F811
    assert len(list(downloaded.glob("*.parquet"))) == len(list(downloaded.glob("*_stats.json"))) == 3
    assert result_of("index", "--src", str(downloaded)) == (0, "")
    good = [number for number in range(NUM_URLS) if is_good(number)]
    index = ShardIndex(downloaded)
    assert len(index.shards) == 3
    captions = {}
    for shard, num_samples in enumerate(index.samples_per_shard):
        for sample in range(num_samples):
            members = index.read(shard, sample, ("json", "txt"))
            captions[index.key(shard, sample)] = captions_of(members, content_of(members))
    assert sorted(captions.values()) == sorted([caption(number)] for number in good)

    recipe = {
        "run": {"dir": str(tmp_path), "name": "run"},
        "model": MODEL,
        "data": {"train": str(downloaded), "tokenizer": str(pretrained), "max_text_tokens": 12, "ledger": True},
        "training": {"steps": 1, "global_batch": len(good), "micro_batch": len(good)},
    }
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    recipe["training"]["ds_config"] = str(tmp_path / "zero.json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    program.check(1, "pretrain.train", "--config", tmp_path / "recipe.yaml")
    (record,) = read_metrics(tmp_path / "run")
    assert record["bad_samples"] == 0
    (line,) = map(json.loads, (tmp_path / "run" / "ledger" / "rank_00000.jsonl").read_text().splitlines())
    assert sorted(key for _, _, _, key in line["samples"]) == sorted(captions)
