"""The image data sets of the simulations, held in memory as tensors."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR100, MNIST
from torchvision.datasets.utils import check_integrity

from experiment.errors import UserError

DATASET_CHOICES = ("auto", "cifar100", "digits")
NETWORK_TIMEOUT_S = 10.0
DOWNLOAD_ERRORS = (OSError, RuntimeError, HTTPException)
DIGITS_TEST_IMAGES = 500
DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """A labelled image data set with training and test images.

    Attributes:
        name: "cifar100", "digits" or "mnist".
        train_images: uint8, shape (N, C, H, W), values 0 to 255.
        train_labels: int64, shape (N,), values 0 to num_classes - 1.
        test_images: uint8, shape (M, C, H, W).
        test_labels: int64, shape (M,).
        num_classes: Number of classes.
        mean: Mean of the training pixels of each channel, scaled to [0, 1].
        std: Standard deviation of the same pixels, on the same scale.
        note: Why digits replace CIFAR-100; empty if they do not.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""

    def normalise(self, images: Tensor) -> Tensor:
        """Scale images so that each channel of the training set has mean 0 and deviation 1.

        Args:
            images: uint8, shape (N, C, H, W), on any device.

        Returns:
            float32, the same shape, on the same device.
        """
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std


def load_dataset(choice: str, data_dir: Path) -> Dataset:
    """Load CIFAR-100 (Krizhevsky, 2009) or scikit-learn's 8x8 handwritten digits.

    Args:
        choice: "cifar100", "digits", or "auto": CIFAR-100 if it can be found or downloaded,
            otherwise digits.
        data_dir: Folder that contains `cifar-100-python`. If it does not, CIFAR-100 is downloaded
            into it. Digits come with scikit-learn and do not use it.

    Returns:
        The data set. Its `note` explains why if digits replace CIFAR-100.

    Raises:
        UserError: `choice` is unknown, `data_dir` is a file, the CIFAR-100 files are incomplete
            or damaged, or "cifar100" can be neither found nor downloaded.
    """
    if choice not in DATASET_CHOICES:
        raise UserError(f"unknown data set {choice!r}: use one of {', '.join(DATASET_CHOICES)}")
    if choice == "digits":
        return _digits(note="")
    data_dir = _checked_folder(data_dir)
    if not os.path.exists(data_dir / CIFAR100.base_folder):
        try:
            _download_cifar100(data_dir)
        except DOWNLOAD_ERRORS as error:
            missing = _missing("CIFAR-100", data_dir, error)
            if choice == "cifar100":
                raise UserError(
                    f"{missing}: put the folder {CIFAR100.base_folder} there, change --data-dir, "
                    "or choose the data set digits"
                ) from error
            return _digits(f"{missing}: this run uses scikit-learn's handwritten digits instead.")
    return _cifar100(data_dir)


def load_mnist(data_dir: Path) -> Dataset:
    """Load MNIST (LeCun et al., 1998); download it into `data_dir` if it is missing.

    Raises:
        UserError: It can be neither found nor downloaded, or the files are damaged.
    """
    data_dir = _checked_folder(data_dir)
    try:
        with _network_timeout(NETWORK_TIMEOUT_S):
            parts = [MNIST(data_dir, train=train, download=True) for train in (True, False)]
    except (*DOWNLOAD_ERRORS, ValueError) as error:
        raise UserError(
            f"{_missing('MNIST', data_dir, error)}: put the folder MNIST there, or change "
            "--data-dir"
        ) from error
    (train_images, train_labels), (test_images, test_labels) = (
        (part.data[:, None].contiguous(), part.targets) for part in parts
    )
    mean, std = _channel_statistics(train_images)
    return Dataset("mnist", train_images, train_labels, test_images, test_labels, 10, mean, std)


def _checked_folder(data_dir: Path) -> Path:
    """Return the folder without `~`; raise `UserError` if it, or a parent, is a file."""
    expanded = data_dir.expanduser()
    existing = _nearest_existing(expanded)
    if not existing.is_dir():
        raise UserError(f"{existing} is not a folder: set --data-dir to a folder")
    return expanded


def _missing(name: str, data_dir: Path, error: Exception) -> str:
    """Return in one line that a data set is missing and why the download failed."""
    reason = " ".join(str(error).strip("<>").split())
    return f"{name} is not in {data_dir} and could not be downloaded ({reason})"


def _nearest_existing(path: Path) -> Path:
    # Path.exists raises below a folder without search permission; os.path.exists does not.
    absolute = path.absolute()
    return next(p for p in (absolute, *absolute.parents) if os.path.exists(p))


def _download_cifar100(data_dir: Path) -> None:
    """Download `cifar-100-python` into `data_dir`, completely or not at all."""
    # On the same file system as data_dir, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".cifar100-", dir=_nearest_existing(data_dir)) as temp:
        with _network_timeout(NETWORK_TIMEOUT_S):
            CIFAR100(temp, download=True)
        data_dir.mkdir(parents=True, exist_ok=True)
        target = data_dir / CIFAR100.base_folder
        try:
            (Path(temp) / CIFAR100.base_folder).rename(target)
        except OSError:
            # Another run may have finished its download first.
            if not target.is_dir():
                raise


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    # torchvision has no timeout option.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _cifar100(data_dir: Path) -> Dataset:
    folder = data_dir / CIFAR100.base_folder
    try:
        _check_cifar100(folder)
        train = CIFAR100(data_dir, train=True)
        test = CIFAR100(data_dir, train=False)
    except OSError as error:
        raise UserError(f"cannot read CIFAR-100 in {folder}: {error}") from error
    train_images, train_labels = _cifar_tensors(train)
    test_images, test_labels = _cifar_tensors(test)
    mean, std = _channel_statistics(train_images)
    return Dataset("cifar100", train_images, train_labels, test_images, test_labels, 100, mean, std)


def _check_cifar100(folder: Path) -> None:
    # torchvision checks the same checksums, but does not say which file is damaged.
    meta = (CIFAR100.meta["filename"], CIFAR100.meta["md5"])
    remedy = f"delete {folder} to download it again, or change --data-dir"
    for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list, meta):
        if not (folder / name).is_file():
            raise UserError(f"CIFAR-100 is incomplete, {folder / name} is missing: {remedy}")
        if not check_integrity(folder / name, md5):
            raise UserError(f"{folder / name} is damaged, its md5 is not {md5}: {remedy}")


def _cifar_tensors(part: CIFAR100) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(part.targets, dtype=torch.int64)


def _digits(note: str) -> Dataset:
    bundle = load_digits()
    # Grey levels 0 to 16, scaled to the range of a byte.
    pixels = np.rint(bundle.images[:, None] * (255 / 16)).astype(np.uint8)
    train_images, test_images, train_labels, test_labels = (
        torch.from_numpy(part)
        for part in train_test_split(
            pixels,
            bundle.target.astype(np.int64),
            test_size=DIGITS_TEST_IMAGES,
            stratify=bundle.target,
            random_state=DIGITS_SPLIT_SEED,
        )
    )
    mean, std = _channel_statistics(train_images)
    return Dataset(
        "digits", train_images, train_labels, test_images, test_labels, 10, mean, std, note
    )


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    means, stds = [], []
    for c in range(images.shape[1]):  # All channels of CIFAR-100 at once would need 600 MB.
        std, mean = torch.std_mean(images[:, c].float() / 255, correction=0)
        means.append(float(mean))
        stds.append(float(std))
    return tuple(means), tuple(stds)
