"""What the requests of rung `pipeline` say about the parts of a pipeline: encoding, latents, decoding, and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from porter.verify.outcome import BOUND, CaseResult

PARTS = ("encode", "latents", "decoded", "defaults", "guidance", "media")


def parts_of(cases: Iterable[CaseResult]) -> dict[str, str]:
    """`validated`, `limited` or `unsupported` for each part that a request asks about; parts without one are left out.

    encode: arguments of the first denoiser call; latents: after each step; decoded: the output; defaults: everything
    omitted and everything given; guidance: scales with each kind of negative prompt; media: requests with pictures.
    """
    seen = [c for c in cases if c.status != "skipped" and not c.name.startswith("raises-")]
    found = {}
    for part, asks in _ASKS.items():
        answers = [answer for c in seen if (answer := asks(c)) is not None]
        if answers:
            found[part] = "validated" if all(answers) else "limited" if any(answers) else "unsupported"
    return found


def _figure(name: str, besides: str) -> Callable[[CaseResult], bool | None]:
    """Whether a figure is within the bound; a case that failed without it got no further. Cases `besides` have none."""

    def asks(case: CaseResult) -> bool | None:
        value = case.figures.get(name)
        if value is None:
            return None if case.status == "passed" or case.name.startswith(besides) else False
        return bool(value <= BOUND)

    return asks


def _named(fits: Callable[[CaseResult], bool]) -> Callable[[CaseResult], bool | None]:
    return lambda case: case.status == "passed" if fits(case) else None


_ASKS: Mapping[str, Callable[[CaseResult], bool | None]] = {
    "encode": _figure("inputs_rel_l2", besides="two-"),
    "latents": _figure("latents_rel_l2", besides="-"),
    "decoded": _figure("output_rel_l2", besides="defaults-omitted"),
    "defaults": _named(lambda c: c.name in ("defaults-omitted", "everything-given")),
    "guidance": _named(lambda c: "=" in c.name or c.name == "negative-prompt"),
    "media": _named(lambda c: bool(c.figures.get("media"))),
}
