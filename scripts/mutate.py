"""Put one fault at a time into a copy of the sources and run the tests that should see it.

    python scripts/mutate.py method rules        # draw the faults of these rooms that have no row yet, and try them
    python scripts/mutate.py --again             # try those that survived once more (--tests PATH: with these tests)
    python scripts/mutate.py --rows              # count them into docs/trust.md

Of every room (`mutation/rooms.py`) 40 faults are drawn with a seed, in turn of each kind that it has
(`mutation/sites.py`). A fault is killed by a test that fails with it and passes without it, a crash or a time limit;
one that does not compile is replaced by the next. Rows go to docs/mutants.jsonl, one per fault; a fault that no test
can see, because the results are the same, stands with its reason in mutation/equivalent.json. The exit status is 1
while a fault survives.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mutation.rooms import ROOMS, Room
from mutation.sites import Site, sites_of
from mutation.trial import Trial
from native_build import ROOT

sys.path.insert(0, str(ROOT))

from common.trust import count

ROWS, EQUIVALENT = ROOT / "docs" / "mutants.jsonl", ROOT / "scripts" / "mutation" / "equivalent.json"
PAGE, MARKS = (
    ROOT / "docs" / "trust.md",
    ("<!-- mutants: python scripts/mutate.py --rows -->", "<!-- end of mutants -->"),
)
SEED, DRAWN = 20261202, 40


def drawn(room: Room, root: Path) -> Iterator[Site]:
    """All faults of a room in the order of the draw, every kind in turn; edits elsewhere leave the order as it is."""

    def draw(site: Site) -> str:
        return hashlib.sha256(f"{SEED} {site.name}".encode()).hexdigest()

    by_kind: dict[str, list[Site]] = {}
    for path in room.sources(root):
        for site in sites_of(root, path):
            by_kind.setdefault(site.kind, []).append(site)
    queues = [iter(sorted(by_kind[kind], key=draw)) for kind in sorted(by_kind)]
    for turn in itertools.zip_longest(*queues):
        yield from (site for site in turn if site is not None)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rooms", nargs="*", default=list(ROOMS), help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--again", action="store_true", help="try only faults that survived, once more")
    parser.add_argument("--tests", nargs="+", default=[], help="the tests to run, instead of the room's")
    parser.add_argument("--rows", action="store_true", help="count the rows into docs/trust.md, and try none")
    options = parser.parse_args()
    if unknown := set(options.rooms) - set(ROOMS):
        raise SystemExit(f"error: no room {', '.join(sorted(unknown))}: there are {', '.join(ROOMS)}.")
    if not options.rows:
        for name in options.rooms:
            room = ROOMS[name]
            if options.tests:
                traced = tuple(options.tests) if room.traced else ()
                room = replace(room, traced=traced, tests=lambda _: options.tests)
            _try(room, options.again)
    return int(_written())


def rows() -> dict[str, dict[str, Any]]:
    """Fault -> its row."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return {row["fault"]: row for row in map(json.loads, lines)}


def _try(room: Room, again: bool) -> None:
    """Write the rows of a room's faults."""
    reasons = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    trial, tried = None, 0
    for site in drawn(room, ROOT):
        row = rows().get(site.name)
        if row is None if not again else row is not None and row["state"] == "survived":
            if site.name in reasons:
                row = dict(
                    room=room.name, fault=site.name, line=site.line, state="equivalent", by=reasons[site.name]
                )
            else:
                trial = trial or Trial(room)
                row = trial.of(site)
            print(room.name, tried + 1, row["state"], site.name, "|", row["by"], flush=True)
            lines = [
                json.dumps(one, ensure_ascii=False) + "\n" for one in {**rows(), site.name: row}.values()
            ]
            ROWS.write_text("".join(lines), encoding="utf-8")
        tried += row is not None and row["state"] != "invalid"
        if tried == DRAWN:
            break


def states(room: Room) -> tuple[Counter[str], int]:
    """How many of a room's drawn faults were killed, survived, are equivalent or not tried; and all its faults."""
    known, sites, drawn_ones = rows(), 0, Counter[str]()
    for site in drawn(room, ROOT):
        sites += 1
        row = known.get(site.name, {"state": "not tried"})
        if row["state"] != "invalid" and drawn_ones.total() < DRAWN:
            drawn_ones[row["state"]] += 1
            if row["state"] == "survived":
                print(f"survived: {site.name} | {row['by']}")
    return drawn_ones, sites


def _written() -> bool:
    """Count the rows, write the table of the page, and return whether a fault survived."""
    from common.pages import between, table

    lines, survived = [], 0
    for room in ROOMS.values():
        own, sites = states(room)
        tried = own.total() - own["not tried"]
        lines.append([room.name, own.total(), tried, own["killed"], own["equivalent"], own["survived"]])
        figures = {state: own[state] for state in ("killed", "equivalent", "survived")}
        count("mutants", faults=sites, drawn=own.total(), tried=tried, **figures)
        survived += own["survived"]
    lines.append(["all", *(sum(column) for column in list(zip(*lines))[1:])])
    text = table(["room", "drawn", "tried", "killed", "equivalent", "survived"], lines)
    print(text)
    between(PAGE, *MARKS, text)
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
