"""The command line of train.py: a mistake gives one message and status 2, and no file is lost."""

import ctypes
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import flags, make_text, run_code, run_script, run_training, write_corpus

import train
from configurator import command
from fradique.checkpointing import checkpoint
from fradique.training import setup
from train import TrainSettings


def error_of(settings, *arguments, **options):
    """Run train.py with a mistake on the command line and return the error message."""
    result = run_script("train.py", *flags(settings), *arguments, **options)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "--debug=True" not in result.stderr
    return result.stderr


def test_all_mistakes_are_reported_at_once_with_suggestions(settings, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("n_layers = 4\nbias = 'high'\n")
    message = error_of(settings, config, "--n_embd=30", "--n_head=4", "--batchsize=3", "--learning_rate=-1")
    assert message.startswith("error: 4 problems with the settings:\n  - ")
    assert "mine.py line 1" in message and "did you mean 'n_layer'?" in message
    assert "did you mean 'batch_size'?" in message
    assert "mine.py line 2, bias = 'high': must be True or False" in message
    assert "--learning_rate=-1: must be above 0.0" in message
    assert not Path(settings.out_dir).exists()


def test_an_indivisible_width_is_rejected_with_alternatives(settings):
    message = error_of(settings, "--n_embd=30", "--n_head=4")
    assert "n_embd = 30 is not divisible by n_head = 4" in message and "28 or 32" in message


def test_contradictions_are_rejected(settings):
    assert "min_lr = 1.0 is above learning_rate" in error_of(settings, "--min_lr=1.0")
    assert "not a duration" in error_of(settings, "--time_budget=soon")
    assert any(
        "use one of them" in text for text in replace(settings, overwrite=True, init_from="resume").problems()
    )


def test_a_missing_corpus_is_reported_with_the_prepare_command(settings, tmp_path):
    folder = tmp_path / "data" / "eca_char"
    folder.mkdir(parents=True)
    (folder / "prepare.py").touch()
    message = error_of(replace(settings, dataset="eca_char", data_dir="data"), cwd=tmp_path)
    assert "make it with: python data/eca_char/prepare.py" in message


def test_a_truncated_token_file_is_rejected(settings, tmp_path):
    folder = write_corpus(tmp_path / "data" / "book", make_text(300))
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-3])
    message = error_of(replace(settings, data_dir=str(tmp_path / "data"), dataset="book"))
    assert "val.bin has" in message and "truncated" in message


def test_tokens_beyond_the_vocabulary_are_rejected(settings, tmp_path):
    folder = write_corpus(tmp_path / "data" / "book", make_text(300))
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[77] = 999
    ids.tofile(folder / "train.bin")
    message = error_of(replace(settings, data_dir=str(tmp_path / "data"), dataset="book"))
    assert "token 999 at position 77 is not in the vocabulary" in message


def test_a_corpus_smaller_than_a_block_is_rejected(settings):
    assert "too few for one block of 100000" in error_of(settings, "--block_size=100000")


def test_an_existing_run_is_kept_without_overwrite(settings):
    run_training(replace(settings, max_iters=2))
    before = sorted(p.name for p in Path(settings.out_dir).iterdir())
    message = error_of(settings)
    assert "--init_from=resume" in message and "--overwrite" in message
    assert sorted(p.name for p in Path(settings.out_dir).iterdir()) == before


def test_other_files_in_out_dir_are_not_deleted(settings):
    folder = Path(settings.out_dir)
    folder.mkdir()
    (folder / "samples.txt").write_text("mine")
    error_of(settings)
    assert (folder / "samples.txt").read_text() == "mine"
    (folder / "ckpt.pt").touch()
    assert "is a run of nanoGPT: choose a folder for this run" in error_of(settings, "--overwrite")


def test_a_corpus_folder_is_rejected_as_out_dir(settings):
    corpus = Path(settings.data_dir) / settings.dataset
    message = error_of(replace(settings, out_dir=str(corpus)), "--overwrite")
    assert "is a corpus: choose a folder for this run" in message and (corpus / "tokenizer.json").exists()


def test_a_constant_learning_rate_may_be_below_min_lr(settings):
    constant = replace(settings, lr_schedule="constant", learning_rate=1e-5)
    assert constant.problems() == [] and replace(constant, lr_schedule="cosine").problems() != []


def test_a_prompt_that_cannot_be_encoded_is_rejected(settings):
    assert "'W'" in error_of(settings, "--sample_start=WXYZ")
    assert not Path(settings.out_dir).exists()


def test_overwrite_deletes_only_files_of_a_run(settings):
    run_training(replace(settings, max_iters=2))
    notes = Path(settings.out_dir) / "notes.txt"
    notes.write_text("mine")
    result = run_script("train.py", *flags(replace(settings, max_iters=1)), "--overwrite")
    assert result.returncode == 0, result.stderr
    assert notes.read_text() == "mine"
    assert [p.name for p in checkpoint.step_folders(Path(settings.out_dir))] == [
        "step-00000000",
        "step-00000001",
    ]


def test_resuming_without_a_run_is_rejected(settings):
    assert "no trained model in" in error_of(replace(settings, init_from="resume"))


def test_resuming_with_another_shape_names_the_settings(settings):
    run_training(replace(settings, max_iters=2))
    message = error_of(replace(settings, init_from="resume", n_embd=32, n_layer=3, block_size=8))
    assert "cannot continue as another model: " in message and "Leave these as they were" in message
    for change in ("n_embd was 16 and is 32", "n_layer was 2 and is 3", "block_size was 16 and is 8"):
        assert change in message


def test_resuming_with_another_lora_rank_names_the_tensors(settings, tmp_path):
    run_training(replace(settings, max_iters=2))
    tuned = replace(settings, out_dir=str(tmp_path / "tuned"), init_from=settings.out_dir, max_iters=2)
    run_training(replace(tuned, lora_rank=2))
    message = error_of(replace(tuned, init_from="resume", lora_rank=4))
    assert "does not fit this model" in message and "has shape (2, 16), and (4, 16) in this model" in message


def test_resuming_with_another_tokenizer_is_rejected(settings, tmp_path):
    run_training(replace(settings, max_iters=2))
    write_corpus(tmp_path / "data" / "other", make_text(300) + "ÀÁÂ")
    other_corpus = replace(settings, init_from="resume", data_dir=str(tmp_path / "data"), dataset="other")
    assert "another tokenizer" in error_of(other_corpus)


def test_weights_with_another_tokenizer_are_rejected(settings, tmp_path):
    run_training(replace(settings, max_iters=2))
    write_corpus(tmp_path / "data" / "other", make_text(300) + "ÀÁÂ")
    other_corpus = replace(
        settings, data_dir=str(tmp_path / "data"), dataset="other", out_dir=str(tmp_path / "b")
    )
    assert "tokenizer" in error_of(replace(other_corpus, init_from=settings.out_dir))


def test_a_block_longer_than_that_of_the_weights_is_rejected(settings, tmp_path):
    run_training(replace(settings, max_iters=2))
    longer = replace(settings, init_from=settings.out_dir, out_dir=str(tmp_path / "b"), block_size=32)
    assert "--block_size=16" in error_of(longer)


def test_an_out_dir_that_cannot_be_created_is_reported(settings, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in error_of(replace(settings, out_dir=str(tmp_path / "file")))
    assert "Not a directory" in error_of(replace(settings, out_dir=str(tmp_path / "file" / "run")))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_an_out_dir_in_proc_is_reported(settings):
    message = error_of(replace(settings, out_dir="/proc/fradique"))
    assert "/proc/fradique" in message


@pytest.fixture
def enforced_modes(tmp_path):
    """Drop CAP_DAC_OVERRIDE during the test, so that file modes apply to root too."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    capabilities = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc and libc.capget(header, capabilities) == 0:
        effective, *remaining = capabilities
        libc.capset(header, (ctypes.c_uint32 * 6)(effective & ~(1 << 1), *remaining))
    (tmp_path / "probe").mkdir(mode=0o555)
    try:
        (tmp_path / "probe" / "file").touch()
    except PermissionError:
        yield
    else:
        pytest.skip("this user can write to read-only folders")
    finally:
        if libc:
            libc.capset(header, capabilities)


@pytest.mark.parametrize("arguments", [[], ["--overwrite"], ["--init_from=resume", "--max_iters=4"]])
def test_a_read_only_out_dir_is_reported_and_unchanged(settings, arguments, enforced_modes, capsys):
    folder = Path(settings.out_dir)
    folder.mkdir()
    if arguments:
        run_training(replace(settings, max_iters=2))

    def content():
        return {
            p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("[!.]*")
        }

    before = content()
    folder.chmod(0o555)
    capsys.readouterr()
    argv = [*flags(settings), *arguments]
    assert command(train.main, TrainSettings, argv, base=setup.saved_run_settings) == 2
    folder.chmod(0o755)
    message = capsys.readouterr().err
    assert (
        message.startswith(f"error: out_dir={folder} cannot be written to: ")
        and "Permission denied" in message
    )
    assert "choose another --out_dir" in message and "Traceback" not in message
    assert content() == before


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX's")
def test_a_full_disk_keeps_the_earlier_checkpoint(settings):
    """The second run can write at most 8 kB per file: enough for its settings, not for its checkpoint."""
    pytest.importorskip("resource")
    run_training(replace(settings, max_iters=5))
    folder = Path(settings.out_dir)
    code = (
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    result = run_code(code, "--init_from=resume", f"--out_dir={folder}", "--max_iters=10")
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr and "Traceback" not in result.stderr
    assert checkpoint.read_checkpoint(checkpoint.newest_checkpoint(folder, print)).state["step"] == 5
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_missing_weights_are_rejected(settings):
    assert "no/such/folder/x" in error_of(replace(settings, init_from="no/such/folder/x"))


def test_help_and_print_settings_write_nothing(settings):
    result = run_script("train.py", "--help")
    assert result.returncode == 0 and "--n_layer" in result.stdout and "optimizer:" in result.stdout
    assert "--help=all" in result.stdout and "--rope_theta" not in result.stdout
    result = run_script("train.py", "--help=all")
    assert result.returncode == 0 and all(f"--{name} " in result.stdout for name in vars(TrainSettings()))
    result = run_script("train.py", *flags(settings), "--print_settings")
    assert result.returncode == 0 and re.search(r"^n_layer = 2 +# --n_layer$", result.stdout, re.MULTILINE)
    assert not Path(settings.out_dir).exists()


def test_debug_shows_the_traceback(settings):
    result = run_script("train.py", *flags(settings), "--dataset=nowhere", "--debug=True")
    assert result.returncode == 2 and "Traceback" in result.stderr


NANOGPT = {  # the assignments of nanoGPT's config files
    "train_shakespeare_char.py": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
    "finetune_shakespeare.py": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "train_gpt2.py": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "eval_gpt2_xl.py": """
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = 'gpt2-xl'
""",
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpt_config_files_run_unchanged(tmp_path, name):
    (tmp_path / name).write_text(NANOGPT[name])
    result = run_script("train.py", tmp_path / name, "--print_settings")
    assert result.returncode == 0, result.stderr
    for line in NANOGPT[name].strip().splitlines():
        if "=" in line and "time" not in line:
            key = line.split("=")[0].strip()
            assert re.search(
                rf"^{key} = .*# {re.escape(str(tmp_path / name))}$", result.stdout, re.MULTILINE
            ), key


def test_nanogpt_corpora_can_be_trained_on(settings, tmp_path):
    """train.bin, val.bin and meta.pkl as nanoGPT's prepare.py writes them."""
    text = make_text(400)
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    folder = tmp_path / "data" / "nanogpt"
    folder.mkdir(parents=True)
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    _, t = run_training(replace(settings, data_dir=str(tmp_path / "data"), dataset="nanogpt"))
    assert t.model.config.vocab_size == len(chars)
    result = run_script("sample.py", f"--out_dir={settings.out_dir}", "--start=amor", "--max_new_tokens=5")
    assert result.returncode == 0 and result.stdout.startswith("amor"), result.stderr


def test_a_malicious_meta_pkl_is_not_executed(settings, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    folder = write_corpus(tmp_path / "data" / "bad", make_text(300))
    for name in ("meta.json", "tokenizer.json"):
        (folder / name).unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Bomb()}))
    message = error_of(replace(settings, data_dir=str(tmp_path / "data"), dataset="bad"))
    assert "meta.pkl" in message
    assert not (tmp_path / "it ran").exists()
