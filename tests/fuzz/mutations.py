"""What readers are fed: valid files, changed in ways that files from others are.

Enters: the bytes of a valid file, or its tree (tables, lists, scalars). Leaves: Hypothesis
strategies of changed bytes and of changed trees. Knows no format and opens no file.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# Names that must not become a path, a line of their own, a colour, an element or a formula.
HOSTILE_NAMES = (
    "../../outside",
    "/etc/passwd",
    "..",
    "a/b",
    "a\\b",
    "",
    " ",
    "NUL\x00byte",
    "two\nlines",
    "carriage\rreturn",
    "\x1b[2J\x1b[31mred",
    "\x9b31m",
    "[red]x[/red]",
    "[/nothing]",
    "<script>alert(1)</script>",
    "</script><!--",
    "=1+1",
    "\u202eright to left",
    "\ud800",
    "é" * 300,
    "x" * 5000,
    "train_",
    "metric/_val_loss",
    "__proto__",
    "{0.__class__}",
    "%s%n",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    -(1 << 63) - 1,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
)


def nested(depth: int, *, in_tables: bool = False) -> Any:
    """Lists in lists, or tables in tables."""
    value: Any = "core"
    for _ in range(depth):
        value = {"a": value} if in_tables else [value]
    return value


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(HOSTILE_NAMES),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.one_of(
    SCALARS,
    SCALARS,
    st.just({}),
    st.just([]),
    st.builds(nested, st.sampled_from((2, 40, 900)), in_tables=st.booleans()),
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(HOSTILE_NAMES) | st.text(max_size=5), SCALARS, max_size=3),
)

Path = tuple[Any, ...]


def paths(tree: Any, limit: int = 4000) -> list[Path]:
    """The places of a tree, its root first; every list is represented by a few of its items."""
    found: list[Path] = [()]
    for path in found:
        node = at(tree, path)
        keys: Sequence[Any] = ()
        if isinstance(node, dict):
            keys = list(node)
        elif isinstance(node, list):
            keys = sorted({0, 1, len(node) // 2, len(node) - 1} & set(range(len(node))))
        found += [(*path, key) for key in keys]
        if len(found) > limit:
            break
    return found


def at(tree: Any, path: Path) -> Any:
    """What lies at a place."""
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A tree with a place or three replaced, removed, renamed, repeated, swapped or wrapped."""
    tree = copy.deepcopy(tree)
    # One change mostly: the second often lies behind what the first has ended.
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        places = paths(tree)
        path = places[draw(st.integers(0, len(places) - 1))]
        if not path:
            if draw(st.integers(0, 9)) == 0:
                tree = draw(VALUES)
            continue
        parent, key = at(tree, path[:-1]), path[-1]
        action = draw(st.sampled_from(("value", "value", "like", "remove", "name", "more", "wrap")))
        if action == "value":
            parent[key] = draw(VALUES)
        elif action == "like":
            parent[key] = draw(_like(parent[key]))
        elif action == "remove":
            del parent[key]
        elif action == "name" and isinstance(parent, dict):
            parent[draw(st.sampled_from(HOSTILE_NAMES))] = parent.pop(key)
        elif action == "more" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == "more":
            parent[draw(st.sampled_from(HOSTILE_NAMES))] = copy.deepcopy(parent[key])
        else:
            parent[key] = [parent[key]]
    return tree


def _like(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same type, so that a check of types passes."""
    if isinstance(value, bool) or value is None:
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from([n for n in NUMBERS if isinstance(n, int)]) | st.integers()
    if isinstance(value, float):
        return st.sampled_from([float(n) for n in NUMBERS if n != 10**400]) | st.floats()
    if isinstance(value, str):
        return st.sampled_from(HOSTILE_NAMES) | st.text(max_size=12)
    if isinstance(value, list):
        return st.permutations(value[:20]) | st.just(value[:1]) | st.just(value[1:])
    return st.just({})


def to_json(tree: Any, **options: Any) -> bytes:
    """A tree as JSON, as any program may have written it: NaN and half surrogates included."""
    return json.dumps(tree, **options).encode("utf-8", "surrogatepass")


_INSERTED = st.one_of(
    st.binary(min_size=1, max_size=6),
    st.sampled_from(
        (
            *(b"\x00", b"\n", b"\r\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"\\"),
            *(b",", b":", b"{", b"[" * 3000, b"]", b"}", b"#", b"=", b"-", b"NaN", b"1e999"),
            *(
                b"9" * 5000,
                b"&a ",
                b"*a ",
                b"!!python/object/apply:os.system ",
                b"<<: ",
                b"\\ud800",
            ),
            *(b"\x80\x04", b"../", b"/etc/passwd", b"\x1b[2J", b"x" * 20_000, b" " * 70_000),
        )
    ),
)


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes cut, flipped, overwritten, put in, taken out, repeated or swapped, once or some times.

    One time in twenty they are bytes of their own.
    """
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=60))
    for _ in range(draw(st.sampled_from((1, 1, 2, 4)))):
        # The start of a file is where formats keep what they decide by.
        last = len(raw) if draw(st.booleans()) else min(len(raw), 64)
        place = draw(st.integers(0, last))
        action = draw(st.sampled_from(("cut", "flip", "over", "in", "out", "twice", "swap")))
        if action == "cut":
            raw = raw[:place] if draw(st.booleans()) else raw[place:]
        elif action == "flip":
            bits = draw(st.integers(1, 255))
            raw = raw[:place] + bytes(b ^ bits for b in raw[place : place + 1]) + raw[place + 1 :]
        elif action == "over":
            put = draw(_INSERTED)
            raw = raw[:place] + put + raw[place + len(put) :]
        elif action == "in":
            raw = raw[:place] + draw(_INSERTED) + raw[place:]
        else:
            end = min(len(raw), place + draw(st.integers(1, 200)))
            part = raw[place:end]
            if action == "out":
                raw = raw[:place] + raw[end:]
            elif action == "twice":
                raw = raw[:end] + part * draw(st.sampled_from((1, 2, 30))) + raw[end:]
            else:
                raw = raw[end:] + part + raw[:place]
    return raw


CELLS = st.sampled_from(
    (
        *("", " ", "0", "-1", "1", "0.5", "1e-320", "1e308", "nan", "inf", "-inf", "NaN", "1e999"),
        *("9" * 30, "9" * 5000, "0x10", "1_000", "１２", "²", "true", "=1+1", '"', "a,b", "1;2"),
        *("\x00", "two\nlines", "\x1b[2J", "x" * 140_000, "<script>", "[red]", "\ufeff", "\u2028"),
    )
)


@st.composite
def changed_table(draw: st.DrawFn, text: str) -> bytes:
    """A CSV table with cells, rows and columns changed; the header counts as a row."""
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        if not rows:
            break
        row = draw(st.integers(0, min(len(rows), 8) - 1))
        column = draw(st.integers(0, max(0, len(rows[row]) - 1)))
        action = draw(
            st.sampled_from(("cell", "cell", "cell", "name", "remove", "row", "short", "column"))
        )
        if action in ("cell", "name") and rows[row]:
            names = st.sampled_from(HOSTILE_NAMES).map(lambda n: n.replace("\ud800", "?"))
            prefix = draw(st.sampled_from(("", "train_", "metric/", "true/", "predicted/")))
            value = draw(CELLS) if action == "cell" else prefix + draw(names)
            rows[row][column] = f'"{value}"' if draw(st.booleans()) else value
        elif action == "remove":
            del rows[row]
        elif action == "row":
            rows.insert(row, list(rows[row]))
        elif action == "short":
            del rows[row][column:]
        else:
            for cells in rows:
                cells[column : column + 1] = cells[column : column + 1] * draw(
                    st.sampled_from((0, 2))
                )
    ending = draw(st.sampled_from(("\n", "\r\n", "\r")))
    return ending.join(",".join(cells) for cells in rows).encode("utf-8", "replace")
