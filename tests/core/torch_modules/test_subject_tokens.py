"""Selection and projection in torch: what numpy says, under autocast as well."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dreammix_trt.core.subject_tokens import TokenConfig  # noqa: E402
from dreammix_trt.core.subject_tokens import select_tokens as define  # noqa: E402
from dreammix_trt.core.torch_modules.subject_tokens import TokenProjection, select_tokens  # noqa: E402
from tests.core.test_subject_tokens import draw  # noqa: E402


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_selects_what_numpy_selects(autocast: bool) -> None:
    features = np.stack([draw(seed, cells=256, width=96) for seed in range(3)])
    inside = np.random.default_rng(0).integers(0, 2, (3, 256)).astype(np.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens, chosen = select_tokens(torch.from_numpy(features), torch.from_numpy(inside))
    assert tokens.dtype == torch.float32
    for number in range(3):
        truth = define(features[number], inside[number])
        np.testing.assert_array_equal(chosen[number].numpy(), truth[1])
        np.testing.assert_array_equal(tokens[number].numpy(), truth[0])


def test_equal_scores_are_in_the_order_of_the_cells() -> None:
    features = torch.ones(1, 16, 12)  # alike, so that each share is a sixteenth, to the bit
    assert select_tokens(features, torch.ones(1, 16), 4)[1].tolist() == [[0, 1, 2, 3]]


def test_selection_in_float16_is_another_one() -> None:
    """Why it is never done: scores of cells of one thing differ by less than float16 tells apart."""
    features = draw(0, cells=1024, width=64)
    unit = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    shares = np.exp(unit @ unit.T)
    scores = (shares / shares.sum(1, keepdims=True, dtype=np.float16)).sum(0, dtype=np.float16)
    kept = {*np.argsort(scores, kind="stable")[:24]} & {*define(features, count=24)[1]}
    assert len(kept) < 24


def test_a_row_depends_on_its_token_alone_and_not_on_its_size() -> None:
    config = TokenConfig(side=64, width=24, context_width=40)
    torch.manual_seed(0)
    module, tokens = TokenProjection(config), torch.randn(2, 16, 24)
    rows = module(tokens)
    assert rows.shape == (2, 16, 40)
    torch.testing.assert_close(module(tokens[:, 3:5]), rows[:, 3:5])
    torch.testing.assert_close(module(8 * tokens), rows, atol=1e-3, rtol=1e-3)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        **{"norm.weight": (24,), "norm.bias": (24,), "linear.weight": (40, 24), "linear.bias": (40,)}
    }
