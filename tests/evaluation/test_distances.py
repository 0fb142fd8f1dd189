"""FID, Inception and LPIPS: formulas against closed forms and numpy, networks against what others' code made of the
same weights (recorded with torch-fidelity 0.4.0 and torchmetrics 1.9.0)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.evaluation.metrics.fid import Fid, Moments, frechet_distance, read_pictures
from dreammix_trt.evaluation.metrics.metric import Sample
from tests.support.metric_weights import draw_pictures, fill_weights, write_lpips
from tests.support.protocols import save

#: every 300th feature of torch-fidelity's FeatureExtractorInceptionV3 with the weights of seed 3, and the mean of all
INCEPTION = (
    [5.305028, 0.0, 4.827515, 18.492868, 0.129930, 0.837675, 2.988822],
    [5.981603, 0.0, 5.664157, 21.053118, 0.127346, 0.967246, 3.359610],
)
INCEPTION_MEANS = (4.9681606, 5.578832)
#: the same of torchvision 0.29.1's inception_v3 behind its own transforms
TORCHVISION = (
    [4.385004, 0.0, 3.953433, 16.306881, 0.076408, 0.712833, 2.46286],
    [5.085055, 0.0, 4.801021, 18.871431, 0.067852, 0.828606, 2.80019],
)
TORCHVISION_MEANS = (4.0393424, 4.6439438)
LPIPS = 0.0597945154  # torchmetrics' _LPIPS with the weights of `write_lpips`


def gather(rows: Any) -> Moments:
    moments = Moments()
    for row in rows:
        moments.add(row)
    return moments


def test_running_moments_are_those_of_all_rows() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (50, 7)) @ np.random.default_rng(1).normal(size=(7, 7))
    moments = gather(rows)
    assert np.allclose(moments.mean, rows.mean(0), atol=1e-12)
    assert np.allclose(moments.covariance, np.cov(rows.T), atol=1e-12)


def test_the_distance_is_the_papers() -> None:
    """Of Gaussians whose covariances commute it is |m1 - m2|^2 + |s1 - s2|^2, s: square roots of the eigenvalues."""
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    first, second = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    means = rng.normal(size=(2, 5))
    made = []
    for mean, deviations in zip(means, (first, second), strict=True):
        moments = Moments(3, mean)
        moments._spread = 2 * (turn * deviations**2) @ turn.T
        made.append(moments)
    wanted = ((means[0] - means[1]) ** 2).sum() + ((first - second) ** 2).sum()
    assert frechet_distance(*made) == pytest.approx(wanted, rel=1e-10)
    assert frechet_distance(made[0], made[0]) == pytest.approx(0, abs=1e-10)


def test_it_agrees_with_the_root_of_a_general_product() -> None:
    rng = np.random.default_rng(4)
    one, other = (gather(rng.normal(size=(30, 6)) @ rng.normal(size=(6, 6))) for _ in range(2))
    root_trace = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).astype(complex)).sum().real
    apart = one.mean - other.mean
    wanted = apart @ apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * root_trace
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)


def test_fid_is_of_each_task_and_has_no_value_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    pictures = [rng.integers(0, 256, (9, 9, 3), np.uint8) for _ in range(8)]
    for number, picture in enumerate(pictures):
        save(tmp_path / f"{number}.png", picture)
    (tmp_path / "notes.txt").write_text("no picture")
    subject: Any = None

    def extract(picture: Any) -> Any:
        return picture.reshape(-1, 3).mean(0).astype(np.float64)

    fid = Fid(extract, read_pictures(tmp_path))
    for picture in pictures:
        for task, shift in (("identity", 0), ("editing", 90)):
            darker = np.maximum(picture.astype(int) - shift, 0).astype(np.uint8)
            sample = Sample(darker, picture, np.ones((9, 9), bool), subject, "", task, {})
            assert fid.add(sample) is None
    assert fid.result("identity") == pytest.approx(0, abs=1e-8)
    assert (fid.result("editing") or 0) > 1000
    assert fid.result("other") is None and "8 real pictures" in fid.about
    with pytest.raises(InputError, match="FID has 0 real pictures"):
        Fid(extract, [])
    with pytest.raises(InputError, match="--real"):
        list(read_pictures(tmp_path / "nowhere"))


def test_inception_is_the_one_that_fid_is_measured_with(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from dreammix_trt.evaluation.metrics.inception import Inception, make_inception

    state = fill_weights(make_inception, 3)
    for classes, wanted, means, origin in (
        (1008, INCEPTION, INCEPTION_MEANS, "TensorFlow"),
        (1000, TORCHVISION, TORCHVISION_MEANS, "torchvision"),
    ):
        torch.save({**state, "fc.weight": torch.zeros(classes, 2)}, tmp_path / "inception.pth")
        inception = Inception(tmp_path / "inception.pth")
        assert origin in inception.origin
        for picture, some, mean in zip(draw_pictures(), wanted, means, strict=True):
            features = inception(picture)
            assert features.shape == (2048,) and inception(picture) is features
            assert features[:2048:300] == pytest.approx(some, abs=2e-4)
            assert features.mean() == pytest.approx(mean, abs=2e-4)


def test_pictures_are_scaled_as_tensorflow_1_did() -> None:
    from dreammix_trt.evaluation.metrics.inception import resize_like_tensorflow

    picture = np.arange(0, 40, 10, dtype=np.uint8).reshape(1, 4, 1)
    assert resize_like_tensorflow(picture, 8)[0, :, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_like_tensorflow(picture, 2)[0, :, 0].tolist() == [0, 20]


def test_torchvision_sees_the_middle() -> None:
    from dreammix_trt.evaluation.metrics.inception import crop_like_torchvision

    picture = np.zeros((342, 400, 3), np.uint8)
    picture[:, 50] = 200  # 400 - 299 = 101 columns are cut: 50 at the left, 51 at the right
    assert np.array_equal(crop_like_torchvision(picture), picture[22:321, 50:349])
    assert crop_like_torchvision(picture[:40, :30]).shape == (299, 299, 3)


def test_lpips_is_that_of_its_authors(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from dreammix_trt.evaluation.metrics.lpips import Lpips

    lpips = Lpips(*write_lpips(tmp_path))
    one, other = draw_pictures()
    assert lpips.measure(one, other) == pytest.approx(LPIPS, rel=1e-5)
    assert lpips.measure(one, one) == 0
    mask = np.zeros(one.shape[:2], bool)
    mask[:, 40:] = True
    subject: Any = None
    painted = np.where(mask[..., None], other, one)
    assert lpips.add(Sample(painted, one, mask, subject, "", "identity", {})) == 0, "inside the mask counts nowhere"
    assert (lpips.add(Sample(painted, one, mask, subject, "", "identity", {}, one)) or 0) > 0


def test_weights_are_read_as_tensors_and_nothing_else(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from dreammix_trt.evaluation.metrics.lpips import Lpips

    alexnet, heads = write_lpips(tmp_path)
    with pytest.raises(InputError, match=r"--lpips .*nowhere\.pth: no such file"):
        Lpips(tmp_path / "nowhere.pth", heads)
    (tmp_path / "cut.pth").write_bytes(alexnet.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match=r"cut\.pth: cannot be read"):
        Lpips(tmp_path / "cut.pth", heads)
    with pytest.raises(FileFormatError, match="of another network: it lacks features"):
        Lpips(heads, heads)
    state = torch.load(alexnet, weights_only=True)
    torch.save({**state, "features.0.weight": torch.zeros(2, 3)}, tmp_path / "shape.pth")
    with pytest.raises(FileFormatError, match=r"of another network .*size mismatch"):
        Lpips(tmp_path / "shape.pth", heads)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(FileFormatError, match=r"evil\.pth: cannot be read as weights"):
        Lpips(tmp_path / "evil.pth", heads)
    assert not (tmp_path / "ran").exists()
