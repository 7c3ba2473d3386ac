"""Speed of generation: prefill (reading the prompt) and decode (one token at a time).

    python -m bench.sample                                   GPT-2 124M with random weights
    python -m bench.sample --shape char --tokens 200 --nanogpt FOLDER --huggingface
    python -m bench.sample --out_dir out/eca-char --dtype bfloat16

To decode a token, all weights must be read from memory. The limit that this sets is measured and printed too.
`--nanogpt FOLDER` also measures `generate` of the nanoGPT in FOLDER, and `--huggingface` that of
transformers: both as a plain GPT-2 of the same size with random weights. nanoGPT runs in bfloat16 on CUDA and
in float32 elsewhere, transformers in float32, and our model in --dtype. The programs take turns; ratios are
medians over the rounds. The last line is JSON.
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

import sample  # sample.py of the project, not this file
from bench import machine
from bench.command import bench_command
from fradique.io.terminal import path_argument
from fradique.runtime.device import configure_process, setup_runtime
from model import GPT, GPTConfig

SHAPES = {
    "gpt2": GPTConfig(vocab_size=50257),
    "char": GPTConfig(block_size=256, vocab_size=128, n_layer=6, n_head=6, n_embd=384, bias=False),
    "tiny": GPTConfig(block_size=32, vocab_size=128, n_layer=1, n_head=2, n_embd=16),  # to try this command
}
Generate = Callable[[Tensor, int], object]  # (prompt (B, T), number of new tokens)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of prefill and decode, the limit of memory bandwidth, and ratios to other programs.

    The tokens of all rows of a batch are counted.
    """
    loaded = load_or_make_model(args)
    model, runtime = loaded.model, loaded.runtime
    config, device = model.config, runtime.device

    def ours(idx: Tensor, count: int) -> None:
        stream = model.stream(idx, count)
        more = True
        while more:
            with loaded.autocast():  # for each token, as in sample.py
                more = next(stream, None) is not None

    others: dict[str, Generate] = {}
    if args.nanogpt:
        others["nanogpt_ratio"] = nanogpt(config, args.nanogpt, device)
    if args.huggingface:
        if args.tokens >= config.block_size:
            raise SystemExit(
                f"transformers' GPT-2 has block_size = {config.block_size} positions, for the start token and "
                "--tokens: use fewer --tokens"
            )
        others["huggingface_ratio"] = huggingface(config, device)
    parameters = count_parameters(config)
    # with the embedding tables, of which a token reads one row: the limit is a little too low
    weight_bytes = parameters * runtime.dtype.itemsize
    result: dict[str, Any] = {
        "machine": machine.describe(device),
        "torch": torch.__version__,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "parameters": parameters,
        "limit_tokens_per_second": machine.read_bandwidth(device) / weight_bytes,
    }
    prompt = torch.randint(config.vocab_size, (1, min(512, config.block_size // 2)), device=device)
    # the one new token is sampled from the logits of the prompt: there is no decode step
    seconds = statistics.median(machine.times(lambda: ours(prompt, 1), device, args.rounds))
    result["prefill_tokens_per_second"] = prompt.size(1) / seconds
    for batch in map(int, args.rows.split(",")):
        start_token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        our_times, other_times = alternate(ours, others, start_token, args.tokens, args.rounds)
        rates = {"tokens_per_second": batch * args.tokens / statistics.median(our_times)}
        rates |= {name: machine.median_ratio(times, our_times) for name, times in other_times.items()}
        result[f"decode_{batch}"] = rates
    return result


def count_parameters(config: GPTConfig) -> int:
    """Number of parameters of a model. The model itself is not asked: packed weights are not parameters."""
    with torch.device("meta"):  # allocates no memory
        return GPT(config).num_params(non_embedding=False)


def alternate(
    ours: Generate, others: dict[str, Generate], prompt: Tensor, count: int, rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Generate `count` tokens in each round with our model and with the others, which take turns.

    Returns the seconds of each round: of our model, and of the others by name.
    """
    for generate in (ours, *others.values()):
        generate(prompt, 4)  # warm-up
    our_times: list[float] = []
    other_times: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        our_times.append(machine.seconds(lambda: ours(prompt, count), prompt.device))
        for name, generate in others.items():
            seconds = machine.seconds(lambda generate=generate: generate(prompt, count), prompt.device)
            other_times[name].append(seconds)
    return our_times, other_times


def load_or_make_model(args: argparse.Namespace) -> sample.LoadedModel:
    """The model of --out_dir, or random weights of --shape, prepared for inference as in sample.py."""
    configure_process(args.device)
    if args.out_dir:
        loaded = sample.load_model(args.out_dir, device=args.device, dtype=args.dtype)
    else:
        torch.manual_seed(0)
        runtime = setup_runtime(device=args.device, dtype=args.dtype)
        model = GPT(SHAPES[args.shape]).to(runtime.device).eval()
        loaded = sample.LoadedModel(model, tokenizer=None, runtime=runtime)
    return sample.prepare_for_inference(loaded, args.dtype)


def nanogpt(config: GPTConfig, folder: Path, device: torch.device) -> Generate:
    """`generate` of the nanoGPT in `folder`: float32 on a CPU, bfloat16 on CUDA, as its sample.py does."""
    our_module = sys.modules.pop("model")  # nanoGPT's module has the same name
    sys.path.insert(0, str(folder))
    try:
        import model
    finally:
        sys.path.remove(str(folder))
        sys.modules["model"] = our_module
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
    gpt = model.GPT(model.GPTConfig(**{name: getattr(config, name) for name in names}))
    gpt.to(device).eval()

    def generate(idx: Tensor, count: int) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            gpt.generate(idx, count)

    return generate


def huggingface(config: GPTConfig, device: torch.device) -> Generate:
    """`generate` of transformers' GPT-2 of the same size, in float32 with biases. It uses a KV cache."""
    import transformers

    gpt2_config = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        bos_token_id=0,
        eos_token_id=None,  # no row ends early
        pad_token_id=0,
    )
    gpt = transformers.GPT2LMHeadModel(gpt2_config).to(device).eval()
    # top_k=0: sample from all tokens, as ours (the default of transformers is 50)
    return lambda idx, count: gpt.generate(
        idx, attention_mask=torch.ones_like(idx), do_sample=True, top_k=0, max_new_tokens=count
    )


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['parameters'] / 1e6:.1f}M parameters, {result['dtype']}, on {result['machine']}",
        f"  prefill: {result['prefill_tokens_per_second']:.0f} tokens/s",
        f"  limit of memory bandwidth: {result['limit_tokens_per_second']:.0f} tokens/s for one row",
    ]
    for key, rates in result.items():
        if not key.startswith("decode_"):
            continue
        batch = int(key.removeprefix("decode_"))
        line = f"  decode, {batch} row{'s' if batch > 1 else ''}: {rates['tokens_per_second']:.0f} tokens/s"
        for name, other in (("nanogpt_ratio", "nanoGPT"), ("huggingface_ratio", "Hugging Face")):
            if name in rates:
                line += f", {rates[name]:.2f} times {other}'s speed"
        lines.append(line)
    return "\n".join(lines)


@bench_command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the result, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="gpt2", help="random weights of this shape (default: %(default)s)"
    )
    parser.add_argument(
        "--out_dir",
        type=lambda text: str(path_argument(text)),
        help="model to measure instead: a run folder, or another value of sample.py's init_from",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, mps, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=500, help="new tokens per round (default: %(default)s)")
    parser.add_argument(
        "--rows", default="1,16", help="batch sizes, separated by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="number of rounds; results are medians over them (default: %(default)s)",
    )
    parser.add_argument(
        "--nanogpt", type=path_argument, metavar="FOLDER", help="also measure the nanoGPT in this folder"
    )
    parser.add_argument("--huggingface", action="store_true", help="also measure transformers' generate")
    args = parser.parse_args(argv)
    result = measure(args)
    print(report(result))
    print(json.dumps({"bench": "sample", **result}))


if __name__ == "__main__":
    main()
