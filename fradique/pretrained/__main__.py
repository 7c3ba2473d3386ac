"""Export the model of a run to a folder that transformers can open.

python -m fradique.pretrained export --out_dir=out/<run> --to=<folder>
"""

import argparse
import sys

from fradique.io.terminal import command_output, path_argument
from fradique.pretrained.export import export_model
from fradique.pretrained.loader import load_weights


@command_output()
def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit status: 0, or 2 after the message of a ValueError or OSError.

    `arguments` are those of the command line by default. Exits with status 2 if they cannot be parsed.
    """
    args = _make_parser().parse_args(arguments)
    folder = args.to
    try:
        weights = load_weights(args.out_dir, args.checkpoint, warn=_print_warning)
        layout = export_model(weights.config, weights.tensors, weights.tokenizer, folder, args.overwrite)
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


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fradique.pretrained", description="Export models.")
    commands = parser.add_subparsers(required=True, metavar="export")
    command = commands.add_parser(
        "export",
        help="write the model of a run in Hugging Face's layout",
        description="Write the model of a run, as GPT-2 or LLaMA, to a folder that transformers can open.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--out_dir",
        required=True,
        type=lambda text: str(path_argument(text)),
        help="run folder, or any weights that --init_from takes",
    )
    command.add_argument("--to", required=True, type=path_argument, help="folder to create")
    command.add_argument(
        "--checkpoint",
        default="best",
        help="checkpoint of the run: best, newest, or a step number (default: %(default)s)",
    )
    for name, text in (
        ("--overwrite", "replace an earlier export in the folder"),
        ("--debug", "show the traceback of an error"),
    ):
        command.add_argument(
            name, nargs="?", const=True, default=False, type=_parse_boolean, metavar="True|False", help=text
        )
    return parser


def _parse_boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text == "True"


if __name__ == "__main__":
    sys.exit(main())
