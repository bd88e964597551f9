"""What `embed` does: the images that a table lacks, embedded by a service or in this process."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import time_ns

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from cli.embeddings import FileState, GrowingTable
from cli.inference import connect, waiting_for
from cli.inputs import Images, Source
from cli.terminal import print_line, print_problem, progress_bar, reason
from pvt_client import Embedding
from pvt_client.async_client import AsyncCalls
from pvt_client.calls import FeaturesOptions

_LISTED = 1000  # failed files whose reasons are kept


def _state(image: Source) -> FileState:
    """What tells whether an image is in the table; one on standard input never is. Raises OSError."""
    if isinstance(image, Path):
        return FileState.of(image)
    return FileState(str(image), len(image.getvalue()), time_ns())


@dataclass
class Run:
    """Adds embeddings to `table`, and counts, under a progress bar."""

    table: GrowingTable
    embedded: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    reading: dict[Source, FileState] = field(default_factory=dict)
    """The images that are being embedded, as their files were before they were read."""
    _step: Callable[[], None] = lambda: None

    def embed(self, url: str | None, key: str | None, images: Images, query: FeaturesOptions, concurrency: int) -> None:
        """Embed those `images` that are not in the table."""
        with progress_bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()) as progress:
            task = progress.add_task(waiting_for(query["model"], url), total=images.count())
            self._step = lambda: progress.update(task, advance=1, description="")
            asyncio.run(self._embed(connect(url, key), query, images, concurrency))

    async def _embed(
        self,
        connection: AbstractAsyncContextManager[AsyncCalls],
        query: FeaturesOptions,
        images: Images,
        concurrency: int,
    ) -> None:
        todo = self._todo(images, query["model"])
        first = next(todo, None)
        if first is None:
            return  # nothing to do, so no model is needed
        async with connection as inference:
            async for image, result in inference.embedding_many(chain([first], todo), concurrency=concurrency, **query):
                file = self.reading.pop(image)
                if isinstance(result, Embedding):
                    self._count(is_new=self.table.add(file, result))
                else:
                    self._fail(image, reason(result))

    def _todo(self, images: Images, model: str | None) -> Iterator[Source]:
        # Where the name leaves open whether the table is of that model, the first image shows it, even if it has a row.
        probing = len(self.table) > 0 and not self.table.is_of(model)
        for image in images:
            try:
                str(image).encode()  # a column of text takes no other names
                file = _state(image)
            except UnicodeEncodeError:
                self._fail(image, "its name is not UTF-8")
            except OSError as error:
                self._fail(image, error.strerror or str(error))
            else:
                if (file not in self.table or probing) and image not in self.reading:
                    probing = False
                    self.reading[image] = file
                    yield image
                else:
                    self._count(is_new=False)

    def _count(self, *, is_new: bool) -> None:
        self.embedded += is_new
        self.skipped += not is_new
        self._step()

    def _fail(self, image: Source, message: str) -> None:
        self.failed += 1
        if len(self.reasons) < _LISTED:
            self.reasons.append((ascii(str(image))[1:-1], message))
        self._step()

    def report(self, output: Path, *, as_json: bool) -> None:
        """Print the counts, and the failed files with their reasons."""
        rows = len(self.table)
        if as_json:
            errors = [{"file": path, "error": message} for path, message in self.reasons]
            counts = {"rows": rows, "embedded": self.embedded, "skipped": self.skipped, "bad": self.failed}
            print_line(json.dumps({"output": str(output), **counts, "errors": errors}))
            return
        if self.failed:
            print_problem(f"{self.failed} could not be embedded:")
            for path, message in self.reasons:
                print_problem(f"  {path}: {message}")
            if self.failed > len(self.reasons):
                print_problem(f"  and {self.failed - len(self.reasons)} more")
        print_line(f"{output}: {rows} rows, {self.embedded} of them new, {self.skipped} skipped, {self.failed} bad")
