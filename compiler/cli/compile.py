"""`onelaunch compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import CompileError, UsageError, nearest
from ...ir.limits import Limits, decode_rows, most_drafts
from .words import MODEL_HELP, Json, PassLines, human_int, note, positive, print_json, speculation, thread_list

if TYPE_CHECKING:
    from ...ir.tuning import Tuning
    from ..driver import Request
    from ..lowering import Dump

LIMITS, INSIDE = "Limits", "Looking inside"
QUANT = ("int4", "int8", "bf16", "nvfp4", "mxfp4", "fp8", "gptq-int4", "gptq-nvfp4", "gptq-mxfp4")
KV = ("bf16", "f32")


def _number(help: str, shown: str | bool = True) -> Any:
    return typer.Option(parser=positive, metavar="N", help=help, rich_help_panel=LIMITS, show_default=shown)


def command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Artifact to write, a .ola file or a folder", show_default="MODEL.ola"),
    ] = None,
    target: Annotated[
        str,
        typer.Option(metavar="NAME,..", help="auto or cpu, cpu-avx512, cpu-avx2, cpu-portable; sm_90, h100, .."),
    ] = "auto",
    target_file: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A TOML file, or a folder, with machines of your own")
    ] = None,
    quant: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help=f"Quantize matrices to {', '.join(QUANT)}, or as a .toml file says",
                     show_default="as stored"),
    ] = "",
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text that gptq-.. chooses weights by")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="How the cache stores keys and values: bf16 or f32")] = "bf16",
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Pack the weights; without, only to inspect")
    ] = True,
    ignore_config: Annotated[
        list[str] | None, typer.Option(metavar="FIELD", help="Pass over a config field we do not know")
    ] = None,
    rows: Annotated[int, _number("Rows of a step: decoded tokens and prompt tokens together")] = 256,
    slots: Annotated[int, _number("Sequences that run at the same time")] = 4,
    context: Annotated[
        int | None, _number("Tokens of a sequence, like 8192 or 8K", "4K or the model's own")
    ] = None,
    window: Annotated[
        int | None, _number("Last tokens that layers without a window of their own see", "everything")
    ] = None,
    sinks: Annotated[
        int, typer.Option(parser=human_int, metavar="N", rich_help_panel=LIMITS,
                          help="First tokens that windows never leave, at most 64: StreamingLLM with --window")
    ] = 0,
    outputs: Annotated[
        int | None, _number("Rows with logits per step", "8, or as many as slots and drafts need")
    ] = None,
    speculate: Annotated[
        str, typer.Option(parser=speculation, metavar="auto|ngram:K|draft:PATH:K|off", rich_help_panel=LIMITS,
                          help="Most tokens to guess and check in a step, from the text so far or by the model at "
                               "PATH; auto is ngram:4, off with a GPU target")
    ] = "auto",
    threads: Annotated[
        str, typer.Option(metavar="N,N,..", help="Thread counts to compile for", show_default="1,2,4,8,16 and all",
                          rich_help_panel=LIMITS)
    ] = "",
    tune: Annotated[
        str, typer.Option(metavar="cached|none|FILE", help="Choices to compile with: those `autotune` found, the "
                          "defaults, or a .json of choices and values")
    ] = "cached",
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.html and timelines for ui.perfetto.dev",
                                  rich_help_panel=INSIDE)
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the text after every pass", rich_help_panel=INSIDE)
    ] = None,
    stop_after: Annotated[
        str, typer.Option(metavar="PASS", help="Stop after a pass and print its text", rich_help_panel=INSIDE)
    ] = "",
    start_from: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Continue from a file that --dump wrote", rich_help_panel=INSIDE),
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Compile a model to one decode-step artifact"""
    if not quant.endswith(".toml"):
        _one_of("--quant", quant, ("", *QUANT))
    _one_of("--kv-dtype", kv_dtype, KV)
    counts = thread_list(threads) if threads else ()
    from ..driver import Request
    from ..gpu.compile import with_fewest_rows
    from ..lowering import Dump
    from ..ondemand import draft_model, find_model
    from ..target_list import parse_targets

    texts = Dump(dump, stop_after)
    gpus = parse_targets(target, tuple(target_file or ())).gpus
    if speculate == "auto" and gpus:
        speculate = "off"
    limits = limits_of(rows, slots, context, outputs, kv_dtype, speculate)
    limits = with_fewest_rows(limits) if gpus else limits
    path = find_model(model)
    request = Request(
        model=path,
        output=_output(output, path),
        target=target,
        limits=limits,
        workers=counts,
        quant=quant,
        calibrate=calibrate,
        ignore_config=frozenset(ignore_config or ()),
        start_from=start_from,
        fit_context=context is None,
        pack=weights,
        draft=draft_model(speculate),
        target_files=tuple(target_file or ()),
        tuning=_tuning(tune),
        tune=tune,
        window=window or 0,
        sinks=sinks,
    )
    _compile(request, texts, json, report)


def _tuning(tune: str) -> Tuning | None:
    """What a file says; None: the database or the defaults."""
    from ...ir.tuning import Tuning
    from ...models.json_file import read_json

    if not tune.endswith(".json"):
        _one_of("--tune", tune, ("cached", "none"))
        return None
    return Tuning.of(read_json(Path(tune)))


def _compile(request: Request, dump: Dump, json: bool, report: Path | None) -> None:
    from ..driver import compile_model

    seconds: dict[str, float] = {}
    lines = PassLines(_passes(request, dump))

    def progress(name: str, took: float, detail: str) -> None:
        seconds[name] = round(took, 3)
        lines(name, took, detail)

    made = compile_model(request, dump, progress)
    if made is None:
        text = "".join(t for name, t in dump.texts.items() if f"-{dump.stop_after}." in name)
        if json:
            print_json({"stopped_after": dump.stop_after, "text": text, "seconds": seconds})
        else:
            print(text, end="")
        return
    from ...runtime.artifact import Artifact
    from ..doctor import read_bandwidth
    from ..reports.artifact import overview, summary_lines

    found = overview(Artifact.open(made), read_bandwidth())
    if report is not None:
        from ..reports.page import write_report

        found["report"] = str(write_report(Artifact.open(made), report, seconds, found["read_gbps"]))
        note(f"report     {found['report']}")
    if json:
        print_json({"artifact": str(made), "seconds": seconds, **found})
        return
    for line in summary_lines(found):
        note(line)
    print(made)


def _passes(request: Request, dump: Dump) -> int:
    """How many lines of progress there will be: one per pass, and one per GPU architecture."""
    from ...passes import PIPELINE
    from ..driver import request_targets
    from ..lowering import read_dump

    done = PIPELINE.index(read_dump(request.start_from)[1]) if request.start_from else 0
    if dump.stop_after:
        return max(1, PIPELINE.index(dump.stop_after) + 1 - done)
    calibration = request.pack and request.calibrate is not None
    return len(PIPELINE) - done - (not request.pack) + calibration + len(request_targets(request).gpus)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = ", ".join(k for k in known if k)
        raise UsageError(f"{option}: expected one of {listed}, got `{value}`", hint=nearest(value, known))


def limits_of(
    rows: int, slots: int, context: int | None, outputs: int | None, kv_dtype: str, speculate: str
) -> Limits:
    from ...runtime.speculate import parse_speculate

    wish = parse_speculate(speculate)
    drafts = 0 if wish.word == "off" else wish.most or most_drafts(rows, slots, outputs or 0, Limits.few_rows)
    needed = max(Limits.outputs, decode_rows(slots, Limits.few_rows, drafts))
    given = {"rows": rows, "slots": slots, "outputs": outputs or needed, "kv_dtype": kv_dtype, "drafts": drafts,
             "drafter": wish.drafter}  # fmt: skip
    try:
        return Limits(**given, context=context or Limits.context)  # type: ignore[arg-type]
    except CompileError as error:
        raise UsageError(error.reasons, hint=error.hint) from error


def _output(output: Path | None, model: Path) -> Path:
    """Where the artifact goes; a folder that holds anything else is never replaced."""
    if output is None:
        return Path(f"{model.name.removesuffix('.gguf')}.ola")
    if output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        raise UsageError(
            f"--output: expected a new path or an artifact to replace, got the folder `{output}`",
            hint="name a file in it that ends in .ola",
        )
    if output.suffix == ".ola" and output.is_dir():
        raise UsageError(f"--output: expected a file, got the folder `{output}`")
    return output
