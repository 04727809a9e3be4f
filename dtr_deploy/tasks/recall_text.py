"""Made text that asks for recall, to train twins on: facts about named things, then questions whose answers they are.

Prose rarely needs a word from a thousand tokens ago, so twins trained on prose alone lose retrieval without their loss
noticing (Arora et al., arXiv 2312.04927). Every document here is mostly such needs: many facts of a few kinds, so that
each is a distractor of the others, and questions about some of them in another order. Wording, things and values are
others than those of the recall tasks that score.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    "amber brisk calm copper crimson dusty early eastern faint frozen gentle golden hollow humble icy ivory jolly keen "
    "late lively loud lunar mellow misty narrow northern olive pale patient plain proud quick quiet rapid rosy rusty "
    "sandy shady silent silver slow solar steady stormy sunny swift tall tidy velvet vivid warm western wild windy"
)
NOUNS = _words(
    "anchor badger barrel beacon bridge cabin candle canyon castle cedar cellar comet cottage desert engine falcon "
    "feather ferry forest fountain garden glacier hammer harbor heron island kettle ladder lantern library lizard "
    "mirror mountain needle office orchard otter paddle palace parrot pebble pillar pocket ribbon river saddle school "
    "shelter station temple ticket tower tunnel valley village wagon walnut window"
)
CITIES = _words(
    "Aachen Bergen Bologna Bristol Calgary Cordoba Dakar Dresden Geneva Ghent Haifa Izmir Kyoto Leeds Lima Lyon Malmo "
    "Medan Nairobi Odessa Oslo Perth Porto Quito Riga Salem Seville Sofia Tampa Turin Utrecht Vienna Warsaw Zagreb"
)
COLOURS = _words("black blue brown green grey orange pink purple red turquoise violet white yellow")

KINDS: tuple[tuple[str, str, Callable[[random.Random], str]], ...] = (
    ("The code of the {thing} is {value}.", "The code of the {thing} is", lambda r: str(r.randrange(1000, 10**7))),
    ("You find the {thing} in {value}.", "You find the {thing} in", lambda r: r.choice(CITIES)),
    ("The door of the {thing} is {value}.", "The door of the {thing} is", lambda r: r.choice(COLOURS)),
    ("The {thing} belongs to agent {value}.", "The {thing} belongs to agent", lambda r: f"{r.randrange(10, 1000)}"),
    ("{thing} = {value}", "{thing} =", lambda r: str(r.randrange(10, 10**5))),
)
"""(a fact, how it is repeated, its values). The last is the way of an assignment; others are sentences."""
FACTS, QUESTIONS = (6, 40), (4, 16)


def recall_documents(rng: random.Random) -> Iterator[str]:
    """Documents of about 100 to 1,000 tokens, without end."""
    while True:
        kinds = rng.sample(KINDS, rng.randint(1, 2))
        count = rng.randint(*FACTS)
        things = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], count)
        facts = [(kind, thing, kind[2](rng)) for thing in things for kind in (rng.choice(kinds),)]
        asked = rng.sample(facts, min(count, rng.randint(*QUESTIONS)))
        told = [kind[0].format(thing=thing, value=value) for kind, thing, value in facts]
        separator = rng.choice(("\n", " "))
        repeated = [f"{kind[1].format(thing=thing)} {value}." for kind, thing, value in asked]
        yield separator.join(told) + "\n\nAsked again:\n" + "\n".join(repeated)
