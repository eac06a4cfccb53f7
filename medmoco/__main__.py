"""`medmoco COMMAND ...`, also `python -m medmoco`: without a command, what is installed."""

import importlib
import sys

from medmoco import _C
from medmoco.command import run_command

COMMANDS = {
    "train": "the main job: pretrain, segment, report; without flags, on the phantom",
    "pretrain": "self-supervised pretraining on a folder of volumes",
    "segment": "linear evaluation and fine-tuning on labelled volumes",
    "predict": "label maps of new volumes, by the models of a run",
    "evaluate": "scores of predicted label maps against the true ones",
    "export": "weights for torchvision, timm and others, or a segmenter as ONNX",
    "report": "one page for one run, or for several side by side",
}


def main() -> int:
    """Runs a subcommand and returns the exit status."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(f"medmoco.{arguments[0]}")
        return run_command(module.main, arguments[1:])
    known = not arguments or arguments[0] in ("-h", "--help", "--version")
    if not known:
        choices = ", ".join(COMMANDS)
        print(f"error: expected a command ({choices}), got {arguments[0]!r}", file=sys.stderr)
        return 2
    for name, value in _C.build_info().items():
        print(f"{name:20} {value}")
    print("\nmedmoco COMMAND --help, or python -m medmoco.COMMAND --help:")
    for name, purpose in COMMANDS.items():
        print(f"  {name:10} {purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
