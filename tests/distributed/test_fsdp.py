"""FSDP2: a sharded model trains as a whole one, and its checkpoints are those of a single process."""

import filecmp
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import flags, losses, run_ranks, run_training

from fradique.checkpointing import checkpoint
from fradique.pretrained.__main__ import main

WRITE_SCRIPT = """
import sys
from pathlib import Path
import safetensors.torch, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from fradique.distributed import fsdp, process_group
dist.init_process_group("gloo")
folder, rank, mesh = Path(sys.argv[1]), dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
whole = {
    "uneven": torch.randn(7, 3), "few rows": torch.randn(1, 5), "vector": torch.randn(11),
    "cube": torch.randn(4, 2, 3), "half": torch.randn(6, 2).bfloat16(), "double": torch.randn(5).double(),
    "integers": torch.arange(9), "scalar": torch.tensor(3.0), "é": torch.randn(2, 2),
}
shards = {
    n: x if x.dim() == 0 or n == "é" else distribute_tensor(x, mesh, [Shard(0)])
    for n, x in whole.items()
}
fsdp.write_safetensors(folder / "model.safetensors", shards)
fsdp.write_safetensors(folder / "optimizer.safetensors", {})
if rank == 0:
    safetensors.torch.save_file(whole, folder / "plain")
    safetensors.torch.save_file({}, folder / "none")
loaded = {n: torch.zeros_like(x) for n, x in shards.items()}
dist.barrier()
fsdp.read_safetensors(folder, loaded)
for n, x in loaded.items():
    assert torch.equal(process_group.full_tensor(x), whole[n]), n
try:
    fsdp.read_safetensors(folder, loaded | {"unknown": torch.zeros(3)})
except ValueError as error:
    assert "unknown" in str(error)
else:
    raise AssertionError("a missing tensor was read")
try:
    fsdp.write_safetensors(folder / "missing" / "model.safetensors", shards)
except OSError as error:
    assert "missing" in str(error), error
else:
    raise AssertionError("a missing folder was written to")
process_group.exit_process(0)  # as train.py ends: torch's threads may abort a plain exit
"""


def test_three_ranks_write_the_file_of_one_process(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(WRITE_SCRIPT)
    result = run_ranks(3, tmp_path, program=script)
    assert result.returncode == 0, result.stderr[-3000:]
    assert filecmp.cmp(tmp_path / "model.safetensors", tmp_path / "plain", shallow=False)
    assert filecmp.cmp(tmp_path / "optimizer.safetensors", tmp_path / "none", shallow=False)


def test_four_ranks_then_two_then_one_train_as_one_rank(settings, tmp_path):
    """Sharded on 4 ranks, then on 2 (with evaluations, samples and snapshots); then whole, on one rank."""
    settings = replace(settings, dropout=0.0, gradient_accumulation_steps=4, max_iters=15, lr_decay_iters=15)
    settings = replace(settings, sample_interval=5, snapshot_interval=5, activation="gelu_tanh")
    single = replace(settings, out_dir=str(tmp_path / "one"))
    run_training(single)
    sharded = replace(settings, parallel="fsdp", gradient_checkpointing=True)
    result = run_ranks(4, *flags(replace(sharded, max_iters=5)))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 processes, each with a shard of the model" in result.stdout
    result = run_ranks(2, "--init_from=resume", f"--out_dir={sharded.out_dir}", "--max_iters=10")
    assert result.returncode == 0, result.stderr[-3000:]
    run_training(replace(sharded, init_from="resume"))
    sharded_losses, single_losses = losses(sharded.out_dir), losses(single.out_dir)
    assert sharded_losses.keys() == single_losses.keys() and len(sharded_losses) == 15
    for step, loss in single_losses.items():
        assert sharded_losses[step] == pytest.approx(loss, abs=1e-5), step
    a, b = (checkpoint.read_checkpoint(Path(x.out_dir) / "step-00000015") for x in (sharded, single))
    assert a.model.keys() == b.model.keys() and a.optimizer.keys() == b.optimizer.keys()
    for kind in ("model", "optimizer"):
        for name, tensor in getattr(b, kind).items():
            torch.testing.assert_close(getattr(a, kind)[name], tensor, atol=2e-5, rtol=1e-4)
    assert len(list((Path(sharded.out_dir) / "snapshots").glob("*.safetensors"))) == 4
    exported = [export_and_load(Path(x.out_dir), tmp_path) for x in (sharded, single)]
    for (name, actual), expected in zip(exported[0].items(), exported[1].values(), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4, msg=name)


def export_and_load(run: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Export the weights of a run, and load them with transformers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / f"exported-{run.name}"
    assert main(["export", f"--out_dir={run}", f"--to={folder}"]) == 0
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_muon_and_fsdp_exclude_each_other(settings):
    (problem,) = replace(settings, parallel="fsdp", optimizer="muon").problems()
    assert "muon" in problem and "fsdp" in problem
