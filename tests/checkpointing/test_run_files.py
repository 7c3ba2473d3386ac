"""Only files that a run has written are deleted or replaced: user's files in and around a run folder stay."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support import run_training

from fradique.checkpointing import checkpoint, run_files, run_folder
from fradique.tokenizer.tokenizer import BPETokenizer, CharTokenizer, save_tokenizer, tokenizer_checksum


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def overwrite(settings):
    assert run_training(replace(settings, overwrite=True))[0] == 0


CONFLICTS = ["settings.json", "tokenizer.json", "metrics.jsonl", "samples.txt", "loss.png", "wandb_id.txt"]
CONFLICTS += ["best/weights.bin", "step-00000010/x", "snapshots/step-00000010.safetensors", "best"]


@pytest.mark.parametrize("name", CONFLICTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_a_run_would_replace_is_refused(settings, name, overwrite):
    folder = Path(settings.out_dir)
    write(folder / name)
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r"files that no run has written.*Choose another --out_dir"):
        run_training(replace(settings, overwrite=overwrite))
    assert snapshot(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["wandb/mine", "notes.txt", "snapshots/mine.txt", "plots/loss.png"])
def test_other_files_do_not_prevent_a_run(settings, name, overwrite):
    mine = write(Path(settings.out_dir) / name)
    assert run_training(replace(settings, max_iters=2, overwrite=overwrite))[0] == 0
    assert mine.read_text() == "mine"


def test_overwriting_a_run_keeps_the_files_of_the_user(settings):
    settings = replace(settings, snapshot_interval=5, sample_interval=5)
    run_training(settings)
    folder = Path(settings.out_dir)
    names = ["notes.txt", "best/notes.txt", "step-00000020/notes.txt", "snapshots/notes.txt", "wandb/mine"]
    names += ["wandb/run-20260101_000000-abc/mine", "step-notes/x", "best.txt"]
    for name in names:
        write(folder / name)
    overwrite(replace(settings, max_iters=3))
    kept = {name.replace("step-00000020", "files-of-step-00000020") for name in names}
    kept = {name.replace("best/", "files-of-best/") for name in kept}
    assert all((folder / name).read_text() == "mine" for name in kept)
    assert [path.name for path in checkpoint.step_folders(folder)] == ["step-00000000", "step-00000003"]


def test_files_in_a_checkpoint_survive_its_removal_and_replacement(settings):
    """Old step checkpoints are removed, and best/ is replaced, while the run goes on."""
    run_training(replace(settings, max_iters=10))
    folder = Path(settings.out_dir)
    write(folder / "step-00000005" / "notes.txt")
    write(folder / "best" / "notes.txt")
    run_training(replace(settings, init_from="resume", max_iters=20))
    assert (folder / "files-of-step-00000005" / "notes.txt").read_text() == "mine"
    assert (folder / "best" / "notes.txt").read_text() == "mine"
    checkpoint.read_checkpoint(folder / "best")


def test_only_the_wandb_folders_of_the_run_are_deleted(tmp_path):
    ours = ["run-20260101_000000-abc1", "offline-run-20260102_000000-abc1"]
    for name in [*ours, "run-20260101_000000-other", "mine"]:
        write(tmp_path / "wandb" / name / "file")
    (tmp_path / "wandb" / "latest-run").symlink_to(ours[1])
    write(tmp_path / "wandb_id.txt", "abc1\n")
    run_files.mark_run(tmp_path, "id")
    run_files.delete_run(tmp_path)
    names = sorted(path.name for path in (tmp_path / "wandb").iterdir())
    assert names == ["mine", "run-20260101_000000-other"]
    assert [path.name for path in tmp_path.iterdir()] == ["wandb"]


def test_links_are_removed_and_never_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "wandb" / "run-20260101_000000-abc1" / "file")
    write(elsewhere / "best" / "model.safetensors")
    run = tmp_path / "run"
    write(run / "wandb_id.txt", "abc1")
    for name in ("wandb", "best"):
        (run / name).symlink_to(elsewhere / name)
    before = snapshot(elsewhere)
    run_files.mark_run(run, "id")
    run_files.delete_run(run)
    assert snapshot(elsewhere) == before


def test_a_run_of_an_older_version_is_recognized_by_its_settings(settings):
    run_training(settings)
    folder = Path(settings.out_dir)
    (folder / run_files.MARKER).unlink()
    assert run_files.is_run(folder)
    overwrite(replace(settings, max_iters=2))
    (folder / run_files.MARKER).unlink()
    (folder / "settings.json").write_text(json.dumps({"settings": {"theme": "dark"}}))
    with pytest.raises(ValueError, match="files that no run has written"):
        run_training(replace(settings, overwrite=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.bin", "a corpus"),
        ("train_00003.bin", "a corpus"),
        ("val.bin", "a corpus"),
        (".shards/plan.json", "a corpus"),
        ("ckpt.pt", "a run of nanoGPT"),
        ("config.json", "a pretrained model"),
        ("model.safetensors", "a pretrained model"),
        ("model.Q8_0.gguf", "a pretrained model"),
        ("prepare.py", "the folder of a corpus"),
        ("meta.pkl", "a corpus"),
        ("manifest.json", "a checkpoint of a run"),
        ("model-00001-of-00002.safetensors", "a pretrained model"),
        ("model.safetensors.index.json", "a pretrained model"),
        ("pytorch_model-00001-of-00002.bin", "a pretrained model"),
        ("vocab.json", "a pretrained model"),
        ("merges.txt", "a pretrained model"),
    ],
)
def test_folders_of_something_else_are_refused_by_name(settings, name, content):
    mine = write(Path(settings.out_dir) / name)
    with pytest.raises(ValueError, match=f"is {content}: choose a folder for this run"):
        run_training(replace(settings, overwrite=True))
    assert snapshot(mine.parent) == {mine.name: b"mine"}


def test_the_suggested_folder_is_quoted_for_the_shell(settings, tmp_path):
    write(tmp_path / "my $run" / "prepare.py")
    with pytest.raises(ValueError, match=r"such as --out_dir='out/my \$run-run'$"):
        run_training(replace(settings, out_dir=str(tmp_path / "my $run")))
    write(tmp_path / "my $run" / "settings.json")
    with pytest.raises(ValueError, match=r"Try --out_dir='.*/my \$run'$"):
        run_folder.saved_settings(tmp_path / "other")


@pytest.mark.parametrize("target", ["link", "nowhere"])
@pytest.mark.parametrize("name", ["link", "link/run"])
def test_a_link_that_leads_nowhere_is_refused(settings, tmp_path, target, name):
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"link is a symbolic link to .*{target}, which leads nowhere"):
        run_training(replace(settings, out_dir=str(tmp_path / name)))
    with pytest.raises(ValueError, match="no trained model in"):
        run_folder.saved_settings(tmp_path / name)


def test_a_run_behind_a_link_can_be_written_and_resumed(settings, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    settings = replace(settings, out_dir=str(tmp_path / "link" / "run"), max_iters=2)
    assert run_training(settings)[0] == 0
    assert run_training(replace(settings, init_from="resume", max_iters=4))[0] == 0


def save_own_tokenizer(folder: Path, tokenizer) -> None:
    """Write what `load_run_tokenizer` reads."""
    save_tokenizer(tokenizer, write(folder / "tokenizer.json"))
    write(folder / "settings.json", json.dumps({"tokenizer_sha256": tokenizer_checksum(tokenizer)}))


def test_the_tokenizer_of_the_corpus_must_be_that_of_the_run(tmp_path):
    save_own_tokenizer(tmp_path, CharTokenizer("abc"))
    run_folder.check_tokenizer(tmp_path, CharTokenizer("abc"), Path("data/x"))
    message = r"another tokenizer \(char, 3 tokens\) than that of data/x now \(char, 2 tokens\)"
    with pytest.raises(ValueError, match=message):
        run_folder.check_tokenizer(tmp_path, CharTokenizer("ab"), Path("data/x"))


def test_a_swapped_tokenizer_of_the_run_is_not_the_corpus(tmp_path):
    save_own_tokenizer(tmp_path, CharTokenizer("abc"))
    save_tokenizer(CharTokenizer("cba"), tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer of this run"):
        run_folder.check_tokenizer(tmp_path, CharTokenizer("abc"), Path("data/x"))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing: put the run's own file back"):
        run_folder.check_tokenizer(tmp_path, CharTokenizer("abc"), Path("data/x"))


@pytest.mark.parametrize(
    ("own", "now", "names", "flag"),
    [
        ("</s>", "<|endoftext|>", "the separator '</s>' .* has the separator '<|endoftext|>'", "'</s>'"),
        (None, "</s>", "no separator between documents, .* the separator '</s>'", "none"),
        (
            "<|endoftext|>",
            None,
            "the separator '<|endoftext|>' between .* has no separator",
            "'<|endoftext|>'",
        ),
    ],
)
def test_another_separator_of_documents_is_named(tmp_path, own, now, names, flag):
    save_own_tokenizer(tmp_path, BPETokenizer([("a", "b")], own))
    with pytest.raises(ValueError, match=names.replace("|", r"\|")) as caught:
        run_folder.check_tokenizer(tmp_path, BPETokenizer([("a", "b")], now), Path("data/x"))
    assert f"Prepare the corpus with --document_separator={flag}," in str(caught.value)


def test_the_home_and_the_current_folder_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="is your home folder"):
        run_training(replace(settings, out_dir=str(tmp_path)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out_dir in (".", str(tmp_path / "here"), "../here"):
        with pytest.raises(ValueError, match=r"is the current folder: choose .*out/here-run"):
            run_training(replace(settings, out_dir=out_dir))
    with pytest.raises(ValueError, match="is the root folder"):
        run_training(replace(settings, out_dir="/"))


def test_a_user_without_a_home_folder_can_train(settings, monkeypatch):
    """Some containers run as a user id without an account."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert run_training(replace(settings, max_iters=1))[0] == 0


def test_a_run_can_be_resumed_from_within_its_folder(settings, monkeypatch):
    run_training(replace(settings, max_iters=5))
    monkeypatch.chdir(settings.out_dir)
    assert run_training(replace(settings, init_from="resume", out_dir=".", max_iters=7))[0] == 0


def test_a_deleted_run_does_not_continue_among_new_files(settings, tmp_path):
    """Somebody deleted the run folder and made another one with files of the same names."""
    folder = Path(settings.out_dir)
    run_lock = claim(folder, settings)
    folder.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    write(folder / "settings.json")
    continued, warning = run_lock.follow_folder()
    assert continued == folder.with_name("run-continued") and "was deleted" in warning
    assert snapshot(folder) == {"settings.json": b"mine"}
    run_lock.lock.release()


def claim(folder, settings):
    return run_folder.claim_run_folder(
        folder, vars(settings), {}, CharTokenizer("ab"), resume_step=None, overwrite=False
    )


def test_only_listed_names_are_deleted(tmp_path):
    """A run of a version that wrote fewer files; a name that no run writes is never deleted."""
    for name in ("settings.json", "samples.txt", "notes.txt"):
        write(tmp_path / name)
    listed = ["settings.json", "notes.txt", "../elsewhere", 3]
    write(tmp_path / run_files.MARKER, json.dumps({"format": 1, "run": "id", "files": listed}))
    run_files.delete_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "samples.txt"]


def test_a_first_run_leaves_hidden_files_of_others_alone(settings):
    """Their names look like temporary files."""
    folder = Path(settings.out_dir)
    folder.mkdir()
    names = [".diary.txt.12.tmp", ".settings.json.12.tmp", ".todo.json.old"]
    for name in names:
        (folder / name).write_text("mine")
    run_training(replace(settings, max_iters=1))
    assert all((folder / name).read_text() == "mine" for name in names)
