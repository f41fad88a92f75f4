"""A long real text without a licence: a lighthouse keeper's log, with a plot, made anew for any number of tokens.

    python -m benchmarks.long_text [--tokens 8192] [--out FILE]

The first lines name a ship; the last line asks for it. What lies between is a year on a rock: weather, work, visitors,
a search that runs through all of it. The same length gives the same text on every machine.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 1822
OPENING = (
    "The log of the keeper of Skarholm Light\n\n"
    "I came to the rock on the first of March. On my first night a ship ran for the harbour under one torn sail, and "
    "by the light of the lamp I read her name: the Merry Agnes. She never reached the harbour. I swore that I would "
    "find out what became of her.\n"
)
QUESTION = (
    "\nSo ends my log of the rock. Of everything that I have written down, one thing stands at the beginning: the "
    "ship that I saw on my first night was called the Merry"
)
MONTHS = ("March", "April", "May", "June", "July", "August", "September", "October", "November", "December", "January")
DAYS = ("2nd", "5th", "9th", "12th", "16th", "19th", "23rd", "27th")
PLOT = (
    "Tove brought the mail and said that nobody on shore had heard of a ship in trouble that night.",
    "After the ebb I found a broken spar below the landing, with green paint on it.",
    "The harbour master wrote that no ship of that name had been expected; his letter was short and his hand unsteady.",
    "A cask of lamp oil drifted in. The mark on it was not of our company, and somebody had tried to burn it away.",
    "Old Jens swore that he had seen lanterns at the seal caves, three nights in a row, and no boat of ours was out.",
    "I rowed to the caves at low water and found a rope made fast to a ring that was newer than the rock around it.",
    "The inspector came, counted the oil, praised the brass, and asked twice what I could see of the caves from here.",
    "Tove's brother, who had sailed on the spring packet, sent no word; she asked me to look out for him.",
    "In the keeper's chest, under the old charts, lay a page of my predecessor's log that had been cut from the book.",
    "The cut page spoke of crates that came ashore by night, and of a harbour master who paid for silence in silver.",
    "I copied the page three times and hid the copies in the clock, in the bread bin, and behind the third lens.",
    "Somebody had been in the tower while I mended the nets: the copy in the bread bin was gone.",
    "A boy came with eels to sell and told me that a tall man with a limp lived in the caves and spoke to no one.",
    "I left bread and a note at the ring. The bread was taken; the note came back with one word on it: wait.",
    "On a night without a moon a boat came to the landing. In it sat Tove's brother, thin as a heron, and alive.",
    "He told me that their ship had been lured on the reef by a false light, a mile north of mine, and emptied.",
    "Eleven of them had reached the caves. The harbour master's men kept them there and let the town mourn them.",
    "We agreed on a signal: two long flashes and one short, on the first clear night that the inspector was away.",
    "Tove carried the second copy to the judge in the next town, sewn into the lining of her coat.",
    "The judge's cutter lay behind the point by noon, and I polished the lens until my hands shook.",
    "I gave the signal at two in the morning. By three there were lanterns at the caves, and by four it was over.",
    "They brought nine men, two women and the silver to the landing, and I made coffee for everybody, guards as well.",
    "The harbour master said in court that the lighthouse had been dark that night; my log and my oil said otherwise.",
    "Tove's brother stood up and named every man by his voice alone, for he had only ever heard them in the dark.",
)
WEATHER = (
    "Wind from the {wind}, {force}; the glass {glass}.",
    "A {sky} morning and a {sea} sea, the wind {wind} and {force}.",
    "Fog until {hour}; then the {wind} wind tore it open and left a {sea} sea.",
    "{sky_up} all day. Towards {hour} the wind went round to the {wind}.",
)
WORK = (
    "I trimmed the wick, carried {count} cans of oil up the stairs and wound the clock at {hour}.",
    "The {part} needed mending again; I used {count} nails and a good deal of patience.",
    "Scrubbed the {part} and wrote to the company for {count} yards of rope, which they will forget, as always.",
    "Counted the stores: {count} candles, one ham, flour for a month and tea for less.",
    "The {part} froze, or would have, had I not sat up with it until {hour}.",
)
SIGHTS = (
    "At {hour} {count} {birds} passed to the {wind}, low over the water.",
    "A {vessel} stood in from the {wind}, looked at the reef, and thought better of it.",
    "The seals lay on the skerry, {count} of them, and sang when the {vessel} went by.",
    "From the gallery I saw a {vessel} {count} miles off, hull down and steady.",
    "Two {birds} struck the lantern in the night; one flew on, and I kept the other in a box until {hour}.",
)
THOUGHTS = (
    "I thought of the torn sail again, and could not sleep.",
    "One gets used to the sound of the sea as to the beat of one's own heart.",
    "My mother used to say that a light is a promise to people one will never meet.",
    "I read the same page by the lamp three times and still could not say what stood on it.",
    "It is a strange thing to keep watch over a sea in which somebody has been lost.",
    "Nobody came, and I talked to the kettle, which is a better listener than most.",
)
WORDS = {
    "wind": ("north", "north-east", "south", "west", "south-west", "east"),
    "force": ("light", "fresh", "strong", "rising", "hardly enough to turn a vane", "a full gale by night"),
    "glass": ("falling", "steady", "rising slowly", "lower than I have ever seen it"),
    "sky": ("grey", "bright", "hazy", "red", "cold and clear"),
    "sky_up": ("Rain", "Sun and showers", "Low cloud", "Sleet", "A thin blue sky"),
    "sea": ("smooth", "short and angry", "long and oily", "confused", "white"),
    "hour": ("noon", "four", "sunset", "midnight", "the turn of the tide", "seven in the morning"),
    "count": ("two", "three", "five", "seven", "eleven", "fourteen", "thirty"),
    "part": ("rail", "gutter", "storm door", "boat shed", "lower stair", "pump", "weather vane"),
    "birds": ("geese", "terns", "gannets", "swans", "starlings", "oystercatchers"),
    "vessel": ("brig", "herring boat", "steamer", "schooner", "collier", "pilot cutter"),
}


def entries() -> Iterator[str]:
    """Days of the log without an end; the plot goes on every third day, and when it is over life does."""
    draw = random.Random(SEED)
    plot = iter(PLOT)
    for day in range(10**6):
        year, place = divmod(day, len(MONTHS) * len(DAYS))
        month, date = divmod(place, len(DAYS))
        said = [_filled(draw, draw.choice(kind)) for kind in (WEATHER, WORK, SIGHTS)]
        said += [draw.choice(THOUGHTS)] if draw.random() < 0.5 else []
        said += [step] if day % 3 == 2 and (step := next(plot, "")) else []
        again = f", the {_ordinal(year + 1)} year" if year else ""
        yield f"\n{MONTHS[month]} {DAYS[date]}{again}. {' '.join(said)}\n"


def long_text(tokenizer: Any, n: int) -> str:
    """Opening, as many whole days as fit, and the question: at most `n` tokens, and nearly as many."""
    size = _size(tokenizer, OPENING) + _size(tokenizer, QUESTION)
    days = []
    for day in entries():
        size += _size(tokenizer, day)
        if size > n:
            break
        days.append(day)
    text = OPENING + "".join(days) + QUESTION
    while days and _size(tokenizer, text) > n:  # tokens may join where texts meet
        days.pop()
        text = OPENING + "".join(days) + QUESTION
    return text


def long_prompt(tokenizer: Any, n: int) -> list[int]:
    """Exactly `n` token ids: the beginning of the log, and the question as far as there is room for it."""
    question = tokenizer(QUESTION)["input_ids"][-n // 2 :]
    ids: list[int] = tokenizer(OPENING)["input_ids"]
    for day in entries():
        if len(ids) + len(question) >= n:
            break
        ids = ids + tokenizer(day)["input_ids"]
    return ids[: n - len(question)] + question


def _filled(draw: random.Random, sentence: str) -> str:
    return sentence.format(**{name: draw.choice(words) for name, words in WORDS.items()})


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _size(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="default: standard output")
    options = parser.parse_args()
    from oversquash_lens.models.loading import load_twin

    text = long_text(load_twin(device="cpu").tokenizer, options.tokens)
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
