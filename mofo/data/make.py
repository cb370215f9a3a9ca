"""`make`: from the name of a converter to a finished set of shards, in parallel, and resumable.

A converter is a module of `mofo.data.convert` with

- `VERSION`, raised whenever its samples change;
- `find(source, **options)`: the items of a published data set, a list that is cheap to make and
  the same each time, of tuples of paths and numbers (a set that is not read from files has no
  `source`);
- `read(item)`: the samples of one item, in order;
- `SAMPLES_PER_ITEM`, about how many these are, if not one;
- `OPTIONS`, what the arguments of `find` mean, and `TREE`, which files it expects: for `--help`.

Items are cut into consecutive runs, one a shard. A shard is a pure function of its run, so neither
the number of processes nor a kill changes a byte.
"""

import hashlib
import json
import logging
import os
import pkgutil
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from inspect import Parameter, signature
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

import mofo.data.convert
from mofo.data.sample import DAMAGE, Sample
from mofo.data.shards import read_manifest, sidecar_path
from mofo.data.storage import lock
from mofo.data.write import Ledger, Packed, pack, read_sidecar, write_shard

log = logging.getLogger(__name__)

LOCK = ".lock"
POLL_S = 0.5  # between two looks at how far the processes are
NUM_SHOWN = 10  # items that could not be converted, in the log
NUM_EMPTY_SHOWN = 3
MAX_ITEM_LENGTH = 300
UNREAD = "not readable"  # begins the reason where the file system, not the file, was at fault
# What each process counts: items, samples; and whether they shall stop.
ITEMS, SAMPLES, STOP = range(3)
Advance = Callable[[int, int], None]
_COUNTS: Any = None  # in a process that writes shards: the array it shares with the others


class Job(NamedTuple):
    """One shard to be written."""

    path: Path
    read: Callable[[Any], Iterator[Sample]]
    items: list[Any]
    made_from: dict[str, Any]

    @property
    def name(self) -> str:
        """What the shard is made of; another run of items or converter has another name."""
        text = json.dumps(self.made_from, sort_keys=True) + repr(self.items)
        return hashlib.sha256(text.encode()).hexdigest()


def make(
    folder: str | Path,
    *,
    converter: str,
    source: str | Path | None = None,
    samples_per_shard: int = 1000,
    processes: int | None = None,
    max_bad_fraction: float = 0.01,
    **options: Any,
) -> bool:
    """Convert into `folder`; False, and nothing done, if the same set is there already.

    What a killed run left is continued. Items that cannot be converted are left out and named; more
    than `max_bad_fraction` of all samples end the run. Items without a measured pixel are left out
    and counted. By default each core has a process.
    """
    folder, module = Path(folder), load(converter)
    defaults, given = _options(module, converter, source, options)
    made_from = {
        "converter": converter,
        "version": module.VERSION,
        "samples_per_shard": samples_per_shard,
        **defaults,
        **given,
    }
    ledger = Ledger(folder, converter, made_from, defaults)
    if ledger.is_finished():
        log.info("nothing to do, already finished: %s", folder)
        return False
    items = module.find(**given)
    _refuse_twins(items)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK):
        # Another process may have made it in the meantime.
        if ledger.is_finished():
            return False
        for left in folder.glob(".*.partial"):  # by a process that was killed
            left.unlink(missing_ok=True)
        expected = getattr(module, "SAMPLES_PER_ITEM", 1)
        run = max(1, samples_per_shard // expected)
        runs = [items[first : first + run] for first in range(0, len(items), run)]
        jobs = [
            Job(folder / f"{converter}-{k:06d}.tar", module.read, items_of_one, ledger.made_from)
            for k, items_of_one in enumerate(runs)
        ]
        processes = processes or len(os.sched_getaffinity(0))
        _fill(ledger, jobs, processes, max_bad_fraction, expected * len(items))
        ledger.finish()
        (folder / LOCK).unlink()
    log.info("wrote %d samples to %s", ledger.num_samples, folder)
    return True


def summary(folder: str | Path) -> str:
    """What a finished set holds and what was left out of it, for who has just made it."""
    manifest = read_manifest(str(folder))
    lines = [
        f"{folder}: {manifest['samples']} samples in {len(manifest['shards'])} shards, "
        f"{manifest['bytes'] / 1e6:.1f} MB"
    ]
    if empty := manifest.get("empty", {}).get("items"):
        lines += [f"left out: {empty} items in which nothing usable is measured, such as"]
        lines += [f"  {name}" for name in manifest["empty"]["first"][:NUM_EMPTY_SHOWN]]
    if bad := manifest.get("bad", {}).get("items"):
        lines += [f"left out: {bad} items that could not be converted"]
        lines += [f"  {n} x {reason}" for reason, n in manifest["bad"]["reasons"].items()]
    return "\n".join(lines)


def converters() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(mofo.data.convert.__path__))


def load(converter: str) -> ModuleType:
    """The module of a converter."""
    if converter not in converters():
        raise ValueError(f"converter {converter!r} is unknown; there are {converters()}")
    return import_module(f"mofo.data.convert.{converter}")


def _options(
    module: ModuleType, converter: str, source: str | Path | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `find` takes by default, and what it is given."""
    # A path that says nothing without the folder it was typed in could name another set tomorrow.
    given = options | ({} if source is None else {"source": Path(source).resolve()})
    accepted = {name: option.default for name, option in signature(module.find).parameters.items()}
    needed = {name for name, default in accepted.items() if default is Parameter.empty}
    unknown, missing = sorted(set(given) - set(accepted)), sorted(needed - set(given))
    if unknown or missing:
        raise ValueError(
            f"converter {converter!r} takes {sorted(accepted)}"
            + (f", but not {unknown}" if unknown else "")
            + (f"; give it {missing}" if missing else "")
        )
    return {name: accepted[name] for name in accepted if name not in needed}, given


def _fill(
    ledger: Ledger, jobs: list[Job], processes: int, max_bad_fraction: float, expected: int
) -> None:
    """Write all shards that are not there yet, and enter every one in the ledger."""
    left = []
    for job in jobs:
        if _is_done(job):
            ledger.add(job.path)
        else:
            left.append(job)
    total = sum(len(job.items) for job in jobs)
    done = total - sum(len(job.items) for job in left)
    with tqdm(
        desc=f"writing {ledger.folder}",
        total=expected,
        initial=ledger.num_samples,
        unit="sample",
        disable=None,
    ) as bar:

        def advance(items: int, samples: int) -> None:
            nonlocal done
            done += items
            if done:
                # An item may hold more samples than expected, or none.
                bar.total = round((bar.n + samples) * total / done)
            bar.update(samples)

        for path in _write_all(left, processes, advance):
            ledger.add(path)
            _limit(ledger, max_bad_fraction, expected)
    _limit(ledger, max_bad_fraction, expected)
    if ledger.num_bad:
        log.warning("%s", _bad(ledger))


def _refuse_twins(items: list[Any]) -> None:
    """Raise if two items say that they have the same key, before anything is written."""
    seen: dict[str, Any] = {}
    for item in items:
        key = getattr(item, "key", None)
        if key is None:
            continue
        if key in seen:
            raise ValueError(
                f"{_named(seen[key])} and {_named(item)} would both have the key {key!r}; rename "
                "one of them"
            )
        seen[key] = item


def _is_done(job: Job) -> bool:
    sidecar = read_sidecar(Path(sidecar_path(str(job.path))))
    if sidecar is None or sidecar.get("job") != job.name:
        return False
    # What the file system did not give may be there by now.
    if any(reason.startswith(UNREAD) for _, reason in sidecar["bad"]):
        return False
    return not sidecar["samples"] or (
        job.path.exists() and job.path.stat().st_size == sidecar["bytes"]
    )


def _limit(ledger: Ledger, max_bad_fraction: float, expected: int) -> None:
    if ledger.num_bad > max_bad_fraction * max(expected, ledger.num_samples + ledger.num_bad):
        raise ValueError(
            f"{_bad(ledger)}\nThis is more than max_bad_fraction={max_bad_fraction:g}; mend the "
            "source, or allow more"
        )


def _bad(ledger: Ledger) -> str:
    rows = [row for name in sorted(ledger.bad) for row in ledger.bad[name]]
    reasons = [f"  {count} x {reason}" for reason, count in ledger.why().most_common()]
    named = [f"  {item}: {reason}" for item, reason in rows[:NUM_SHOWN]]
    about = f"{len(rows)} items of {ledger.folder} could not be converted:"
    return "\n".join([about, *reasons, "the first are", *named])


def _write_all(jobs: list[Job], processes: int, advance: Advance) -> Iterator[Path]:
    """Write the shards of `jobs`, and yield each as it is done."""
    if processes == 1 or len(jobs) <= 1:
        for job in jobs:
            _write(job, advance)
            yield job.path
        return
    # A server that forks: a process that has threads, as one that trains does, must not.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    counts = context.Array("q", 3)
    seen = [0, 0]
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _start, (counts,)) as pool:
        pending = {pool.submit(_write_in_process, job): job for job in jobs}
        try:
            while pending:
                done, _ = wait(pending, POLL_S, FIRST_COMPLETED)
                now = counts[:STOP]
                advance(now[ITEMS] - seen[ITEMS], now[SAMPLES] - seen[SAMPLES])
                seen = now
                for future in done:
                    job = pending.pop(future)
                    future.result()
                    yield job.path
        except BrokenProcessPool:
            raise ValueError(
                "a process that wrote shards was killed, perhaps for want of memory; give the same "
                "command with fewer processes: it goes on where it stopped"
            ) from None
        finally:
            counts[STOP] = 1
            pool.shutdown(cancel_futures=True)


def _write(job: Job, advance: Advance) -> None:
    bad: list[list[str]] = []
    empty: list[str] = []
    samples = _pack_all(job, bad, empty, advance)
    write_shard(job.path, samples, made_from=job.made_from, job=job.name, bad=bad, empty=empty)


def _pack_all(
    job: Job, bad: list[list[str]], empty: list[str], advance: Advance
) -> Iterator[Packed]:
    """The samples of a job, one in memory at a time; what gives none goes to `bad` or `empty`."""
    for item in job.items:
        one = None
        for one in _attempts(job, item):
            if isinstance(one, Packed):
                advance(0, 1)
                yield one
            else:
                bad.append([_named(item), _why(one)])
        if one is None:
            empty.append(_named(item))
        advance(1, 0)


def _named(item: Any) -> str:
    """The files and numbers of an item, without what else its converter keeps in it."""
    values = item if isinstance(item, tuple) else (item,)
    parts = [str(v) for v in values if isinstance(v, (Path, int)) and not isinstance(v, bool)]
    return (" ".join(parts) or str(item))[:MAX_ITEM_LENGTH]


def _attempts(job: Job, item: Any) -> Iterator[Packed | Exception]:
    try:
        for sample in job.read(item):
            try:
                yield pack(sample)
            except DAMAGE as error:
                yield error
    except DAMAGE as error:
        yield error


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{UNREAD}: {error.strerror}"
    # An address would differ each time.
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")


def _start(counts: Any) -> None:
    """What a process does before its first shard."""
    global _COUNTS
    _COUNTS = counts
    # Ctrl-C reaches the whole group: the first process stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without it a process whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_in_process(job: Job) -> None:
    def advance(items: int, samples: int) -> None:
        if _COUNTS[STOP]:
            raise CancelledError("another shard failed, or the user stopped it")
        with _COUNTS.get_lock():
            _COUNTS[ITEMS] += items
            _COUNTS[SAMPLES] += samples

    _write(job, advance)
