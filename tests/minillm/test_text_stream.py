"""Stop strings: found wherever token borders lie, never shown, no false start spoils them."""

import itertools

import pytest

from minillm.errors import UserError
from minillm.text_stream import StopStrings, TextStream


class Pieces:
    """A tokenizer whose ids are places in a list of pieces of text."""

    def __init__(self, *pieces: str):
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def streamed(pieces: list[str], *stops: str, prompt: str = "") -> tuple[list[str], str]:
    """What each piece shows until a stop string has come, and the whole text."""
    tokenizer = Pieces(prompt, *pieces)
    stop = StopStrings(tokenizer, stops)
    stream, shown = TextStream(tokenizer, [0], stop), []
    for i in range(1, len(pieces) + 1):
        shown.append(stream.push(i))
        if stop.ends([0], range(1, i + 1)):
            break
    shown.append(stream.finish())
    return shown, stream.text()


def test_a_false_start_does_not_hide_the_stop_string():
    """A count of matched characters that goes back to zero misses this one."""
    shown, text = streamed(["1 ", "1 ", "1 ", "2", " 3"], "1 1 2")
    assert text == "1 " == "".join(shown)


def test_a_stop_string_across_and_inside_tokens_is_found():
    assert streamed(["a", "b\n", "\nc", "d"], "\n\n")[1] == "ab"
    assert streamed(["a", "b##c", "d"], "##")[1] == "ab"


def test_what_may_become_a_stop_string_is_held_back():
    shown, text = streamed(["x", "EN", "D", "ED"], "ENDE", "NDX")
    assert (shown, text) == (["x", "", "", "", ""], "x")
    shown, text = streamed(["x", "EN", "D", "Y"], "ENDE")
    assert (shown, text) == (["x", "", "", "ENDY", ""], "xENDY")


def test_text_that_was_held_back_comes_at_the_end():
    assert streamed(["x", "EN"], "END") == (["x", "", "EN"], "xEN")


def test_the_prompt_does_not_count():
    assert streamed(["b", "c", "END"], "ab", "END", prompt="END a")[1] == "bc"


@pytest.mark.parametrize("stops", [("aab",), ("ab", "ba"), ("aba", "bb"), ("abab", "b")])
def test_every_text_of_two_letters_is_cut_as_a_search_of_it_would(stops):
    for letters in itertools.product("ab", repeat=7):
        text, shortest = "".join(letters), None
        for n in range(1, 8):  # the first moment at which one is there
            if any(s in text[:n] for s in stops):
                shortest = text[:n]
                break
        found = [shortest.find(s) for s in stops if s in shortest] if shortest else []
        shown, whole = streamed(list(letters), *stops)
        assert whole == "".join(shown) == (text[: min(found)] if found else text)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string"):
        StopStrings(Pieces(), ("a", ""))
