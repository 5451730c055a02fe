"""Byte-pair encoding: how GPT-2's vocabulary is made, and what it was merged from.

Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (on bytes, within words).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

from minillm.errors import UserError

# contractions, words, numbers and signs, each with its leading space; then white space
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = PRINTABLE + OTHERS  # in the order of GPT-2's first 256 ids


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes was merged from, in order: what is left of its
    bytes once all earlier merges have been made. Errors: UserError if that is not two tokens."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] == rank:
                raise UserError(f"token {token!r} is no merge of two earlier ones; not saveable")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding: from 256 bytes on, the most frequent neighbours within a word become a
    token, until there are `vocab_size` with the control token. Returns their ranks."""
    words = Counter(word.encode() for text in texts for word in regex.findall(PATTERN, text))
    parts = {word: [word[i : i + 1] for i in range(len(word))] for word in words}
    counts: Counter = Counter()
    found_in = defaultdict(set)  # pair -> words that hold it, or held it once
    for word, tokens in parts.items():
        for pair in zip(tokens, tokens[1:], strict=False):
            counts[pair] += words[word]
            found_in[pair].add(word)
    ranks = {bytes([byte]): i for i, byte in enumerate(BYTES)}
    while len(ranks) < vocab_size - 1 and counts:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        if counts[best] < 1:
            break
        ranks[best[0] + best[1]] = len(ranks)
        for word in found_in.pop(best):
            old = parts[word]
            new = parts[word] = _join(old, best)
            for pair in zip(old, old[1:], strict=False):
                counts[pair] -= words[word]
            for pair in zip(new, new[1:], strict=False):
                counts[pair] += words[word]
                found_in[pair].add(word)
        del counts[best]
    return ranks


def _join(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    joined, i = [], 0
    while i < len(tokens):
        both = tuple(tokens[i : i + 2]) == pair
        joined.append(tokens[i] + tokens[i + 1] if both else tokens[i])
        i += 2 if both else 1
    return joined
