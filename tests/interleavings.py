"""Every execution of a few actors that share memory: the data races, wrong results and deadlocks among them.

An actor is a list of operations. It reads and writes words with plain moves and meets others at counters, each of which
only one actor publishes. A race is two accesses of different actors to one word, one of them a write, that no chain of
publishing with release order and waiting with acquire order puts in an order: found with vector clocks, so it is found
in every execution in which it exists, not only where the accesses happen to be neighbours.

Why this covers machines that reorder, such as ARM: C11 promises that a program without races behaves as if its steps
were interleaved, but only if its atomics are sequentially consistent; release and acquire are weaker (store
buffering: two ranks may both miss the other's latest store). So a wait does not see the newest value here: it sees any
value that coherence lets it see, and learns only what was known when that value was published. With one writer to a
counter these are all executions of release, acquire and relaxed accesses as C11 means them, but for values out of thin
air. A plain read of a program without races has one write that it can see, the last that happened before it, which is
the one that the interleaving shows. So no race, no wrong result and no deadlock here means none on any machine.

Not covered: a wait is taken when a sufficient value is seen; that stores are seen at all after a while is assumed.

Source: vector clocks: FastTrack (Flanagan and Freund, PLDI 2009). The memory model: Lahav et al., Repairing Sequential
Consistency in C/C++11 (PLDI 2017).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Read(NamedTuple):
    """Look at a word, and keep what is there beside what was read before."""

    word: Hashable


class Write(NamedTuple):
    """Put part `part` of a value into a word: of `value`, or of what was made from all that was read."""

    word: Hashable
    part: int
    value: Hashable = None


class Deliver(NamedTuple):
    """Compare the words that were read, in order, to what they should be, and forget them; None: only forget them."""

    expected: "tuple | None"


class Publish(NamedTuple):
    counter: int
    value: int
    release: bool


class Wait(NamedTuple):
    counter: int
    least: int
    acquire: bool


Operation = Read | Write | Deliver | Publish | Wait


class Made(tuple):
    """The value that is made from the words that were read, in that order."""


def parts(value: Hashable, count: int) -> list:
    """A value as the words that hold it."""
    return [(value, part) for part in range(count)]


@dataclass
class Found:
    """What went wrong in some execution: the first of each kind, as a sentence, by `race`, `value` and `deadlock`."""

    wrong: dict[str, str]
    states: int


# A state is (steps taken, words read, clocks, newest value seen of each counter; values published; memory): the first
# four by actor. A clock counts by actor those publishings of it that happened before; an access between the n-th and
# the next publishing of its actor happened before all that know more than n.
_UNWRITTEN = (-1, -1, -1, ())
_FORGOTTEN = (-1, None)


class World:
    """The actors and their next steps."""

    def __init__(self, actors: Sequence[Sequence[Operation]]):
        self.wrong: dict[str, str] = {}
        # Small numbers instead of words: a state is hashed often.
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self.actors = [tuple(map(self._numbered, operations)) for operations in actors]
        operations = [operation for actor in self.actors for operation in actor]
        words = sorted({o.word for o in operations if isinstance(o, Read | Write)})
        self._words = {word: i for i, word in enumerate(words)}
        counters = sorted({o.counter for o in operations if isinstance(o, Publish | Wait)})
        self._counters = {counter: i for i, counter in enumerate(counters)}
        self._writers: list[int] = []
        for counter in counters:
            published = [{o.counter for o in actor if isinstance(o, Publish)} for actor in self.actors]
            writers = [a for a, theirs in enumerate(published) if counter in theirs]
            assert len(writers) == 1, f"actors {writers} publish counter {counter:#x}"
            self._writers += writers
        self._known = [self._knowledge(*pair) for pair in zip(counters, self._writers, strict=True)]
        self.start = (
            (0,) * len(self.actors),
            ((),) * len(self.actors),
            ((0,) * len(self.actors),) * len(self.actors),
            ((0,) * len(counters),) * len(self.actors),
            (((0, None),),) * len(counters),
            (_UNWRITTEN,) * len(words),
        )

    def _knowledge(self, counter: int, writer: int) -> list[int]:
        """By how many publishings of its writer, which may have other counters, somebody knows of: the latest value."""
        places = [0]
        for operation in self.actors[writer]:
            if isinstance(operation, Publish):
                places.append(places[-1] + (operation.counter == counter))
        return places

    def _numbered(self, operation: Operation) -> Operation:
        if isinstance(operation, Deliver) and operation.expected is not None:
            return Deliver(tuple(map(self._number, operation.expected)))
        return operation

    def _number(self, word: tuple[Hashable, int]) -> int:
        value, part = word
        if isinstance(value, Made):
            value = Made(w if isinstance(w, int) else self._number(w) for w in value)
        return self._numbers.setdefault((value, part), len(self._numbers))

    def next(self, state: tuple, actor: int) -> list[tuple]:
        """The states after one more step of `actor`: none if it is done or must wait, several if it may see several.

        What no other actor can notice comes along: comparing, and waiting for its own counter.
        """
        return [self._settled(after, actor) for after in self._step(state, actor)]

    def _settled(self, state, actor):
        while state[0][actor] < len(self.actors[actor]):
            operation = self.actors[actor][state[0][actor]]
            own = isinstance(operation, Wait) and self._writers[self._counters[operation.counter]] == actor
            after = self._step(state, actor) if own or isinstance(operation, Deliver) else []
            if not after:
                break
            (state,) = after
        return state

    def _step(self, state, actor):
        step = state[0][actor]
        if step == len(self.actors[actor]):
            return []
        operation = self.actors[actor][step]
        taken = (_with(state[0], actor, step + 1), *state[1:])
        if isinstance(operation, Read):
            return [self._read(taken, actor, operation)]
        if isinstance(operation, Write):
            return [self._write(taken, actor, operation)]
        if isinstance(operation, Deliver):
            return [self._deliver(taken, actor, operation)]
        if isinstance(operation, Publish):
            return [self._publish(taken, actor, operation)]
        return self._wait(taken, actor, operation)

    def _read(self, state, actor, operation):
        steps, held, clocks, seen, published, memory = state
        word = self._words[operation.word]
        value, writer, written, readers = memory[word]
        clock = clocks[actor]
        if writer not in (-1, actor) and clock[writer] <= written:
            self._race(state, actor, writer, operation, "reads", "wrote")
        readers = (*(reader for reader in readers if reader[0] != actor), (actor, clock[actor]))
        memory = _with(memory, word, (value, writer, written, tuple(sorted(readers))))
        return steps, _with(held, actor, (*held[actor], value)), clocks, seen, published, memory

    def _write(self, state, actor, operation):
        steps, held, clocks, seen, published, memory = state
        word = self._words[operation.word]
        _, writer, written, readers = memory[word]
        clock = clocks[actor]
        if writer not in (-1, actor) and clock[writer] <= written:
            self._race(state, actor, writer, operation, "writes", "wrote")
        for reader, when in readers:
            if reader != actor and clock[reader] <= when:
                self._race(state, actor, reader, operation, "writes", "read")
        value = Made(held[actor]) if operation.value is None else operation.value
        memory = _with(memory, word, (self._number((value, operation.part)), actor, clock[actor], ()))
        return steps, held, clocks, seen, published, memory

    def _deliver(self, state, actor, operation):
        steps, held, *others = state
        if operation.expected is not None and held[actor] != operation.expected:
            self.wrong.setdefault("value", f"actor {actor}, step {steps[actor]}: a result is not what it should be")
        return steps, _with(held, actor, ()), *others

    def _publish(self, state, actor, operation):
        steps, held, clocks, seen, published, memory = state
        counter = self._counters[operation.counter]
        clock = _with(clocks[actor], actor, clocks[actor][actor] + 1)
        message = (operation.value, clock if operation.release else None)
        messages = (*published[counter], message)
        seen = _with(seen, actor, _with(seen[actor], counter, len(messages) - 1))
        return steps, held, _with(clocks, actor, clock), seen, _with(published, counter, messages), memory

    def _wait(self, state, actor, operation):
        steps, held, clocks, seen, published, memory = state
        counter = self._counters[operation.counter]
        if self._writers[counter] == actor:
            # Its own latest, from which there is nothing to learn.
            return [state] if published[counter][-1][0] >= operation.least else []
        states = []
        # Coherence: nothing older than what it saw, or than what it knows to have been published.
        for i in range(seen[actor][counter], len(published[counter])):
            value, known = published[counter][i]
            if value >= operation.least:
                clock = clocks[actor]
                if operation.acquire and known is not None:
                    clock = tuple(map(max, clock, known))
                newest = _with(seen[actor], counter, i)
                facts = zip(newest, self._writers, self._known, strict=True)
                newest = tuple(max(n, places[clock[writer]]) for n, writer, places in facts)
                now = _with(clocks, actor, clock), _with(seen, actor, newest)
                states.append((steps, held, *now, *self._forgotten(*now, published, memory)))
        return states

    def _forgotten(self, clocks, seen, published, memory):
        """Without what can no longer matter: accesses that happened before all that comes, values that all are past."""
        least = [min(clock[a] for clock in clocks) for a in range(len(clocks))]
        oldest = [min(newest[c] for newest in seen) for c in range(len(published))]
        published = tuple((_FORGOTTEN,) * n + messages[n:] for n, messages in zip(oldest, published, strict=True))
        return published, tuple(_forget(word, least) if word[1] >= 0 or word[3] else word for word in memory)

    def _race(self, state, actor, other, operation, does, did):
        self.wrong.setdefault(
            "race",
            f"actor {actor}, step {state[0][actor]}: {does} word {operation.word}, which actor {other} {did}, and "
            "neither happened before the other",
        )

    def stuck(self, state: tuple):
        """Note a state without a next one, if some actor is not done."""
        waiting = [a for a, step in enumerate(state[0]) if step < len(self.actors[a])]
        if waiting:
            self.wrong.setdefault("deadlock", f"actors {waiting} wait for ever, at steps {state[0]}")


def _forget(word: tuple, least: list[int]) -> tuple:
    value, writer, written, readers = word
    if least[writer] > written:
        writer = written = -1
    return value, writer, written, tuple(reader for reader in readers if least[reader[0]] <= reader[1])


def _with(items: tuple, i: int, item) -> tuple:
    return (*items[:i], item, *items[i + 1 :])


def explore(actors: Sequence[Sequence[Operation]], until: "set[str] | None" = None) -> Found:
    """What goes wrong in any execution; `until` ends the search as soon as all of these were found."""
    world = World(actors)
    known, todo = {world.start}, [world.start]
    while todo and not (until and until <= set(world.wrong)):
        state = todo.pop()
        any_next = False
        for actor in range(len(world.actors)):
            for after in world.next(state, actor):
                any_next = True
                if after not in known:
                    known.add(after)
                    todo.append(after)
        if not any_next:
            world.stuck(state)
    return Found(world.wrong, len(known))


def replay(actors: Sequence[Sequence[Operation]]) -> Found:
    """What goes wrong in one execution: each actor runs until it must wait."""
    world = World(actors)
    state, steps, moved = world.start, 0, True
    while moved:
        moved = False
        for actor in range(len(world.actors)):
            while states := world.next(state, actor):
                state, moved, steps = states[-1], True, steps + 1
    world.stuck(state)
    return Found(world.wrong, steps)
