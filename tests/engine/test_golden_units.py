"""The recorded pieces of the algorithm, and a check that the checker can fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.golden_units import check_units


def test_every_recorded_piece_is_reproduced(golden: Path) -> None:
    rows = check_units(golden / "units.npz")
    assert [row for row in rows if not row.passed] == []
    assert len(rows) >= 40


def test_wrong_numbers_are_found(golden: Path, tmp_path: Path) -> None:
    with np.load(golden / "units.npz") as file:
        arrays = {name: file[name] for name in file.files}
    changed = ("crop_box", "feather_out", "tas_out", "timestep_table", "blur_out", "head_out_ch", "fooocus_step_count")
    for name in changed:
        arrays[name].reshape(-1)[0] += 1
    arrays["keymap_sdxl_diffusers"][7] = "elsewhere.weight"
    arrays["novelty"] = np.zeros(3)
    for beside in ("model", "inpaint_head.pth"):
        (tmp_path / beside).symlink_to(golden / beside)
    np.savez(tmp_path / "units.npz", **arrays)
    failed = {row.array for row in check_units(tmp_path / "units.npz") if not row.passed}
    assert failed >= {*changed, "keymap_sdxl_diffusers", "novelty (unknown array)"}
