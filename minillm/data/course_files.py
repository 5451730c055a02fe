"""Files in the layouts that the text-generation course hands in: prompts with their samples, and
the ROUGE-1 score of summaries."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.data.samples import Body, Sample
from minillm.data.templates import Template

LINE = "=" * 36


@dataclass(frozen=True)
class Layout:
    """What a prompt and a sample are called, and where the files of a model go."""

    prompt: str
    sample: str
    file: str
    gap: str = ""  # before the closing lines


LAYOUTS = {
    "completions": Layout("PREFIX", "COMPLETION", "output_shakespeare_completions_{}.txt"),
    "summaries": Layout("POST", "SUMMARY", "output_reddit_summaries_{}.txt", "\n"),
}
SCORES = "output_rouge_score_{}.txt"


def block(layout: Layout, number: int, prompt: str, samples: Sequence[str]) -> str:
    """One prompt and its samples, lettered from A, each after a line of equal signs."""
    parts = [f"\n\n=== {layout.prompt} {number} ===\n{prompt}\n"]
    for letter, text in zip(string.ascii_uppercase, samples, strict=False):
        parts.append(f"\n{LINE}\n\n=== {layout.sample} {number}-{letter} ===\n{text}\n")
    return "".join(parts) + f"{layout.gap}{LINE}\n{LINE}\n"


def score_file(scores: Sequence[float]) -> str:
    """The mean of the corpus scores of sample A, sample B, ... with a sentence on what it is."""
    mean = sum(scores) / len(scores)
    return (
        f"ROUGE-1 (F-measure, no stemmer) of {len(scores)} sets of summaries against the "
        f"references, one sample of each post in a set; the mean of the sets' means.\n{LINE}\n"
        f"ROUGE-1 mean score: {mean}\n"
    )


def read_posts(text: str) -> list[str]:
    """The blocks between blank lines, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def read_references(text: str, n: int) -> list[str]:
    """A reference for each of n posts: blocks between blank lines, or lines."""
    blocks = read_posts(text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines if len(lines) == n else blocks


def ask_about_post(post: str, template: Template | None) -> Sample:
    """A flattened post (SUBREDDIT: r/x TITLE: ... POST: ... TL;DR:) in the template's words, or as
    it is without a template that has a place for a post; what lies after POST: may be shortened."""
    found = re.fullmatch(r"SUBREDDIT: r/(\S*) TITLE:(?: (.*?))?? POST: (.*) TL;DR:", post)
    if found is None:
        return Sample(post, "")
    if template is None or "{post}" not in template.text:
        return Sample(post, "", body=Body(*found.span(3)))
    names = {"subreddit": found[1], "title": found[2] or ""}
    prompt, body = template.fill_around("post", found[3], **names)
    return Sample(prompt, "", body=body)


def until_next_cue(text: str) -> str:
    """A summary up to the second TL;DR: of its prompt and itself."""
    return text.partition("TL;DR:")[0].strip()
