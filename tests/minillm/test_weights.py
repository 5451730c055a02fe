"""Pickled weights: mapped into memory, and still no record taken for its neighbour's numbers."""

import io
import zipfile

import pytest
import torch

from minillm.errors import UserError
from minillm.weights import open_weights

STATE = {"a": torch.randn(30, 5), "b": torch.randn(7), "c": torch.randn(30, 5)}


def write(file, compression: int = zipfile.ZIP_STORED, cut: str = "none"):
    """STATE as torch.save writes it, packed anew: one record cut to eight bytes."""
    torch.save(STATE, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:8] if name.endswith(f"data/{cut}") else content)
    return file


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_packed_anew_holds_the_same_numbers(tmp_path, compression):
    found = open_weights([write(tmp_path / "x.bin", compression)])
    for name, want in STATE.items():
        found[name].write_to(got := torch.empty_like(want))
        assert torch.equal(got, want)


@pytest.mark.parametrize("cut", "012")
def test_a_record_shorter_than_its_tensor_is_refused(tmp_path, cut):
    with pytest.raises(UserError, match="x.bin.*record"):
        open_weights([write(tmp_path / "x.bin", cut=cut)])


def test_tensors_that_share_a_record_are_read(tmp_path):
    whole = torch.randn(6, 4)
    torch.save({"whole": whole, "row": whole[2]}, tmp_path / "x.bin")
    found = open_weights([tmp_path / "x.bin"])
    found["row"].write_to(row := torch.empty(4))
    assert torch.equal(row, whole[2])
