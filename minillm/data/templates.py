"""The prompt text of each task. A template is stored beside every adapter trained with it, because
a prompt that differs by one newline degrades answers quietly."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from minillm.errors import UserError
from minillm.files import read_json


@dataclass(frozen=True)
class Template:
    """Prompt texts with {field} places; `without_input` serves samples whose input is empty."""

    name: str
    with_input: str
    without_input: str

    def fill(self, instruction: str, input: str = "") -> str:
        """The prompt of one sample, ending where the response begins."""
        text = self.with_input if input else self.without_input
        fields = {"instruction": instruction, "input": input}
        # in one pass, and no format(): braces in the user's text are text
        return re.sub(r"\{(instruction|input)\}", lambda place: fields[place[1]], text)

    def to_dict(self) -> dict:
        """Plain strings, for JSON."""
        return asdict(self)


_TASK = "Below is an instruction that describes a task"
_COMPLETE = "Write a response that appropriately completes the request."

TEMPLATES = {
    "alpaca": Template(
        "alpaca",
        f"{_TASK}, paired with an input that provides further context. {_COMPLETE}\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        f"{_TASK}. {_COMPLETE}\n\n### Instruction:\n{{instruction}}\n\n### Response:",
    ),
    "plain": Template("plain", "{instruction}\n{input}\n", "{instruction}\n"),
}


def find_template(name: str) -> Template:
    """A template by name, or from a JSON file with with_input and without_input.

    Errors: UserError naming the known templates, or what the file lacks.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".json"):
        raise UserError(f"template {name!r} is unknown; use {', '.join(TEMPLATES)} or a .json file")
    return template_from(read_json(Path(name)), name)


def template_from(content: object, where: str | Path) -> Template:
    """The Template of a JSON object. Errors: UserError for a missing or non-string field."""
    fields = ("with_input", "without_input")
    if not isinstance(content, dict) or not all(isinstance(content.get(f), str) for f in fields):
        raise UserError(f"{where}: no template; it needs the strings with_input and without_input")
    if not all("{instruction}" in content[f] for f in fields):
        raise UserError(f"{where}: a text without {{instruction}}; write where it goes")
    return Template(str(content.get("name", where)), *(content[f] for f in fields))
