"""Fetches an official checkpoint into checkpoints/ and checks it; run again, it takes up where it
stopped, at the file that was not finished.

    python tools/download.py gpt2                  then: python tools/generate.py --checkpoint gpt2
    python tools/download.py gpt2-medium phi-1.5
    python tools/download.py llama-2-7b            gated: accept Meta's licence on the hub first
"""

from pathlib import Path

from minillm.cli import Parser
from minillm.errors import friendly_errors
from minillm.hub import CHECKPOINTS, fetch
from tools.models import FAMILIES

OFFICIAL = {name: official for family in FAMILIES for name, official in family.official.items()}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="+", choices=[*OFFICIAL], metavar="NAME",
        help=f"one or more of {', '.join(OFFICIAL)}")  # fmt: skip
    parser.add_argument("--out", help="folder to make NAME in (default: checkpoints/)")
    parser.add_argument("--endpoint", help="another hub's address (default: HF_ENDPOINT, or the "
        "public one)")  # fmt: skip
    parser.add_argument("--token", help="access token, for gated models (default: the saved one)")
    parser.add_argument("--offline", action="store_true", help="only check what is there")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    for name in args.names:
        folder = (Path(args.out) if args.out else CHECKPOINTS) / name
        files = fetch(OFFICIAL[name], folder, args.endpoint, args.token, args.offline)
        size = sum(path.stat().st_size for path in files)
        known = sum(path.name in OFFICIAL[name].sha256 for path in files)
        print(f"{folder}: {len(files)} files, {size / 1e6:,.0f} MB; {known} of them have a "
              "published SHA-256 and were held against it")  # fmt: skip


if __name__ == "__main__":
    with friendly_errors():
        main()
