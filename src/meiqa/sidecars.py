"""XMP sidecars: a rating and a label are merged into a packet, whose other bytes stay as they are.

What is written stands there twice, as xmp:Rating and as meiqa:Rating: where the two differ,
somebody has rated the photo by hand since.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from xml.parsers import expat

from meiqa.errors import OutputUnwritable

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMP, _OURS = "http://ns.adobe.com/xap/1.0/", "urn:meiqa:1.0/"
_PREFIXES = {_XMP: "xmp", _OURS: "meiqa"}
_EMPTY = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{_RDF}">
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
""".encode()
_START_TAG = re.compile(rb"""<[^\s/>]+(?:\s+[^\s=]+\s*=\s*(?:"[^"]*"|'[^']*'))*\s*/?>""")
_ATTRIBUTE = re.compile(rb"""\s([^\s=]+)\s*=\s*("[^"]*"|'[^']*')""")
_EMPTY_ELEMENT = re.compile(rb"<([\w-]+:(?:Rating|Label))\s*/>")
_EMBEDDED = re.compile(rb"<x:xmpmeta.*?</x:xmpmeta>", re.DOTALL)
_HEAD_BYTES = 4 << 20
"""How far into a photo its packet is looked for."""

Name = tuple[str, str]
"""A namespace and a name within it."""
_DESCRIPTION = [(_RDF, "RDF"), (_RDF, "Description")]


def rated_by_hand(packet: bytes, path: str) -> bool:
    """Tell whether somebody gave a rating other than what was written here before.

    Raises:
        OutputUnwritable: it is no well-formed XMP in UTF-8.
    """
    return _by_hand(_Properties(packet, path).values, "Rating")


def embedded_packet(photo: str | Path) -> bytes | None:
    """Give the first XMP packet near the beginning of a photo, None if there is none."""
    with open(photo, "rb") as file:
        found = _EMBEDDED.search(file.read(_HEAD_BYTES))
    return found[0] if found else None


def merged(packet: bytes | None, path: str, rating: int, label: str, *, force: bool) -> bytes:
    """Put a rating and a label into a sidecar's packet, or into a new one.

    Args:
        packet: what is there.
        path: where, for messages.
        rating: 1-5, 0 for none, or -1 for a reject.
        label: a colour's name; "" leaves the label as it is.
        force: in place of a label that was given by hand, too.

    Raises:
        OutputUnwritable: it is no well-formed XMP in UTF-8.
    """
    found = _Properties(packet or _EMPTY, path)
    wanted = {"Rating": str(rating)}
    if label and (force or not _by_hand(found.values, "Label")):
        wanted["Label"] = label
    return found.changed({(space, k): v for k, v in wanted.items() for space in _PREFIXES})


def told(packet: bytes, path: str) -> str:
    """Give a packet's rating and label in words; "" where it has neither.

    >>> told(merged(None, "a.xmp", 5, "Green", force=False), "a.xmp")
    '5 stars, Green'
    """
    values = _Properties(packet, path).values
    rating, label = (values.get((_XMP, name), "").strip() for name in ("Rating", "Label"))
    words = {"-1": "rejected", "0": "no stars", "1": "1 star", "": ""}
    return ", ".join(filter(None, (words.get(rating, f"{rating} stars"), label)))


def _by_hand(values: Mapping[Name, str], name: str) -> bool:
    given = values.get((_XMP, name), "").strip()
    return given not in ("", "0") and given != values.get((_OURS, name))


class _Properties:
    """Ratings and labels of a packet, with the bytes where they stand."""

    def __init__(self, packet: bytes, path: str) -> None:
        self.values: dict[Name, str] = {}
        self._packet, self._end = _EMPTY_ELEMENT.sub(rb"<\1></\1>", packet), -1
        self._spans: list[tuple[int, int, Name]] = []
        self._names: list[Name] = []
        self._begun, self._text = 0, ""
        self._parser = parser = expat.ParserCreate("utf-8", namespace_separator=" ")
        parser.namespace_prefixes = True
        parser.StartElementHandler, parser.EndElementHandler = self._begin, self._finish
        parser.CharacterDataHandler = self._read
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        try:
            parser.Parse(self._packet, True)
            if self._end < 0:
                raise ValueError("no rdf:RDF with anything in it")
        except (expat.ExpatError, ValueError) as error:
            raise OutputUnwritable(
                f"{path} is left as it is: no well-formed XMP",
                seen=str(error),
                hint="mend it, or move it away",
            ) from None

    def changed(self, wanted: Mapping[Name, str]) -> bytes:
        """Give the packet with other values; those it lacks get a description of their own."""
        packet = self._packet
        if missing := {k: v for k, v in wanted.items() if k not in self.values}:
            spaces = "".join(f' xmlns:{p}="{space}"' for space, p in _PREFIXES.items())
            told = "".join(f' {_PREFIXES[k[0]]}:{k[1]}="{v}"' for k, v in missing.items())
            own = f' <rdf:Description xmlns:rdf="{_RDF}" rdf:about=""{spaces}{told}/>\n '
            packet = packet[: self._end] + own.encode() + packet[self._end :]
        for start, end, name in sorted(self._spans, reverse=True):
            packet = packet[:start] + wanted.get(name, self.values[name]).encode() + packet[end:]
        return packet

    def _begin(self, triplet: str, attributes: Mapping[str, str]) -> None:
        self._names.append(_name(triplet)[0])
        at = self._parser.CurrentByteIndex
        tag = _START_TAG.match(self._packet, at)
        if tag is None:
            raise ValueError("a tag that cannot be read")
        self._begun, self._text = tag.end(), ""
        if self._names[-2:] == _DESCRIPTION:
            spans = {a[1].decode(): a.span(2) for a in _ATTRIBUTE.finditer(tag[0])}
            for each, value in attributes.items():
                name, written = _name(each)
                start, end = spans[written]
                self._note(name, value, at + start + 1, at + end - 1)

    def _read(self, text: str) -> None:
        self._text += text

    def _finish(self, _: str) -> None:
        name, at = self._names.pop(), self._parser.CurrentByteIndex
        if not self._packet.startswith(b"</", at):  # an element without content
            return
        if self._names[-2:] == _DESCRIPTION:
            self._note(name, self._text, self._begun, at)
        elif name == _DESCRIPTION[0]:
            self._end = at

    def _note(self, name: Name, value: str, start: int, end: int) -> None:
        if name[0] in _PREFIXES and name[1] in ("Rating", "Label"):
            self.values[name] = value
            self._spans.append((start, end, name))

    def _refuse_doctype(self, *_: object) -> None:
        raise ValueError("a document type, which XMP has none of")


def _name(triplet: str) -> tuple[Name, str]:
    """Split a name as expat gives it: what it means, and how it is written."""
    *space, local = triplet.split(" ")[:2]
    prefix = triplet.split(" ")[2:]
    return ("".join(space), local), ":".join([*prefix, local])
