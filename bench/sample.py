"""How fast a model writes: reading a prompt, and making tokens one by one.

    python -m bench.sample                                   GPT-2 124M with random weights
    python -m bench.sample --shape char --nanogpt FOLDER --huggingface
    python -m bench.sample --out_dir out/eca-char --dtype bfloat16

A token cannot be written faster than the weights are read from memory: that limit is measured beside, and told
as `limit`. `--nanogpt` measures the `generate` of a nanoGPT that lies in FOLDER, `--huggingface` that of
transformers, by turns and with weights of the same shape; the ratios are medians over the rounds. The last line
is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sample
from bench import machine
from fradique.runtime import device as devices
from model import GPT, GPTConfig

SHAPES = {
    "gpt2": GPTConfig(vocab_size=50257),
    "char": GPTConfig(block_size=256, vocab_size=128, n_layer=6, n_head=6, n_embd=384, bias=False),
}
Write = Callable[[Tensor, int], object]  # a prompt (B, T) and a number of tokens to write behind it


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rates of prefill and decode, in tokens a second over all rows, and what they are measured beside."""
    writer = writer_of(args)
    model, place = writer.model, writer.runtime
    config, device = model.config, place.device

    def ours(idx: Tensor, count: int) -> None:
        with writer.autocast():
            list(model.stream(idx, count))

    others: dict[str, Write] = {}
    if args.nanogpt:
        others["nanogpt_ratio"] = nanogpt(config, args.nanogpt, device)
    if args.huggingface:
        others["huggingface_ratio"] = huggingface(config, device)
    parameters = parameters_of(config)
    weights = parameters * place.dtype.itemsize
    result: dict[str, Any] = {
        "machine": machine.describe(device),
        "torch": torch.__version__,
        "dtype": str(place.dtype).removeprefix("torch."),
        "parameters": parameters,
        "limit_tokens_per_second": machine.read_bandwidth(device) / weights,
    }
    prompt = torch.randint(config.vocab_size, (1, min(512, config.block_size // 2)), device=device)
    spent = statistics.median(machine.times(lambda: ours(prompt, 1), device, args.rounds))
    result["prefill_tokens_per_second"] = prompt.size(1) / spent
    for batch in map(int, args.rows.split(",")):
        start = torch.zeros(batch, 1, dtype=torch.long, device=device)
        mine, theirs = by_turns(ours, others, start, args.tokens, args.rounds)
        rates = {"tokens_per_second": batch * args.tokens / statistics.median(mine)}
        rates |= {name: machine.median_ratio(seconds, mine) for name, seconds in theirs.items()}
        result[f"decode_{batch}"] = rates
    return result


def parameters_of(config: GPTConfig) -> int:
    with torch.device("meta"):
        return GPT(config).num_params(non_embedding=False)


def by_turns(
    ours: Write, others: dict[str, Write], start: Tensor, count: int, rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each round, of ours and of the others."""
    for write in (ours, *others.values()):
        write(start, 4)
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        mine.append(machine.seconds(lambda: ours(start, count), start.device))
        for name, write in others.items():
            theirs[name].append(machine.seconds(lambda write=write: write(start, count), start.device))
    return mine, theirs


def writer_of(args: argparse.Namespace) -> sample.LoadedModel:
    """The model of a run, or one of a shape with random weights, as sample.py would open it."""
    if args.out_dir:
        writer = sample.load_model(args.out_dir, device=args.device, dtype=args.dtype)
    else:
        torch.manual_seed(0)
        place = devices.setup_runtime(device=args.device, dtype=args.dtype)
        model = GPT(SHAPES[args.shape]).to(place.device).eval()
        writer = sample.LoadedModel(model, tokenizer=None, runtime=place)
    return sample.prepare_for_inference(writer, args.dtype)


def nanogpt(config: GPTConfig, folder: Path, device: torch.device) -> Write:
    """nanoGPT's own model, from its folder, in float32 on a CPU and bfloat16 on CUDA, as its sample.py runs."""
    ours = sys.modules.pop("model")  # its module has the name of ours
    sys.path.insert(0, str(folder))
    try:
        import model
    finally:
        sys.path.remove(str(folder))
        sys.modules["model"] = ours
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    made = model.GPT(model.GPTConfig(**{name: getattr(config, name) for name in names}))
    made.to(device).eval()

    def write(idx: Tensor, count: int) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            made.generate(idx, count)

    return write


def huggingface(config: GPTConfig, device: torch.device) -> Write:
    """transformers' GPT-2 of the same shape, with its cache."""
    import transformers

    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    made = transformers.GPT2LMHeadModel(shape).to(device).eval()
    return lambda idx, count: made.generate(
        idx, attention_mask=torch.ones_like(idx), do_sample=True, top_k=0, max_new_tokens=count
    )


def report(result: dict[str, Any]) -> str:
    """A result as people read it."""
    lines = [
        f"{result['parameters'] / 1e6:.1f}M parameters, {result['dtype']}, on {result['machine']}",
        f"  reading a prompt: {result['prefill_tokens_per_second']:.0f} tokens/s",
        f"  no faster than memory: {result['limit_tokens_per_second']:.0f} tokens/s for one row",
    ]
    for batch in (int(key.removeprefix("decode_")) for key in result if key.startswith("decode_")):
        rates = result[f"decode_{batch}"]
        line = f"  writing {batch} row{'s' if batch > 1 else ''}: {rates['tokens_per_second']:.0f} tokens/s"
        for name, other in (("nanogpt_ratio", "nanoGPT"), ("huggingface_ratio", "Hugging Face")):
            if name in rates:
                line += f", {rates[name]:.2f} times {other}'s"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print what was found, and one line of JSON."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="gpt2", help="random weights of this shape (default: %(default)s)")
    add("--out_dir", help="a run folder, or what sample.py takes as init_from, instead")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--tokens", type=int, default=500, help="to write in a round (default: %(default)s)")
    add("--rows", default="1,16", help="samples written at once, with commas (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of which the medians are told (default: %(default)s)")
    add("--nanogpt", type=Path, metavar="FOLDER", help="measure beside a nanoGPT that lies there")
    add("--huggingface", action="store_true", help="measure beside transformers' generate")
    args = parser.parse_args(argv)
    if args.huggingface and not args.out_dir and args.tokens >= SHAPES[args.shape].block_size:
        parser.error("transformers writes no further than the block: give fewer --tokens")
    result = measure(args)
    print(report(result))
    print(json.dumps({"bench": "sample", **result}))


if __name__ == "__main__":
    main()
