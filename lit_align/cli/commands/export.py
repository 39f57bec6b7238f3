"""`lit-align export RUN_OR_CKPT --out FOLDER`: a checkpoint as a folder of transformers or peft."""

from pathlib import Path

from lit_align.cli.arguments import Arguments
from lit_align.console import print_line
from lit_align.errors import UserError


def run(args: list[str]) -> None:
    """Write the folder."""
    parser = Arguments("export", "Write a run's policy in transformers' format, with its tokenizer and a model card.")
    parser.add_argument("source", metavar="RUN_OR_CKPT", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to write")
    parser.add_argument(
        "--adapter", action="store_true", help="write the LoRA adapter alone, for peft (default: merge it)"
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload the folder to the Hugging Face hub, as USER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new model on the hub private")
    given = parser.parse_args(args)
    if given.private and not given.push_to_hub:
        parser.error("--private has no effect without --push-to-hub. Leave it out")
    if Path(given.out).is_file():
        raise UserError(f"export: --out={given.out} must be a folder, not a file. Choose another name.")
    from lit_align.export import export

    print_line(f"exported   {export(given.source, given.out, given.adapter)}")
    if given.push_to_hub:
        from lit_align.hub import push

        print_line(f"uploaded   {push(given.out, given.push_to_hub, private=given.private)}")
