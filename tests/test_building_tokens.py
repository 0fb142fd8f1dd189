"""Builds with a token adapter: parts of their own, run by ONNX Runtime, bound on a device, refused for other bases."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dreammix_trt.building import BaseSources, build  # noqa: E402
from dreammix_trt.core.axes import Sides  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import FileFormatError  # noqa: E402
from dreammix_trt.core.networks import Network, describe_networks  # noqa: E402
from dreammix_trt.core.passport import Passport  # noqa: E402
from dreammix_trt.core.seam import Array  # noqa: E402
from dreammix_trt.core.token_adapter import FILE_NAME  # noqa: E402
from dreammix_trt.engine import DreamMix  # noqa: E402
from dreammix_trt.engine.device.memory_plan import Options  # noqa: E402
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks  # noqa: E402
from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet  # noqa: E402
from tests.engine.conftest import make_scene  # noqa: E402
from tests.support.tokens import write_small_adapter  # noqa: E402

NAMES = ("subject_features", "token_select", "token_proj")
ONE = {"pictures": 1}


@pytest.fixture(scope="module")
def file(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens") / "small.safetensors"
    return write_small_adapter(place, BaseFiles.open(small_base), told={"base": {"unet": "12" * 32}}).file


@pytest.fixture(scope="module")
def engine(test_home: Path, small_base: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "with"
    build(out=out, base=small_base, tokens=file)
    return out


@pytest.fixture(scope="module")
def networks(small_base: Path, file: Path) -> dict[str, Network]:
    found = describe_networks(BaseFiles.open(small_base, tokens=file))
    return {network.name: network for network in found if network.name in NAMES}


def test_they_are_parts_with_keys_of_their_own(engine: Path, small_base: Path, file: Path, tmp_path: Path) -> None:
    passport = Passport.read(engine)
    parts = passport.parts
    assert {*NAMES} <= parts.keys() and passport.base["tokens"].keys() == {FILE_NAME}
    assert f"--tokens {file}" in passport.command
    assert all(entry.parity["max_rel"] < 1e-4 for entry in passport.networks if entry.name in NAMES)
    (doubt,) = [remark for remark in passport.base["remarks"] if "token adapter" in remark]
    assert "was trained with other files than this base's" in doubt
    plain = build(out=tmp_path / "without", base=small_base)
    assert plain.parts == {name: key for name, key in parts.items() if name not in NAMES}
    assert "tokens" not in plain.base and "--tokens" not in plain.command
    assert (plain.base_key, plain.base["files"]) == (passport.base_key, passport.base["files"]), "the base is the same"
    write_small_adapter(tmp_path / "x.safetensors", BaseFiles.open(small_base), seed=1)
    other = build(out=tmp_path / "other", base=small_base, tokens=tmp_path / "x.safetensors").parts
    assert [name for name in parts if other[name] != parts[name]] == ["token_proj"], "features are the base's alone"


def test_the_command_line_makes_the_same(engine: Path, test_home: Path) -> None:
    from typer.testing import CliRunner

    from dreammix_trt.cli import app

    before = Passport.read(engine)
    result = CliRunner().invoke(app, shlex.split(before.command)[1:])
    assert result.exit_code == 0, result.output
    assert Passport.read(engine).parts == before.parts


def test_that_of_the_base_s_folder_is_found_and_looked_at_by_build_alone(small_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    write_small_adapter(base / FILE_NAME, BaseFiles.open(small_base))
    assert BaseFiles.open(base).tokens is None
    found = BaseSources(base).open().find_own_extras().tokens
    assert found is not None and found.file == base / FILE_NAME
    (base / FILE_NAME).write_bytes(b"cut")
    assert BaseFiles.open(base).hash_contents() == BaseFiles.open(small_base).hash_contents()
    with pytest.raises(FileFormatError, match=FILE_NAME):
        build(out=tmp_path / "engine", base=base)


def test_onnx_runtime_gives_what_torch_gives(
    engine: Path, small_base: Path, file: Path, networks: dict[str, Network]
) -> None:
    truth = TorchEngineSet(BaseFiles.open(small_base, tokens=file))
    with DreamMix.load(engine, threads=1) as dm:
        for name, network in networks.items():
            given = network.draw_example(ONE)
            found, wanted = dm.networks.run(name, **given), truth.run(name, **given)
            for key, value in wanted.items():
                np.testing.assert_allclose(found[key], value, atol=1e-4 * np.abs(value).max(), rtol=0)


def test_keys_and_values_of_the_base_are_what_the_features_take(engine: Path, networks: dict[str, Network]) -> None:
    """The whole way: text -> keys and values -> features -> tokens -> rows of the text condition."""
    with DreamMix.load(engine, threads=1) as dm:
        given = networks["subject_features"].draw_example(ONE)
        spec = next(
            each for each in dm.networks.entries["unet_kv"]["inputs"] if each["name"] == "encoder_hidden_states"
        )
        text = np.random.default_rng(0).standard_normal((1, 77, spec["shape"][-1])).astype(np.float32)
        given |= dm.networks.run("unet_kv", encoder_hidden_states=text)
        features = dm.networks.run("subject_features", **given)["features"]
        selected = dm.networks.run("token_select", features=features, inside=np.ones(features.shape[:2], np.float32))
        rows = dm.networks.run("token_proj", tokens=selected["tokens"])["token_rows"]
    assert features.shape == (1, 64, 96) and selected["tokens"].shape == (1, 48, 96) and rows.shape == (1, 48, 160)
    np.testing.assert_array_equal(features[0, selected["chosen"][0]], selected["tokens"][0])


def test_a_device_binds_them_beside_its_rooms(engine: Path, networks: dict[str, Network]) -> None:
    device = SimulatedDevice()
    with DreamMix.load(engine, threads=1) as host:
        simulated = SimulatedNetworks(device, host.networks)
        options = Options(largest_picture=128 * 128)
        with DreamMix.on_device(device, simulated, host.tokenizers, (), options, owned=(device,)) as dm:
            image, mask = make_scene()
            dm.inpaint(image, mask, "a mug", num_inference_steps=2, seed=1)
            studio, sides = dm.studio, Sides(1, 1, 16, 16)
            assert studio is not None and all(name in str(studio.plan) for name in NAMES)
            assert not {*NAMES} & {*simulated.bound}, "what a subject needs once takes no place in a room"
            studio.residency.need(*NAMES)
            space = device.allocate(1 << 16)
            workspace = Array(space.pointer, (space.nbytes,), "uint8")
            for name, network in networks.items():
                tensors = (*simulated.inputs(name), *simulated.outputs(name))
                held = {tensor.name: device.allocate(1 << 20) for tensor in tensors}
                arrays = {
                    tensor.name: Array(held[tensor.name].pointer, sides.shape(tensor), tensor.dtype)
                    for tensor in tensors
                }
                bound = simulated.bind(name, sides, arrays, workspace)
                given = network.draw_example(ONE)
                for key, value in given.items():
                    studio.put(arrays[key], value)
                bound.enqueue(studio.stream)
                for key, value in host.networks.run(name, **given).items():
                    found = studio.bring(arrays[key])
                    np.testing.assert_allclose(found, value, atol=1e-5 * np.abs(value).max(), rtol=0)


def test_an_adapter_of_another_base_is_refused_before_the_build(tmp_path: Path, small_base: Path) -> None:
    own = BaseFiles.open(small_base)
    write_small_adapter(tmp_path / "x.safetensors", own, block=2)
    assert BaseFiles.open(small_base, tokens=tmp_path / "x.safetensors").tokens is not None
    from tests.support.tiny_model import write_tiny_model

    tiny = write_tiny_model(tmp_path / "tiny", half=False).folder
    with pytest.raises(FileFormatError, match=r"x\.safetensors: tokens: width is 128, but this base has"):
        build(out=tmp_path / "engine", base=tiny, tokens=tmp_path / "x.safetensors")
    assert not (tmp_path / "engine").exists()
