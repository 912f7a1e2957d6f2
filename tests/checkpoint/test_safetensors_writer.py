import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimo3.checkpoint.safetensors_writer import SafetensorsWriter, read_header
from unimo3.errors import CheckpointError

TYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint64,
]
TENSORS = {
    **{f"all.{dtype}": torch.arange(5).remainder(2).to(dtype) for dtype in TYPES},
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    'a matrix, with a "quoted" name and an é': torch.rand(3, 7).half(),
}


def write(path: Path) -> None:
    """In pieces of two elements, the last ones first."""
    writer = SafetensorsWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()})
    for name, tensor in reversed(TENSORS.items()):
        flat = tensor.reshape(-1)
        for first in reversed(range(0, flat.numel(), 2)):
            writer.write(name, first, flat[first : first + 2])
    writer.flush()
    writer.close()


def test_pieces_in_any_order_give_the_file_that_the_library_writes(tmp_path):
    write(tmp_path / "ours")
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, TENSORS[name])


def test_a_header_gives_the_offsets_of_tensors(tmp_path):
    write(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    entries = read_header(tmp_path / "file")
    assert entries.keys() == TENSORS.keys()
    entry = entries["scalar"]
    assert (entry.dtype, entry.shape, entry.num_bytes) == (torch.float32, torch.Size([]), 4)
    assert content[entry.start : entry.start + 4] == torch.tensor(3.5).numpy().tobytes()


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(first: int, last: int) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"12345678",
        with_header(b"{}", b"left over"),
        with_header(b"[]", b""),
        with_header(b"not json", b""),
        (2**60).to_bytes(8, "little") + b"{}",
        with_header(json.dumps({"a": entry(0, 4)}).encode(), b"123"),
        with_header(json.dumps({"a": entry(0, 4), "b": entry(2, 6)}).encode(), b"123456"),
        with_header(json.dumps({"a": entry(0, 4), "b": entry(8, 12)}).encode(), b"123456789012"),
        with_header(json.dumps({"a": entry(0, 8)}).encode(), b"12345678"),
        with_header(json.dumps({"a": entry(0, 4) | {"dtype": "X1"}}).encode(), b"1234"),
        with_header(json.dumps({"a": {"dtype": "F32"}}).encode(), b"1234"),
    ],
)
def test_a_file_that_does_not_add_up_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no complete safetensors file"):
        read_header(tmp_path / "file")


def test_a_type_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"a: is of type torch.complex128"):
        SafetensorsWriter(tmp_path / "file", {"a": (torch.complex128, torch.Size([1]))})
    assert not (tmp_path / "file").exists()
