"""The data sets of the simulations: loading, downloading, and the errors when they fail."""

import hashlib
import io
import pickle
import socket
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from experiment import data
from experiment.data import Dataset, load_dataset
from experiment.errors import UserError
from torchvision.datasets import CIFAR100

BOTH_CHOICES = pytest.mark.parametrize("choice", ["auto", "cifar100"])


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without logging requests to the terminal."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield an archive of 20 + 10 images, which torchvision accepts as the real CIFAR-100.

    Torchvision downloads the archive from this machine as long as the archive exists.
    """
    rng = np.random.default_rng(0)
    files = {"meta": pickle.dumps({"fine_label_names": [f"class {c}" for c in range(100)]})}
    for name, size in (("train", 20), ("test", 10)):
        pixels = rng.integers(0, 256, (size, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "fine_labels": list(range(size))})
    archive: Path = tmp_path / "server" / CIFAR100.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{CIFAR100.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(QuietHandler, directory=archive.parent)
    ) as server:
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        monkeypatch.setattr(CIFAR100, "url", url)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield archive
        server.shutdown()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every connection, so that each download of CIFAR-100 fails at once."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{not_listening.getsockname()[1]}/x")
        yield


def unpacked(archive: Path, data_dir: Path) -> Path:
    """Unpack the archive into a new data_dir and return the unpacked folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(data_dir, filter="data")
    return data_dir.joinpath(CIFAR100.base_folder)


def test_cifar100_is_the_published_data_set(cifar_dir: Path) -> None:
    dataset = load_dataset("auto", cifar_dir)
    assert (dataset.name, dataset.num_classes, dataset.note) == ("cifar100", 100, "")
    assert dataset.train_images.shape == (50_000, 3, 32, 32)
    assert dataset.test_images.shape == (10_000, 3, 32, 32)
    assert dataset.train_images.dtype == torch.uint8
    assert torch.bincount(dataset.train_labels).tolist() == [500] * 100
    assert torch.bincount(dataset.test_labels).tolist() == [100] * 100
    assert dataset.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=1e-4)
    assert dataset.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=1e-4)


def test_images_and_labels_have_torchvisions_order(tiny_cifar: Path, tmp_path: Path) -> None:
    unpacked(tiny_cifar, tmp_path / "data")
    dataset = load_dataset("cifar100", tmp_path / "data")
    for images, labels, train in (
        (dataset.train_images, dataset.train_labels, True),
        (dataset.test_images, dataset.test_labels, False),
    ):
        expected = CIFAR100(tmp_path / "data", train=train)
        for index, (image, label) in enumerate(expected):
            assert np.array_equal(images[index].permute(1, 2, 0).numpy(), np.asarray(image))
            assert labels[index] == label


def assert_digits(dataset: Dataset) -> None:
    assert (dataset.name, dataset.num_classes) == ("digits", 10)
    assert dataset.train_images.shape == (1297, 1, 8, 8)
    assert dataset.test_images.shape == (500, 1, 8, 8)
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert int(dataset.train_images.min()) == 0
    assert int(dataset.train_images.max()) == 255


def test_digits_are_fixed_and_stratified(tmp_path: Path) -> None:
    first, second = (load_dataset("digits", tmp_path) for _ in range(2))
    assert_digits(first)
    assert first.note == ""
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)
    in_train, in_test = torch.bincount(first.train_labels), torch.bincount(first.test_labels)
    share = in_train / (in_train + in_test)
    assert torch.allclose(share, torch.tensor(1297 / 1797), atol=0.005)


def test_digits_do_not_touch_the_data_folder(tmp_path: Path) -> None:
    load_dataset("digits", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_normalised_training_images_have_mean_0_and_deviation_1(tmp_path: Path) -> None:
    dataset = load_dataset("digits", tmp_path)
    images = dataset.normalise(dataset.train_images)
    assert images.dtype == torch.float32
    assert images.shape == dataset.train_images.shape
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_each_channel_is_normalised_by_its_own_statistics() -> None:
    nothing = torch.empty(0)
    dataset = Dataset("x", nothing, nothing, nothing, nothing, 2, (0.0, 0.5), (1.0, 0.25))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 2, 3, 3)
    expected = torch.tensor([[0.0, -2.0], [1.0, 2.0]])
    assert torch.equal(dataset.normalise(images)[:, :, 1, 2], expected)


def test_unknown_choice_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mnist': use one of auto, cifar100, digits"):
        load_dataset("mnist", tmp_path)


@BOTH_CHOICES
def test_download_leaves_the_data_and_nothing_else(
    tiny_cifar: Path, tmp_path: Path, choice: str
) -> None:
    data_dir = tmp_path / "new" / "data"
    dataset = load_dataset(choice, data_dir)
    assert (dataset.name, len(dataset.train_labels), dataset.note) == ("cifar100", 20, "")
    assert [path.name for path in data_dir.iterdir()] == [CIFAR100.base_folder]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "server"}
    tiny_cifar.unlink()
    assert torch.equal(load_dataset(choice, data_dir).train_images, dataset.train_images)


@pytest.mark.usefixtures("offline")
def test_auto_without_data_and_network_uses_digits_and_says_why(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    dataset = load_dataset("auto", data_dir)
    assert_digits(dataset)
    assert dataset.note.startswith(f"CIFAR-100 is not in {data_dir} and could not be downloaded (")
    assert "Connection refused)" in dataset.note
    assert dataset.note.endswith("handwritten digits instead.")
    assert "\n" not in dataset.note
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("offline")
def test_error_without_data_and_network_names_folder_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"not in .*/data and could not .* change --data-dir"
    ) as caught:
        load_dataset("cifar100", tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_damaged_download_is_not_kept(tiny_cifar: Path, tmp_path: Path) -> None:
    tiny_cifar.write_bytes(tiny_cifar.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"downloaded \(File not found or corrupted"):
        load_dataset("cifar100", tmp_path / "data")
    assert {path.name for path in tmp_path.iterdir()} == {"server"}


def test_a_server_that_does_not_answer_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "NETWORK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.getsockname()[1]}/x.tar.gz")
        assert "timed out)" in load_dataset("auto", tmp_path / "data").note
    assert socket.getdefaulttimeout() is None


@BOTH_CHOICES
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_error_names_a_damaged_file_which_is_not_deleted(
    tiny_cifar: Path, tmp_path: Path, choice: str, name: str
) -> None:
    damaged = unpacked(tiny_cifar, tmp_path / "data") / name
    damaged.write_bytes(b"not CIFAR")
    with pytest.raises(UserError, match=rf"/{name} is damaged, .*: delete .* or change"):
        load_dataset(choice, tmp_path / "data")
    assert damaged.read_bytes() == b"not CIFAR"


@BOTH_CHOICES
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_error_names_a_missing_file_which_is_not_downloaded(
    tiny_cifar: Path, tmp_path: Path, choice: str, name: str
) -> None:
    missing = unpacked(tiny_cifar, tmp_path / "data") / name
    missing.unlink()
    tiny_cifar.unlink()  # If "auto" tried to download, it would fall back to digits.
    with pytest.raises(UserError, match=rf"incomplete, .*/{name} is missing: delete .* or change"):
        load_dataset(choice, tmp_path / "data")
    assert not missing.exists()


@BOTH_CHOICES
def test_error_names_the_folder_of_an_unreadable_file(
    tiny_cifar: Path, tmp_path: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(tiny_cifar, tmp_path / "data")

    # chmod would not stop root from reading the file.
    def refuse(path: Path, _md5: str) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "check_integrity", refuse)
    with pytest.raises(UserError, match=f"cannot read CIFAR-100 in {folder}: .*denied"):
        load_dataset(choice, tmp_path / "data")


@BOTH_CHOICES
@pytest.mark.parametrize("below", ["", "one/two"])
def test_error_names_a_data_folder_that_is_a_file(tmp_path: Path, choice: str, below: str) -> None:
    file = tmp_path / "data"
    file.write_text("mine")
    with pytest.raises(UserError, match=f"{file} is not a folder: set --data-dir to a folder"):
        load_dataset(choice, file / below)


def test_download_does_not_overwrite_that_of_another_run(
    tiny_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"

    def download_while_another_run_finishes(_: CIFAR100, root: str, **__: bool) -> None:
        unpacked(tiny_cifar, Path(root))
        (unpacked(tiny_cifar, data_dir) / "theirs").touch()

    monkeypatch.setattr(CIFAR100, "__init__", download_while_another_run_finishes)
    data._download_cifar100(data_dir)
    assert (data_dir / CIFAR100.base_folder / "theirs").exists()
    assert [path.name for path in data_dir.iterdir()] == [CIFAR100.base_folder]
