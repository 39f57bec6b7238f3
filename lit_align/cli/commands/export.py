"""`lit-align export RUN_OR_CKPT --out FOLDER`: a checkpoint as a folder of transformers or peft."""

from pathlib import Path

from lit_align.cli.arguments import Arguments
from lit_align.console import print_line
from lit_align.errors import UserError


def run(args: list[str]) -> None:
    """Write the folder."""
    parser = Arguments("export", "Write a run's policy in transformers' format, with its tokenizer and a model card.")
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--adapter", action="store_true", help="write the LoRA adapter alone, for peft (default: merge it)"
    )
    given = parser.parse_args(args)
    if Path(given.out).is_file():
        raise UserError(f"export: --out={given.out} must be a folder, not a file. Choose another name.")
    from lit_align.export import export

    print_line(f"exported   {export(given.source, given.out, given.adapter)}")
