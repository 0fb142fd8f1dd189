"""The token adapter of the embedded base: trained for just these weights, and small."""

from __future__ import annotations

from dreammix_trt.core.checkpoint import EMBEDDED, BaseFiles
from dreammix_trt.core.subject_tokens import TokenConfig


def test_it_belongs_to_the_shipped_base() -> None:
    """New weights of the base want it trained anew; it changes no hash of the base."""
    base = BaseFiles.open().find_own_extras()
    assert base.tokens is not None
    assert base.tokens.find_doubts(base.hash_contents) == []
    card, hashes = base.tokens.card, BaseFiles.open().hash_contents()
    assert card.base == hashes == base.hash_contents() and not [name for name in hashes if "token_adapter" in name]
    assert card.config == TokenConfig.of_base(base.configs)
    assert "rendered objects" in card.trained_on, "a third party's pictures would want a licence"
    assert [each["steps"] for each in (*card.settings["earlier"], card.settings)] == [3500, 1300, 1800, 400, 600, 800]


def test_it_is_small() -> None:
    graphs = [
        file
        for name in ("subject_features", "token_select", "token_proj")
        for file in (EMBEDDED / "graphs" / name).iterdir()
    ]
    assert sum(file.stat().st_size for file in (*graphs, EMBEDDED / "token_adapter.safetensors")) <= 3_000_000
