"""The prompt text of each task. A template is stored beside every adapter trained with it, because
a prompt that differs by one newline degrades answers quietly."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.data.samples import Body
from minillm.errors import UserError
from minillm.files import read_json

ASKED = ("instruction", "text", "article", "post", "prompt")  # what a task is asked about


@dataclass(frozen=True)
class Template:
    """Prompt text with {field} places; `without_input` serves samples whose input is empty."""

    name: str
    text: str
    without_input: str | None = None

    def fill(self, **fields: str) -> str:
        """The prompt of one sample, ending where the response begins: without spaces at its end,
        for a response brings its own. A place without a field of its name is text."""
        short = self.without_input is not None and not fields.get("input")
        text = self.without_input if short else self.text
        # in one pass, and no format(): braces in the user's text are text
        text = re.sub(r"\{(\w+)\}", lambda place: fields.get(place[1], place[0]), text)
        return text.rstrip(" ")

    def fill_around(self, field: str, text: str, cut_at: str = r"\s+", **others) -> tuple:
        """The prompt with `field` as text, and where in it that text lies: what may be cut."""
        prompt = self.fill(**others, **{field: text})
        others = {name: value.replace("\0", " ") for name, value in others.items()}
        start = self.fill(**others, **{field: "\0"}).index("\0")
        return prompt, Body(start, min(start + len(text), len(prompt)), cut_at)

    def ask(self, prompt: str, input: str = "") -> str:
        """The prompt of a user's own text: in the place of an instruction, article, post, ...;
        places of anything else stay empty."""
        places = re.findall(r"\{(\w+)\}", f"{self.text}{self.without_input or ''}")
        fields = dict.fromkeys(places, "") | dict.fromkeys(ASKED, prompt)
        return self.fill(**(fields | {"input": input}))

    def check_field(self, field: str) -> "Template":
        """Errors: UserError if a text has no place for the field."""
        for text in (self.text, self.without_input):
            if text is not None and f"{{{field}}}" not in text:
                raise UserError(
                    f"template {self.name}: a text without {{{field}}}; write where it goes"
                )
        return self

    def to_dict(self) -> dict:
        """Plain strings, for JSON."""
        return asdict(self)


_TASK = "Below is an instruction that describes a task"
_COMPLETE = "Write a response that appropriately completes the request."
# the default prompt of the LoRA course, word for word: its accuracies are of this one
_CLASSIFY = (
    "Please read the following text and classify it as either positive or negative sentiment. "
    "Remember to consider the overall tone, context, and emotional cues conveyed in the text. "
    "Positive sentiments generally express happiness, satisfaction, or positivity, while negative "
    "sentiments convey sadness, anger, or negativity."
)

TEMPLATES = {
    "alpaca": Template(
        "alpaca",
        f"{_TASK}, paired with an input that provides further context. {_COMPLETE}\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        f"{_TASK}. {_COMPLETE}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
    ),
    "plain": Template("plain", "{instruction}\n{input}\n", "{instruction}\n"),
    "reviews": Template(
        "reviews",
        "Instruction: Is this film review positive or negative?\nText: {text}\nLabel:",
    ),
    "reviews-course": Template(
        "reviews-course", f"Instruction: {_CLASSIFY}\nText: {{text}}\nLabel:"
    ),
    "reviews-short": Template("reviews-short", "Text: {text}\nLabel:"),
    "summary": Template("summary", "{article}\n\nTL;DR:"),
    "tldr": Template(
        "tldr", "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    ),
    "complete": Template("complete", "{text} <complete>"),
    "continue": Template("continue", "{text}"),
    "prompt": Template("prompt", "{prompt}"),
}


def find_template(name: str, field: str | None = None) -> Template:
    """A template by name, or from a JSON file with the prompt as `text` (and, where an input may
    be empty, `without_input`); `field` is one it must have a place for.

    Errors: UserError naming the known templates, or what the file lacks.
    """
    if name in TEMPLATES:
        template = TEMPLATES[name]
    elif name.endswith(".json"):
        template = template_from(read_json(Path(name)), name)
    else:
        known = ", ".join(TEMPLATES)
        raise UserError(f"template {name!r} is unknown; use {known} or a .json file")
    return template if field is None else template.check_field(field)


def template_from(content: object, where: str | Path) -> Template:
    """The Template of a JSON object. Errors: UserError for a missing or non-string field."""
    content = content if isinstance(content, dict) else {}
    text, short = content.get("text"), content.get("without_input")
    if not isinstance(text, str) or not isinstance(short, str | None):
        raise UserError(f'{where}: no template; write {{"text": "... {{instruction}} ..."}}')
    return Template(str(content.get("name", where)), text, short)
