"""ASUKA's networks of the embedded base: whole, trained for just these weights, and small."""

from __future__ import annotations

from dreammix_trt.core.asuka_folder import PARTS
from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles


def test_they_belong_to_the_shipped_base() -> None:
    """New weights of the base want them trained anew; they themselves change no hash of the base."""
    base = BaseFiles.open().find_own_extras()
    assert base.asuka is not None and base.asuka.parts == PARTS
    base.asuka.check_aligned()
    record = base.asuka.read_record()
    assert record.keys() == {"prior", "align", "decoder"}
    hashes = BaseFiles.open().hash_contents()
    assert base.hash_contents() == hashes and not [name for name in hashes if "asuka" in name]
    for name, part in record.items():  # the prior and the decoder never saw the UNets, so they outlive them
        assert part["settings"]["base"].keys() == hashes.keys(), name
        assert name != "align" or part["settings"]["base"] == hashes
        assert "rendered rooms" in part["settings"]["pictures"], "a third party's pictures would want a licence"
    assert base.asuka.find_doubts(base.hash_contents) == []


def test_they_are_small() -> None:
    files = {file.name: file for file in (EMBEDDED / "asuka").iterdir()}
    assert files.keys() == {"config.json", "train.json", *(f"{part}.safetensors" for part in PARTS)}
    assert sum(file.stat().st_size for file in files.values()) <= 4_000_000
