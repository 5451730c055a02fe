"""Writes tinyworld's data to a folder, in the formats of the public data sets it stands in for."""

import argparse
import csv
import itertools
import json
from pathlib import Path

from minillm.data import tinyworld


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minillm.data.tinyworld", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=1000, help="number of stories")
    parser.add_argument("--instructions", type=int, default=2000, help="number of rows")
    parser.add_argument("--reviews", type=int, default=2000, help="number of rows, half of each "
        "label")
    parser.add_argument("--articles", type=int, default=500, help="number of rows")
    parser.add_argument("--preferences", type=int, default=500, help="number of rows")
    return parser.parse_args(argv)


def _write(path: Path, text: str, count: int, what: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {count} {what}, {path.stat().st_size} bytes")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    told = [story.text for story in itertools.islice(tinyworld.stories(args.seed), args.stories)]
    _write(args.out / "stories.txt", "\n\n".join(told) + "\n", len(told), "stories")

    rows = tinyworld.instructions(args.instructions, args.seed)
    _write(args.out / "instructions.json", json.dumps(rows, indent=1) + "\n", len(rows),
        "instructions")

    rows = tinyworld.reviews(args.reviews, args.seed)
    for label, name in ((1, "rt-polarity.pos"), (0, "rt-polarity.neg")):
        lines = [row["text"].lower() for row in rows if row["label"] == label]
        _write(args.out / name, "\n".join(lines) + "\n", len(lines), "reviews")

    rows = tinyworld.articles(args.articles, args.seed)
    with open(args.out / "articles.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "article", "highlights"])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out / 'articles.csv'}: {len(rows)} articles")

    rows = tinyworld.preferences(args.preferences, args.seed)
    lines = [json.dumps(row) for row in rows]
    _write(args.out / "preferences.jsonl", "\n".join(lines) + "\n", len(lines), "preferences")


if __name__ == "__main__":
    main()
