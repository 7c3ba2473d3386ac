"""A model in parts (FSDP2) trains as a whole one, and its checkpoints are those of a single process."""

import filecmp
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, flags, losses, run_training, torchrun

from fradique.checkpointing import checkpoint
from fradique.pretrained.__main__ import main

WRITE = """
import sys
from pathlib import Path
import safetensors.torch, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from fradique.distributed import fsdp
dist.init_process_group("gloo")
folder, rank, mesh = Path(sys.argv[1]), dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
whole = {
    "uneven": torch.randn(7, 3), "few rows": torch.randn(1, 5), "vector": torch.randn(11),
    "cube": torch.randn(4, 2, 3), "half": torch.randn(6, 2).bfloat16(), "double": torch.randn(5).double(),
    "integers": torch.arange(9), "scalar": torch.tensor(3.0), "é": torch.randn(2, 2),
}
parts = {
    n: x if x.dim() == 0 or n == "é" else distribute_tensor(x, mesh, [Shard(0)])
    for n, x in whole.items()
}
fsdp.write_safetensors(folder / "model.safetensors", parts)
fsdp.write_safetensors(folder / "optimizer.safetensors", {})
if rank == 0:
    safetensors.torch.save_file(whole, folder / "plain")
    safetensors.torch.save_file({}, folder / "none")
back = {n: torch.zeros_like(x) for n, x in parts.items()}
dist.barrier()
fsdp.read_safetensors(folder, back)
for n, x in back.items():
    assert torch.equal(x.full_tensor() if hasattr(x, "full_tensor") else x, whole[n]), n
try:
    fsdp.read_safetensors(folder, back | {"stranger": torch.zeros(3)})
except ValueError as error:
    assert "stranger" in str(error)
else:
    raise AssertionError("a tensor that is not there was read")
try:
    fsdp.write_safetensors(folder / "nowhere" / "model.safetensors", parts)
except OSError as error:
    assert "nowhere" in str(error), error
else:
    raise AssertionError("a folder that is not there was written to")
dist.destroy_process_group()
"""


def test_ranks_write_the_file_that_one_process_writes(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(WRITE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(script)]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert filecmp.cmp(tmp_path / "model.safetensors", tmp_path / "plain", shallow=False)
    assert filecmp.cmp(tmp_path / "optimizer.safetensors", tmp_path / "none", shallow=False)


def test_four_ranks_then_two_then_one_train_as_one_does(settings, tmp_path):
    """In parts, on 4 ranks and then on 2 (evaluations, samples and snapshots too); then whole, on one."""
    settings = replace(settings, dropout=0.0, gradient_accumulation_steps=4, max_iters=15, lr_decay_iters=15)
    settings = replace(settings, sample_interval=5, snapshot_interval=5, activation="gelu_tanh")
    one = replace(settings, out_dir=str(tmp_path / "one"))
    run_training(one)
    parts = replace(settings, parallel="fsdp", gradient_checkpointing=True)
    done = torchrun(4, *flags(replace(parts, max_iters=5)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 processes, each with a part of the model" in done.stdout
    done = torchrun(2, "--init_from=resume", f"--out_dir={parts.out_dir}", "--max_iters=10")
    assert done.returncode == 0, done.stderr[-3000:]
    run_training(replace(parts, init_from="resume"))
    mine, theirs = losses(parts.out_dir), losses(one.out_dir)
    assert mine.keys() == theirs.keys() and len(mine) == 15
    for step, loss in theirs.items():
        assert mine[step] == pytest.approx(loss, abs=1e-5), step
    a, b = (checkpoint.read_checkpoint(Path(x.out_dir) / "step-00000015") for x in (parts, one))
    assert a.model.keys() == b.model.keys() and a.optimizer.keys() == b.optimizer.keys()
    for kind in ("model", "optimizer"):
        for name, tensor in getattr(b, kind).items():
            torch.testing.assert_close(getattr(a, kind)[name], tensor, atol=2e-5, rtol=1e-4)
    assert len(list((Path(parts.out_dir) / "snapshots").glob("*.safetensors"))) == 4
    exported = [as_transformers_opens(Path(x.out_dir), tmp_path) for x in (parts, one)]
    for (name, mine), theirs in zip(exported[0].items(), exported[1].values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4, msg=name)


def as_transformers_opens(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of a run, by way of our export and their class."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / f"exported-{run.name}"
    assert main(["export", f"--out_dir={run}", f"--to={folder}"]) == 0
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_matrix_optimizer_and_parts_of_matrices_contradict_each_other(settings):
    (problem,) = replace(settings, parallel="fsdp", optimizer="muon").problems()
    assert "muon" in problem and "fsdp" in problem
