"""Names of rows in a table and in its footnotes, and the protocols of many rows in one line."""

import re
from collections.abc import Mapping

from unlearning.reporting.formats import Cell, listed
from unlearning.reporting.grouping import Key

Place = tuple  # the values of the conditions, and the concept: runs of one place should share a protocol

_SPECIFIC = re.compile(r"\w*\d\w*(?:\.\w+)*")  # a number, a version, a digest


def label_cells(key: Key) -> list[Cell]:
    """The cells that name a row."""
    return [Cell("–" if value is None else str(value), values=(value,)) for value in key]


def label(key: Key) -> str:
    """The name of a row in a footnote."""
    return ", ".join(cell.text for cell in label_cells(key))


def shortened(protocols: Mapping[Place, str]) -> str:
    """Protocols by place in one line; all places are tuples of one length.

    Protocols that differ in numbers and digests only share one text. A place is named by those of its parts on which
    the protocol depends: "1000 real (…). Of cat: f9bfbddf; of key: 3ab08c11".
    """
    parts = _deciding_parts(protocols)
    kinds: dict[str, dict[str, str]] = {}
    for place, protocol in protocols.items():
        kinds.setdefault(_SPECIFIC.sub("…", protocol), {})[" ".join(str(place[i]) for i in parts)] = protocol
    texts = []
    for places in kinds.values():
        values = {protocol: _SPECIFIC.findall(protocol) for protocol in places.values()}
        differs = [len({*column}) > 1 for column in zip(*values.values(), strict=True)]
        protocol, first = next(iter(values.items()))
        text, gaps = "", _SPECIFIC.split(protocol)
        for gap, value, d in zip(gaps, [*first, ""], [*differs, False], strict=True):
            text += gap + ("…" if d else value)
        for way, numbers in values.items() if any(differs) else ():
            names = listed(place for place, other in places.items() if other == way)
            own = ", ".join(value for value, d in zip(numbers, differs, strict=True) if d)
            text += f"{'. Of' if way == protocol else '; of'} {names}: {own}"
        texts.append(text if any(differs) or len(kinds) == 1 else f"of {listed(places)}: {text}")
    return " | ".join(texts)


def _deciding_parts(protocols: Mapping[Place, str]) -> list[int]:
    """The indices of the parts of a place that decide its protocol. The first parts are the first to be left out."""
    kept = list(range(len(next(iter(protocols), ()))))
    for part in range(len(kept)):
        fewer = [i for i in kept if i != part]
        pairs = {(tuple(place[i] for i in fewer), protocol) for place, protocol in protocols.items()}
        if len({place for place, _ in pairs}) == len(pairs):
            kept = fewer
    return kept
