"""What reads matrices in a program: the bodies, and per bucket and weight format the functions that serve them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.bodies import part_of
from ...ir.graph import Program
from ...ir.limits import Limits
from ...ir.schedule import part_weight
from ...ir.tuning import Tuning
from ...ir.types import OUTPUTS
from ..rendering import Bodies, BodyText
from .experts import Experts, Places, Router, experts_body, experts_text, route_text
from .linear import Matrix, core_text, linear_text, tables_text, tile_rows


def find_bodies(program: Program, listed: Sequence[BodyText], bodies: Bodies) -> tuple[list[Matrix], list[Experts]]:
    """The bodies that are matrices, and those of experts."""
    titles = {body.code: body.title for body in listed}
    matrices: dict[int, Matrix] = {}
    experts: dict[int, Experts] = {}
    for (graph_name, phase_name, name), body in next(iter(bodies.values())).items():
        graph = next(g for g in program.graphs if g.name == graph_name)
        phase = next(p for p in graph.phases if p.name == phase_name)
        if not phase.reads_matrix or name.startswith("pack."):
            continue
        part, title = part_of(phase, name), titles[body.code]
        if phase.anchor_kind == "experts":
            experts[body.code] = experts_body(phase, part, body.code, title)
        else:
            outputs, dtype = part[0].out.tensor.shape[0] == OUTPUTS, part_weight(part).tensor.dtype
            matrices[body.code] = Matrix(body.code, title, dtype, phase.layout == "heads", outputs)
    return list(matrices.values()), list(experts.values())


def helper_texts(program: Program, router: Router | None) -> list[str]:
    """Functions that bodies of some programs call: to read formats with a table, to route."""
    tables = tables_text([w.tensor.dtype for g in program.graphs for w in g.weights])
    return [text for text in (tables, route_text(router) if router else "") if text]


@dataclass(frozen=True)
class Products:
    """What the functions of all formats have in common: where bodies have their arguments, and names for templates."""

    limits: Limits
    router: Router | None
    places: Places
    expert_places: Places
    common: dict[str, Any]
    tuning: Tuning

    def texts(self, bucket: str, matrices: Sequence[Matrix], experts: Sequence[Experts]) -> Iterator[str]:
        """The functions of a bucket, format by format."""
        streamed, held = ({m.format: None for m in found} for found in (matrices, experts))
        rows = tile_rows(bucket, self.limits)
        common = self.common | {"tile_rows": rows}
        for name in streamed | held:
            yield core_text(name, bucket, rows, name in streamed, name in held, self.tuning)
            if name in streamed:
                fields = common | {"common": self.places}
                yield linear_text(name, bucket, matrices, fields, self.limits.has_draft_model, self.tuning["chunk"])
            if name in held and self.router:
                fields = common | {"at": self.expert_places}
                layer_words = self.limits.rows * self.router.choices
                yield experts_text(name, bucket, experts, self.router, layer_words, fields)
