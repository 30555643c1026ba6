"""Text that every Python installation already has: its standard library.

Two kinds of documents come from each file: the file itself, and one chat sample per
documented function (the question names the signature and the first paragraph of the
docstring, the answer is the function's source). The split into training and held-out files
hashes the relative path, so it is the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT_ONE_IN = 20  # about 5 % of the files
MAX_ANSWER_BYTES = 3000

# Third-party code, caches, and tables that are data rather than text.
SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "data",
        "cjkencodings",
    }
)
MAX_FILE_BYTES = 300_000


@dataclass
class Split:
    """Documents of one side of the split."""

    texts: list[str] = field(default_factory=list)
    chats: list[tuple[str, str]] = field(default_factory=list)  # (question, answer)

    def add_file(self, text: str) -> None:
        """Take one source file and the chat samples in it."""
        self.texts.append(text)
        self.chats.extend(chat_samples(text))


@dataclass
class Corpus:
    """The two sides, and how many bytes of source they were made from."""

    train: Split
    held_out: Split
    num_files: int
    num_bytes: int


def is_held_out(relative_path: str) -> bool:
    """Whether a file is on the held-out side. A function of its relative path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def source_files(root: Path) -> list[Path]:
    """Python files below `root`: sorted, the library first and its test suite last."""
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS.intersection(parts) and path.stat().st_size <= MAX_FILE_BYTES:
            files.append((bool({"test", "tests", "idle_test"} & set(parts)), "/".join(parts), path))
    return [path for _, _, path in sorted(files)]


def read_source(path: Path) -> str | None:
    """A file's text; None where there is none to learn from."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None  # the test suite has files that are broken on purpose
    return text if text.strip() and "\0" not in text else None


def held_out_texts(root: Path | None = None) -> list[str]:
    """The held-out files of the standard library (or `root`), without their chat samples."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    held_out = (p for p in source_files(root) if is_held_out(p.relative_to(root).as_posix()))
    return [text for path in held_out if (text := read_source(path)) is not None]


def load_corpus(max_megabytes: float, root: Path | None = None) -> Corpus:
    """Read the standard library (or `root`) up to `max_megabytes` (10^6 bytes) of source.

    Raises:
        ValueError: no text at all, or nothing on one side of the split.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    corpus = Corpus(train=Split(), held_out=Split(), num_files=0, num_bytes=0)
    for path in source_files(root):
        text = read_source(path)
        if text is None:
            continue
        side = corpus.held_out if is_held_out(path.relative_to(root).as_posix()) else corpus.train
        side.add_file(text)
        corpus.num_files += 1
        corpus.num_bytes += len(text.encode())
        if corpus.num_bytes >= max_megabytes * 1e6:
            break
    if not corpus.train.texts or not corpus.held_out.texts:
        raise ValueError(f"{corpus.num_files} source files are too few to split")
    return corpus


def chat_samples(text: str) -> Iterator[tuple[str, str]]:
    """(question, answer) for each documented function in a source text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old files
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        answer = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(answer) <= MAX_ANSWER_BYTES:
            paragraph = " ".join(docstring.split("\n\n")[0].split())
            yield f"Write `def {node.name}({ast.unparse(node.args)})`: {paragraph}", answer
