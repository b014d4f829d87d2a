"""Little worlds whose facts are told one by one: persons move, take things and hand them on, and places lie around.

The tasks are those of bAbI that BABILong hides in books (Weston et al., 2015), in sentences of our own:

* qa1, one fact: where a person is;
* qa2, two facts: where a thing is, whose holder moves;
* qa3, three facts: where a thing was before;
* qa4, two arguments: which place lies in a direction of another;
* qa5, three arguments: who gave what to whom.
"""

import random
from abc import ABC, abstractmethod
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from longmem_fairseq.evaluation.babilong import LABELS

PLACES = LABELS["qa1"]
MOVERS, GIVERS = ("Daniel", "John", "Mary", "Sandra"), ("Bill", "Fred", "Jeff", "Mary")
THINGS = ("apple", "football", "milk")
_MOVES = ("{} walked to the {}.", "{} went over to the {}.", "{} headed for the {}.", "{} hurried to the {}.")
_TAKES = ("{} took the {} there.", "{} picked up the {}.", "{} got hold of the {}.")
_DROPS = ("{} put down the {}.", "{} left the {} there.")
_GIVES = ("{} gave the {} to {}.", "{} handed the {} to {}.", "{} passed the {} to {}.")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

Question = Tuple[str, str]  # with its answer


class Story(NamedTuple):
    """Facts with one question about them.

    Attributes:
        facts: Sentences, in their order.
        question: Question about what they say together.
        answer: Right answer, a word.
    """

    facts: List[str]
    question: str
    answer: str


class World(ABC):
    """A world of one task.

    Args:
        rng: Source of all random choices.
    """

    least, most = 2, 10  # numbers of facts of a story

    def __init__(self, rng: random.Random):
        self.rng = rng

    @abstractmethod
    def fact(self) -> Optional[str]:
        """Let something happen and return the sentence that tells it; None where nothing more can happen."""

    @abstractmethod
    def questions(self) -> List[Question]:
        """Return all questions that the facts so far answer."""


class Moves(World):
    """Persons who move between places (qa1)."""

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.places: Dict[str, str] = {}  # by person

    def fact(self) -> str:
        return self.move(self.rng.choice(MOVERS))

    def move(self, person: str) -> str:
        """Let a person go to another place."""
        place = self.rng.choice([place for place in PLACES if place != self.places.get(person)])
        self.places[person] = place
        return self.rng.choice(_MOVES).format(person, place)

    def questions(self) -> List[Question]:
        return [(f"Where is {person}?", place) for person, place in self.places.items()]


class Carries(Moves):
    """Persons who move with things, and put them down (qa2)."""

    least, most = 3, 16

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.holders: Dict[str, Optional[str]] = {}  # by thing; None where it was put down
        self.histories: Dict[str, List[str]] = {}  # places of a thing, by thing

    def fact(self) -> str:
        rng, person = self.rng, self.rng.choice(MOVERS)
        place = self.places.get(person)
        held = [thing for thing, holder in self.holders.items() if holder == person]
        free = [thing for thing in THINGS if self._may_take(thing, place)]
        choice = rng.random()
        if place is not None and free and choice < 0.35:
            thing = rng.choice(free)
            self.holders[thing] = person
            self._note(thing, place)
            return rng.choice(_TAKES).format(person, thing)
        if held and choice < 0.5:
            thing = rng.choice(held)
            self.holders[thing] = None
            return rng.choice(_DROPS).format(person, thing)
        sentence = self.move(person)
        for thing in held:
            self._note(thing, self.places[person])
        return sentence

    def _may_take(self, thing: str, place: Optional[str]) -> bool:
        if thing not in self.holders:
            return True
        return self.holders[thing] is None and self.histories[thing][-1] == place

    def _note(self, thing: str, place: str) -> None:
        history = self.histories.setdefault(thing, [])
        if not history or history[-1] != place:
            history.append(place)

    def questions(self) -> List[Question]:
        return [(f"Where is the {thing}?", history[-1]) for thing, history in self.histories.items()]


class Before(Carries):
    """The same, where a thing was before another place (qa3)."""

    least, most = 5, 24

    def questions(self) -> List[Question]:
        questions = []
        for thing, history in self.histories.items():
            if len(history) > 1:
                questions.append((f"Where was the {thing} before the {history[-1]}?", history[-2]))
        return questions


class Directions(World):
    """Places that lie around others (qa4)."""

    least, most = 2, 2

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.neighbors: Dict[Tuple[str, str], str] = {}  # what lies in a direction of a place

    def fact(self) -> Optional[str]:
        free = [
            (place, direction, other)
            for place in PLACES
            for other in PLACES
            for direction in _OPPOSITE
            if place != other
            and (place, direction) not in self.neighbors
            and (other, _OPPOSITE[direction]) not in self.neighbors
            and not any({place, other} == {a, b} for (a, _), b in self.neighbors.items())
        ]
        if not free:
            return None
        place, direction, other = self.rng.choice(free)
        self.neighbors[place, direction] = other
        self.neighbors[other, _OPPOSITE[direction]] = place
        return f"The {other} is {direction} of the {place}."

    def questions(self) -> List[Question]:
        questions = []
        for (place, direction), other in self.neighbors.items():
            questions.append((f"What is {direction} of the {place}?", other))
            questions.append((f"What is the {place} {_OPPOSITE[direction]} of?", other))
        return questions


class Gives(World):
    """Persons who hand things to others, and do other things (qa5)."""

    least, most = 2, 16

    def __init__(self, rng: random.Random):
        super().__init__(rng)
        self.holders: Dict[str, str] = {}  # by thing
        self.gifts: List[Tuple[str, str, str]] = []  # giver, thing and receiver, oldest first

    def fact(self) -> str:
        rng, choice = self.rng, self.rng.random()
        if self.holders and choice < 0.5:
            thing = rng.choice(sorted(self.holders))
            giver = self.holders[thing]
            receiver = rng.choice([person for person in GIVERS if person != giver])
            self.holders[thing] = receiver
            self.gifts.append((giver, thing, receiver))
            return rng.choice(_GIVES).format(giver, thing, receiver)
        free = [thing for thing in THINGS if thing not in self.holders]
        if free and choice < 0.8:
            thing, person = rng.choice(free), rng.choice(GIVERS)
            self.holders[thing] = person
            return rng.choice(_TAKES).format(person, thing)
        return rng.choice(_MOVES).format(rng.choice(GIVERS), rng.choice(PLACES))

    def questions(self) -> List[Question]:
        questions: Dict[str, str] = {}  # later gifts replace the answers of earlier ones
        for giver, thing, receiver in self.gifts:
            questions[f"Who gave the {thing}?"] = giver
            questions[f"Who received the {thing}?"] = receiver
            questions[f"Who gave the {thing} to {receiver}?"] = giver
            questions[f"Who did {giver} give the {thing} to?"] = receiver
            questions[f"What did {giver} give to {receiver}?"] = thing
        return list(questions.items())


WORLDS: Dict[str, Callable[[random.Random], World]] = {
    "qa1": Moves,
    "qa2": Carries,
    "qa3": Before,
    "qa4": Directions,
    "qa5": Gives,
}


def tell(task: str, rng: random.Random) -> Story:
    """Tell a story of a task.

    Args:
        task: Task, a key of :data:`WORLDS`.
        rng: Source of all random choices.
    """
    world = WORLDS[task](rng)
    facts = [world.fact() for _ in range(rng.randint(world.least, world.most))]
    while not world.questions():
        facts.append(world.fact())
    question, answer = rng.choice(world.questions())
    return Story(facts, question, answer)
