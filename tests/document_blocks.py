"""The blocks of code in the documents, and the commands in them.

Before each block for the operator stands a comment that says who has tried it:

    <!-- tried: run 3 -->          tests/test_document_blocks.py runs it, third of all
    <!-- tried: tests/PATH -->     that test does the same
    <!-- tried: by hand, … -->     with these versions
    <!-- not tried -->             and the text says so as well
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(nbd-bridge [^`]+)`(?!`)")
_WRAPPERS = ("sudo", "do", "then", "if", "!", "exec")
_SEPARATORS = frozenset("|;&()")


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: Path
    mark: str
    """What the comment before it says; empty without one."""
    language: str
    text: str
    section: str
    """The visible text of its section."""

    @property
    def lines(self) -> list[str]:
        """The typed lines, continued ones joined; without prompts, and without what is answered."""
        lines = self.text.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in prompted or lines if line.strip() and not line.startswith("#")]


def blocks_of(document: Path) -> list[Block]:
    """The blocks of `document`, a path relative to the project."""
    text = (ROOT / document).read_text()
    found = []
    for match in _BLOCK.finditer(text):
        mark, language, body = match.groups()
        section = text[text.rfind("\n## ", 0, match.start()) + 1 :]
        section = section[: section.find("\n## ", 1)] if "\n## " in section[1:] else section
        visible = re.sub(r"<!--.*?-->", "", section)
        found.append(Block(document, mark or "", language, body, visible))
    return found


def inline_commands(document: Path) -> list[str]:
    """What stands as `nbd-bridge …` in the text."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)
    return _INLINE.findall(text)


def commands_of(line: str) -> Iterator[list[str]]:
    """The words of each command in a line of shell; without redirections and variables before."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&()<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    skip = False
    for token in lexer:
        if skip:
            skip = False
        elif set(token) <= _SEPARATORS:
            yield from _command(words)
            words = []
        elif set(token) <= set("<>&"):
            skip = True
        else:
            words.append(token)
    yield from _command(words)


def _command(words: list[str]) -> Iterator[list[str]]:
    while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in _WRAPPERS):
        words = words[1:]
    if "exec" in words and "compose" in " ".join(words[:2]):
        words = words[words.index("exec") + 2 :]  # what runs in that service
    if words:
        yield words
