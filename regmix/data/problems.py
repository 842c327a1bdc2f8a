"""Generated problems of school mathematics, with their answers.

Enters: a seeded generator. Leaves: documents of 15 to 40 questions of one kind, each answered on
the next line. Every answer is computed, none is looked up. Writes no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random

Problem = tuple[str, str]
NAMES = ("Ann", "Bela", "Chen", "Dara", "Emil", "Fay", "Goran", "Hana", "Ivo", "June")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "stamps", "tickets")


def problem_documents(draw: Random) -> Iterator[str]:
    """Yield documents without end, the kinds of problem in random order."""
    while True:
        kind = draw.choice(KINDS)
        problems = (kind(draw) for _ in range(draw.randint(15, 40)))
        yield "\n".join(f"{question}\n{answer}" for question, answer in problems)


def _whole(draw: Random) -> int:
    """Return a whole number whose number of digits is drawn first, so that small ones are met."""
    return draw.randint(0, 10 ** draw.randint(1, 5))


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"


def _term(factor: int, letter: str) -> str:
    return {1: letter, -1: f"-{letter}"}.get(factor, f"{factor}*{letter}")


def _sum(draw: Random) -> Problem:
    numbers = [_whole(draw) for _ in range(draw.randint(2, 4))]
    return f"What is {' + '.join(map(str, numbers))}?", str(sum(numbers))


def _difference(draw: Random) -> Problem:
    first, second = _whole(draw), _whole(draw)
    return f"Subtract {second} from {first}.", str(first - second)


def _product(draw: Random) -> Problem:
    first, second = draw.randint(-99, 999), draw.randint(2, 99)
    return f"Multiply {first} by {second}.", str(first * second)


def _division(draw: Random) -> Problem:
    number, divisor = _whole(draw), draw.randint(2, 60)
    quotient, rest = divmod(number, divisor)
    answer = f"{quotient} remainder {rest}" if rest else str(quotient)
    return f"Divide {number} by {divisor}.", answer


def _linear(draw: Random) -> Problem:
    letter, root = draw.choice("abhkmnpqrstxyz"), draw.randint(-40, 40)
    factor, shift = draw.choice([-9, -7, -5, -4, -3, -2, 2, 3, 4, 5, 6, 8]), draw.randint(-90, 90)
    left = f"{_term(factor, letter)} {_signed(shift)}"
    return f"Solve {left} = {factor * root + shift} for {letter}.", f"{letter} = {root}"


def _expand(draw: Random) -> Problem:
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    c, d = draw.choice([-7, -4, -3, -1, 2, 5, 6, 9]), draw.choice([-8, -5, -2, 1, 3, 4, 7])
    question = f"Expand ({_term(a, 'x')} {_signed(c)})*({_term(b, 'x')} {_signed(d)})."
    middle = a * d + b * c
    shown = f" {'+' if middle > 0 else '-'} {_term(abs(middle), 'x')}" if middle else ""
    return question, f"{_term(a * b, 'x^2')}{shown} {_signed(c * d)}"


def _derivative(draw: Random) -> Problem:
    a, b, c = draw.randint(1, 12), draw.randint(1, 30), draw.randint(-50, 50)
    power = draw.randint(3, 7)
    question = f"Differentiate {_term(a, f'x^{power}')} + {_term(b, 'x')} {_signed(c)}."
    return question, f"{a * power}*x^{power - 1} + {b}"


def _value(draw: Random) -> Problem:
    a, b, c = draw.randint(1, 9), draw.randint(-9, 9), draw.randint(-20, 20)
    x, name = draw.randint(-9, 9), draw.choice("fghpu")
    question = f"Let {name}(x) = {_term(a, 'x^2')} {_signed(b)}*x {_signed(c)}. Find {name}({x})."
    return question, str(a * x * x + b * x + c)


def _divisor(draw: Random) -> Problem:
    shared = draw.randint(2, 40)
    first, second = shared * draw.randint(1, 60), shared * draw.randint(1, 60)
    if draw.random() < 0.5:
        question = f"What is the greatest common divisor of {first} and {second}?"
        return question, str(math.gcd(first, second))
    return f"Find the least common multiple of {first} and {second}.", str(math.lcm(first, second))


def _fraction(draw: Random) -> Problem:
    first = Fraction(draw.randint(1, 20), draw.randint(2, 20))
    second = Fraction(draw.randint(1, 20), draw.randint(2, 20))
    sign, result = draw.choice(
        [("+", first + second), ("-", first - second), ("*", first * second)]
    )
    return f"Calculate {first} {sign} {second}.", str(result)


def _base(draw: Random) -> Problem:
    number = draw.randint(10, 5000)
    base, shown = draw.choice([(2, f"{number:b}"), (8, f"{number:o}"), (16, f"{number:x}")])
    if draw.random() < 0.5:
        return f"Write {number} in base {base}.", shown
    return f"Convert {shown} from base {base} to base 10.", str(number)


def _sequence(draw: Random) -> Problem:
    first, step, bend = draw.randint(-50, 50), draw.randint(-20, 20), draw.choice([0, 0, 1, 2, -1])
    terms = [first + step * n + bend * n * n for n in range(6)]
    return f"What comes next: {', '.join(map(str, terms[:5]))}?", str(terms[5])


def _order(draw: Random) -> Problem:
    numbers = draw.sample(range(-200, 200), draw.randint(4, 7))
    question = f"Put {', '.join(map(str, numbers))} in increasing order."
    return question, ", ".join(map(str, sorted(numbers)))


def _prime(draw: Random) -> Problem:
    number, factors, divisor = draw.randint(2, 3000), [], 2
    left = number
    while left > 1:
        while left % divisor == 0:
            factors.append(divisor)
            left //= divisor
        divisor += 1
    return f"List the prime factors of {number}.", ", ".join(map(str, factors))


def _story(draw: Random) -> Problem:
    name, other = draw.sample(NAMES, 2)
    thing, price = draw.choice(THINGS), draw.randint(2, 30)
    bought = draw.randint(3, 40)
    given = draw.randint(1, bought - 1)
    question = (
        f"{name} buys {bought} {thing} at {price} cents each and gives {given} of them to {other}. "
        f"How many {thing} does {name} keep, and what did all of them cost?"
    )
    cost = bought * price
    return question, f"{bought - given} {thing}; {cost // 100}.{cost % 100:02d} in all"


KINDS: tuple[Callable[[Random], Problem], ...] = (
    _sum, _difference, _product, _division, _linear, _expand, _derivative, _value, _divisor,
    _fraction, _base, _sequence, _order, _prime, _story,
)  # fmt: skip
