"""What the tests share: the real data where it lies beside the checkout, and one thread each."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PACKED_DATA = Path(__file__).parents[2] / "shared" / "data"

# Tests run side by side; more threads than cores make all of them slow.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of each later collection: a round ends with one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published CIFAR-100 files."""
    if not (PACKED_DATA / "unpack.py").is_file():
        pytest.skip("the packed CIFAR-100 is not beside this checkout")
    folder = tmp_path_factory.mktemp("cifar100")
    command = [sys.executable, str(PACKED_DATA / "unpack.py"), str(folder), "--only", "cifar100"]
    subprocess.run(command, check=True, capture_output=True)
    return folder
