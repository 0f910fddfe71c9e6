"""The example app on a real SuperLink: SuperNodes join, die and are refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates, make_certificates, make_node_key
from deployment import JOINED, ROOT, Deployment

pytestmark = pytest.mark.slow

APP = ROOT / "examples" / "digits"
GOOD = 0.8
"""Accuracy of a trained model; chance level is 0.1."""

Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploy]:
    """Start SuperLinks; after the test, kill all processes and print their logs.

    pytest shows this output only if the test fails.
    """
    made: list[Deployment] = []

    def start(certificates: Certificates | None = None) -> Deployment:
        folder = tmp_path / f"deployment-{len(made)}"
        folder.mkdir()
        made.append(Deployment(folder, certificates))
        made[-1].start_superlink()
        return made[-1]

    try:
        yield start
    finally:
        for deployment in made:
            deployment.close()
            for name in deployment.processes:
                sys.stdout.write(f"\n----- {name}\n{deployment.log(name)}")


def begin(deployment: Deployment, rounds: int) -> None:
    """Start a run in which each round waits for three SuperNodes."""
    config = {"num-server-rounds": rounds, "min-nodes": 3, "hidden-units": 32}
    deployment.start_run(APP, {**config, "out": str(deployment.home / "out")})


def complete(deployment: Deployment) -> dict[str, Any]:
    """Wait until the run completes, and return its metrics."""
    deployment.wait(lambda: deployment.ended("run"), "the run ends", alive="superlink")
    # The exit code is 0 even if the run failed.
    assert deployment.statuses() == ["finished:completed"]
    metrics: dict[str, Any] = json.loads((deployment.home / "out" / "metrics.json").read_text())
    return metrics


def reason_of_refusal(deployment: Deployment, name: str) -> str:
    """Check that the SuperLink refuses a SuperNode; return the SuperNode's log."""
    deployment.wait(
        lambda: deployment.ended(name) or JOINED in deployment.log(name), f"{name} gives up"
    )
    log = deployment.log(name)
    assert JOINED not in log, f"{name} was accepted"
    assert deployment.processes[name].returncode != 0
    assert "Failed to initialize the connection to the SuperLink" in log
    return log


def test_a_run_survives_a_supernode_that_dies_and_uses_one_that_joins(deploy: Deploy) -> None:
    deployment = deploy()
    for number in range(3):
        deployment.start_supernode(f"node-{number}", f"{number}/4")
    for number in range(3):
        deployment.wait_for(f"node-{number}", JOINED)
    begin(deployment, rounds=2)
    deployment.wait_for("node-1", "Start `flwr-clientapp` process")
    deployment.kill("node-1")
    assert "Receiving: train" in deployment.log("node-1")
    assert "Sending: train" not in deployment.log("node-1")
    deployment.start_supernode("node-3", "3/4")
    metrics = complete(deployment)
    first, second = deployment.log("run").split("[ROUND 1/2]")[1].split("[ROUND 2/2]")
    assert "Received 2 results and 1 failures" in first
    # One of these three is the new SuperNode.
    assert "Received 3 results and 0 failures" in second
    assert "Sending: train" in deployment.log("node-3")
    # The strategy asked its own question only of the clients that replied.
    assert [metrics["train"][n]["batchnorm-clients"] for n in ("1", "2")] == [2, 3]
    accuracies = [metrics["evaluate"][n]["accuracy"] for n in ("0", "1", "2")]
    assert accuracies[0] < 0.4 < GOOD < min(accuracies[1:])
    assert sorted(deployment.nodes().values()) == ["offline", "online", "online", "online"]


def test_only_registered_supernodes_with_tls_take_part(deploy: Deploy, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    deployment = deploy(certificates)
    trusting = ("--root-certificates", certificates.authority)
    registered = set()
    for number in range(3):
        private, public = make_node_key(tmp_path, f"node-{number}")
        registered.add(str(deployment.flwr("supernode", "register", public)["node-id"]))
        deployment.start_supernode(
            f"node-{number}", f"{number}/3", *trusting, "--auth-supernode-private-key", private
        )
    begin(deployment, rounds=1)
    # Others try to connect while the run waits for SuperNodes.
    once = ("--max-retries", "1")
    unknown, _ = make_node_key(tmp_path, "unknown")
    deployment.start_supernode(
        "unknown", "0/3", *trusting, *once, "--auth-supernode-private-key", unknown
    )
    deployment.start_supernode("keyless", "0/3", *trusting, *once)
    deployment.start_supernode("plain", "0/3", "--insecure", *once)
    assert "Failed to activate SuperNode" in reason_of_refusal(deployment, "unknown")
    assert "must be registered" in reason_of_refusal(deployment, "keyless")
    # The server is reachable, and closes the connection.
    assert re.search("disconnected|reset", reason_of_refusal(deployment, "plain"))
    metrics = complete(deployment)
    assert "Received 3 results and 0 failures" in deployment.log("run")
    assert metrics["train"]["1"]["batchnorm-clients"] == 3
    assert metrics["evaluate"]["1"]["accuracy"] > GOOD
    assert deployment.nodes() == dict.fromkeys(registered, "online")
