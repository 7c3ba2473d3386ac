"""Export a run for transformers.

python -m fradique.pretrained export --out_dir=out/<run> --to=<folder>
"""

import argparse
import sys
from pathlib import Path

from fradique.pretrained import export, loader


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2, after a message, if the user made a mistake."""
    args = _parser().parse_args(arguments)
    try:
        weights = loader.load_weights(args.out_dir, args.checkpoint, warn=_print_warning)
        folder = Path(args.to)
        layout = export.export_model(
            weights.config, weights.tensors, weights.tokenizer, folder, args.overwrite
        )
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out_dir} was exported to {folder} as {layout.name}; in transformers:")
    print(f'  model = AutoModelForCausalLM.from_pretrained("{folder}")')
    if weights.tokenizer:
        print(f'  tokenizer = AutoTokenizer.from_pretrained("{folder}")')
    else:
        print("the weights had no tokenizer, so none was exported")
    return 0


def _print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fradique.pretrained", description="Export models.")
    commands = parser.add_subparsers(required=True, metavar="export")
    add = commands.add_parser(
        "export",
        help="write a run in Hugging Face's layout",
        description="Write a run as a folder that transformers opens, as GPT-2 or LLaMA.",
        allow_abbrev=False,
    ).add_argument
    add("--out_dir", required=True, help="run folder, or any weights that --init_from takes")
    add("--to", required=True, help="folder to create")
    add("--checkpoint", default="best", help="checkpoint of the run: best, newest, or a step number (best)")
    boolean = {"nargs": "?", "const": True, "default": False, "type": _boolean, "metavar": "True|False"}
    add("--overwrite", **boolean, help="replace an earlier export in the folder")
    add("--debug", **boolean, help="show the traceback of an error")
    return parser


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text == "True"


if __name__ == "__main__":
    sys.exit(main())
