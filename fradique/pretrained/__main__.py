"""TODO."""

import argparse
import sys
from pathlib import Path

from fradique.pretrained import export
from fradique.pretrained.loader import load_weights

# python -m fradique.pretrained export


def main(words: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 after a user's mistake, told in one message."""
    args = _parser().parse_args(words)
    try:
        weights = load_weights(
            args.out_dir, args.checkpoint, warn=lambda text: print(f"warning: {text}", file=sys.stderr)
        )
        folder = Path(args.to)
        layout = export.export_model(
            weights.config, weights.tensors, weights.tokenizer, folder, args.overwrite
        )
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder} holds {args.out_dir} as a {layout.name}; transformers opens it:")
    print(f'  model = AutoModelForCausalLM.from_pretrained("{folder}")')
    print(
        f'  tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        if weights.tokenizer
        else "no tokenizer came with the weights, and none was written"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fradique.pretrained", description="Weights in and out.")
    commands = parser.add_subparsers(required=True, metavar="export")
    add = commands.add_parser(
        "export",
        help="write a run in Hugging Face's layout",
        description="Write a run as a folder that transformers opens, as a GPT-2 or a LLaMA.",
        allow_abbrev=False,
    ).add_argument
    add("--out_dir", required=True, help="the run folder, or any weights that --init_from takes")
    add("--to", required=True, help="the folder to make")
    add(
        "--checkpoint", default="best", help="which of the run's: best | newest | the number of a step (best)"
    )
    truth = {"nargs": "?", "const": True, "default": False, "type": _boolean, "metavar": "True|False"}
    add("--overwrite", **truth, help="replace a model that lies in the folder")
    add("--debug", **truth, help="show the traceback of an error")
    return parser


def _boolean(word: str) -> bool:
    if word not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word == "True"


if __name__ == "__main__":
    sys.exit(main())
