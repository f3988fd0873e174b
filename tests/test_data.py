import dataclasses
import functools
import gzip
import hashlib
import http.server
import itertools
import os
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments import data

REAL = os.environ.get("CURVAX_DATA", "")


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def idx(array: np.ndarray) -> bytes:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder, named by CURVAX_DATA, and a cache that is empty too."""
    pooch = pytest.importorskip("pooch")
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setenv("CURVAX_DATA", str(root))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    return root


@pytest.fixture
def offline(monkeypatch) -> None:
    requests = pytest.importorskip("requests")

    def get(url, **_):
        raise requests.exceptions.ConnectionError(f"no route to {url}")

    monkeypatch.setattr(requests, "get", get)


def place(root: Path, remote: data.Remote, raw: bytes, *, packed: bool = False) -> data.Remote:
    """Put a file where `remote` is looked for, and give back a remote with its hash."""
    path = root / remote.folder / (remote.file + ".gz" * packed)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = gzip.compress(raw) if packed else raw
    path.write_bytes(content)
    key = "gz_sha256" if packed else "sha256"
    return dataclasses.replace(remote, **{key: sha256(content)})


def register(monkeypatch, name: str, files: dict[str, data.Remote]) -> None:
    monkeypatch.setitem(data.REGISTRY, name, files)


SHAKESPEARE = data.REGISTRY["tinyshakespeare"]["text"]
YACHT = data.REGISTRY["yacht"]["table"]


# Files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("offline")
def test_a_file_is_read_from_the_folder(folder, packed):
    remote = place(folder, SHAKESPEARE, b"to be", packed=packed)
    assert data.read(remote) == b"to be"


@pytest.mark.parametrize("packed", [False, True])
def test_another_sha256_names_file_seen_and_wanted(folder, packed):
    wanted = SHAKESPEARE.gz_sha256 if packed else SHAKESPEARE.sha256
    remote = place(folder, SHAKESPEARE, b"not to be", packed=packed)
    seen = remote.gz_sha256 if packed else remote.sha256
    with pytest.raises(data.DataCorrupted) as caught:
        data.read(SHAKESPEARE)
    for part in ("tinyshakespeare/input.txt" + ".gz" * packed, seen, wanted):
        assert part in str(caught.value)


def test_a_file_that_does_not_unpack_is_named(folder):
    remote = place(folder, data.Remote("a", "b.gz", ""), gzip.compress(b"whole")[:-9])
    with pytest.raises(data.DataCorrupted, match=r"b\.gz does not unpack"):
        data.read(remote)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.usefixtures("offline")
def test_offline_the_message_names_the_file_the_url_and_both_ways_out(folder, monkeypatch, named):
    if not named:
        monkeypatch.delenv("CURVAX_DATA")
    with pytest.raises(data.DataUnavailable) as caught:
        data.load("tinyshakespeare")
    message = str(caught.value)
    assert "tinyshakespeare/input.txt" in message
    assert SHAKESPEARE.url is not None and SHAKESPEARE.url in message
    assert "connect to the network" in message
    assert "set CURVAX_DATA to a folder" in message
    assert (str(folder) in message) == named
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.usefixtures("folder", "offline")
def test_a_file_without_url_says_so():
    with pytest.raises(data.DataUnavailable, match=r"no URL .* set CURVAX_DATA to a folder"):
        data.load("classics")


def test_a_folder_that_is_none_is_named(folder, monkeypatch):
    monkeypatch.setenv("CURVAX_DATA", str(folder / "typo"))
    with pytest.raises(data.DataUnavailable, match="typo is not a folder"):
        data.read(SHAKESPEARE)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: (its folder, its address)."""
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(_Quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield served, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_file_is_fetched_once_and_checked(folder, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served, address = server
    raw = bytes(range(256)) * 1000
    (served / "x.bin").write_bytes(raw)
    remote = data.Remote("a/b", "x.bin", sha256(raw), f"{address}/x.bin")
    assert data.read(remote) == raw
    (served / "x.bin").unlink()
    assert data.read(remote) == raw  # from the cache
    assert not list(folder.iterdir())


def test_a_fetched_file_with_another_sha256_is_refused(folder, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served, address = server
    (served / "x.bin").write_bytes(b"else")
    remote = data.Remote("a", "x.bin", sha256(b"some"), f"{address}/x.bin")
    with pytest.raises(data.DataCorrupted) as caught:
        data.read(remote)
    for part in (remote.url, sha256(b"else"), sha256(b"some")):
        assert str(part) in str(caught.value)
    assert not list((folder.parent / "cache").rglob("x.bin"))


# Loaders


def fashion(folder, monkeypatch, change=lambda name, raw: raw):
    rng = np.random.default_rng(0)
    arrays = {
        "train images": rng.integers(0, 256, (20, 28, 28)),
        "train labels": np.arange(20) % 10,
        "test images": rng.integers(0, 256, (5, 28, 28)),
        "test labels": np.arange(5),
    }
    files = {
        key: place(folder, data.REGISTRY["fashion-mnist"][key], gzip.compress(change(key, idx(a))))
        for key, a in arrays.items()
    }
    register(monkeypatch, "fashion-mnist", files)
    return arrays


def test_images_are_standardised_by_the_training_split(folder, monkeypatch):
    arrays = fashion(folder, monkeypatch)
    found = data.load("fashion-mnist")
    train = arrays["train images"] / 255
    for split, key in ((found.train, "train"), (found.test, "test")):
        images, labels = split
        assert images.dtype == np.float32 and labels.dtype == np.int32
        wanted = (arrays[f"{key} images"] / 255 - train.mean()) / train.std()
        np.testing.assert_allclose(images, wanted, atol=1e-6)
        np.testing.assert_array_equal(labels, arrays[f"{key} labels"])
    np.testing.assert_allclose(found.metadata["mean"], train.mean())
    np.testing.assert_allclose(found.metadata["std"], train.std())
    assert found.metadata["classes"] == 10


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:9], "truncated"),
        (lambda raw: raw + b"\x00", "too long"),
        (lambda raw: b"\x89PNG" + raw, "no idx file"),
        (lambda raw: b"", "no idx file"),
    ],
)
def test_a_broken_idx_file_is_named(folder, monkeypatch, cut, words):
    fashion(folder, monkeypatch, lambda key, raw: cut(raw) if key == "test images" else raw)
    with pytest.raises(data.DataCorrupted, match=rf"t10k-images-idx3-ubyte\.gz is {words}"):
        data.load("fashion-mnist")


def test_images_and_labels_must_belong_together(folder, monkeypatch):
    fewer = idx(np.arange(4))
    fashion(folder, monkeypatch, lambda key, raw: fewer if key == "test labels" else raw)
    with pytest.raises(data.DataCorrupted, match=r"test: images of shape \(5, 28, 28\)"):
        data.load("fashion-mnist")


def test_text_becomes_ids_and_back(folder, monkeypatch):
    text = "Wär' nicht das Auge sonnenhaft, " * 10
    register(monkeypatch, "tinyshakespeare", {"text": place(folder, SHAKESPEARE, text.encode())})
    found = data.load("tinyshakespeare")
    (train,), (test,) = found.train, found.test
    assert found.valid is None
    assert train.dtype == test.dtype == np.int32
    assert found.decode(np.concatenate([train, test])) == text
    assert test.size == len(text.encode()) // 10
    assert found.vocabulary == bytes(sorted(set(text.encode())))
    assert train.max() < found.metadata["vocabulary size"] == len(found.vocabulary)


def test_all_splits_of_a_text_share_one_vocabulary(folder, monkeypatch):
    texts = {"train": b"abba", "valid": b"bc", "test": b"ad"}
    files = data.REGISTRY["wikitext-2"]
    placed = {key: place(folder, files[key], raw, packed=True) for key, raw in texts.items()}
    register(monkeypatch, "wikitext-2", placed)
    found = data.load("wikitext-2")
    assert found.vocabulary == b"abcd"
    assert found.valid is not None
    for key, (ids,) in {"train": found.train, "valid": found.valid, "test": found.test}.items():
        assert found.decode(ids) == texts[key].decode()


def yacht(folder, monkeypatch, rows=105):
    table = np.random.default_rng(1).normal(3.0, 2.0, (rows, 4)).round(4)
    table[:, 1] = 7.0  # a feature that does not vary
    text = "\n".join(" \t".join(map(str, row)) + " " for row in table) + "\n\n"
    register(monkeypatch, "yacht", {"table": place(folder, YACHT, text.encode(), packed=True)})
    return table


def test_regression_is_split_by_seed_and_standardised(folder, monkeypatch):
    table = yacht(folder, monkeypatch)
    found = data.load("yacht", split_seed=3)
    features, targets = found.train
    assert features.shape == (95, 3) and targets.shape == (95, 1)
    assert found.test[0].shape == (10, 3) and found.test[1].shape == (10, 1)
    assert features.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(features.std(0), [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose([targets.mean(), targets.std()], [0, 1], atol=1e-6)

    # Train and test are the whole table, once.
    everything = np.concatenate([targets, found.test[1]]).ravel()
    units = everything * found.metadata["target std"] + found.metadata["target mean"]
    np.testing.assert_allclose(np.sort(units), np.sort(table[:, -1]), atol=1e-5)

    again, other = data.load("yacht", split_seed=3), data.load("yacht", split_seed=4)
    np.testing.assert_array_equal(again.train[0], features)
    assert not np.array_equal(other.train[0], features)


def test_a_broken_table_is_named(folder, monkeypatch):
    register(monkeypatch, "yacht", {"table": place(folder, YACHT, b"1 2 3\n4 5\n")})
    with pytest.raises(data.DataCorrupted, match=r"uci-regression/yacht/data\.txt is no table"):
        data.load("yacht")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'mnist'.*fashion-mnist.*yacht"):
        data.load("mnist")


# Batches


def test_windows_are_shifted_by_one():
    inputs, targets = data.windows(np.arange(11), 4)
    np.testing.assert_array_equal(inputs, [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(targets, inputs + 1)
    with pytest.raises(ValueError, match="11 ids has no window of length 11"):
        data.windows(np.arange(11), 11)


@hypothesis.given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 30),
    draw=st.data(),
)
def test_batches_resume_where_they_stopped(size, seed, start, draw):
    batch = draw.draw(st.integers(1, size))
    arrays = (np.arange(size), np.arange(size) * 2.0)
    whole = list(data.batches(arrays, batch, seed=seed, steps=31))
    rest = list(data.batches(arrays, batch, seed=seed, steps=31, start=start))
    assert len(whole) == 31 and len(rest) == 31 - start
    for (x, y), (x_again, y_again) in zip(whole[start:], rest, strict=True):
        assert x.shape == y.shape == (batch,)
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(y, y_again)
        np.testing.assert_array_equal(y, 2.0 * x)  # examples stay together


def test_an_epoch_has_every_example_once_but_the_rest():
    arrays = (np.arange(23),)
    epochs = list(data.batches(arrays, 5, seed=0, epochs=2))
    assert len(epochs) == 8
    first = np.concatenate([x for (x,) in epochs[:4]])
    second = np.concatenate([x for (x,) in epochs[4:]])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 20
    assert not np.array_equal(first, second)


def test_batches_depend_on_the_seed_and_go_on_for_ever():
    arrays = (np.arange(100),)
    one, other = (next(data.batches(arrays, 50, seed=seed))[0] for seed in (0, 1))
    assert not np.array_equal(one, other)
    endless = itertools.islice(data.batches(arrays, 50, seed=0), 1000)
    assert sum(1 for _ in endless) == 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 11}, "wanted 1 to 10"),
        ({"seed": -1}, "negative"),
        ({"start": -1}, "negative"),
        ({"epochs": 1, "steps": 1}, "not both"),
        ({"arrays": (np.arange(10), np.arange(9))}, r"\[9, 10\]"),
    ],
)
def test_batches_refuse_at_the_call(change, words):
    arguments = {"arrays": (np.arange(10),), "batch_size": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        data.batches(**arguments)


# The real files


SHAPES = {
    "fashion-mnist": ((60000, 28, 28), (10000, 28, 28)),
    "tinyshakespeare": ((1003855,), (111539,)),
    "wikitext-2": ((10797148,), (1256449,)),
    "classics": ((35945969,), (2563983,)),
    "concrete": ((927, 8), (103, 8)),
    "energy": ((691, 8), (77, 8)),
    "kin8nm": ((7373, 8), (819, 8)),
    "power-plant": ((8611, 4), (957, 4)),
    "wine-quality-red": ((1439, 11), (160, 11)),
    "yacht": ((277, 6), (31, 6)),
}


def test_every_data_set_has_its_shapes_here():
    assert set(SHAPES) == set(data.REGISTRY)


@pytest.mark.skipif(not Path(REAL).is_dir() or not REAL, reason="CURVAX_DATA names no folder")
@pytest.mark.parametrize("name", SHAPES)
def test_the_real_files(name):
    folder = next(iter(data.REGISTRY[name].values())).folder
    if not Path(REAL, folder).is_dir():
        pytest.skip(f"CURVAX_DATA has no {folder}")
    found = data.load(name)
    assert (found.train[0].shape, found.test[0].shape) == SHAPES[name]
    if found.kind == "regression":
        assert found.train[1].shape == (len(found.train[0]), 1)
    if name == "fashion-mnist":
        images, labels = found.train
        np.testing.assert_allclose(found.metadata["mean"], 0.2860, atol=1e-4)
        np.testing.assert_allclose(found.metadata["std"], 0.3530, atol=1e-4)
        assert abs(images.mean(dtype=np.float64)) < 1e-6
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, 6000))
    if name == "tinyshakespeare":
        assert len(found.vocabulary) == 65
        assert found.decode(found.train[0][:14]) == "First Citizen:"
