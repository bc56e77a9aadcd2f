"""Command lines: the options that scripts have in common, presets, and errors in one line."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common import UsageError, data

HELD_OUT = 400  # training images that --schedule follow looks at in place of training on them

Presets = Mapping[str, Mapping[str, Any]]
# Options that count only together with some values of another one: {option: (other, values)}.
Needs = Mapping[str, tuple[str, Sequence[Any]]]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the options that have one, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


def parser(
    script: str,
    description: str,
    presets: Presets,
    schedules: Sequence[str] = ("constant", "cosine"),
) -> argparse.ArgumentParser:
    """The options that every training script has; ``script`` is its file."""
    parser = argparse.ArgumentParser(
        prog=f"examples/{Path(script).name}",
        description=description,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=presets, default=next(iter(presets)), help="named set of options")
    add("--out", type=Path, help="folder of the run, else one in runs/ named after what it is")
    add("--steps", type=int, help="length of the run")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--resume", action="store_true", help="continue the run in --out; else start it afresh")
    add("--stop-at", type=int, help="save and leave after this step, to --resume later")
    add("--schedule", choices=schedules, default="constant", help="learning rate over time")
    return parser


def add_image_options(parser: argparse.ArgumentParser, also: Sequence[str] = ()) -> None:
    """The options of every script that trains on images; ``also`` names more data sets."""
    add, sets = parser.add_argument, ("auto", *data.NAMES, *also)
    auto = "auto: FashionMNIST if its files are found, else the bundled digits"
    add("--data", choices=sets, default="auto", help=auto)
    add("--data-dir", type=Path, help="folder of the data sets, else $OTLOSS_DATA")
    add("--epochs", type=float, default=1.0, help="length in passes over the images, if no --steps")
    add("--batch", type=int, default=200, help="real images per step")
    add("--limit-train", type=int, help="use only this many training images")
    add("--labels", type=int, nargs="+", help="only images of these classes, e.g. --labels 2")
    add_amp(parser)


def add_amp(parser: argparse.ArgumentParser) -> None:
    """For scripts that compute networks inside :func:`autocast`."""
    text = "networks in bfloat16; losses stay in float32"
    parser.add_argument("--amp", action="store_true", help=text)


def parse(
    parser: argparse.ArgumentParser,
    presets: Presets,
    argv: Sequence[str] | None,
    needs: Needs | None = None,
) -> argparse.Namespace:
    """Command line over preset over defaults.

    A preset maps options to values; its entry ``by_data`` maps names of data sets to what differs
    there. An option of the command line that would do nothing, by ``needs``, is refused.
    """
    # A parser without --help, so that the help shows the defaults of the preset.
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--preset", default=next(iter(presets)))
    preset = dict(presets.get(named.parse_known_args(argv)[0].preset, {}))
    by_data = preset.pop("by_data", {})
    parser.set_defaults(**preset)
    first = parser.parse_known_args(argv)[0]
    if getattr(first, "data", None) == "auto":
        # A folder that was named and is wrong must not fall back to digits in silence.
        found = first.data_dir or data.available("fashion", data.default_dir())
        first.data = "fashion" if found else "digits"
    if by_data:
        parser.set_defaults(**by_data.get(first.data, {}))
    args = parser.parse_args(argv)
    if hasattr(args, "data"):
        args.data = first.data
        if args.data in data.BUNDLED and args.data_dir:
            raise UsageError(
                f"--data-dir is {args.data_dir}, expected none: {args.data} come with the "
                "examples; --data names another set"
            )
    if args.out is None:
        parts = (Path(parser.prog).stem.removeprefix("train_"), getattr(args, "data", ""))
        args.out = Path("runs", "_".join(filter(None, (*parts, args.preset))))
    _refuse_unused(args, given(parser, argv), needs or {})
    args.command = command_of(parser, argv)
    return args


def given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """The options that stand on the command line."""
    unset = object()
    # argparse leaves alone what the namespace has, and so what it replaces was given.
    names = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    return {k for k, v in vars(parser.parse_known_args(argv, names)[0]).items() if v is not unset}


def _refuse_unused(args: argparse.Namespace, given: set[str], needs: Needs) -> None:
    if {"steps", "epochs"} <= given:
        raise UsageError("--steps and --epochs are both given, expected one: each sets the length")
    if {"classifier", "classifier_preset"} <= given:
        raise UsageError("--classifier-preset does nothing with --classifier, which is trained")
    for name in sorted(given & needs.keys()):
        other, values = needs[name]
        if getattr(args, other) not in values:
            wanted = f"{flag(other)} {' or '.join(map(str, values))}, or no {flag(name)}"
            found = f"{flag(other)} {getattr(args, other)}"
            raise UsageError(f"{flag(name)} does nothing with {found}, expected {wanted}")


def flag(name: str) -> str:
    """An option as it stands on the command line."""
    return "--" + name.replace("_", "-")


def command_of(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> str:
    """As one would repeat the run from its start."""
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", parser.prog, *(word for word in words if word != "--resume")])


def at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Refuse smaller values of these options."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"{flag(name)} is {value}, expected at least {least}")


def even_batch(args: argparse.Namespace) -> None:
    """Losses of two half-batches need an even batch."""
    if args.batch < 2 or args.batch % 2:
        raise UsageError(f"--batch is {args.batch}, expected an even number: two half-batches")


def begin(args: argparse.Namespace) -> None:
    """Seed, check what every script shares, and make ``args.out``."""
    torch.manual_seed(args.seed)
    at_least(args, 1, "steps")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device is {args.device}, expected cpu: torch sees no GPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UsageError(f"--out is {args.out}, expected a folder to write in: {error}") from error
    if (there := args.out / "ckpt.pt").is_file():
        owner = script_of(torch.load(there, weights_only=True, mmap=True)["args"]["command"])
        if owner != script_of(args.command):
            raise UsageError(
                f"--out is {args.out}, expected another folder: it holds a run of {owner}.py"
            )


def script_of(command: str) -> str:
    """The script of a recorded command."""
    return Path(shlex.split(command)[1]).stem


def begin_images(args: argparse.Namespace) -> tuple[data.ImageData, data.Batches]:
    """``begin`` for scripts on images: read them too, cut them into batches, and settle the number
    of steps. Rows of a batch are among the first ``args.limit_train`` training images."""
    begin(args)
    at_least(args, 1, "limit_train", "batch")
    images = data.load(args.data, args.data_dir)
    images = images.only(args.labels) if args.labels else images
    if args.schedule == "follow":
        rest = len(images.train) - HELD_OUT
        args.limit_train = min(args.limit_train or rest, rest)
    batches = data.Batches(len(images.train[: args.limit_train]), args.batch, args.seed)
    if args.steps is None:
        args.steps = round(args.epochs * batches.per_epoch)
    if args.steps < 1:
        raise UsageError(f"--epochs {args.epochs} gives {args.steps} steps, expected at least 1")
    return images.to(args.device), batches


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 for networks with ``--amp``. It needs no loss scaling, and otloss computes in
    float32 inside it."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


def run_from_shell(main: Callable[[], object]) -> None:
    """Call ``main``; what is wrong with the command line is one line, not a traceback."""
    try:
        main()
    except (UsageError, FileNotFoundError, FloatingPointError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments as JSON and ``torch.load(weights_only=True)`` can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())}
