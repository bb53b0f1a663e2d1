"""`onelaunch run` and `onelaunch chat`: text out of a model."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.errors import UsageError
from .words import (
    MODEL_HELP,
    Context,
    Device,
    Json,
    PassLines,
    Segments,
    Threads,
    note,
    positive,
    print_json,
    spread,
)

if TYPE_CHECKING:
    from ...runtime import Generation, Model

SAMPLING = "Sampling"
HELP = f"An artifact, or a model to compile and keep: {MODEL_HELP[0].lower()}{MODEL_HELP[1:]}"

Target = Annotated[str, typer.Argument(metavar="MODEL", help=HELP)]
NewTokens = Annotated[
    int | None, typer.Option(parser=positive, metavar="N", help="Tokens to generate at most", show_default="what fits")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(min=0, help="Keep this many of the likeliest, 0 all", rich_help_panel=SAMPLING)]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Keep the likeliest up to this mass", rich_help_panel=SAMPLING)]
MinP = Annotated[
    float, typer.Option(min=0, max=1, help="Keep those above this share of the likeliest", rich_help_panel=SAMPLING)
]
Penalty = Annotated[float, typer.Option(min=0.01, help="Against tokens seen before, 1 none", rich_help_panel=SAMPLING)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text", rich_help_panel=SAMPLING)]
Stats = Annotated[bool, typer.Option("--stats", help="Print speeds on stderr")]
PrefixCache = Annotated[
    bool, typer.Option(" /--no-prefix-cache", help="Read again what the KV cache still holds")
]
WHERE = ("threads", "context", "device", "segments", "prefix_cache")
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text, may be repeated")]


@dataclass(frozen=True)
class Options:
    """What `run` and `chat` share."""

    max_new_tokens: NewTokens = None
    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: Penalty = 1.0
    seed: Seed = 0
    threads: Threads = None
    context: Context = None
    device: Device = "auto"
    segments: Segments = "mega"
    prefix_cache: PrefixCache = True
    stats: Stats = False
    json: Json = False

    @property
    def settings(self) -> dict[str, Any]:
        """Of `Model.generate`."""
        return {name: getattr(self, name) for name in SETTINGS}

    def open(self, name: str) -> Model:
        from ..ondemand import open_model

        where = {name: getattr(self, name) for name in WHERE}
        return open_model(name, PassLines(12), **where)

    def report(self, result: Generation) -> None:
        """What was asked for besides the text."""
        if self.json:
            print_json(asdict(result))
        if self.stats:
            _stats(result)


@spread(Options)
def run(
    model: Target,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The prompt, - reads it from stdin")],
    options: Options,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the model's chat template or the bare text",
                     show_default="chat if there is a template"),
    ] = None,
    stop: Stop = None,
    trace_routing: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write which experts every step uses, for `inspect --routing`")
    ] = None,
) -> None:  # fmt: skip
    """Continue a prompt, compiling the model first if need be"""
    text = sys.stdin.read() if prompt == "-" else prompt
    settings = {**options.settings, "stop": tuple(stop or ())}
    with options.open(model) as opened:
        if trace_routing is not None:
            opened.trace_routing(trace_routing)
        tokenizer = opened.tokenizer
        if tokenizer is None:
            raise UsageError("run: expected a model with a tokenizer, got none", hint="the checkpoint had none")
        settings["chat"] = tokenizer.has_chat_template if chat is None else chat
        result = opened.generate(text, **settings) if options.json else _stream(opened, text, settings)
    options.report(result)


def _stream(model: Model, prompt: Any, options: dict[str, Any]) -> Generation:
    """Print text as it comes."""
    stream = model.stream(prompt, **options)
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    return stream.result


@spread(Options)
def chat(
    model: Target,
    options: Options,
    system: Annotated[str, typer.Option(help="What the model is told first", show_default="nothing")] = "",
) -> None:
    """Talk with a model: one line a turn, /reset starts over, /exit ends"""
    start = [{"role": "system", "content": system}] if system else []
    with options.open(model) as opened:
        if opened.tokenizer is None or not opened.tokenizer.has_chat_template:
            raise UsageError("expected a model with a chat template, got none", hint="use `onelaunch run --raw`")
        _converse(opened, start, options)


def _converse(model: Model, start: list[dict[str, str]], options: Options) -> None:
    messages = list(start)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        words = line.strip()
        if not line or words == "/exit":
            note("")
            return
        if words == "/reset":
            messages = list(start)
            note("the conversation starts over")
        elif words.startswith("/"):
            note(f"expected /reset or /exit, got `{words}`")
        elif words:
            messages = _turn(model, [*messages, {"role": "user", "content": words}], options)


def _turn(model: Model, messages: list[dict[str, str]], options: Options) -> list[dict[str, str]]:
    """Answer the last message; the conversation after it. A turn that cannot run leaves it as it was."""
    settings = {**options.settings, "chat": True}
    try:
        result = model.generate(messages, **settings) if options.json else _stream(model, messages, settings)
    except UsageError as error:
        note(f"{error.show()}\n\nhint: /reset starts over")
        return messages[:-1]
    options.report(result)
    return [*messages, {"role": "assistant", "content": result.text}]


def _stats(result: Generation) -> None:
    t = result.timings
    reused = f" ({result.reused_tokens} reused)" if result.reused_tokens else ""
    note(
        f"prompt {result.prompt_tokens} tokens{reused}, {t.prompt_per_second:.1f}/s; "
        f"generated {len(result.tokens)}, {t.decode_per_second:.1f}/s; ended by {result.finish_reason}"
    )
