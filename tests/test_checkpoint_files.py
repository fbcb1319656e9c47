"""Plain data and the directory of checkpoints: what goes in comes out, and nothing but a whole checkpoint ever comes out."""

import errno
import json
import os
import random
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from sb3_agpo.agpo.gates import DisagreementGate
from sb3_agpo.agpo.policies import AGPOPolicy
from sb3_agpo.checkpoint import directory as directory_module
from sb3_agpo.checkpoint.directory import (
    ARRAYS,
    MANIFEST,
    STRUCTURE,
    complete_checkpoints,
    find_checkpoint,
    read_checkpoint,
    read_newest,
    write_checkpoint,
)
from sb3_agpo.checkpoint.plain_data import (
    NotPlainError,
    PlainData,
    decode,
    encode,
    is_plain,
    same_data,
    set_space_generators,
    space_generators,
)
from sb3_agpo.dynamics.mujoco import FiniteDifferences


def through_json(value: Any) -> Any:
    """Encode, write as JSON, read and decode."""
    data = encode(value)
    return decode(json.loads(json.dumps(data.structure)), data.arrays)


# ---------------------------------------------------------------------- plain data

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text() | st.integers() | st.just("!")
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


@given(TREES)
@settings(max_examples=100, deadline=None)
def test_nested_values_come_back(value: Any) -> None:
    assert through_json(value) == value


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_, np.float16, "U3"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_arrays_come_back(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype=dtype)
    back = through_json({"x": array})["x"]
    assert np.array_equal(back, array) and back.dtype == array.dtype and back.shape == shape
    scalar = np.ones((), dtype=dtype)[()]
    assert type(through_json(scalar)) is type(scalar)


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.bfloat16, th.int64, th.bool, th.uint8])
def test_tensors_come_back(dtype: th.dtype) -> None:
    for tensor in (th.ones(2, 3, dtype=dtype), th.ones((), dtype=dtype), th.zeros(0, dtype=dtype)):
        back = through_json(tensor)
        assert back.dtype == dtype and back.shape == tensor.shape and th.equal(back, tensor)


def test_special_numbers_come_back() -> None:
    values = [float("inf"), float("-inf"), -0.0, 5e-324, 0.1 + 0.2, 2**200]
    assert [repr(value) for value in through_json(values)] == [repr(value) for value in values]
    assert np.isnan(through_json(float("nan")))


def test_objects_come_back() -> None:
    schedule = through_json(FloatSchedule(LinearSchedule(1.0, 0.5, 0.25)))
    assert schedule(0.9) == FloatSchedule(LinearSchedule(1.0, 0.5, 0.25))(0.9)
    assert through_json(FiniteDifferences(threads=3)) == FiniteDifferences(threads=3)
    assert through_json(DisagreementGate(2.0)).tolerance == 2.0
    noise = through_json(VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), 3))
    assert noise().shape == (3, 2)
    statistics = RunningMeanStd(shape=(2,))
    statistics.update(np.random.default_rng(0).normal(size=(5, 2)))
    assert np.array_equal(through_json(statistics).var, statistics.var)
    frequency = TrainFreq(3, TrainFrequencyUnit.EPISODE)
    assert through_json(frequency) == frequency
    assert through_json({AGPOPolicy: th.nn.SiLU, "x": [th.optim.AdamW, np.float32, np.dtype("int8")]}) == {
        AGPOPolicy: th.nn.SiLU,
        "x": [th.optim.AdamW, np.float32, np.dtype("int8")],
    }
    ordered = through_json({"x": OrderedDict(b=1, a=OrderedDict({2: 3}))})["x"]
    assert type(ordered) is type(ordered["a"]) is OrderedDict and list(ordered) == ["b", "a"] and ordered["a"] == {2: 3}
    values = deque([1, 2], maxlen=3)
    assert through_json(values) == values and through_json(values).maxlen == 3


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_generators_come_back(kind: type) -> None:
    for generator in (np.random.Generator(kind(5)), np.random.RandomState(kind(5)), random.Random(5)):
        generator.random()
        back = through_json(generator)
        assert [back.random() for _ in range(3)] == [generator.random() for _ in range(3)]


@pytest.mark.parametrize("seed", [5, [1, 2**40], None])
def test_generators_spawn_as_they_would_have(seed: Any) -> None:
    generator = np.random.default_rng(seed)
    generator.spawn(2)
    back = through_json(generator)
    for own, other in zip(generator.spawn(2), back.spawn(2), strict=True):
        assert own.random() == other.random()
    before = encode(generator)
    del before.structure["seeds"]  # checkpoints of before
    assert decode(before.structure, before.arrays).random() == generator.random()


@pytest.mark.parametrize("dtype", ["int8", ">f4", "U24", "M8[ms]", [("t", "i4"), ("x", ">f8", (2,)), ("deep", [("y", "?")])]])
def test_data_types_come_back(dtype: Any) -> None:
    assert through_json(np.dtype(dtype)) == np.dtype(dtype)
    assert decode({"!": "dtype", "name": "float32"}, {}) == np.float32, "checkpoints of before"


def test_tensors_of_all_kinds_come_back_or_are_refused() -> None:
    numbers = th.tensor([1 + 2j, 3 - 1j])
    assert th.equal(through_json(numbers.conj()), numbers.conj()) and th.equal(through_json(numbers.imag), numbers.imag)
    sparse, small = th.eye(2).to_sparse(), th.ones(2).to(th.float8_e4m3fn)
    for value in (sparse, small, th.ones(2, device="meta")):
        assert not is_plain([value])


def test_nan_is_the_same_as_nan() -> None:
    """Options of an environment are compared with those of the checkpoint."""
    nan = float("nan")
    assert same_data({"a": [nan, 1.0]}, {"a": (float("nan"), 1.0)}) and not same_data(nan, 1.0)
    assert same_data(np.array([nan, 2.0]), np.array([nan, 2.0])) and not same_data(np.array([nan]), np.array([1.0]))
    assert same_data(np.array(["a"]), np.array(["a"])) and not same_data(np.array(["a"]), nan)


@pytest.mark.parametrize(
    "value",
    [
        *(lambda: 0, object(), np.array([object()]), open, json, random.SystemRandom(), {"deep": [1, {"x": print}]}),
        Path("x"),
        *(np.matrix([[1.0]]), np.ma.masked_array([1.0], [True]), np.rec.array([(1, 2)])),  # these compute in other ways
        np.dtype([("x", object)]),
        *(defaultdict(list, a=[1]), Counter("a"), MappingProxyType({"a": 1})),  # these would come back as dictionaries
    ],
)
def test_other_values_are_refused(value: Any) -> None:
    assert not is_plain(value)
    with pytest.raises(NotPlainError, match="thing"):
        encode(value, "thing")


class Mine(th.nn.Module):
    """A class from no allowed package."""


@pytest.mark.parametrize("kind", [Mine, Path, os.PathLike, RunningMeanStd, dict])
def test_other_classes_are_refused(kind: type) -> None:
    assert not is_plain(kind)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "torch:load",
        "torch.hub:load",
        "torch.serialization:os.system",
        "stable_baselines3.common.save_util:cloudpickle.loads",
        "numpy:load",
        "sb3_agpo.nowhere:Thing",
        "",
    ],
)
def test_reading_names_classes_only_from_the_list(name: str) -> None:
    with pytest.raises(ValueError, match=r"class|exist"):
        decode({"!": "class", "name": name}, {})


@pytest.mark.parametrize(
    "structure",
    [
        {"!": "object", "class": "os:system", "attributes": {}},
        {"!": "object", "class": "torch.nn.modules.module:Module", "attributes": {}},
        {"!": "record", "class": "Popen", "items": []},
        {"!": "enumeration", "class": "TrainFrequencyUnit", "name": "__class__"},
        {"!": "generator", "state": {"bit_generator": "seed"}},
        {"!": "array", "name": "missing"},
        {"!": "nonsense", "items": []},
        {"!": "dict"},
    ],
)
def test_reading_refuses_what_encoding_does_not_make(structure: Any) -> None:
    with pytest.raises(ValueError, match=r"not understood|no bit generator"):
        decode(structure, {})


def test_space_generators() -> None:
    space = spaces.Dict({"a": spaces.Box(0, 1, (2,)), "b": spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)])})
    space.seed(3)
    saved = through_json(space_generators(space))
    expected = space.sample()
    set_space_generators(space, saved)
    again = space.sample()
    assert np.array_equal(again["a"], expected["a"]) and again["b"][0] == expected["b"][0]


# ---------------------------------------------------------------------- directories


def content(number: int) -> PlainData:
    """Something to write."""
    return encode({"number": number, "array": np.full(1000, number, dtype=np.float64)})


def number_in(directory: Path) -> int:
    """What the newest checkpoint holds; an error if it is not whole."""
    data = read_checkpoint(find_checkpoint(directory))
    value = decode(data.structure, data.arrays)
    assert np.array_equal(value["array"], np.full(1000, value["number"]))
    return value["number"]


def test_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for number in range(12):
        path = write_checkpoint(tmp_path / "sub" / "dir", content(number), 1000 - number, keep=3)
    assert path.name == "000012-step-989"
    names = [path.name for path in complete_checkpoints(tmp_path / "sub" / "dir")]
    assert names == ["000010-step-991", "000011-step-990", "000012-step-989"]
    assert sorted(os.listdir(tmp_path / "sub" / "dir")) == names
    assert number_in(tmp_path / "sub" / "dir") == 11
    assert number_in(tmp_path / "sub" / "dir" / names[0]) == 9
    assert complete_checkpoints(tmp_path / "nothing") == []


def test_more_checkpoints_than_six_digits_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, content(1), 10, keep=1).rename(tmp_path / "999999-step-10")
    for number in (2, 3):
        write_checkpoint(tmp_path, content(number), 10 * number, keep=2)
        assert number_in(tmp_path) == number
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["1000000-step-20", "1000001-step-30"]


def test_reading_beside_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint may be removed, once a newer one is there, between finding and reading it."""
    write_checkpoint(tmp_path, content(1), 10, keep=1)
    find = directory_module.find_checkpoint

    def find_and_write(path: Path) -> Path:
        found = find(path)
        if len(complete_checkpoints(path)) == 1 and found.name.startswith("000001"):
            write_checkpoint(tmp_path, content(2), 20, keep=1)
        return found

    monkeypatch.setattr(directory_module, "find_checkpoint", find_and_write)
    checkpoint, data = read_newest(tmp_path)
    assert checkpoint.name == "000002-step-20"
    assert decode(data.structure, data.arrays)["number"] == 2
    with pytest.raises(ValueError, match="is damaged"):
        read_newest(tmp_path / "000001-step-10")


class Killed(BaseException):
    """Stands for the end of the process: nothing that handles errors may catch it."""


#: every call by which a checkpoint reaches the disk, and how often it is made
CALLS = {"os.fsync": 5, "os.replace": 2, "np.savez": 1, "json.dump": 2, "shutil.rmtree": 1, "zlib.crc32": 2, "os.open": 2}


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException, after: bool) -> None:
    """Let the given call of a function fail, before or after it has done its work."""
    module_name, function_name = name.split(".")
    module = getattr(directory_module, module_name)
    function: Callable[..., Any] = getattr(module, function_name)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise error
        result = function(*args, **kwargs)
        if calls == call:
            raise error
        return result

    monkeypatch.setattr(module, function_name, failing)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("name", "call"), [(name, call + 1) for name, calls in CALLS.items() for call in range(calls)])
def test_killed_at_every_step(name: str, call: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, content(1), 10, keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, name, call, Killed(), after)
        with pytest.raises(Killed):
            write_checkpoint(tmp_path, content(2), 20, keep=1)
    assert number_in(tmp_path) in (1, 2)
    # The next process goes on, and cleans up
    write_checkpoint(tmp_path, content(3), 30, keep=1)
    assert number_in(tmp_path) == 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "call"), [("os.fsync", 1), ("os.fsync", 3), ("np.savez", 1), ("json.dump", 2), ("os.replace", 1)]
)
@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "the disk is full: free space, or lower `keep`"), (errno.EACCES, "check the path and its permissions")],
)
def test_failure_to_write(
    name: str, call: int, number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_checkpoint(tmp_path, content(1), 10, keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, name, call, OSError(number, os.strerror(number)), after=False)
        with pytest.raises(OSError, match=f"000001-step-10, is still whole; {advice}") as caught:
            write_checkpoint(tmp_path, content(2), 20, keep=1)
    assert caught.value.errno == number
    assert [path.name for path in tmp_path.iterdir()] == [first.name]  # nothing is left behind
    assert number_in(tmp_path) == 1
    write_checkpoint(tmp_path, content(2), 20, keep=1)
    assert number_in(tmp_path) == 2


def test_first_failure_and_bad_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "os.fsync", 1, OSError(errno.ENOSPC, "No space left on device"), after=False)
        with pytest.raises(OSError, match="there was none before"):
            write_checkpoint(tmp_path, content(1), 10, keep=1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "file", content(1), 10, keep=1)


def test_old_checkpoint_that_cannot_be_removed_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, content(1), 10, keep=1)
    with monkeypatch.context() as patch:
        fail_at(patch, "os.replace", 2, OSError(errno.EACCES, "no"), after=False)
        write_checkpoint(tmp_path, content(2), 20, keep=1)
    assert number_in(tmp_path) == 2
    write_checkpoint(tmp_path, content(3), 30, keep=1)
    assert len(complete_checkpoints(tmp_path)) == 1


def damage(path: Path, how: str) -> None:
    """Do something to a file that a disk might do."""
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "empty", "short", "flipped"])
@pytest.mark.parametrize("name", [ARRAYS, STRUCTURE, MANIFEST])
def test_damaged_checkpoint(name: str, how: str, tmp_path: Path) -> None:
    for number in (1, 2):
        newest = write_checkpoint(tmp_path, content(number), 10 * number, keep=2)
    damage(newest / name, how)
    with pytest.raises(ValueError, match=r"000002-step-20 is damaged .* resume from .*000001-step-10"):
        number_in(tmp_path)
    assert number_in(tmp_path / "000001-step-10") == 1
    damage(tmp_path / "000001-step-10" / name, how)


def test_only_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content(1), 10, keep=1)
    damage(path / ARRAYS, "flipped")
    with pytest.raises(ValueError, match="there is no other one next to it"):
        number_in(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format": "something else", "version": 1}, "is not that of a sb3-agpo checkpoint"),
        ({"format": "sb3-agpo checkpoint", "version": 99}, "has version 99 .* this package reads version 1; resume it with"),
        ([], "is damaged"),
        ({"format": "sb3-agpo checkpoint", "version": 1, "files": {}}, "is damaged"),
    ],
)
def test_other_format_or_version(manifest: Any, message: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content(1), 10, keep=1)
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        number_in(tmp_path)


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content(1), 10, keep=1)
    np.savez(path / ARRAYS, a0=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][ARRAYS] = directory_module._fingerprint(path / ARRAYS)
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        number_in(tmp_path)


def test_archive_is_a_plain_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, content(1), 10, keep=1)
    with zipfile.ZipFile(path / ARRAYS) as archive:
        assert archive.namelist() == ["a0.npy"]
    assert sorted(os.listdir(path)) == [ARRAYS, MANIFEST, STRUCTURE]
