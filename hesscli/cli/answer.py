"""What a command does with what was typed: load, measure, and let everything be read or written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from hesscli import world
from hesscli.cli import options
from hesscli.cli.console import Console
from hesscli.cli.ledgers import begun_as, facts_of, ledger_in
from hesscli.cli.process import lasting
from hesscli.cli.usage import EVERY_LAYER, Given, Layers, Measure, Usage
from hesscli.commands import Command
from hesscli.errors import ExitCode, InputError, UsageError
from hesscli.results import Answer, CheckpointReport, Header, Status

if TYPE_CHECKING:
    from hesscli.joining import JoinedLedger
    from hesscli.ledger import FileLedger
    from hesscli.locks import Hold
    from hesscli.problem.problem import Problem


# -- From a command line to its exit code ----------------------------------------------------------


def answer(
    command: Command,
    usage: Usage,
    console: Console,
    checkpoint: Path | None,
    given: Given,
    joined: JoinedLedger | None = None,
) -> ExitCode:
    """Do what a command line asks: load, measure, say, write, and tell the shell.

    Args:
        command: which one.
        usage: how it is typed.
        console: where to say what.
        checkpoint: of the problem; None where the spec is to name it.
        given: all else that was typed, by the names of its options.
        joined: what runs over parts have found, in place of all work.
    """
    with lasting():
        from hesscli.problem.loading import load

        resolve_name(command.measure)
    is_answer = issubclass(resolve_name(command.result), Answer)  # all else only plans
    if world.is_silent() and not is_answer:
        return ExitCode.OK
    with ExitStack() as until_delivered:
        if is_answer:
            until_delivered.enter_context(world.joined())
        with console.working() as observe:
            budget = given["budget"]
            ledger: FileLedger | JoinedLedger | None = None
            with world.apart():
                how = {option.name: given[option.name] for option in options.LOADED}
                how["budget"] = console.left(budget)
                problem = load(checkpoint, observe=observe, **how)
                console.warn(*problem.warnings, *_idle(problem))
                shown = select_layers(given.get("layers") or (), problem)
                folder = given["directory"] if world.is_first() else NO_FILES
                held = until_delivered.enter_context(output(folder, problem.checkpoint, console))
                if held is not None and usage.copies is not None:
                    name = resolve_name(command.result).command
                    document = _document(name, given["matrix"], held)
                    for copy in usage.copies(problem):
                        copy = _copied_as(copy, name, given["matrix"])
                        _require_place(copy, name, document, problem.checkpoint)
                if joined is not None:
                    ledger = joined
                    joined.recognise(facts_of(problem, what_is_asked(usage, given)))
                elif is_answer and world.is_first():
                    ledger = _ledger(command, usage, console, problem, given, held, checkpoint)
            if is_answer:
                given = {**given, "budget": world.decided(console.left(budget))}
            measure = prepared(command, usage, problem, given, shown)
            kept = _as_kept(ledger) if is_answer else {}
            result = measure(observe=observe, **kept)
        with world.apart():
            if world.is_first():
                _told(command, result, console, given, shown, held, ledger, problem.warnings)
        if not isinstance(result, Answer) or not world.is_first():
            return ExitCode.OK
        return exit_code(result.status, asked=any(given.get(name) for name in _TOLERANCES))


def _idle(problem: Problem) -> Iterator[str]:
    """What is said where there are more ranks than there is work for."""
    if world.size() > (batches := len(problem.indices)):
        yield (
            f"{world.size()} ranks share {batches} batches: {world.size() - batches} of them wait; "
            "smaller batches by --batch-size, or --nproc-per-node "
            f"{batches}"
        )


def _as_kept(ledger: FileLedger | JoinedLedger | None) -> dict[str, Any]:
    """What a measurement is told of where it is kept; of many ranks, all are kept by one."""
    if world.size() > 1:
        from hesscli.diagnostics.keeping import SharedLedger

        return {"ledger": SharedLedger(cast("FileLedger | None", ledger))}
    return {"ledger": ledger} if ledger else {}


def _told(
    command: Command,
    result: Header,
    console: Console,
    given: Given,
    shown: Layers,
    held: Hold | None,
    ledger: FileLedger | JoinedLedger | None,
    warned: Sequence[str],
) -> None:
    """Let a result be read, and written where it is to be."""
    console.warn(*(text for text in result.warnings if text not in warned))
    if not isinstance(result, Answer):
        deliver(command, result, console, given, held)
        return
    try:
        deliver(command, result.only(shown), console, given, held)
    except UsageError as error:
        if ledger is None or ledger.place is None:
            raise
        hint = f"the run is kept: room for it, then the same with --resume; or {error.hint}"
        raise UsageError(error.what, error.got, hint) from None
    if ledger is not None:
        ledger.delivered()


def _ledger(
    command: Command,
    usage: Usage,
    console: Console,
    problem: Problem,
    given: Given,
    held: Hold | None,
    checkpoint: Path | None,
) -> FileLedger | None:
    asked, name = what_is_asked(usage, given), resolve_name(command.result).command
    begun = begun_as(name, usage, checkpoint, problem, given)
    file = file_name(name, given["matrix"])
    return ledger_in(held, file, console, problem, asked, given, begun)


_TOLERANCES = ("rtol", "atol", "refine")


def prepared(
    command: Command, usage: Usage, problem: Problem, given: Given, shown: Layers
) -> Measure:
    """The command's measurement, told all that is asked of it."""
    asked = what_is_asked(usage, given)
    if usage.prepare is not None:
        return usage.prepare(problem, asked, shown)
    return partial(resolve_name(command.measure), problem, **asked)


def what_is_asked(usage: Usage, given: Given) -> dict[str, Any]:
    """What a measurement is told, of all that was typed; without a tolerance the usual one."""
    elsewhere = {options.CHECKPOINT, *options.LOADED, *options.SHOWN}
    own = [o for o in usage.options if o not in elsewhere or o in (options.SEED, options.BUDGET)]
    asked = {option.name: given[option.name] for option in own}
    usual = next((option.usual for option in usage.options if option.name == "rtol"), None)
    if usual is not None and not (given["rtol"] or given.get("atol")):
        asked["rtol"] = usual
    return asked


def exit_code(status: Status, *, asked: bool) -> ExitCode:
    """What a run that ended so tells the shell; a tolerance counts if it was ``asked`` for."""
    if status == "interrupted":
        return ExitCode.INTERRUPTED
    missed = status not in ("exact", "converged")
    return ExitCode.TOLERANCE if missed and asked else ExitCode.OK


# -- What happens to a result: which layers it shows, its files, and stdout ------------------------


CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors")
NO_FILES = Path("-")


def select_layers(patterns: Sequence[str], problem: Problem) -> tuple[str, ...] | None:
    """The layers that any of the patterns takes, in the model's order; None without patterns.

    Raises:
        InputError: a pattern matches nothing and looks like a checkpoint that is not there.
        UsageError: a pattern matches nothing.
    """
    from hesscli.parameters import match_layers

    chosen: set[str] = set()
    for pattern in patterns:
        try:
            chosen.update(match_layers(pattern, problem.layer_names, problem.parameter_names))
        except UsageError:
            if pattern.endswith(CHECKPOINT_SUFFIXES):
                raise InputError(
                    "file not found",
                    f"{pattern} after --layer; no layer has that name either",
                    "the checkpoint's path, or a pattern such as --layer 'conv*'",
                ) from None
            _say_if_frozen(pattern, problem)
            raise
    return tuple(name for name in problem.layer_names if name in chosen) if patterns else None


def _say_if_frozen(pattern: str, problem: Problem) -> None:
    """Refuse a pattern that matches what ``--params`` has left out."""
    from hesscli.parameters import matches

    for parameter in problem.trainable.without(problem.parameters):
        if any(matches(pattern, name) for name in (parameter.layer, *parameter.names)):
            raise UsageError(
                "no layer of the matrix matches the pattern",
                f"--layer {pattern!r}, and {parameter.layer} is frozen by --params",
                f"--params that takes it too; or one of {', '.join(problem.layer_names[:5])}",
            ) from None


@contextmanager
def output(
    folder: Path | None, checkpoint: CheckpointReport | None, console: Console
) -> Iterator[Hold | None]:
    """The folder for files, made, held and swept before the long work; None for no files."""
    if folder == NO_FILES:
        yield None
        return
    from hesscli.locks import hold
    from hesscli.storage import prepare_folder, sweep

    if folder is None:
        path = Path(checkpoint.path).resolve() if checkpoint else Path("model")
        # Names of models have dots in them, as in Llama-3.2-1B.
        name = path.stem if path.suffix in (*CHECKPOINT_SUFFIXES, ".json") else path.name
        folder = Path("hesscli-out", "-".join(filter(None, (path.parent.name, name))))
    with hold(prepare_folder(folder), console.note) as held:
        sweep(folder)
        yield held


def deliver(
    command: Command, result: Header, console: Console, given: Given, held: Hold | None
) -> None:
    """Write a result's files, into a folder if there is to be one, and print it."""
    from hesscli.render.document import to_json

    try:
        if held is not None:
            result = _save(command, result, console, given, held)
    finally:  # a full disk must not cost the user the numbers
        if given["out"] == "json":
            console.write(to_json(result))
        else:
            every = EVERY_LAYER in (given.get("layers") or ())
            console.show(resolve_name(command.table)(result, **({"full": True} if every else {})))


def _save(command: Command, result: Header, console: Console, given: Given, held: Hold) -> Header:
    """Write a result's files as one set, its document last; the result names them."""
    from hesscli.render.document import to_json
    from hesscli.results.saved import belonging
    from hesscli.storage import FileSet

    matrix = result.problem.matrix
    document = _document(result.command, matrix, held)
    paths = {"json": document}
    with FileSet(held.folder) as files:
        for name, arrays in result.tensors().items():
            kind = _kind(result, name, "tensors") if "tensors" in paths else "tensors"
            file = f"{file_name(name, matrix)}.safetensors"
            paths[kind] = files.write(file, partial(_put_arrays, arrays))
        for kind, (file, write) in result.copies().items():
            file = _copied_as(file, result.command, matrix)
            _require_place(file, result.command, document, result.problem.checkpoint)
            paths[kind] = files.write(file, write)
        if command.figures:
            from hesscli.render.figures.canvas import encoders

            for name, figure in resolve_name(command.figures)(result, given):
                for kind, encode in encoders(figure).items():
                    file = f"{file_name(name, matrix)}.{kind}"
                    paths[_kind(result, name, kind)] = files.write(file, encode)
        result = replace(
            result,
            files={kind: str(path) for kind, path in paths.items()},
            sha256={kind: files.sums[path.name] for kind, path in paths.items() if kind != "json"},
        )
        held.check()
        files.commit(document.name, partial(_put, to_json(result)), belonging(document))
    for path in paths.values():
        console.note(f"wrote {path}")
    return result


def _kind(result: Header, name: str, kind: str) -> str:
    """What ``files`` calls a file: the command's main ones by their kind alone."""
    extra = name.removeprefix(result.command).strip("-_")
    return f"{kind}_{extra}" if extra else kind


def file_name(name: str, matrix: str) -> str:
    """A file's name without its ending; it carries the matrix where that is not the Hessian."""
    return name if matrix == "hessian" else f"{name}-{matrix}"


def _copied_as(copy: str, command: str, matrix: str) -> str:
    """What a copy is called; one that has the command's name carries the matrix as well."""
    stem, dot, ending = copy.partition(".")
    return f"{file_name(stem, matrix)}{dot}{ending}" if stem == command else copy


def _document(command: str, matrix: str, held: Hold) -> Path:
    return held.folder / f"{file_name(command, matrix)}.json"


def _require_place(
    name: str, command: str, document: Path, checkpoint: CheckpointReport | None
) -> None:
    """See that a copy of a checkpoint takes no other file's place, but for an earlier run's.

    Args:
        name: of the copy.
        command: whose it is.
        document: beside which it will lie.
        checkpoint: that it is a copy of.

    Raises:
        UsageError: it would.
    """
    from hesscli.results.saved import belonging

    place = document.parent / name
    _require_another(place, checkpoint)
    if not name.startswith(command):
        _require_new(place, belonging(document))


def _require_another(path: Path, checkpoint: CheckpointReport | None) -> None:
    """See that no file takes the place of the checkpoint that it was made of.

    Raises:
        UsageError: it would.
    """
    if checkpoint is not None:
        source = Path(checkpoint.path).resolve()
        if path.resolve() in (source, source / path.name):
            raise _in_place_of("the checkpoint", path)


def _require_new(path: Path, earlier: Collection[Path]) -> None:
    """See that a file whose name is not the command's takes no other's place.

    Args:
        path: of the file.
        earlier: files of an earlier run, whose place it may take.

    Raises:
        UsageError: it would.
    """
    if path.exists() and path not in earlier:
        raise _in_place_of("another file", path)


def _in_place_of(what: str, path: Path) -> UsageError:
    return UsageError(
        f"what is written would take the place of {what}",
        str(path),
        "another --dir, or the checkpoint under another name",
    )


def _put_arrays(arrays: Mapping[str, Any], stream: BinaryIO) -> None:
    from safetensors.numpy import save

    stream.write(save(dict(arrays)))


def _put(text: str, stream: BinaryIO) -> None:
    stream.write(text.encode())


def write_text(path: Path, text: str) -> None:
    """Write or replace a text file, whole or not at all."""
    from hesscli.storage import write_atomically

    write_atomically(path, partial(_put, text))
