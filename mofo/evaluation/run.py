"""Predict, judge, write: one JSON line per image and predictor, by any number of processes.

    run([Task(row=row, images=open_row(row), predictors=[...])], protocol=..., folder=..., ...)

The lines hold everything that a report says. They are written as batches are done, so a run that is
killed loses a batch, and typed again continues; processes on one folder share the batches among
them by claims. An image that cannot be read, predicted or scored gets a line with the reason: it is
listed and never averaged.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mofo.data.sample import Sample
from mofo.evaluation.claims import Claims
from mofo.evaluation.kept import file_name
from mofo.evaluation.ledger import Ledger, Task, plain
from mofo.evaluation.lines import Line, Writer, read_lines
from mofo.evaluation.origin import Origin
from mofo.evaluation.pictures import (
    chosen_keys,
    draw,
    drop_others,
    picture_folder,
    picture_paths,
)
from mofo.evaluation.predictors import Prediction, Predictor
from mofo.evaluation.protocol import Protocol
from mofo.evaluation.verdict import aligned, verdict

CLAIMS = "claims"
MAX_PIXELS = 2**23  # of a batch: eight megapixels of image, truth and prediction are 0.3 GB
POLL = 1.0  # seconds between looks at what other processes have not finished
QUIET = 60.0  # seconds between the progress bar's lines where nobody watches it


def run(
    tasks: Sequence[Task],
    *,
    protocol: Protocol,
    folder: str | Path,
    batch_size: int,
    origin: Origin,
    workers: int = 2,
    retry: bool = False,
) -> None:
    """Judge every predictor on every image; what `folder` has is kept, what is failed with `retry`.

    Returns when all is done, by whichever process. Lines made by another protocol, other weights
    or other settings are refused, not mixed. A predictor sees up to `batch_size` pictures at once,
    fewer if they are large.
    """
    for task in tasks:
        _check(task, protocol)
    with _Run(tasks, protocol, Path(folder), batch_size, origin, workers, retry) as running:
        # What others have is left to the end, when there is nothing else to do.
        while unfinished := [task for task in tasks if not running.work(task)]:
            time.sleep(POLL)
            tasks = unfinished


class _Run:
    """One process's part."""

    def __init__(
        self,
        tasks: Sequence[Task],
        protocol: Protocol,
        folder: Path,
        batch_size: int,
        origin: Origin,
        workers: int,
        retry: bool,
    ) -> None:
        self.protocol, self.folder, self.batch_size = protocol, folder, batch_size
        self.origin = asdict(origin)
        self.settings = protocol.settings()
        self.claims, self.writer = Claims(folder / CLAIMS), Writer(folder)
        self.ledger = Ledger(tasks, folder, protocol.id, self.settings, retry)
        self.pool = ThreadPoolExecutor(workers)
        self.begun: list[_Batch] = []
        self.bars: dict[str, tqdm] = {}

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        for batch in self.begun:
            batch.claim.close()
        for bar in self.bars.values():
            bar.close()

    def work(self, task: Task) -> bool:
        """Do what nobody else does; whether all of the set is done, its pictures too."""
        reading = _one_ahead(map(self._read, self._claimed(task)))
        judging = _one_ahead(map(self._judge, reading))
        self._show(task)
        for batch in judging:
            self.writer.append(line.result() for line in batch.lines)
            self._show(task)
            batch.claim.close()
            self.begun.remove(batch)
        done = not self.ledger.missing(task, range(len(task.images.keys)))
        if done:
            self.bars[task.row.name].close()
        return done and self._draw(task)

    def _claimed(self, task: Task) -> Iterator["_Batch"]:
        """Batches with something to do that are now ours, until all that is left is others'."""
        count, size = len(task.images.keys), self._batch_size(task)
        for start in range(0, count, size):
            indices = range(start, min(start + size, count))
            if not self.ledger.missing(task, indices):
                continue
            with ExitStack() as stack:
                piece = f"{file_name(task.row.name)}/{start:06d}-{indices.stop:06d}"
                if not stack.enter_context(self.claims.claim(piece)):
                    continue
                self.ledger.refresh()  # what its last owner wrote
                if self.ledger.missing(task, indices):
                    batch = _Batch(task=task, indices=indices, claim=stack.pop_all())
                    self.begun.append(batch)
                    yield batch

    def _batch_size(self, task: Task) -> int:
        """The same whoever asks: a batch's predictions may depend on it in their last bits."""
        try:
            h, w = task.images.read(0).shape
        except Exception:
            return self.batch_size
        return min(self.batch_size, max(1, MAX_PIXELS // (h * w)))

    def _read(self, batch: "_Batch") -> "_Batch":
        read = batch.task.images.read
        batch.samples = [self.pool.submit(read, index) for index in batch.indices]
        return batch

    def _judge(self, batch: "_Batch") -> "_Batch":
        """Predict all of a batch, as in a run that was never killed, and judge what is missing."""
        samples = {k: _outcome(one) for k, one in zip(batch.indices, batch.samples, strict=True)}
        missing = self.ledger.missing(batch.task, batch.indices)
        for number, predictor in enumerate(batch.task.predictors):
            wanted = [index for index, name in missing if name == predictor.name]
            if not wanted:
                continue
            usable = {k: one for k, one in samples.items() if isinstance(one, Sample)}
            start = time.monotonic()
            made = dict(zip(usable, _predicted(predictor, list(usable.values())), strict=True))
            seconds = (time.monotonic() - start) / max(1, len(usable))
            measured = {"order": [batch.task.order, number], "seconds": seconds}
            for index in wanted:
                given = index, samples[index], made.get(index), measured
                batch.lines.append(self.pool.submit(self._line, batch.task, predictor, *given))
        batch.samples = []
        return batch

    def _line(
        self,
        task: Task,
        predictor: Predictor,
        index: int,
        sample: Sample | Exception,
        made: Prediction | Exception | None,
        measured: dict[str, Any],
    ) -> Line:
        if predictor.keep is not None and isinstance(made, Prediction):
            made = predictor.keep(task.images.keys[index], made)
        said = verdict(sample, made, kind=predictor.kind, row=task.row, protocol=self.protocol)
        return {
            "protocol": self.protocol.id,
            "set": task.row.name,
            "part": task.images.parts[index],
            "predictor": predictor.name,
            "kind": predictor.kind,
            "key": task.images.keys[index],
            "index": index,
            **measured,
            **said,
            "weights": predictor.weights,
            "predictor_settings": plain(predictor.settings),
            "list_sha256": task.images.list_sha256,
            "list_count": task.row.count or len(task.images.keys),
            "row": plain(asdict(task.row)),
            "settings": self.settings,
            **self.origin,
        }

    def _draw(self, task: Task) -> bool:
        """Draw what a report shows and is not drawn yet; False while another process does."""
        lines: dict[str, dict[str, Line]] = {predictor.name: {} for predictor in task.predictors}
        for line in read_lines(self.folder):
            if line["set"] == task.row.name:
                lines.setdefault(line["predictor"], {})[line["key"]] = line
        chosen = {name: set(chosen_keys(own.values()).values()) for name, own in lines.items()}
        missing = [
            (predictor, lines[predictor.name][key])
            for predictor in task.predictors
            for key in sorted(chosen[predictor.name])
            if not all(path.exists() for path in self._paths(task, predictor.name, key))
        ]
        if not missing:
            return True
        with self.claims.claim(f"{file_name(task.row.name)}/pictures") as ours:
            if ours:
                for predictor, line in missing:
                    self._draw_image(task, predictor, line)
                drop_others(self.folder, task.row.name, set().union(*chosen.values()))
        return ours

    def _draw_image(self, task: Task, predictor: Predictor, line: Line) -> None:
        sample = _outcome(self.pool.submit(task.images.read, line["index"]))
        if not isinstance(sample, Sample) or sample.depth is None:
            return  # it could be read when it was scored
        [made] = _predicted(predictor, [sample])
        if isinstance(made, Prediction):
            depth = aligned(made.depth, line, row=task.row, protocol=self.protocol)
            paths = self._paths(task, predictor.name, line["key"])
            draw(paths, sample.image, *sample.depth, depth)

    def _paths(self, task: Task, predictor: str, key: str) -> tuple[Path, Path, Path, Path]:
        return picture_paths(picture_folder(self.folder, task.row.name, key), predictor)

    def _show(self, task: Task) -> None:
        """What all processes have done, and means so far, of the predictor in front."""
        self.ledger.refresh()
        name, tally = task.row.name, self.ledger.tallies[task.row.name, task.predictors[0].name]
        if name not in self.bars:
            self.bars[name] = tqdm(
                desc=name,
                unit="image",
                total=len(task.images.keys),
                initial=int(tally["lines"]),
                mininterval=0.1 if sys.stderr.isatty() else QUIET,
            )
        if scored := tally["scored"]:
            means = f"AbsRel {tally['absrel'] / scored:.4f}, δ1 {tally['delta1'] / scored:.4f}"
            self.bars[name].set_postfix_str(f"{task.predictors[0].name}: {means}", refresh=False)
        self.bars[name].update(int(tally["lines"]) - self.bars[name].n)


@dataclass(kw_only=True, eq=False)
class _Batch:
    """Images that one process has claimed, on their way from being read to being written."""

    task: Task
    indices: range
    claim: ExitStack
    samples: list[Future[Sample]] = field(default_factory=list)
    lines: list[Future[Line]] = field(default_factory=list)


def _check(task: Task, protocol: Protocol) -> None:
    """What would be wrong with every image shows before the first."""
    names = Counter(predictor.name for predictor in task.predictors)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"two predictors are called {twice[0]!r}; give each its own label")
    for predictor in task.predictors:
        protocol.fits_for(predictor.kind, is_metric=task.row.metric)


def _outcome(future: Future[Sample]) -> Sample | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


def _predicted(
    predictor: Predictor, samples: list[Sample]
) -> list[Prediction] | list[Prediction | Exception]:
    """Predictions; if a batch cannot be had, of each image alone, with what is wrong if it is."""
    if not samples:
        return []
    try:
        return predictor([one.image for one in samples], [one.key for one in samples])
    except Exception as error:
        if len(samples) == 1:
            return [error]
        return [made for one in samples for made in _predicted(predictor, [one])]


def _one_ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same, each begun before the one before it is used."""
    before = next(batches, None)
    for batch in batches:
        assert before is not None
        yield before
        before = batch
    if before is not None:
        yield before
