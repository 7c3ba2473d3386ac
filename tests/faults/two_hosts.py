"""Two hosts whose network connection is cut during a run.

The hosts are two network namespaces connected by a veth pair, with torchrun in each; the link is set down for
a while. The run must end with the losses of an uninterrupted run.

    sudo python tests/faults/two_hosts.py [--cut 5,40] [--steps 400] [--patience 12]

`--cut`: seconds without connection. After a short cut the ranks continue; after a cut longer than
`--patience`, both torchruns rendezvous again and resume from the last checkpoint. Needs root, Linux and
iproute2.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import (
    ROOT,
    TIMEOUT,
    exit_status,
    fork_train,
    kill_all,
    last_step,
    losses,
    tensor_checksums,
    train_flags,
    wait_for,
    write_tiny_corpus,
)

A, B = (f"fradique-{os.getpid()}-{name}" for name in "ab")
HOSTS = {A: "10.203.77.1", B: "10.203.77.2"}  # in a network of only these two
# changes to harness.RUN
CHANGES = {"eval_interval": 25, "dropout": 0.0, "gradient_accumulation_steps": 2}


def missing_requirement() -> str | None:
    """The requirement that this machine does not meet; None if it meets all."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not shutil.which("ip"):
        return "there is no `ip` (Debian's iproute2)"
    try:
        with connected_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"two connected network namespaces cannot be made: {error.stderr.strip()}"


@contextmanager
def connected_hosts() -> Iterator[None]:
    """Create the two hosts and the connection between them; delete them afterwards."""
    (a, address_a), (b, address_b) = HOSTS.items()
    interfaces = ("fradique0", "fradique1")
    delete_stale_hosts()
    try:
        for arguments in (
            f"netns add {a}",
            f"netns add {b}",
            f"link add {interfaces[0]} netns {a} type veth peer name {interfaces[1]} netns {b}",
            f"-n {a} addr add {address_a}/24 dev {interfaces[0]}",
            f"-n {b} addr add {address_b}/24 dev {interfaces[1]}",
            f"-n {a} link set lo up",
            f"-n {b} link set lo up",
            f"-n {a} link set {interfaces[0]} up",
            f"-n {b} link set {interfaces[1]} up",
        ):
            ip(arguments)
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def delete_stale_hosts() -> None:
    """Delete the namespaces of processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name in re.findall(r"^fradique-\d+-[ab]\b", listed, re.M):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def set_link(state: str) -> None:
    """Set the link up or down."""
    ip(f"-n {A} link set fradique0 {state}")


def start_host(name: str, number: int, arguments: list[str], output: Path) -> subprocess.Popen:
    """Start torchrun on a host, with one rank of a script. The first host has the rendezvous store."""
    interface = "fradique0" if name == A else "fradique1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint={HOSTS[A]}:29500", "--rdzv_id=cut"]
    torchrun += ["--max_restarts=5", f"--local_addr={HOSTS[name]}", f"--rdzv_conf=is_host={1 - number}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    with output.open("w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def cut_link(
    folder: Path, data: Path, seconds: float, args: argparse.Namespace, expected: dict[int, float]
) -> list[str]:
    """Cut the connection of a run for some seconds. Returns the problems."""
    out, steps = folder / f"cut-{seconds:g}", args.steps
    flags = train_flags(data, out, max_iters=steps, dist_timeout=args.patience, **CHANGES)
    gate = folder / f"gate-{seconds:g}"  # the run waits for it, so that it cannot end before the cut
    arguments = [str(ROOT / "tests/faults/gated_train.py"), str(steps // 3), str(gate), *flags]
    outputs = [folder / f"{name}-{seconds:g}.txt" for name in HOSTS]
    processes = [start_host(name, i, arguments, outputs[i]) for i, name in enumerate(HOSTS)]
    try:
        if not wait_for(lambda: last_step(out) >= steps // 6, processes[0]):
            return [f"it did not start: {outputs[0].read_text()[-2000:]}"]
        set_link("down")
        gate.touch()
        time.sleep(seconds)
        step = last_step(out)
        set_link("up")
        if step >= steps:
            return ["the run ended while the connection was cut"]
        for process in processes:
            process.wait(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return [f"it does not end: {outputs[0].read_text()[-1500:]}\n{outputs[1].read_text()[-1500:]}"]
    finally:
        for process in processes:
            kill_all(process)
    problems = [
        f"{name} ended with {process.returncode}: {output.read_text()[-1500:]}"
        for name, process, output in zip(HOSTS, processes, outputs, strict=True)
        if process.returncode
    ]
    actual = losses(out)
    if actual.keys() != expected.keys() or any(abs(actual[n] - expected[n]) > 1e-5 for n in expected):
        problems.append("other losses than those of an undisturbed run")
    resumed = "resuming at step" in outputs[0].read_text() + outputs[1].read_text()
    reaction = "resumed" if resumed else "waited"
    result = "; ".join(problems) or "the losses are those of an undisturbed run"
    print(f"a cut of {seconds:g} s at step {step}: the ranks {reaction}; {result}", flush=True)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cut", default="5,40", help="seconds, separated by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--patience", type=int, default=12, help="seconds that ranks wait for each other")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hosts are deleted
    if reason := missing_requirement():
        print(f"two hosts: skipped, {reason}")
        return 0
    with tempfile.TemporaryDirectory() as name, connected_hosts():
        folder = Path(name)
        data, reference = write_tiny_corpus(folder), folder / "undisturbed"
        output = folder / "undisturbed.txt"
        status = exit_status(
            fork_train(train_flags(data, reference, max_iters=args.steps, **CHANGES), output)
        )
        assert status == 0, output.read_text()
        tensor_checksums(reference)  # fails if there is no complete checkpoint
        expected, cuts = losses(reference), args.cut.split(",")
        problems = [problem for n in cuts for problem in cut_link(folder, data, float(n), args, expected)]
    print(f"two hosts: {'failed' if problems else 'ok'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
