"""A federation of real processes on this machine: a SuperLink, SuperNodes, Flower commands."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from certificates import Certificates

ROOT = Path(__file__).parents[2]
LINK = "link"
"""The SuperLink's name in Flower's configuration file."""
PATIENCE = 480
"""Seconds to wait for any event. The slowest, a complete run, took 143 s on two busy cores."""
JOINED = "SuperNode ID"
"""A SuperNode logs this once the SuperLink has accepted it."""


class Deployment:
    """Processes that share one FLWR_HOME. Each has a log; `close` ends all of them.

    Args:
        folder: an empty folder for logs and Flower's files.
        certificates: with certificates the SuperLink uses TLS and accepts only registered
            SuperNodes.
    """

    def __init__(self, folder: Path, certificates: Certificates | None = None) -> None:
        self.home = folder / "flwr"
        self.logs = folder / "logs"
        self.home.mkdir()
        self.logs.mkdir()
        self.certificates = certificates
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        connection: dict[str, Any] = {"address": f"127.0.0.1:{self.port}"}
        if certificates is None:
            connection["insecure"] = True
        else:
            connection["root-certificates"] = str(certificates.authority)
        lines = [f"{key} = {json.dumps(value)}" for key, value in connection.items()]
        (self.home / "config.toml").write_text("\n".join([f"[superlink.{LINK}]", *lines, ""]))

    def start(self, name: str, *command: str | Path) -> None:
        """Start a process in its own process group."""
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
            ),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        with (self.logs / name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.home,
                start_new_session=True,
            )

    def start_superlink(self) -> None:
        """Start the SuperLink and wait until it listens."""
        options = ["--insecure"]
        if self.certificates is not None:
            options = [
                f"--ssl-ca-certfile={self.certificates.authority}",
                f"--ssl-certfile={self.certificates.server}",
                f"--ssl-keyfile={self.certificates.server_key}",
                "--enable-supernode-auth",
            ]
        self.start(
            "superlink",
            "flower-superlink",
            "--host=127.0.0.1",
            f"--port={self.port}",
            "--disable-runtime-dependency-installation",
            *options,
        )
        self.wait(lambda: listens(self.port), "the SuperLink listens", alive="superlink")

    def start_supernode(self, name: str, partition: str, *options: str | Path) -> None:
        """Start a SuperNode with a partition such as `0/3`; without options it does not use TLS."""
        number, total = partition.split("/")
        self.start(
            name,
            "flower-supernode",
            f"--superlink=127.0.0.1:{self.port}",
            f"--port={free_port()}",
            f"--node-config=partition-id={number} num-partitions={total}",
            *(options or ("--insecure",)),
        )

    def start_run(self, app: Path, config: Mapping[str, Any]) -> None:
        """Start a run; the process `run` logs what the ServerApp logs, and ends with the run."""
        settings = [f"{key}={json.dumps(value)}" for key, value in config.items()]
        self.start("run", "flwr", "run", app, LINK, "--stream", "--run-config", " ".join(settings))

    def flwr(self, *arguments: str | Path) -> dict[str, Any]:
        """Run a Flower command; return its JSON output."""
        name = "flwr-" + "-".join(arg for arg in arguments if isinstance(arg, str))
        self.start(name, "flwr", *arguments, LINK, "--format", "json")
        self.wait(lambda: self.ended(name), f"{name} ends")
        assert self.processes[name].returncode == 0, self.log(name)
        answer: dict[str, Any] = json.loads(self.log(name))
        assert answer["success"], answer
        return answer

    def statuses(self) -> list[str]:
        """Return the status of each run."""
        return [run["status"] for run in self.flwr("ls")["runs"]]

    def nodes(self) -> dict[str, str]:
        """Return the status of each SuperNode that the SuperLink knows, by ID."""
        nodes = self.flwr("supernode", "list")["nodes"]
        return {str(node["node-id"]): node["status"] for node in nodes}

    def log(self, name: str) -> str:
        return (self.logs / name).read_text(errors="replace")

    def ended(self, name: str) -> bool:
        return self.processes[name].poll() is not None

    def kill(self, name: str) -> None:
        """Kill a process and its children at once, as if their machine lost power."""
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def wait(self, condition: Callable[[], object], what: str, alive: str | None = None) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: it does not hold in time, or the process `alive` has ended.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert alive is None or not self.ended(alive), f"{alive} ended before: {what}"
            assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
            time.sleep(0.1)

    def wait_for(self, name: str, words: str) -> None:
        """Wait until a process logs some words."""
        self.wait(lambda: words in self.log(name), f"{name} logs {words!r}", alive=name)

    def close(self) -> None:
        """End all processes, including those that left their group or lost their parent."""
        deadline = time.monotonic() + 30
        while ours := self._alive():
            assert time.monotonic() < deadline, f"these do not end: {ours}"
            for process in ours:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(ours, timeout=1)
        for started in self.processes.values():
            started.wait()

    def _alive(self) -> list[psutil.Process]:
        """Return all processes with this FLWR_HOME."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and (
                    process.environ().get("FLWR_HOME") == str(self.home)
                ):
                    found.append(process)
        return found


def free_port() -> int:
    """Return a free port below the range that systems use for outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port from 20000 to 32000")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
