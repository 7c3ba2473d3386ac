"""Two hosts, and the cable between them cut in mid-run: two network namespaces with a pair of veth, torchrun
in each, the link taken down for a while. The run ends with the losses of an undisturbed one.

    sudo python tests/faults/two_hosts.py [--cut 5,40] [--steps 400]

`--cut`: for how many seconds. A short cut is waited out; a long one is ended by `dist_timeout`, after which
both torchruns meet again and go on from the last checkpoint. Needs root, Linux and `ip` (iproute2).
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

from harness import ROOT, losses, prepare, run, step, stop, sums, wait_for, words

A, B = (f"fradique-{os.getpid()}-{name}" for name in "ab")
HOSTS = {A: "10.203.77.1", B: "10.203.77.2"}  # addresses of these two alone
PATIENCE = 12  # seconds for which a rank waits for another
STEPS = {
    "eval_interval": 25,
    "dropout": 0.0,
    "gradient_accumulation_steps": 2,
    "dist_timeout": PATIENCE,
}


def why_not() -> str | None:
    """Why this machine cannot play two hosts; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if not shutil.which("ip"):
        return "there is no `ip` (Debian's iproute2)"
    try:
        with cable():
            return None
    except subprocess.CalledProcessError as error:
        return f"no two network namespaces with a cable can be made: {error.stderr.strip()}"


@contextmanager
def cable() -> Iterator[None]:
    """The two hosts, with a cable between them."""
    (a, address_a), (b, address_b) = HOSTS.items()
    ends = ("fradique0", "fradique1")
    sweep()
    try:
        for words_ in (
            f"netns add {a}",
            f"netns add {b}",
            f"link add {ends[0]} netns {a} type veth peer name {ends[1]} netns {b}",
            f"-n {a} addr add {address_a}/24 dev {ends[0]}",
            f"-n {b} addr add {address_b}/24 dev {ends[1]}",
            f"-n {a} link set lo up",
            f"-n {b} link set lo up",
            f"-n {a} link set {ends[0]} up",
            f"-n {b} link set {ends[1]} up",
        ):
            ip(words_)
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def sweep() -> None:
    """Remove the hosts of processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name in re.findall(r"^fradique-\d+-[ab]\b", listed, re.M):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(words_: str) -> None:
    subprocess.run(["ip", *words_.split()], check=True, capture_output=True, text=True)


def link(state: str) -> None:
    """up | down."""
    ip(f"-n {A} link set fradique0 {state}")


def host(name: str, number: int, flags: list[str], said: Path) -> subprocess.Popen:
    """torchrun on one of the hosts, with one rank. The first keeps the store where they meet."""
    end = "fradique0" if name == A else "fradique1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint={HOSTS[A]}:29500", "--rdzv_id=cut"]
    torchrun += ["--max_restarts=5", f"--local_addr={HOSTS[name]}", f"--rdzv_conf=is_host={1 - number}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end}
    with said.open("w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *torchrun, str(ROOT / "train.py"), *flags],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def cut(folder: Path, data: Path, seconds: float, steps: int, truth: dict[int, float]) -> list[str]:
    """A run whose cable is cut for so long after some steps: what was not as it should be."""
    out = folder / f"cut-{seconds:g}"
    flags = words(data, out, max_iters=steps, **STEPS)
    said = [folder / f"{name}-{seconds:g}.txt" for name in HOSTS]
    processes = [host(name, i, flags, said[i]) for i, name in enumerate(HOSTS)]
    try:
        if not wait_for(lambda: step(out) >= steps // 6, processes[0], 240):
            return [f"it did not begin: {said[0].read_text()[-2000:]}"]
        link("down")
        time.sleep(seconds)
        reached = step(out)
        link("up")
        if reached >= steps:
            return ["the run had ended before its cable was cut"]
        for process in processes:
            process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        return [f"it does not end: {said[0].read_text()[-1500:]}\n{said[1].read_text()[-1500:]}"]
    finally:
        for process in processes:
            stop(process)
    problems = [
        f"{name} ended with {process.returncode}: {text.read_text()[-1500:]}"
        for name, process, text in zip(HOSTS, processes, said, strict=True)
        if process.returncode
    ]
    mine = losses(out)
    if mine.keys() != truth.keys() or any(abs(mine[n] - truth[n]) > 1e-5 for n in truth):
        problems.append("other losses than those of an undisturbed run")
    again = "resuming at step" in said[0].read_text() + said[1].read_text()
    how = "met again and went on" if again else "waited"
    result = "; ".join(problems) or "the losses are those of an undisturbed run"
    print(f"a cut of {seconds:g} s at step {reached}: the ranks {how}; {result}", flush=True)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cut", default="5,40", help="seconds, parted by commas")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts go in any case
    if reason := why_not():
        print(f"two hosts: skipped, {reason}")
        return 0
    with tempfile.TemporaryDirectory() as name, cable():
        folder = Path(name)
        data, whole = prepare(folder), folder / "whole"
        run(words(data, whole, max_iters=args.steps, **STEPS))
        sums(whole)
        truth, lengths = losses(whole), args.cut.split(",")
        problems = [problem for n in lengths for problem in cut(folder, data, float(n), args.steps, truth)]
    print(f"two hosts: {'not ' if problems else ''}as it should be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
