"""Write text with a trained model: settings -> model and tokenizer -> prompt -> text, streamed.

python sample.py --out_dir=out/eca-char --start="A figura é poética"
python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=3
printf "Era uma vez" | python sample.py --out_dir=out/eca-char --start=-
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configurator import Resolved, command, setting
from fradique.checkpointing import checkpoint, run_folder
from fradique.generation import packed_weights
from fradique.pretrained import loader
from fradique.runtime import device as devices
from fradique.runtime import memory_limits
from fradique.tokenizer import tokenizer as tokenizers
from model import GPT, GPTConfig

LONGEST_PROMPT = 4 << 20  # bytes; the model reads the end of it


# fmt: off
@dataclass(frozen=True)
class SampleSettings:
    """python sample.py --out_dir=out/<run> [--start=...] [--key=value ...]

    Continues a prompt with a trained model and prints the text as it is made.
    """

    out_dir: str = setting("out", "the run folder", group="model")
    init_from: str = setting("resume", "resume: the run in out_dir; else gpt2, …, a run folder, ckpt.pt, or Hugging Face folder")
    checkpoint: str = setting("best", "which of the run's: best | newest | the number of a step")

    start: str = setting("\n", "the prompt: text, FILE:path, or - for standard input", group="text")
    num_samples: int = setting(1, "how many continuations, made as one batch", lo=1, hi=2**20)
    max_new_tokens: int = setting(500, "the length of each", lo=0, hi=2**40)
    stop: str = setting("", "end a sample before this text; empty: go on to max_new_tokens")

    temperature: float = setting(0.8, "0: always the likeliest token; 1: as the model has learnt it", lo=0.0, group="drawing")
    top_k: int = setting(0, "draw from the k likeliest tokens; 0: from all", lo=0)
    top_p: float = setting(1.0, "draw from the likeliest whose probabilities reach p", above=0.0, hi=1.0)
    min_p: float = setting(0.0, "draw from those at least p times as likely as the likeliest", lo=0.0, hi=1.0)
    repetition_penalty: float = setting(1.0, "above 1: tokens that have occurred become less likely", lo=0.1, hi=10.0)
    seed: int = setting(1337, "the same seed gives the same text", lo=0, hi=2**62)

    device: str = setting("auto", "auto | cpu | mps | cuda | cuda:N", group="machine")
    dtype: str = setting("auto", "auto: what the card has; on a CPU float32, or packed bfloat16 from 5M parameters where it has that", choices=("auto", *devices.DTYPES))
    cache: bool = setting(True, "keep keys and values; False: compute the whole context for each token")
    debug: bool = setting(False, "show the traceback of an error")
    # fmt: on


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to write, and the tokenizer that goes with it."""

    model: GPT
    tokenizer: tokenizers.Tokenizer
    runtime: devices.Runtime
    lowered: bool = False  # the weights themselves are in the runtime's dtype, and need no autocast

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.lowered else self.runtime.autocast()


def load_model(
    source: str, *, checkpoint_name: str = "best", device: str = "auto", dtype: str = "auto"
) -> LoadedModel:
    """A run folder, or weights of others, as model and tokenizer. Raises ValueError where they do not fit."""
    weights = loader.load_weights(source, checkpoint_name)
    if weights.tokenizer is None:
        raise ValueError(
            f"{source} comes without a tokenizer that this program knows (characters, GPT-2's, or a BPE of its "
            "own): of nanoGPT's ckpt.pt, put the corpus it was trained on into data/, or the tokenizer.json of "
            "that corpus beside it; of a run folder, copy its tokenizer.json back"
        )
    config = GPTConfig(**weights.config)
    if problems := config.problems():
        raise ValueError(f"{source} holds no model: {'; '.join(problems)}")
    with torch.device("meta"):  # no memory, no initial weights: those that were loaded become its own
        model = GPT(config)
    checkpoint.assign_parameters(model, weights.tensors, weights.source)
    if weights.tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {weights.tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    place = devices.setup_runtime(device=device, dtype=dtype)  # n_embd unset: a CPU keeps to float32
    return LoadedModel(model.to(place.device).eval(), weights.tokenizer, place)


def prepare_for_inference(writer: LoadedModel, dtype: str) -> LoadedModel:
    """The writer with weights of 16 bits, where that writes faster; it can then do nothing else.

    On CUDA they take the runtime's dtype, but for float16, whose range the stream between the layers can leave.
    On a CPU they are packed in bfloat16, where dtype is auto.
    """
    model, place = writer.model, writer.runtime
    if place.device.type == "cuda" and place.dtype != torch.float16:
        return replace(writer, model=model.to(place.dtype), lowered=True)
    if dtype != "auto" or not packed_weights.should_pack(model, place.device):
        return writer
    packed_weights.pack_weights(model)
    return replace(writer, runtime=replace(place, dtype=torch.bfloat16), lowered=True)


def read_prompt(start: str) -> str:
    """The prompt that `--start` means. Raises ValueError for a file that is longer than any prompt, or no UTF-8."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    name = "standard input" if start == "-" else start.removeprefix("FILE:")
    with nullcontext(sys.stdin.buffer) if start == "-" else Path(name).open("rb") as file:
        data = file.read(LONGEST_PROMPT + 1)
    if len(data) > LONGEST_PROMPT:
        raise ValueError(f"{name} is longer than {LONGEST_PROMPT >> 20} MB: give the end of it as the prompt")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None


class StreamedSample:
    """The text of one sample as it grows, cut at `stop`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: str) -> None:
        self.decoder, self.stop = tokenizers.StreamDecoder(tokenizer), stop
        self.held = ""  # the end of the text so far, which may turn out to be the beginning of `stop`
        self.done = False

    def feed(self, token: int) -> str:
        """The text that can be shown once `token` is there."""
        return "" if self.done else self._release(self.held + self.decoder.feed([token]))

    def flush(self) -> str:
        """What is left at the end."""
        text = "" if self.done else self._release(self.held + self.decoder.flush())
        rest, self.held = ("" if self.done else self.held), ""
        return text + rest

    def _release(self, text: str) -> str:
        if not self.stop:
            return text
        if (at := text.find(self.stop)) >= 0:
            self.done, self.held = True, ""
            return text[:at]
        longest = min(len(self.stop) - 1, len(text))
        keep = next(n for n in range(longest, -1, -1) if text.endswith(self.stop[:n]))
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def generate_text(writer: LoadedModel, prompt: str, settings: SampleSettings) -> Iterator[list[str]]:
    """Continue `prompt`: what each of the num_samples rows has to show next, again and again until the end."""
    ids = torch.from_numpy(tokenizers.encode_prompt(writer.tokenizer, prompt).astype("int64"))  # (T,)
    rows = [StreamedSample(writer.tokenizer, settings.stop) for _ in range(settings.num_samples)]
    generator = torch.Generator(writer.runtime.device)
    generator.manual_seed(settings.seed)
    stream = writer.model.stream(
        ids.repeat(settings.num_samples, 1).to(writer.runtime.device),  # (B, T)
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k or None,
        top_p=settings.top_p,
        min_p=settings.min_p or None,
        repetition_penalty=settings.repetition_penalty,
        n_vocab=writer.tokenizer.vocab_size,
        use_cache=settings.cache,
        generator=generator,
    )
    while not all(row.done for row in rows):
        with writer.autocast():  # entered anew for each token: the caller's code is not in it
            tokens = next(stream, None)
        if tokens is None:
            break
        yield [row.feed(token) for row, token in zip(rows, tokens.tolist(), strict=True)]
    yield [row.flush() for row in rows]


@memory_limits.report_oom
def main(resolved: Resolved[SampleSettings]) -> int:
    settings = resolved.settings
    source = settings.init_from
    if source == "resume":
        source = settings.out_dir
        run_folder.saved_settings(Path(source))  # a mistyped folder gets a message, and is not looked for on the hub
    writer = load_model(
        source, checkpoint_name=settings.checkpoint, device=settings.device, dtype=settings.dtype
    )
    writer = prepare_for_inference(writer, settings.dtype)
    prompt = read_prompt(settings.start)
    if settings.temperature == 0 and settings.num_samples > 1:
        settings = replace(settings, num_samples=1)
        print("temperature 0 writes the same text every time: one sample", file=sys.stderr)
    print(prompt, end="", flush=True)
    others = [""] * (settings.num_samples - 1)
    for first, *rest in generate_text(writer, prompt, settings):
        print(first, end="", flush=True)  # the first sample is shown as it grows, the others after it
        others = [text + piece for text, piece in zip(others, rest, strict=True)]
    print()
    for text in others:
        print(f"---------------\n{prompt}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main, SampleSettings))
