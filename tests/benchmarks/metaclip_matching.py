"""How fast MetaCLIP's entries are found in captions: 500,000 entries, beside pyahocorasick as the paper's code uses it.

    python tests/benchmarks/metaclip_matching.py            # `pip install pyahocorasick` for the comparison

Made-up data: 200,000 words with Zipf's frequencies; entries of one to three words, the longer ones as the words follow
each other in text; captions of 4 to 40 words with a capital, a comma and a full stop. Rounds
take turns; the figures are CPU seconds of this process, matching alone, the automaton's build is reported separately.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.stages.filters.metaclip import EntryAutomaton, spaced, spaced_entry

WORDS = 200_000


def made_up(entries: int, captions: int) -> tuple[list[str], list[str]]:
    """Entries and captions over the same words."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(WORDS)]
    frequency = 1 / np.arange(1, WORDS + 1)
    frequency /= frequency.sum()
    chosen = dict.fromkeys(words[: entries // 3])
    while len(chosen) < entries:
        for row in random.choice(WORDS, (100_000, 3), p=frequency):
            chosen[" ".join(words[number] for number in row[: random.integers(2, 4)])] = None
    lengths = np.minimum(4 + random.geometric(1 / 8, captions), 40)
    texts = []
    for length in lengths:
        text = [words[number] for number in random.choice(WORDS, length, p=frequency)]
        text[0] = text[0].capitalize()
        text[length // 2] += ","
        texts.append(" ".join(text) + ".")
    return list(chosen)[:entries], texts


def theirs(entries: Sequence[str]) -> Callable[[Sequence[str]], int] | None:
    """Matching caption by caption with pyahocorasick, where it is installed."""
    if importlib.util.find_spec("ahocorasick") is None:
        return None
    import ahocorasick

    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        automaton.add_word(spaced_entry(entry), number)
    automaton.make_automaton()
    return lambda captions: sum(len({number for _, number in automaton.iter(spaced(text))}) for text in captions)


def seconds(work: Callable[[Sequence[str]], int], captions: Sequence[str]) -> tuple[float, int]:
    """CPU seconds of one pass, and matches found."""
    start = time.process_time()
    found = work(captions)
    return time.process_time() - start, found


def main() -> None:
    """Print one JSON line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--entries", type=int, default=500_000)
    options.add_argument("--captions", type=int, default=40_000)
    options.add_argument("--rounds", type=int, default=5)
    asked = options.parse_args()
    entries, captions = made_up(asked.entries, asked.captions)
    start = time.process_time()
    automaton = EntryAutomaton(entries)
    build = time.process_time() - start
    peer = theirs(entries)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(asked.rounds):
        mine, found = seconds(lambda texts: len(automaton.match(texts)[0]), captions)
        rates["ours"].append(asked.captions / mine)
        if peer is not None:
            other, expected = seconds(peer, captions)
            assert found == expected
            rates["peer"].append(asked.captions / other)
    ratios = [ours / peer for ours, peer in zip(rates["ours"], rates["peer"], strict=False)]
    line = {
        "name": "metaclip_matching",
        "ours": round(statistics.median(rates["ours"])),
        "peer": round(statistics.median(rates["peer"])) if ratios else None,
        "ratio": round(statistics.median(ratios), 2) if ratios else None,
        "unit": "captions per CPU second",
        "n": asked.captions,
        "conditions": f"{len(entries)} entries, {found / asked.captions:.1f} matches a caption, "
        f"{statistics.mean(map(len, captions)):.0f} characters a caption, build {build:.1f} CPU s; "
        f"peer: pyahocorasick{'' if ratios else ', which is not installed'}",
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
