"""`lit-align init OBJECTIVE --policy MODEL --data FILE`: a configuration to start from."""

from pathlib import Path

from lit_align.cli.arguments import Arguments
from lit_align.console import print_line
from lit_align.errors import UserError
from lit_align.files import write_whole


def run(args: list[str]) -> None:
    """Print the configuration, or write it to a file."""
    parser = Arguments(
        "init",
        "Print a commented configuration for an objective, a model, data and this machine. The layout of the data, "
        "the lengths of its texts and the size of the model are looked up; nothing is asked.",
    )
    parser.add_argument("objective", metavar="OBJECTIVE", help="its class: DPO, IPO, KTO, SFT, ...")
    parser.add_argument("--policy", metavar="MODEL", required=True, help="model to train: a hub name or a folder")
    parser.add_argument("--data", metavar="FILE", help="rows to train on: a file, a folder or a hub name")
    parser.add_argument("--prompts", metavar="FILE", help="instead of --data: prompts to sample responses to")
    parser.add_argument("--scorer", metavar="FUNCTION", help="with --prompts: rewards, as path/to/file.py:function")
    parser.add_argument("--columns", metavar="MAP", help="source of each column: '{chosen: good, rejected: bad}'")
    parser.add_argument("--devices", metavar="N", type=int, help="GPUs to use (default: those of this machine)")
    parser.add_argument("--memory", metavar="GB", type=float, help="memory of each GPU (default: this machine's)")
    parser.add_argument("--out", metavar="FILE", help="YAML to write (default: print it)")
    given = parser.parse_args(args)
    if (given.data is None) == (given.prompts is None):
        parser.error("give either --data or --prompts")
    if (given.prompts is None) != (given.scorer is None):
        parser.error("--prompts and --scorer belong together: the scorer gives the sampled responses their rewards")
    if given.out and Path(given.out).exists():
        raise UserError(f"init: --out={given.out} exists already. Name a new file.")
    from lit_align.cli.init import Machine, Request, columns_of, configuration, objective_of

    machine = Machine.here().with_options(given.devices, given.memory)
    objective = objective_of(given.objective)
    sources = (given.data, given.prompts, given.scorer)
    columns = columns_of(given.columns)
    text = configuration(Request(objective, given.policy, *sources, machine, columns, given.out or "THIS_FILE"))
    if given.out is None:
        print(text, end="")
        return
    write_whole(Path(given.out), lambda beside: beside.write_text(text, encoding="utf-8"))
    print_line(f"wrote      {given.out}")
