"""What is asked for before work that would be in vain."""

from __future__ import annotations

import pytest

from dreammix_trt.core import extras
from dreammix_trt.core.errors import MissingExtraError


def test_what_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "list_missing", lambda packages: [each for each in packages if each == "uvicorn"])
    with pytest.raises(MissingExtraError, match=r"^uvicorn is not installed, the service needs it: .*\[serve\]"):
        extras.require_serving()
    extras.require_training()
    assert extras.SERVING == ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
