"""Pictures with transparency through the whole runtime, on the host and on the simulated device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreammix_trt.core.errors import InputError
from dreammix_trt.engine import DreamMix
from dreammix_trt.engine.canvas.geometry import feather_width
from tests.engine.conftest import make_scene

STEPS = 2
SIZE = (128, 128)


@pytest.fixture(params=["host", "device"])
def painter(request: pytest.FixtureRequest) -> DreamMix:
    if request.param == "host":
        host: DreamMix = request.getfixturevalue("host")
        return host
    dm: DreamMix = request.getfixturevalue("simulated")()[0]
    return dm


def make_layers(hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture whose left part is transparent, `hidden` beneath, and a mask that reaches into it."""
    image, mask = make_scene(*SIZE)
    rgb, marked = np.asarray(image).copy(), np.asarray(mask) > 127
    alpha = np.full(SIZE, 255, np.uint8)
    middle = int(np.nonzero(marked.any(0))[0].mean())
    alpha[:, :middle] = 0
    rgb[alpha == 0] = hidden
    return np.dstack([rgb, alpha]), np.where(marked, 255, 0).astype(np.uint8)


def paint(dm: DreamMix, image: Any, mask: Any) -> np.ndarray:
    result = dm.inpaint(image, mask, "a red sks mug", num_inference_steps=STEPS, seed=3)
    assert result.images[0].mode == "RGBA"
    return np.asarray(result.images[0])


def test_what_is_painted_shows_and_what_is_hidden_is_not_seen(painter: DreamMix) -> None:
    (black, mask), (white, _) = make_layers(0), make_layers(255)
    out, other = paint(painter, Image.fromarray(black), mask), paint(painter, Image.fromarray(white), mask)
    marked = mask > 0
    assert (out[marked, 3] == 255).all()  # also where there was nothing
    np.testing.assert_array_equal(out[marked], other[marked])  # the hidden colours did not matter
    far = np.ones(SIZE, bool)
    rows, columns = (np.nonzero(marked.any(axis))[0] for axis in (1, 0))
    reach = feather_width(SIZE) + 1
    far[max(rows[0] - reach, 0) : rows[-1] + reach + 1, max(columns[0] - reach, 0) : columns[-1] + reach + 1] = False
    np.testing.assert_array_equal(out[far], black[far])
    np.testing.assert_array_equal(other[far], white[far])
    rim = out[..., 3][(black[..., 3] == 0) & ~marked & ~far]
    assert ((rim > 0) & (rim < 255)).any()  # alpha rises with the feather


@pytest.mark.parametrize(("field", "width"), [(1.0, 144), (0.0, 4)])
def test_a_wide_feather_ends_within_the_last_frame(painter: DreamMix, field: float, width: int) -> None:
    """Beyond the frame nothing is painted, so nothing may become visible there."""
    rgb, mask = make_scene(128, 512)[0], np.zeros((128, 512), np.uint8)
    mask[50:70, 40:70] = 255
    layers = np.dstack([rgb, np.where(np.arange(512) < 60, 255, 0) * np.ones((128, 1))]).astype(np.uint8)
    fields: dict[str, Any] = {"num_inference_steps": 1, "gch_field": field, "lcg_fraction": 0.0}
    result = painter.inpaint(Image.fromarray(layers), mask, "a red sks mug", feather=400, **fields)
    assert result.warnings == (f"feather is 400, but the frame ends near the mask, and {width} pixels of it are used",)
    alpha = np.asarray(result.images[0])[60, :, 3].astype(int)
    assert alpha[40:70].min() == 255 and alpha[70 + width - 1 :].max() == 0
    assert alpha[70 + width - 3] > 0 and np.abs(np.diff(alpha[69 : 70 + width])).max() <= 256 // width + 1


def test_the_mask_may_be_the_pictures_own_transparency(painter: DreamMix, caplog: pytest.LogCaptureFixture) -> None:
    image, mask = make_scene(*SIZE)
    marked = np.asarray(mask) > 127
    erased = np.dstack([np.asarray(image), np.where(marked, 0, 255).astype(np.uint8)])
    by_none = paint(painter, Image.fromarray(erased), None)
    by_mask = paint(painter, Image.fromarray(erased), np.where(marked, 255, 0).astype(np.uint8))
    with caplog.at_level("WARNING"):
        fields: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 3}
        result = painter.inpaint(Image.fromarray(erased), Image.fromarray(erased), "a red skz mug", **fields)
    recognised, unnamed = result.warnings  # the reader's and the prompt's, each also logged once
    assert "mask_image is the picture with a part erased" in recognised and "'skz'" in unnamed
    assert caplog.messages == list(result.warnings)
    by_itself = paint(painter, Image.fromarray(erased), Image.fromarray(erased))
    np.testing.assert_array_equal(by_none, by_mask)
    np.testing.assert_array_equal(by_none, by_itself)
    assert (by_none[marked, 3] == 255).all()
    with pytest.raises(InputError, match="has no transparency"):
        painter.inpaint(image, None, "a red sks mug", num_inference_steps=STEPS)
