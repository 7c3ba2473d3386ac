"""Generate text with a trained model, and print it as it is generated.

python sample.py --out_dir=out/eca-char --start="A figura é poética"
python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=3
printf "Era uma vez" | python sample.py --out_dir=out/eca-char --start=-
"""

from fradique.runtime import mps, openmp

openmp.limit_spinning()  # before torch is imported
mps.fall_back_to_cpu()

import codecs
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configurator import Resolved, command, setting
from fradique.checkpointing import run_folder
from fradique.checkpointing.checkpoint import assign_parameters, step_folders
from fradique.data.text import UTF_ENCODINGS, guess_encoding
from fradique.generation import packed_weights
from fradique.generation.sampling import GREEDY_TEMPERATURE
from fradique.io.files import expand_home
from fradique.pretrained import loader
from fradique.runtime import fallback
from fradique.runtime.device import DTYPES, Runtime, configure_process, setup_runtime
from fradique.runtime.memory_limits import OomReport
from fradique.tokenizer.tokenizer import StreamDecoder, Tokenizer, encode_prompt
from model import GPT

MAX_PROMPT_BYTES = 4 << 20  # more than any context holds: the model would read only the end


# fmt: off
@dataclass(frozen=True)
class SampleSettings:
    """python sample.py --out_dir=out/<run> [--start=...] [--key=value ...]

    Continues a prompt with a trained model and prints the text as it is generated.
    """

    out_dir: str = setting("out", "run folder to load the model from", common=True, group="model", path=True)
    init_from: str = setting("resume", "resume: the run in out_dir; otherwise gpt2, gpt2-medium, ..., or a path: run folder, ckpt.pt, Hugging Face folder", common=True, path=True)
    checkpoint: str = setting("best", "checkpoint of the run: best, newest, or a step number", common=True)

    start: str = setting("\n", "prompt: text (in a flag \\n is a newline, \\t a tab, \\\\ a backslash), FILE:path, or - for standard input", common=True, group="text", escapes=True)
    num_samples: int = setting(1, "number of samples, generated in one batch", common=True, lo=1, hi=2**20)
    max_new_tokens: int = setting(500, "number of tokens to generate for each sample", common=True, lo=0, hi=2**40)
    stop: str = setting("", "end a sample before this text, for example \\n\\n; empty: only at max_new_tokens", escapes=True)

    temperature: float = setting(0.8, "0 (or below 1e-4): always the most probable token; 1: the model's own probabilities; above 1: more random", common=True, lo=0.0, group="sampling")
    top_k: int = setting(0, "sample only from the k most probable tokens; 0: from all", common=True, lo=0)
    top_p: float = setting(1.0, "sample only from the most probable tokens whose probabilities add up to p (nucleus sampling)", common=True, above=0.0, hi=1.0)
    min_p: float = setting(0.0, "sample only from tokens at least p times as probable as the most probable one", lo=0.0, hi=1.0)
    repetition_penalty: float = setting(1.0, "above 1: make tokens that have already occurred less probable", lo=0.1, hi=10.0)
    seed: int = setting(1337, "random seed; the same seed gives the same text", common=True, lo=0, hi=2**62)

    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N", common=True, group="machine")
    dtype: str = setting("auto", "auto: on a GPU bfloat16 if it supports it, else float16; on a CPU float32, or packed bfloat16 for models of 5M parameters or more where the CPU supports it", choices=("auto", *DTYPES))
    cache: bool = setting(True, "use the KV cache; False: recompute the whole context for each token")
    debug: bool = setting(False, "show the traceback of an error")
    # fmt: on


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, with its tokenizer and the device and dtype it runs on."""

    model: GPT
    tokenizer: Tokenizer
    runtime: Runtime
    weights_cast: bool = False  # to runtime.dtype, so that no autocast is needed

    def autocast(self) -> AbstractContextManager:
        """The context in which the model runs."""
        return nullcontext() if self.weights_cast else self.runtime.autocast()


def load_model(
    source: str, *, checkpoint_name: str = "best", device: str | torch.device = "auto", dtype: str = "auto"
) -> LoadedModel:
    """Load a run folder, or pretrained weights, with the tokenizer. Raises ValueError if they do not fit.

    On a CPU with dtype="auto" the weights stay float32; `prepare_for_inference` may pack them in bfloat16.
    """
    weights = loader.load_weights(source, checkpoint_name)
    if weights.tokenizer is None:
        raise ValueError(
            f"{source} has no tokenizer that this program knows (characters, GPT-2's, or its own BPE). For a "
            "ckpt.pt of nanoGPT: put the corpus it was trained on into data/, or the corpus's tokenizer.json "
            "next to ckpt.pt. For a run folder: restore its tokenizer.json"
        )
    with torch.device("meta"):  # no memory, no initialization: the loaded tensors become the parameters
        model = GPT(weights.config)
    assign_parameters(model, weights.tensors, weights.source)
    if weights.tokenizer.vocab_size > weights.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {weights.tokenizer.vocab_size} tokens and the model "
            f"{weights.config.vocab_size}: they do not match"
        )
    runtime = setup_runtime(device=device, dtype=dtype)
    return LoadedModel(model.to(runtime.device).eval(), weights.tokenizer, runtime)


def prepare_for_inference(loaded: LoadedModel, requested_dtype: str) -> LoadedModel:
    """Convert the weights, if that makes generation faster. The model can then no longer be trained.

    On CUDA to the runtime's dtype, except float16, in which activations could overflow; if fused attention or
    the dtype does not work there, prints a warning and uses plain attention or float32. On a CPU, if "auto" was
    requested, to bfloat16 in oneDNN's packed layout (see `packed_weights`).
    """
    model = loaded.model
    runtime = fallback.check_inference(model, loaded.runtime, lambda text: print(f"warning: {text}", file=sys.stderr))
    loaded = replace(loaded, runtime=runtime)
    if runtime.device.type == "cuda" and runtime.dtype != torch.float16:
        return replace(loaded, model=model.to(runtime.dtype), weights_cast=True)
    if requested_dtype != "auto" or not packed_weights.should_pack(model, runtime.device):
        return loaded
    packed_weights.pack_weights(model)
    return replace(loaded, runtime=replace(runtime, dtype=torch.bfloat16), weights_cast=True)


def read_prompt(start: str) -> str:
    """The prompt for a value of --start. Raises ValueError for one that is too long or not UTF-8."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    if not name.strip():
        raise ValueError("--start=FILE: names no file: write its path, as in --start=FILE:prompt.txt")
    if start == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: give the prompt as --start=TEXT or --start=FILE:path")
    with nullcontext(sys.stdin.buffer) if start == "-" else Path(expand_home(name)).open("rb") as file:
        data = file.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise ValueError(f"{name} is longer than {MAX_PROMPT_BYTES >> 20} MB: use its end as the prompt")
    encoding = guess_encoding(data, is_start=True)
    if b"\0" in data and encoding in UTF_ENCODINGS:
        raise ValueError(f"{name} is not UTF-8 but {encoding}: convert it with iconv -f {encoding} -t UTF-8, or save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None


class StreamedSample:
    """Decodes one sample while it is generated, and ends it before the text `stop`."""

    def __init__(self, tokenizer: Tokenizer, stop: str) -> None:
        self.decoder, self.stop = StreamDecoder(tokenizer), stop
        self.pending = ""  # not shown yet, because it may be the beginning of `stop`
        self.done = False

    def feed(self, token: int) -> str:
        """Add a token; return the text that can be shown now."""
        return "" if self.done else self._split_at_stop(self.pending + self.decoder.feed([token]))

    def flush(self) -> str:
        """At the end of generation: return the text that has not been shown."""
        if self.done:
            return ""
        text = self._split_at_stop(self.pending + self.decoder.flush()) + self.pending
        self.pending = ""
        return text

    def _split_at_stop(self, text: str) -> str:
        """The part of `text` that can be shown.

        All before `stop` if it occurs (the sample is done then); otherwise all but the longest end that could
        be the beginning of `stop`, which becomes `pending`.
        """
        if not self.stop:
            return text
        if (end := text.find(self.stop)) >= 0:
            self.done, self.pending = True, ""
            return text[:end]
        longest = min(len(self.stop) - 1, len(text))
        length = next(n for n in range(longest, -1, -1) if text.endswith(self.stop[:n]))
        self.pending = text[len(text) - length :]
        return text[: len(text) - length]


def generate_text(loaded: LoadedModel, prompt: str, settings: SampleSettings) -> Iterator[list[str]]:
    """Continue `prompt`: yield, after each token, the new text of each sample (it may be empty).

    Raises ValueError at once, and not in the first iteration, if the prompt cannot be encoded.
    """
    ids = torch.from_numpy(encode_prompt(loaded.tokenizer, prompt).astype("int64"))  # (T,)
    return _stream_texts(loaded, ids, settings)


def _stream_texts(loaded: LoadedModel, ids: torch.Tensor, settings: SampleSettings) -> Iterator[list[str]]:
    """`generate_text` for the tokens (T,) of a prompt."""
    samples = [StreamedSample(loaded.tokenizer, settings.stop) for _ in range(settings.num_samples)]
    generator = torch.Generator(loaded.runtime.device)
    generator.manual_seed(settings.seed)
    stream = loaded.model.stream(
        ids.repeat(settings.num_samples, 1).to(loaded.runtime.device),  # (B, T)
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k or None,
        top_p=settings.top_p,
        min_p=settings.min_p or None,
        repetition_penalty=settings.repetition_penalty,
        n_vocab=loaded.tokenizer.vocab_size,
        use_cache=settings.cache,
        generator=generator,
    )
    while not all(sample.done for sample in samples):
        with loaded.autocast():  # not around the loop: it would enclose the caller's code at each yield
            tokens = next(stream, None)
        if tokens is None:
            break
        yield [sample.feed(token) for sample, token in zip(samples, tokens.tolist(), strict=True)]
    yield [sample.flush() for sample in samples]


def note_ignored_settings(resolved: Resolved[Any]) -> None:
    """Print a note for each setting that the user gave and that init_from, which names other weights, replaces."""
    settings, source = resolved.settings, resolved.settings.init_from
    if source in ("", "resume"):
        return
    if {"out_dir", "init_from"} <= resolved.explicit:
        text = f"--out_dir={settings.out_dir} is ignored, because --init_from={source} names the weights"
        print(f"note: {text}", file=sys.stderr)
    if "checkpoint" in resolved.explicit and not _has_checkpoints(Path(source)):
        text = f"--checkpoint={settings.checkpoint} is ignored, because --init_from={source} is no run folder"
        print(f"note: {text}", file=sys.stderr)


def _has_checkpoints(folder: Path) -> bool:
    """Whether `loader.load_weights` chooses one of several checkpoints in a folder: it is a run folder."""
    if (folder / "manifest.json").exists():  # it is itself a checkpoint of a run
        return False
    return (folder / run_folder.SETTINGS_FILE).exists() or (folder / "best").is_dir() or bool(step_folders(folder))


def main(resolved: Resolved[SampleSettings]) -> int:
    """Print the samples. Returns the exit status."""
    note_ignored_settings(resolved)
    with OomReport():
        print_samples(resolved.settings, configure_process(resolved.settings.device))
    return 0


def print_samples(settings: SampleSettings, device: torch.device) -> None:
    """Print the first sample as it grows, and the others after it."""
    source = settings.init_from
    if source == "resume":
        source = settings.out_dir
        run_folder.saved_settings(Path(source))  # raises if there is no run: it is not a name on the hub
    prompt = read_prompt(settings.start)
    loaded = load_model(source, checkpoint_name=settings.checkpoint, device=device, dtype=settings.dtype)
    for warning in loaded.runtime.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    loaded = prepare_for_inference(loaded, settings.dtype)
    note = ""
    if settings.temperature < GREEDY_TEMPERATURE and settings.num_samples > 1:
        note = f"temperature {settings.temperature:g} always gives the same text: 1 sample instead of {settings.num_samples}"
        settings = replace(settings, num_samples=1)
    stream = generate_text(loaded, prompt, settings)  # raises before anything is printed
    if note:
        print(note, file=sys.stderr)
    print(prompt, end="", flush=True)
    texts = [""] * settings.num_samples
    for pieces in stream:
        print(pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    print()
    for text in texts[1:]:
        print(f"---------------\n{prompt}{text}")


if __name__ == "__main__":
    sys.exit(command(main, SampleSettings))
