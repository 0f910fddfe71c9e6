"""Run an experiment on Flower's simulation engine: the server here, the clients on Ray."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from rich.console import Console

from experiment.client import make_client_app
from experiment.comparison import compare
from experiment.data import Dataset
from experiment.progress import progress_bars
from experiment.settings import Settings

RAY_DAEMONS = ("raylet", "gcs_server")


def simulate(
    settings: Settings, dataset: Dataset, console: Console, log_file: Path
) -> list[dict[str, Any]]:
    """Run all seeds; return one entry of `runs` for each.

    Args:
        settings: The experiment.
        dataset: Its data.
        console: Draws the progress bars.
        log_file: File for Flower's log.

    Raises:
        FederationError: A client failed.
    """
    cores = os.cpu_count() or 1
    threads = max(1, cores // settings.clients)
    gpus = torch.cuda.device_count()
    gpu_share = min(1.0, gpus / min(settings.clients, cores))
    runs: list[dict[str, Any]] = []
    server_app = ServerApp()
    with tempfile.TemporaryDirectory(prefix="fl-rebasin-") as folder:
        progress = Path(folder)

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            runs.extend(compare(settings, dataset, grid, seed, progress) for seed in settings.seeds)

        _log_to(log_file)
        with _exit_on_ctrl_c(progress), progress_bars(progress, console):
            run_simulation(
                server_app=server_app,
                client_app=make_client_app(settings, progress, threads),
                num_supernodes=settings.clients,
                backend_config={
                    "init_args": {"num_cpus": cores, "log_to_driver": False},
                    "client_resources": {"num_cpus": threads, "num_gpus": gpu_share},
                },
            )
    return runs


@contextmanager
def _exit_on_ctrl_c(folder: Path) -> Iterator[None]:
    """End this process and Ray's on Ctrl-C.

    Otherwise Flower's server thread would wait for its clients for up to an hour, and Ray's
    processes would finish their work first.
    """

    def exit_now(signum: int, frame: FrameType | None) -> None:
        children = psutil.Process().children(recursive=True)
        # The daemons last: soon after they end, Ray ends this process with another exit code.
        daemons = [child for child in children if _name(child) in RAY_DAEMONS]
        workers = [child for child in children if child not in daemons]
        _kill(workers)
        psutil.wait_procs(workers, timeout=5)
        shutil.rmtree(folder, ignore_errors=True)
        os.write(2, b"\ninterrupted: no results were written\n")
        _kill(daemons)
        os._exit(130)

    before = signal.signal(signal.SIGINT, exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _log_to(path: Path) -> None:
    """Send Flower's log to a file, away from the progress bars."""
    logger = logging.getLogger("flwr")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.FileHandler(path, mode="w")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
