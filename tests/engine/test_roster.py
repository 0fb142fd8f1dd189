"""The subjects by name, and what is remarked on them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.subject import Subject
from dreammix_trt.engine.roster import Roster
from tests.support.tiny_model import random_factors


@pytest.mark.parametrize(
    ("parts", "has_raw", "lost_raw", "told"),
    [
        (("unet_raw",), False, False, True),
        (("unet_raw",), True, False, False),
        (("unet_raw",), False, True, False),  # which is said with each picture
        (("unet", "unet_raw"), False, False, False),
        (("unet",), False, False, False),
    ],
)
def test_a_subject_of_a_unet_that_the_base_lacks_is_remarked_on(
    parts: tuple[str, ...], has_raw: bool, lost_raw: bool, told: bool
) -> None:
    factors = {part: random_factors({"a.to_k": (4, 4)}) for part in parts}
    runtime = SimpleNamespace(add_subject=lambda *_: None, has_raw_unet=has_raw, lost_raw_unet=lost_raw)
    with keep_remarks(tell=False) as remarks:
        assert Roster(runtime).add(Subject("mug", "sks", "mug", factors=factors)) == "mug"  # type: ignore[arg-type]
    assert [text for text in remarks if "subject 'mug'" in text and "target 'patched'" in text] == remarks
    assert len(remarks) == told
